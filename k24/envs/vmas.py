"""Suites ``mpe`` and ``vmas``: particle worlds simulated for all environments at once.

VMAS (Bettini et al., "VMAS: A Vectorized Multi-Agent Simulator for Collective Robot Learning", DARS 2022) steps a whole batch as
tensors. It also holds the multi-agent particle environments (Lowe et al., NeurIPS 2017), which are the suite ``mpe`` here.

How it is driven
    The scenario and its world are stepped directly, in the order of ``vmas.simulator.environment.Environment.step``: actions,
    physics, rewards, observations, done. That class decodes actions piece by piece and saves three random states; here decoding is one
    lookup for all agents. Worlds of round bodies are stepped by ``k24.envs.particles``, and a few scenarios are set right or done faster
    by ``k24.envs.scenarios``. Tests hold all that to the same numbers.

Actions
    VMAS's own discrete actions: none, less or more force on each of two axes, so nine per moving agent (the five of the original
    MPE have no diagonals; suite ``mpe2`` has those). Agents that speak choose force and word together, as one product. Agents that
    cannot move have only the words: the forces do nothing for them. Whoever has fewer actions than the others has the rest
    unavailable.

    With ``continuous_actions=True`` they are VMAS's continuous ones: one number per input, where 1 is the most the agent can do, then one
    per word. VMAS's words lie in [0, 1], so -1 stands for 0.

Random numbers
    VMAS draws from torch's global generator. It is swapped for a private one while VMAS runs.

Left out are the debug scenarios that pay 0 whatever is done: ``diff_drive``, ``drone``, ``kinematic_bicycle`` and ``pollock``.

``TASKS`` says which tasks have two sides that play against each other: there, learn from each agent's own reward, for the sum over all
of them means little.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k24.envs.base import EnvSpec, Observation, Step, TeamEnv
from k24.envs.check import require_actions
from k24.envs.particles import Particles, fits
from k24.envs.picture import Mark, draw
from k24.errors import RunError, UsageError, unknown_name

_MPE_LIMIT = 25
_VMAS_LIMIT = 100

TASKS = {
    "mpe/simple": "one agent goes to one landmark",
    "mpe/simple_adversary": "two agents hide their landmark from an adversary (two sides)",
    "mpe/simple_crypto": "Alice and Bob talk, Eve listens in (two sides)",
    "mpe/simple_push": "an agent and an adversary push for one landmark (two sides)",
    "mpe/simple_reference": "two agents tell each other where to go",
    "mpe/simple_speaker_listener": "one speaks, the other goes where it is told",
    "mpe/simple_spread": "three agents cover three landmarks and do not collide",
    "mpe/simple_tag": "three chase one (two sides)",
    "mpe/simple_world_comm": "a leader tells chasers where the prey hides (two sides)",
    "vmas/balance": "carry a ball on a line to a goal against gravity",
    "vmas/ball_passage": "push a ball through a gap",
    "vmas/ball_trajectory": "keep a ball on a circle",
    "vmas/blind_spread": "go to the landmark of one's own hidden colour",
    "vmas/buzz_wire": "carry a ring along a wire without touching it",
    "vmas/debug/asym_joint": "turn a stick with one heavy end upright",
    "vmas/debug/circle_trajectory": "one agent runs round a circle",
    "vmas/debug/goal": "one agent goes to a goal, its speed under control",
    "vmas/debug/het_mass": "two agents of unlike hidden mass: one should run, at little cost",
    "vmas/debug/line_trajectory": "one agent runs along a line",
    "vmas/debug/vel_control": "three agents whose every move costs",
    "vmas/debug/waterfall": "a chain of agents reaches for the floor past boxes",
    "vmas/discovery": "cover moving targets, several agents to each",
    "vmas/dispersion": "eat food that lies apart, all at once",
    "vmas/dropout": "one of many goes to the goal, energy is paid by all",
    "vmas/flocking": "flock round a leader among obstacles",
    "vmas/football": "three against three scripted players",
    "vmas/give_way": "two agents swap places in a corridor",
    "vmas/joint_passage": "two agents joined by a rod go through a gap",
    "vmas/joint_passage_size": "the same, the rod off centre and the gaps of several sizes",
    "vmas/multi_give_way": "four agents cross one junction",
    "vmas/navigation": "each to its own goal, lidar against collisions",
    "vmas/passage": "five agents in formation go through a gap",
    "vmas/reverse_transport": "push a box from within",
    "vmas/road_traffic": "cars keep to their lanes and off each other (slow: half a second for each step of all 20)",
    "vmas/sampling": "visit a field where it is densest",
    "vmas/transport": "push a heavy box to a goal",
    "vmas/wheel": "turn a heavy line at a given speed",
    "vmas/wind_flocking": "two agents of unlike size fly in each other's lee",
}


# The inputs of one agent, [E, inputs], and its word, [E, words]; None where it is silent.
_Deed = tuple[Tensor, Tensor | None]


class _Discrete:
    """Discrete actions, each a row of one table.

    Attributes:
        counts: Actions of each agent.
    """

    def __init__(self, agents: list[Any], dim_c: int) -> None:
        rows = [_tabulate(agent, dim_c) for agent in agents]
        self.counts = [len(inputs) for inputs, _ in rows]
        self._sizes = [inputs.shape[1] for inputs, _ in rows]
        self._speaks = [words is not None for _, words in rows]
        most = max(self._sizes)
        self._inputs = torch.cat([F.pad(inputs, (0, most - inputs.shape[1])) for inputs, _ in rows])
        self._words = torch.cat([inputs.new_zeros(len(inputs), dim_c) if words is None else words for inputs, words in rows])
        count = torch.tensor(self.counts, device=self._inputs.device)[:, None]
        self._count, self._first = count, count.cumsum(0) - count

    def __call__(self, actions: Tensor) -> list[_Deed]:
        """Looks up ``[A, E]``."""
        if min(self.counts) < max(self.counts) and bool((actions >= self._count).any()):
            index, row = next((i, row) for i, row in enumerate(actions) if (row >= self.counts[i]).any())
            got = f"{int(row.min())} to {int(row.max())}"
            raise RunError(f"step: agent {index} has actions 0 to {self.counts[index] - 1}, got {got}")
        rows = (actions + self._first).flatten()
        inputs = self._inputs.index_select(0, rows).view(*actions.shape, -1).unbind(0)
        if not any(self._speaks):
            return [(one[:, :size], None) for one, size in zip(inputs, self._sizes, strict=True)]
        words = self._words.index_select(0, rows).view(*actions.shape, -1)
        each = zip(inputs, self._sizes, words, self._speaks, strict=True)
        return [(one[:, :size], word if speaks else None) for one, size, word, speaks in each]


class _Continuous:
    """Continuous actions: inputs, then words.

    Attributes:
        counts: Numbers that make up an action of each agent.
    """

    def __init__(self, agents: list[Any], dim_c: int) -> None:
        self._sizes = [agent.action_size for agent in agents]
        starts = [0 if _is_fixed(agent) else agent.action_size for agent in agents]
        stops = [start if agent.silent else start + dim_c for start, agent in zip(starts, agents, strict=True)]
        self.counts = stops
        self._words = list(zip(starts, stops, strict=True))
        self._most = max(self._sizes)

        def padded(of_each: list[Tensor]) -> Tensor:
            return torch.stack([F.pad(one, (0, self._most - len(one))) for one in of_each])[:, None]

        self._range = padded([agent.action.u_range_tensor * (start > 0) for start, agent in zip(starts, agents, strict=True)])
        self._multiplier = padded([agent.action.u_multiplier_tensor for agent in agents])

    def __call__(self, actions: Tensor) -> list[_Deed]:
        """Stretches ``[A, E, U]``."""
        inputs = actions[..., : self._most] * self._range * self._multiplier
        each = zip(inputs, self._sizes, actions, self._words, strict=True)
        return [(one[:, :size], (row[:, start:stop] + 1) / 2 if start < stop else None) for one, size, row, (start, stop) in each]


class _PrivateRandom:
    """Torch's global generators, replaced by private ones inside a ``with``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seed(0)

    def seed(self, seed: int) -> None:
        self._cpu = torch.Generator().manual_seed(seed).get_state()
        self._cuda = torch.Generator(self._device).manual_seed(seed).get_state() if self._device.type == "cuda" else None

    def __enter__(self) -> None:
        self._outer = torch.get_rng_state()
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            self._outer_cuda = torch.cuda.get_rng_state(self._device)
            torch.cuda.set_rng_state(self._cuda, self._device)

    def __exit__(self, *error: object) -> None:
        self._cpu = torch.get_rng_state()
        torch.set_rng_state(self._outer)
        if self._cuda is not None:
            self._cuda = torch.cuda.get_rng_state(self._device)
            torch.cuda.set_rng_state(self._outer_cuda, self._device)


class VmasEnv(TeamEnv):
    """A VMAS scenario as a team environment.

    The state is all agents' observations side by side. Episodes end by the scenario's own ``done`` (terminated) or at
    ``max_steps`` (truncated).

    Attributes:
        scenario: VMAS's scenario object.
    """

    def __init__(
        self,
        task: str,
        n_envs: int,
        device: str | torch.device = "cpu",
        max_steps: int | None = None,
        continuous_actions: bool = False,
        **kwargs: Any,
    ) -> None:
        """Builds the world.

        Args:
            task: A key of ``TASKS``.
            n_envs: Parallel environments.
            device: Where tensors live.
            max_steps: Episode limit; 25 in suite ``mpe`` and in ``vmas/blind_spread``, 100 elsewhere where None.
            continuous_actions: Whether actions are vectors of numbers.
            **kwargs: Options of the scenario, e.g. ``n_agents``.

        Raises:
            UsageError: An option that the scenario doesn't know, or observations that are not plain tensors.
        """
        if max_steps is None:
            max_steps = _MPE_LIMIT if task.startswith("mpe/") or task == "vmas/blind_spread" else _VMAS_LIMIT
        if not isinstance(continuous_actions, bool):
            raise UsageError(f"{task}: continuous_actions must be true or false, got {continuous_actions!r}")
        self.n_envs = n_envs
        self.device = torch.device(device)
        self._random = _PrivateRandom(self.device)
        with self._random:
            self.scenario = _load(task, n_envs, self.device, kwargs)
            self.scenario.env_reset_world_at(None)
            world = self.scenario.world
            self._agents = world.policy_agents
            seen = [self.scenario.observation(agent) for agent in self._agents]
        if not all(isinstance(one, Tensor) for one in seen):
            raise UsageError(f"{task}: with these options agents observe a {type(seen[0]).__name__}, expected one tensor each")
        sizes = [one.shape[-1] for one in seen]
        self._decode = (_Continuous if continuous_actions else _Discrete)(self._agents, world.dim_c)
        counts = self._decode.counts
        self.spec = EnvSpec(len(seen), max(sizes), sum(sizes), max(counts), max_steps, continuous_actions)
        sides = tuple("adversary" if _is_adversary(agent) else "good" for agent in self._agents)
        self.sides = sides if len(set(sides)) > 1 else None
        self._physics = Particles(world) if fits(world) else world
        # VMAS's default, which builds a tensor of False at every step.
        self._endless = type(self.scenario).done.__qualname__ == "BaseScenario.done"
        self._padding = [max(sizes) - size for size in sizes]
        self._avail = None
        if min(counts) < max(counts) and not continuous_actions:
            has = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
            self._avail = has[:, None].expand(-1, n_envs, -1).to(self.device).contiguous()
        self._clock = torch.zeros(n_envs, dtype=torch.int64, device=self.device)

    def reset(self, seed: int) -> Observation:
        """See ``TeamEnv.reset``."""
        self._random.seed(seed)
        self._clock.zero_()
        with self._random:
            self.scenario.env_reset_world_at(None)
            return self._observe()

    def step(self, actions: Tensor) -> Step:
        """See ``TeamEnv.step``."""
        require_actions(self, actions)
        scenario = self.scenario
        with self._random:
            self._act(actions)
            scenario.pre_step()
            self._physics.step()
            scenario.post_step()
            # Scenarios may hand out one tensor for all agents and add to it in place: copy each before asking for the next.
            reward = torch.empty(self.spec.n_agents, self.n_envs, device=self.device)
            for agent, row in zip(self._agents, reward.unbind(0), strict=True):
                row.copy_(scenario.reward(agent).reshape(-1))
            after = self._observe()
            terminated = torch.zeros_like(self._clock, dtype=torch.bool) if self._endless else scenario.done().clone()
            self._clock += 1
            truncated = (self._clock >= self.spec.episode_limit) & ~terminated
            ended = terminated | truncated
            current = self._restart(ended, after) if ended.any() else after
        return Step(after, current, reward, terminated, truncated)

    def render(self) -> Tensor:
        """Agents (outlined) and landmarks of environment 0 from above, uint8 ``[320, 320, 3]``."""
        world = self.scenario.world
        marks = []
        for entity in (*world.landmarks, *world.agents):
            if not entity.is_rendering[0]:
                continue
            shape = entity.shape
            if hasattr(shape, "radius"):
                half = (shape.radius, shape.radius)
            else:
                # The width of a line counts pixels of VMAS's own viewer.
                half = (shape.length / 2, 0.01 if type(shape).__name__ == "Line" else shape.width / 2)
            x, y = entity.state.pos[0].tolist()
            # Some scenarios colour an entity anew in each environment.
            colour = entity.color[0] if isinstance(entity.color, Tensor) and entity.color.ndim > 1 else entity.color
            red, green, blue = (float(part) for part in colour[:3])
            turn = float(entity.state.rot[0, 0])
            circle, agent = hasattr(shape, "radius"), entity in world.agents
            hollow = circle and not (agent or entity.collide or entity.movable)
            marks.append(Mark((x, y), half, (red, green, blue), circle, turn, outline=agent, hollow=hollow))
        return draw(marks)

    def _act(self, actions: Tensor) -> None:
        """Hands every agent its inputs and words."""
        for agent, (inputs, word) in zip(self._agents, self._decode(actions), strict=True):
            agent.action.u = inputs + torch.randn_like(inputs) * agent.u_noise if agent.u_noise > 0 else inputs
            if word is not None:
                agent.action.c = word + torch.randn_like(word) * agent.c_noise if agent.c_noise > 0 else word
        for agent in self.scenario.world.agents:
            self.scenario.env_process_action(agent)

    def _observe(self) -> Observation:
        """What all agents see now."""
        seen = [self.scenario.observation(agent) for agent in self._agents]
        state = torch.cat(seen, dim=-1)
        if any(self._padding):
            seen = [F.pad(one, (0, missing)) for one, missing in zip(seen, self._padding, strict=True)]
        return Observation(torch.stack(seen), state, self._avail)

    def _restart(self, ended: Tensor, after: Observation) -> Observation:
        """Begins new episodes where ``ended``, and returns what to act on next."""
        if ended.all():
            self._clock.zero_()
            self.scenario.env_reset_world_at(None)
            return self._observe()
        self._clock.masked_fill_(ended, 0)
        for index in ended.nonzero().flatten().tolist():
            self.scenario.env_reset_world_at(index)
        fresh = self._observe()
        # Not `fresh` everywhere: a scenario may add noise to what it shows, and whoever goes on has already seen `after`.
        obs = torch.where(ended[:, None], fresh.obs, after.obs)
        return Observation(obs, torch.where(ended[:, None], fresh.state, after.state), self._avail)


def make(task: str, n_envs: int, device: str | torch.device = "cpu", **kwargs: Any) -> VmasEnv:
    """Builds one task of ``TASKS``; see ``VmasEnv``."""
    return VmasEnv(task, n_envs, device, **kwargs)


def _load(task: str, n_envs: int, device: torch.device, kwargs: dict[str, object]) -> Any:
    """Imports a scenario and makes its world.

    VMAS warns of options that it doesn't know and goes on without them; a misspelt option must not pass.
    """
    path = task.removeprefix("vmas/").replace("/", ".")
    module = importlib.import_module("k24.envs.blind_spread" if task == "vmas/blind_spread" else f"vmas.scenarios.{path}")
    changed = importlib.import_module("k24.envs.scenarios").CHANGED
    scenario = changed.get(task, module.Scenario)()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scenario.env_make_world(n_envs, device, **kwargs)
    if any("not used by the scenario" in str(warning.message) for warning in caught):
        known = set(re.findall(r"kwargs\s*\.(?:pop|get)\(\s*\"(\w+)\"", inspect.getsource(module)))
        strange = next((key for key in kwargs if key not in known), next(iter(kwargs)))
        raise unknown_name(f"option of {task}", strange, known | {"max_steps", "continuous_actions"})
    return scenario


def _is_fixed(agent: Any) -> bool:
    """Whether forces do nothing for it."""
    return not agent.movable and type(agent.dynamics).__name__ == "Holonomic"


def _is_adversary(agent: Any) -> bool:
    """VMAS's football names its second team and marks it in no other way."""
    return agent.adversary or agent.name.startswith("agent_red")


def _tabulate(agent: Any, dim_c: int) -> _Deed:
    """Tabulates an agent's discrete actions, as VMAS numbers them: the last axis, or the word, runs fastest.

    An axis with an odd number of levels has "none" first, then the rest from the least to the most.
    """
    axes = []
    for levels, most in zip(agent.discrete_action_nvec, agent.action.u_range_tensor, strict=True):
        level = torch.arange(levels, device=most.device)
        if levels % 2:
            middle = levels // 2
            level = torch.cat([level[middle : middle + 1], level[:middle], level[middle + 1 :]])
        axes.append(level / (levels - 1) * (2 * most) - most)
    inputs = torch.cartesian_prod(*axes).reshape(-1, len(axes)) * agent.action.u_multiplier_tensor
    if _is_fixed(agent):
        inputs = torch.zeros_like(inputs[:1])
    if agent.silent or dim_c == 0:
        return inputs, None
    words = torch.eye(dim_c, device=inputs.device)
    return inputs.repeat_interleave(dim_c, dim=0), words.repeat(len(inputs), 1)
