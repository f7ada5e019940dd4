"""Suites ``mpe`` and ``vmas``: particle worlds simulated for all environments at once.

VMAS (Bettini et al., "VMAS: A Vectorized Multi-Agent Simulator for Collective Robot Learning", DARS 2022) steps a whole batch as
tensors. It also holds the multi-agent particle environments (Lowe et al., NeurIPS 2017), which are the suite ``mpe`` here.

How it is driven
    The scenario and its world are stepped directly, in the order of ``vmas.simulator.environment.Environment.step``: actions,
    physics, rewards, observations, done. In a step of simple_spread that class spends two fifths of its time on decoding discrete actions
    and on saving three random states; here decoding is one table lookup, and a test holds both to the same numbers.

Actions
    VMAS's own discrete actions: none, less or more force on each of two axes, so nine per moving agent (the five of the original
    MPE have no diagonals; suite ``mpe2`` has those). Agents that speak choose force and word together, as one product. Agents that
    cannot move have only the words: the forces do nothing for them. Whoever has fewer actions than the others has the rest
    unavailable.

Random numbers
    VMAS draws from torch's global generator. It is swapped for a private one while VMAS runs, and only torch's: no scenario of the tables
    draws from numpy or from Python.

Left out: ``wind_flocking``, which carries the wind on each agent from one episode into the next; ``road_traffic``, which pays the first
step by the place where the episode before ended, and takes a quarter of a second for each step of 20 cars; and VMAS's debug
scenarios, which show single features, most without a reward to learn from.

``TASKS`` says which tasks have two sides that play against each other: there, learn from each agent's own reward, for the sum over all
of them means little.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from k24.envs.base import EnvSpec, Observation, Step, TeamEnv
from k24.envs.check import require_actions
from k24.envs.picture import Mark, draw
from k24.errors import RunError, UsageError, unknown_name

_MPE_LIMIT = 25
_VMAS_LIMIT = 100
_ONE_START_FOR_ALL = {"vmas/give_way"}

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
    "vmas/sampling": "visit a field where it is densest",
    "vmas/transport": "push a heavy box to a goal",
    "vmas/wheel": "turn a heavy line at a given speed",
}


class _Moves(NamedTuple):
    """What each action of one agent means.

    Attributes:
        force: Control inputs, ``[actions, inputs]``.
        word: One-hot utterance, ``[actions, words]``; None where the agent is silent.
    """

    force: Tensor
    word: Tensor | None


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

    def __init__(self, task: str, n_envs: int, device: str | torch.device = "cpu", max_steps: int | None = None, **kwargs: Any) -> None:
        """Builds the world.

        Args:
            task: A key of ``TASKS``.
            n_envs: Parallel environments.
            device: Where tensors live.
            max_steps: Episode limit; 25 in suite ``mpe`` and in ``vmas/blind_spread``, 100 elsewhere where None.
            **kwargs: Options of the scenario, e.g. ``n_agents``.

        Raises:
            UsageError: An option that the scenario doesn't know, or observations that are not plain tensors.
        """
        if max_steps is None:
            max_steps = _MPE_LIMIT if task.startswith("mpe/") or task == "vmas/blind_spread" else _VMAS_LIMIT
        self._task = task
        self.n_envs = n_envs
        self.device = torch.device(device)
        self._random = _PrivateRandom(self.device)
        with self._random:
            self.scenario = _load(task, n_envs, self.device, kwargs)
            self._restart_all()
            self._agents = self.scenario.world.policy_agents
            seen = [self.scenario.observation(agent) for agent in self._agents]
        if not all(isinstance(one, Tensor) for one in seen):
            raise UsageError(f"{task}: with these options agents observe a {type(seen[0]).__name__}, expected one tensor each")
        sizes = [one.shape[-1] for one in seen]
        self._moves = [_moves(agent, self.scenario.world.dim_c) for agent in self._agents]
        counts = [len(moves.force) for moves in self._moves]
        self.spec = EnvSpec(len(seen), max(sizes), sum(sizes), max(counts), max_steps)
        self._padding = [max(sizes) - size for size in sizes]
        self._avail = None
        if min(counts) < max(counts):
            has = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
            self._avail = has[:, None].expand(-1, n_envs, -1).to(self.device).contiguous()
        self._clock = torch.zeros(n_envs, dtype=torch.int64, device=self.device)

    def reset(self, seed: int) -> Observation:
        """See ``TeamEnv.reset``."""
        self._random.seed(seed)
        self._clock.zero_()
        with self._random:
            self._restart_all()
            return self._observe()

    def step(self, actions: Tensor) -> Step:
        """See ``TeamEnv.step``."""
        require_actions(self, actions)
        scenario = self.scenario
        with self._random:
            self._act(actions)
            scenario.pre_step()
            scenario.world.step()
            scenario.post_step()
            # Scenarios may hand out one tensor for all agents and add to it in place: copy each before asking for the next.
            reward = torch.stack([scenario.reward(agent).reshape(-1).clone() for agent in self._agents])
            after = self._observe()
            terminated = scenario.done().clone()
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
            marks.append(Mark((x, y), half, (red, green, blue), hasattr(shape, "radius"), turn, outline=entity in world.agents))
        return draw(marks)

    def _act(self, actions: Tensor) -> None:
        """Hands every agent its forces and words."""
        for index, (agent, moves, row) in enumerate(zip(self._agents, self._moves, actions.unbind(0), strict=True)):
            try:
                force = moves.force.index_select(0, row)
                if agent.action.u_noise > 0:
                    force += torch.randn_like(force) * agent.u_noise
                agent.action.u = force
                if moves.word is not None:
                    word = moves.word.index_select(0, row)
                    agent.action.c = word + torch.randn_like(word) * agent.c_noise if agent.c_noise > 0 else word
            except IndexError as error:
                got = f"{int(row.min())} to {int(row.max())}"
                raise RunError(f"step: agent {index} has actions 0 to {len(moves.force) - 1}, got {got}") from error
        for agent in self.scenario.world.agents:
            self.scenario.env_process_action(agent)

    def _observe(self) -> Observation:
        """What all agents see now."""
        seen = [self.scenario.observation(agent) for agent in self._agents]
        state = torch.cat(seen, dim=-1)
        if any(self._padding):
            seen = [F.pad(one, (0, missing)) for one, missing in zip(seen, self._padding, strict=True)]
        return Observation(torch.stack(seen), state, self._avail)

    def _restart_all(self) -> None:
        """Begins new episodes everywhere."""
        self.scenario.env_reset_world_at(None)
        if self._task in _ONE_START_FOR_ALL:
            # Reset as a whole, these draw one start and give it to every environment.
            for index in range(self.n_envs):
                self.scenario.env_reset_world_at(index)

    def _restart(self, ended: Tensor, after: Observation) -> Observation:
        """Begins new episodes where ``ended``, and returns what to act on next."""
        if ended.all():
            self._clock.zero_()
            self._restart_all()
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
    suite, name = task.split("/")
    own = task == "vmas/blind_spread"
    module = importlib.import_module("k24.envs.blind_spread" if own else f"vmas.scenarios.{'mpe.' if suite == 'mpe' else ''}{name}")
    scenario = module.Scenario()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scenario.env_make_world(n_envs, device, **kwargs)
    if any("not used by the scenario" in str(warning.message) for warning in caught):
        known = set(re.findall(r"kwargs\s*\.(?:pop|get)\(\s*\"(\w+)\"", inspect.getsource(module)))
        strange = next((key for key in kwargs if key not in known), next(iter(kwargs)))
        raise unknown_name(f"option of {task}", strange, known | {"max_steps"})
    return scenario


def _moves(agent: Any, dim_c: int) -> _Moves:
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
    force = torch.cartesian_prod(*axes).reshape(-1, len(axes)) * agent.action.u_multiplier_tensor
    if not agent.movable and type(agent.dynamics).__name__ == "Holonomic":
        force = torch.zeros_like(force[:1])
    if agent.silent or dim_c == 0:
        return _Moves(force, None)
    words = torch.eye(dim_c, device=force.device)
    return _Moves(force.repeat_interleave(dim_c, dim=0), words.repeat(len(force), 1))
