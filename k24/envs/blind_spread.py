"""Blind particle spread: every agent has a colour that nobody sees.

After the "blind-particle spread" task of Christianos, Papoudakis, Rahman and Albrecht, "Scaling Multi-Agent Reinforcement
Learning with Selective Parameter Sharing" (ICML 2021), section 5. Each agent must go to the landmark of its own colour, and is
paid for it alone. Colours are fixed for as long as the task lives but appear in no observation: two agents at the same place
see the same and must do different things. So one shared network without agent identities cannot solve it, and one network for
each *colour* is all it takes. That makes it the plain test of a sharing scheme.

What the agents see, per agent: own position (2), own velocity (2), and the offset to each landmark (2 each), the landmarks in
the order of their colours. Reward of agent ``i``, per step: ``-|position_i - landmark_{colour_i}|``. Agents pass through each other,
so nothing but the colours couples them. Agents and landmarks start uniformly in ``[-1, 1]^2``; physics are VMAS's defaults.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vmas.simulator.core import Agent, Landmark, Sphere, World
from vmas.simulator.scenario import BaseScenario
from vmas.simulator.utils import ScenarioUtils

from k24.errors import UsageError

# Okabe and Ito's colours, which most colour-blind people can tell apart.
_PALETTE = [
    (0.84, 0.37, 0.00), (0.00, 0.45, 0.70), (0.00, 0.62, 0.45), (0.80, 0.47, 0.65),
    (0.90, 0.62, 0.00), (0.34, 0.71, 0.91), (0.94, 0.89, 0.26), (0.30, 0.30, 0.30),
]  # fmt: skip


def assign_colours(n_agents: int, n_colours: int, seed: int) -> list[int]:
    """Gives each agent a colour, in an order that its index does not betray.

    Args:
        n_agents: Agents.
        n_colours: Colours; each is given to as many agents as any other, give or take one.
        seed: Of the shuffle. Not the seed of the episodes: the colours stay the same in all of them.

    Returns:
        One colour from 0 to ``n_colours - 1`` per agent.
    """
    order = torch.randperm(n_agents, generator=torch.Generator().manual_seed(seed))
    return (order % n_colours).tolist()


class Scenario(BaseScenario):
    """The task as a VMAS scenario.

    Attributes:
        colours: The hidden colour of each agent.
    """

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: int) -> World:
        """Builds the world.

        Args:
            batch_dim: Parallel environments.
            device: Where tensors live.
            **kwargs: ``n_agents`` (8), ``n_colours`` (4) and ``colour_seed`` (0).
        """
        n_agents = kwargs.pop("n_agents", 8)
        n_colours = kwargs.pop("n_colours", min(4, n_agents))
        colour_seed = kwargs.pop("colour_seed", 0)
        ScenarioUtils.check_kwargs_consumed(kwargs)
        if not 1 <= n_colours <= n_agents:
            raise UsageError(f"vmas/blind_spread: n_colours must be from 1 to n_agents (={n_agents}), got {n_colours}")
        self.colours = assign_colours(n_agents, n_colours, colour_seed)
        world = World(batch_dim, device)
        for i, colour in enumerate(self.colours):
            paint = _PALETTE[colour % len(_PALETTE)]
            world.add_agent(Agent(name=f"agent_{i}", collide=False, shape=Sphere(radius=0.05), color=paint))
        for colour in range(n_colours):
            world.add_landmark(Landmark(name=f"landmark_{colour}", collide=False, color=_PALETTE[colour % len(_PALETTE)]))
        self._goal_of = {agent: world.landmarks[colour] for agent, colour in zip(world.agents, self.colours, strict=True)}
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        """Scatters agents and landmarks in one environment, or in all of them where ``env_index`` is None."""
        rows = self.world.batch_dim if env_index is None else 1
        for entity in (*self.world.agents, *self.world.landmarks):
            entity.set_pos(torch.empty(rows, 2, device=self.world.device).uniform_(-1, 1), batch_index=env_index)

    def reward(self, agent: Agent) -> Tensor:
        """Minus the distance to the landmark of the agent's colour, ``[E]``."""
        return -torch.linalg.vector_norm(agent.state.pos - self._goal_of[agent].state.pos, dim=-1)

    def observation(self, agent: Agent) -> Tensor:
        """Own position, own velocity, offset to each landmark: ``[E, 4 + 2 * n_colours]``."""
        pos = agent.state.pos
        if agent is self.world.agents[0]:
            # VMAS asks all agents in turn; the landmarks do not move in between.
            self._landmarks = torch.cat([landmark.state.pos for landmark in self.world.landmarks], dim=-1)
        return torch.cat([pos, agent.state.vel, self._landmarks - pos.repeat(1, len(self.world.landmarks))], dim=-1)
