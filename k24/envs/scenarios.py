"""Scenarios of VMAS with something set right, or done faster.

Each is VMAS's own class with one or two methods replaced; what it was that needed it stands with each. Tests hold ``SimpleSpread`` to
VMAS's numbers bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vmas.scenarios import ball_passage, ball_trajectory, give_way, joint_passage, passage, road_traffic, wind_flocking
from vmas.scenarios.debug import asym_joint, circle_trajectory, goal, het_mass
from vmas.scenarios.mpe import simple_adversary, simple_push, simple_reference, simple_speaker_listener, simple_spread


class SimpleSpread(simple_spread.Scenario):
    """Works out rewards and observations of all agents together, which takes a sixth of the time.

    VMAS finds the closest agent of each landmark once for every agent, and that is half of a step. They are the same each time, but float
    sums depend on their order, so what is found once is still taken off as often, and in the same order.
    """

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: Any) -> Any:
        """See VMAS."""
        world = super().make_world(batch_dim, device, **kwargs)
        # Which of the offsets from each agent (row) to each body (column) are shown.
        shown = [[one is not me and (self.obs_agents or one not in world.agents) for one in world.entities] for me in world.agents]
        self._shown = torch.tensor(shown, device=device).flatten().nonzero().flatten()
        return world

    def reward(self, agent: Any) -> Tensor:
        """The team's reward ``[E]``; VMAS asks all agents in turn, and nothing moves in between."""
        agents = self.world.agents
        if agent is agents[0]:
            at = torch.stack([one.state.pos for one in agents])
            goals = torch.stack([landmark.state.pos for landmark in self.world.landmarks])
            closest = torch.linalg.vector_norm(at[:, None] - goals, dim=-1).amin(0).unbind(0)
            radius = agent.shape.radius
            touching = (torch.linalg.vector_norm(at[:, None] - at, dim=-1) - radius - radius < 0).float()
            self.rew = torch.zeros_like(closest[0])
            for index, row in enumerate(touching):
                for part in (*closest, *row[:index], *row[index + 1 :]):
                    self.rew.sub_(part)
        return self.rew

    def observation(self, agent: Any) -> Tensor:
        """Own position and velocity, offsets to all landmarks and other agents; ``[E, D]``."""
        agents, bodies = self.world.agents, self.world.entities
        if agent is agents[0]:
            at = torch.stack([one.state.pos for one in bodies])
            own = at[-len(agents) :]
            offsets = (at - own[:, None]).flatten(0, 1).index_select(0, self._shown)
            offsets = offsets.view(len(agents), -1, *own.shape[1:]).transpose(1, 2).flatten(2)
            speed = torch.stack([one.state.vel for one in agents])
            self._seen = dict(zip(agents, torch.cat([own, speed, offsets], dim=-1), strict=True))
        return self._seen[agent]


class _Goal:
    """A landmark for each environment, which VMAS's code takes for one landmark.

    VMAS's MPE scenarios draw one goal for all environments, and draw it anew only when all begin anew together; the particle environments
    that they port draw one for every episode. A batch of episodes with one goal teaches nobody to listen.
    """

    def __init__(self, world: Any) -> None:
        self._landmarks = world.landmarks
        self._which = torch.zeros(world.batch_dim, dtype=torch.int64, device=world.device)

    def draw(self, env_index: int | None) -> None:
        """Chooses anew in one environment, or in all."""
        rows = self._which[_rows(env_index)]
        self._which[_rows(env_index)] = torch.randint(len(self._landmarks), rows.shape, device=rows.device)

    def among(self, of_each: Tensor) -> Tensor:
        """Its own among what the landmarks have, ``[L, ...]``: ``[E, ...]``."""
        return of_each[self._which]

    @property
    def state(self) -> _Goal:
        """Where ``pos`` is looked for."""
        return self

    @property
    def pos(self) -> Tensor:
        """Place in each environment, ``[E, 2]``."""
        places = torch.stack([landmark.state.pos for landmark in self._landmarks])
        return places[self._which, torch.arange(len(self._which), device=places.device)]

    @property
    def color(self) -> Tensor:
        """Some landmark's, for code that wants one colour for all; what is shown of it is replaced by ``colours``."""
        return self._landmarks[0].color

    @property
    def colours(self) -> Tensor:
        """Colour in each environment, ``[E, 3]``."""
        return self.among(torch.stack([landmark.color for landmark in self._landmarks]))


class SpeakerListener(simple_speaker_listener.Scenario):
    """Gives each episode a goal of its own; see ``_Goal``."""

    def reset_world_at(self, env_index: int | None = None) -> None:
        """See VMAS."""
        super().reset_world_at(env_index)
        speaker, listener = self.world.agents
        if env_index is None:
            speaker.goal_b = _Goal(self.world)
        speaker.goal_b.draw(env_index)
        listener.color = speaker.goal_b.colours + 0.45

    def observation(self, agent: Any) -> Tensor:
        """See VMAS."""
        return super().observation(agent) if agent.movable else agent.goal_b.colours


class Reference(simple_reference.Scenario):
    """As for ``SpeakerListener``, a goal for each of the two."""

    def reset_world_at(self, env_index: int | None = None) -> None:
        """See VMAS."""
        super().reset_world_at(env_index)
        for agent in self.world.agents:
            if env_index is None:
                agent.goal_b = _Goal(self.world)
            agent.goal_b.draw(env_index)
            agent.goal_a.color = agent.goal_b.colours

    def observation(self, agent: Any) -> Tensor:
        """See VMAS: own velocity, offsets to the landmarks, the goal's colour, the other one's word."""
        seen = super().observation(agent)
        first = 2 + 2 * len(self.world.landmarks)
        seen[:, first : first + 3] = agent.goal_b.colours
        return seen


class Adversary(simple_adversary.Scenario):
    """As for ``SpeakerListener``, one goal for the whole team."""

    def reset_world_at(self, env_index: int | None = None) -> None:
        """See VMAS."""
        super().reset_world_at(env_index)
        _share_goal(self.world, env_index)


class Push(simple_push.Scenario):
    """As for ``Adversary``; the agent's own colour tells it which landmark is its goal."""

    def reset_world_at(self, env_index: int | None = None) -> None:
        """See VMAS."""
        super().reset_world_at(env_index)
        _share_goal(self.world, env_index)

    def observation(self, agent: Any) -> Tensor:
        """See VMAS: the agent sees its velocity, the offset to the goal, its own colour, and what the adversary sees."""
        seen = super().observation(agent)
        if not agent.adversary:
            landmarks = torch.arange(len(self.world.landmarks), device=seen.device)
            seen[:, 4:7] = 0.25 + 0.5 * F.one_hot(agent.goal.among(landmarks) + 1, 3)
        return seen


def _share_goal(world: Any, env_index: int | None) -> None:
    """Gives all agents one goal in each environment."""
    if env_index is None:
        goal = _Goal(world)
        for agent in world.agents:
            agent.goal = goal
    world.agents[0].goal.draw(env_index)


class _Apart:
    """Draws a start for each environment.

    Where all begin together, some of VMAS's scenarios draw who stands where, or where a wall has its gap, once for all of them: a batch
    of episodes is then hardly more than one.
    """

    def reset_world_at(self, env_index: int | None = None) -> None:
        """See VMAS."""
        super().reset_world_at(env_index)  # type: ignore[misc]
        if env_index is None:
            for index in range(self.world.batch_dim):  # type: ignore[attr-defined]
                super().reset_world_at(index)  # type: ignore[misc]


class AsymJoint(_Apart, asym_joint.Scenario):
    """See ``_Apart``."""


class BallPassage(_Apart, ball_passage.Scenario):
    """See ``_Apart``."""


class BallTrajectory(_Apart, ball_trajectory.Scenario):
    """See ``_Apart``."""


class GiveWay(_Apart, give_way.Scenario):
    """See ``_Apart``."""


class JointPassage(_Apart, joint_passage.Scenario):
    """See ``_Apart``."""


class Passage(_Apart, passage.Scenario):
    """See ``_Apart``."""


class Goal(goal.Scenario):
    """Begins each episode with nothing under way; with ``dt_delay``, VMAS's first does what was ordered in the episode before."""

    def reset_world_at(self, env_index: int | None = None) -> None:
        """See VMAS."""
        for orders in self.input_queue:
            orders[_rows(env_index)] = 0
        super().reset_world_at(env_index)


class CircleTrajectory(circle_trajectory.Scenario):
    """As for ``Goal``."""

    def reset_world_at(self, env_index: int | None = None) -> None:
        """See VMAS."""
        for orders in self.input_queue:
            orders[_rows(env_index)] = 0
        super().reset_world_at(env_index)


class HetMass(het_mass.Scenario):
    """Draws masses from torch's generator; VMAS's from numpy's global one."""

    def reset_world_at(self, env_index: int | None = None) -> None:
        """See VMAS."""
        outer = np.random.get_state()
        np.random.seed(int(torch.randint(2**31, ())))
        try:
            super().reset_world_at(env_index)
        finally:
            np.random.set_state(outer)


class WindFlocking(_Apart, wind_flocking.Scenario):
    """See ``_Apart``; and begins each episode in the full wind. In VMAS's it is what an agent's cover left of it in the episode before."""

    def reset_world_at(self, env_index: int | None = None) -> None:
        """See VMAS."""
        rows = _rows(env_index)
        for agent in self.world.agents:
            agent.gravity = agent.gravity.clone()
            agent.gravity[rows] = self.wind[rows]
        super().reset_world_at(env_index)


class RoadTraffic(road_traffic.Scenario):
    """Remembers steering for its own episode only, and once for each step.

    VMAS's fines a car for the change of steering between its last two observations. Those of the episode before count, too, and each
    time that all are looked at, which is also when an environment beside them begins anew.
    """

    _moved = False

    def reset_world_at(self, env_index: int | None = None, agent_index: Tensor | None = None) -> None:
        """See VMAS."""
        if agent_index is None:
            self.observations.past_action_steering.buffer[:, _rows(env_index)] = 0
        super().reset_world_at(env_index, agent_index)

    def reward(self, agent: Any) -> Tensor:
        """See VMAS."""
        self._moved = True
        return super().reward(agent)

    def observation(self, agent: Any) -> Tensor:
        """See VMAS."""
        steering = self.observations.past_action_steering
        if agent is self.world.agents[0]:
            if not self._moved and steering.valid_size > 0:
                # Looking again replaces what was seen.
                steering.pointer = (steering.pointer - 1) % steering.buffer_size
                steering.valid_size -= 1
            self._moved = False
        return super().observation(agent)


def _rows(env_index: int | None) -> slice | int:
    """Which environments VMAS means; None is all of them."""
    return slice(None) if env_index is None else env_index


CHANGED = {
    "mpe/simple_adversary": Adversary,
    "mpe/simple_push": Push,
    "mpe/simple_reference": Reference,
    "mpe/simple_speaker_listener": SpeakerListener,
    "mpe/simple_spread": SimpleSpread,
    "vmas/ball_passage": BallPassage,
    "vmas/ball_trajectory": BallTrajectory,
    "vmas/debug/asym_joint": AsymJoint,
    "vmas/debug/circle_trajectory": CircleTrajectory,
    "vmas/debug/goal": Goal,
    "vmas/give_way": GiveWay,
    "vmas/debug/het_mass": HetMass,
    "vmas/joint_passage": JointPassage,
    "vmas/passage": Passage,
    "vmas/wind_flocking": WindFlocking,
    "vmas/road_traffic": RoadTraffic,
}
