"""Suite ``toy``: games of a few steps whose best return is known.

A learner that is wrong can still look busy on a simulated task. It cannot on these: each isolates one ability, its optimum is
stated as ``optimal_return`` (the sum over agents and steps), and a run takes seconds.

| task | what it needs | without it |
|---|---|---|
| ``toy/matrix`` | credit for a joint action | a lower cell of the table |
| ``toy/specialisation`` | agents that differ | 1/n if deterministic; at most 0.75 for two agents that toss coins |
| ``toy/memory`` | recurrence | one right answer in ``n_cues``, by luck |
| ``toy/units`` | units that act by their type | one right order in ``n_types``, by luck |
| ``toy/reach`` | continuous actions over several steps, by agents that differ | at most 0 |

Every game here ends of itself, so ``truncated`` is always false.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from k24.envs.base import EnvSpec, Observation, Step, TeamEnv
from k24.envs.check import require_actions
from k24.errors import UsageError, unknown_name


class MatrixGame(TeamEnv):
    """Two agents choose once, and share what the table pays for the pair.

    The table is monotonic: whatever the other one does, action 1 beats 0 and 0 beats 2. So the independent learners, VDN and QMIX can
    all represent what matters and must find the optimum. It is no sum of one part per agent, so VDN fits it only roughly.

    Attributes:
        payoff: Return of the team for each pair of actions.
        optimal_return: The best of them, at actions (1, 1).
    """

    payoff = ((0.2, 0.5, 0.0), (0.5, 1.0, 0.3), (0.0, 0.3, -0.2))
    optimal_return = 1.0

    def __init__(self, n_envs: int, device: str | torch.device = "cpu") -> None:
        self.n_envs = n_envs
        self.device = torch.device(device)
        self.spec = EnvSpec(n_agents=2, obs_dim=1, state_dim=1, n_actions=3, episode_limit=1)
        self._table = torch.tensor(self.payoff, device=self.device)

    def reset(self, seed: int) -> Observation:
        """See ``TeamEnv.reset``; there is nothing random to seed."""
        return _nothing_to_see(self)

    def step(self, actions: Tensor) -> Step:
        """See ``TeamEnv.step``."""
        require_actions(self, actions)
        return _end(self, self._table[actions[0], actions[1]])


class Specialisation(TeamEnv):
    """Agents that all see the same must do different things.

    The team's return is the number of distinct actions over the number of agents. A shared policy that is not told which
    agent it acts for gets ``1/n`` if it is deterministic, and at most ``1 - (1 - 1/n)^n`` (0.75 for two) if it is not.

    Attributes:
        optimal_return: 1, when no two agents do the same.
    """

    optimal_return = 1.0

    def __init__(self, n_envs: int, device: str | torch.device = "cpu", n_agents: int = 2) -> None:
        if n_agents < 2:
            raise UsageError(f"toy/specialisation: n_agents must be at least 2, got {n_agents}")
        self.n_envs = n_envs
        self.device = torch.device(device)
        self.spec = EnvSpec(n_agents, obs_dim=1, state_dim=1, n_actions=n_agents, episode_limit=1)

    def reset(self, seed: int) -> Observation:
        """See ``TeamEnv.reset``; there is nothing random to seed."""
        return _nothing_to_see(self)

    def step(self, actions: Tensor) -> Step:
        """See ``TeamEnv.step``."""
        require_actions(self, actions)
        chosen = F.one_hot(actions, self.spec.n_actions).any(dim=0)
        return _end(self, chosen.sum(dim=-1) / self.spec.n_agents)


class MemoryGame(TeamEnv):
    """Each agent sees a cue at the first step and must name it at the last.

    An observation is the cue as one-hot (zeros after the first step), then a flag that is 1 at the last step, the only one where the
    action counts. Agents have cues of their own, and each right answer pays ``1/n_agents``. Without memory, the best return is
    ``1/n_cues``.

    Attributes:
        optimal_return: 1, when every agent answers right.
    """

    optimal_return = 1.0

    def __init__(self, n_envs: int, device: str | torch.device = "cpu", n_agents: int = 2, n_cues: int = 2, max_steps: int = 4) -> None:
        for name, value, least in (("n_agents", n_agents, 1), ("n_cues", n_cues, 2), ("max_steps", max_steps, 2)):
            if value < least:
                raise UsageError(f"toy/memory: {name} must be at least {least}, got {value}")
        self.n_envs = n_envs
        self.device = torch.device(device)
        obs_dim = n_cues + 1
        self.spec = EnvSpec(n_agents, obs_dim, n_agents * obs_dim, n_cues, max_steps)
        self._random = torch.Generator(self.device)
        blank = torch.zeros(n_agents, n_envs, obs_dim, device=self.device)
        asked = blank.clone()
        asked[..., -1] = 1
        self._blank, self._asked = _with_state(blank), _with_state(asked)

    def reset(self, seed: int) -> Observation:
        """See ``TeamEnv.reset``."""
        self._random.manual_seed(seed)
        return self._begin()

    def step(self, actions: Tensor) -> Step:
        """See ``TeamEnv.step``."""
        require_actions(self, actions)
        self._clock += 1
        last = self._clock == self.spec.episode_limit
        reward = (actions == self._cue) / self.spec.n_agents if last else torch.zeros(actions.shape, device=self.device)
        after = self._asked if self._clock == self.spec.episode_limit - 1 else self._blank
        ended = torch.full((self.n_envs,), last, device=self.device)
        # All environments keep the same time, so they begin anew together.
        return Step(after, self._begin() if last else after, reward, ended, torch.zeros_like(ended))

    def _begin(self) -> Observation:
        """Draws new cues and shows them."""
        self._clock = 0
        n_cues = self.spec.n_actions
        self._cue = torch.randint(n_cues, (self.spec.n_agents, self.n_envs), generator=self._random, device=self.device)
        return _with_state(F.one_hot(self._cue, n_cues + 1).float())


class UnitGame(TeamEnv):
    """Units of several types must each do what is right for their type; some die on the way.

    Every episode draws a type for each unit. An observation is the type as one-hot, then a flag that is 1 at the second of two steps. A
    unit of type k earns ``1/n_agents`` by action k at the first step and by action ``k + 1`` (counted round) at the second. Between, each
    unit but the last dies with chance a half. The dead see zeros, have only action 0 and earn nothing. An episode is won if all that the
    living did was right.

    Attributes:
        optimal_return: What a team that is always right earns over the two steps, on average.
    """

    def __init__(self, n_envs: int, device: str | torch.device = "cpu", n_agents: int = 3, n_types: int = 3) -> None:
        for name, value, least in (("n_agents", n_agents, 1), ("n_types", n_types, 2)):
            if value < least:
                raise UsageError(f"toy/units: {name} must be at least {least}, got {value}")
        self.n_envs = n_envs
        self.device = torch.device(device)
        self.spec = EnvSpec(n_agents, n_types + 1, n_agents * (n_types + 1), n_types, 2, unit_types=(0, n_types))
        self.optimal_return = 1 + (1 + (n_agents - 1) / 2) / n_agents
        self._random = torch.Generator(self.device)

    def reset(self, seed: int) -> Observation:
        """See ``TeamEnv.reset``."""
        self._random.manual_seed(seed)
        return self._begin()

    def step(self, actions: Tensor) -> Step:
        """See ``TeamEnv.step``."""
        require_actions(self, actions)
        right = actions == (self._type + self._clock) % self.spec.n_actions
        self._won &= (right | ~self._alive).all(dim=0)
        reward = (right & self._alive) / self.spec.n_agents
        last = self._clock == 1
        if not last:
            self._alive[:-1] &= torch.rand(self._alive[:-1].shape, generator=self._random, device=self.device) < 0.5
        self._clock += 1
        after, won = self._observe(), self._won.clone() if last else torch.zeros_like(self._won)
        ended = torch.full((self.n_envs,), last, device=self.device)
        return Step(after, self._begin() if last else after, reward, ended, torch.zeros_like(ended), won)

    def _begin(self) -> Observation:
        """Draws a new team."""
        self._clock = 0
        shape = (self.spec.n_agents, self.n_envs)
        self._type = torch.randint(self.spec.n_actions, shape, generator=self._random, device=self.device)
        self._alive = torch.ones(shape, dtype=torch.bool, device=self.device)
        self._won = torch.ones(self.n_envs, dtype=torch.bool, device=self.device)
        return self._observe()

    def _observe(self) -> Observation:
        """Type and clock of the living."""
        types = F.one_hot(self._type, self.spec.n_actions).float()
        obs = torch.cat([types, torch.full_like(types[..., :1], float(self._clock == 1))], dim=-1) * self._alive[..., None]
        avail = self._alive[..., None].repeat(1, 1, self.spec.n_actions)
        avail[..., 0] = True
        return Observation(obs, obs.transpose(0, 1).flatten(1), avail, self._alive.clone())


class ReachGame(TeamEnv):
    """Agents that all see the same must go to different places, which nobody sees, by continuous actions.

    Each starts at 0 and moves by ``1.2/max_steps`` times its action, within [-1, 1]. The goals are spread evenly from -0.8 to 0.8, the
    first agent's being the lowest; in every second dimension they are mirrored. The outer ones take more than one step to reach, and only
    the last step pays: agent i gets ``(1 - d_i²/V)/n_agents`` for its distance ``d_i`` to its goal, where V is the mean square of the
    goals; with several dimensions both squares are means over them. An observation is the agent's own place, then the share of the
    episode that has passed.

    Agents that share a policy and are not told who they are end up at places of one distribution, with mean m and variance v, so the mean
    of ``d_i²`` is ``v + m² + V``. They earn 0 at best, by staying where they are, whether they are deterministic or not.

    Attributes:
        optimal_return: 1, when every agent reaches its goal.
        goals: float32 ``[A, 1, U]``.
    """

    optimal_return = 1.0
    _place: Tensor

    def __init__(self, n_envs: int, device: str | torch.device = "cpu", n_agents: int = 2, max_steps: int = 3, n_dims: int = 1) -> None:
        for name, value, least in (("n_agents", n_agents, 2), ("max_steps", max_steps, 2), ("n_dims", n_dims, 1)):
            if value < least:
                raise UsageError(f"toy/reach: {name} must be at least {least}, got {value}")
        self.n_envs = n_envs
        self.device = torch.device(device)
        obs_dim = n_dims + 1
        self.spec = EnvSpec(n_agents, obs_dim, n_agents * obs_dim, n_dims, max_steps, continuous=True)
        mirrored = 1 - 2 * (torch.arange(n_dims, device=self.device) % 2)
        self.goals = torch.linspace(-0.8, 0.8, n_agents, device=self.device)[:, None, None] * mirrored

    def reset(self, seed: int) -> Observation:
        """See ``TeamEnv.reset``; there is nothing random to seed."""
        return self._begin()

    def step(self, actions: Tensor) -> Step:
        """See ``TeamEnv.step``."""
        require_actions(self, actions)
        self._clock += 1
        self._place = (self._place + 1.2 / self.spec.episode_limit * actions).clamp(-1, 1)
        last = self._clock == self.spec.episode_limit
        after = self._observe()
        error = (self._place - self.goals).square().mean(-1) / self.goals.square().mean()
        reward = (1 - error) / self.spec.n_agents if last else torch.zeros_like(error)
        ended = torch.full((self.n_envs,), last, device=self.device)
        # All environments keep the same time, so they begin anew together.
        return Step(after, self._begin() if last else after, reward, ended, torch.zeros_like(ended))

    def _begin(self) -> Observation:
        """Puts everyone back to the middle."""
        self._clock = 0
        self._place = torch.zeros(self.spec.n_agents, self.n_envs, self.spec.n_actions, device=self.device)
        return self._observe()

    def _observe(self) -> Observation:
        """Places and clock."""
        passed = torch.full_like(self._place[..., :1], self._clock / self.spec.episode_limit)
        return _with_state(torch.cat([self._place, passed], dim=-1))


_GAMES = {
    "toy/matrix": MatrixGame,
    "toy/specialisation": Specialisation,
    "toy/memory": MemoryGame,
    "toy/units": UnitGame,
    "toy/reach": ReachGame,
}

TASKS = {
    "toy/matrix": "two agents, one table, one best pair of actions",
    "toy/specialisation": "agents that see the same must act differently",
    "toy/memory": "a cue at the first step is asked for at the last",
    "toy/units": "units must act by their type, which changes from episode to episode; some die",
    "toy/reach": "agents that see the same must go to different places, by continuous actions",
}


def make(task: str, n_envs: int, device: str | torch.device = "cpu", **kwargs: object) -> TeamEnv:
    """Builds one task of ``TASKS``; options are those of its class."""
    game = _GAMES[task]
    known = set(inspect.signature(game).parameters) - {"n_envs", "device"}
    for name, value in kwargs.items():
        if name not in known:
            raise unknown_name(f"option of {task}", name, known)
        if not isinstance(value, int):
            raise UsageError(f"{task}: {name} must be a whole number, got {value!r}")
    return game(n_envs, device, **kwargs)


def _nothing_to_see(env: TeamEnv) -> Observation:
    """The constant 1 for every agent."""
    return Observation(torch.ones(env.spec.n_agents, env.n_envs, 1, device=env.device), torch.ones(env.n_envs, 1, device=env.device))


def _with_state(obs: Tensor) -> Observation:
    """Observations ``[A, E, D]``, with all of them side by side as the state."""
    return Observation(obs, obs.transpose(0, 1).flatten(1))


def _end(env: TeamEnv, team_return: Tensor) -> Step:
    """The step that ends a one-step game; what the team earned, ``[E]``, is shared evenly."""
    n_agents = env.spec.n_agents
    ended = torch.ones(env.n_envs, dtype=torch.bool, device=env.device)
    reward = (team_return / n_agents).expand(n_agents, -1).contiguous()
    return Step(_nothing_to_see(env), _nothing_to_see(env), reward, ended, torch.zeros_like(ended))
