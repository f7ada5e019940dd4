"""Suite ``pettingzoo``: any PettingZoo parallel environment, by the path it is imported from.

``pettingzoo/mpe2.simple_spread_v3`` imports that module and calls its ``parallel_env``; ``pettingzoo/my_package.my_module:make`` calls
``make`` instead. Options go to that function, and so does ``max_steps``, by the name ``max_cycles`` where it has that.

Three things about PettingZoo are easy to get wrong, and tests pin each:

* At the end of an episode ``env.agents`` is already empty when ``step`` returns. The last rewards and observations are in what
  ``step`` returned; whoever loops over ``env.agents`` loses them.
* Agents end one by one. An episode ends when nobody is left, and it was cut, rather than finished, if a time limit took any of the last.
* Whether agents may vanish, or which of their actions are barred at times, shows in no attribute. So a generic environment always says
  who is alive and what is available.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from k24.envs.base import EnvSpec, Outcome, SingleEnv, View
from k24.envs.batch import RAISED
from k24.envs.options import build, require_options
from k24.errors import RunError, UsageError

IMPORTS = True  # ``accepts`` takes any import path, so a task may run code that k24 doesn't know

_LIMIT = 500
_PATH = re.compile(r"pettingzoo/(?P<module>\w+(?:\.\w+)*)(?::(?P<name>\w+))?")

# What runs where only pettingzoo and mpe2 are installed; any other module may be named in the same way.
TASKS = {
    "pettingzoo/mpe2.simple_spread_v3": "three agents cover three landmarks and do not collide",
    "pettingzoo/mpe2.simple_tag_v3": "three chase one (two sides)",
    "pettingzoo/pettingzoo.classic.rps_v2": "rock, paper, scissors (two sides)",
    "pettingzoo/pettingzoo.sisl.pursuit_v5": "eight pursuers surround thirty evaders on a grid",
}


class ParallelTeam(SingleEnv):
    """A PettingZoo parallel environment.

    Observations are flattened: boxes of any shape row by row, discrete ones one-hot. An observation that is a dictionary of
    ``observation`` and ``action_mask`` tells which actions are available; so does an ``action_mask`` in an agent's info.

    Agents that are gone see zeros, earn nothing and have only action 0. The state is the environment's own where it has one of a fixed
    number of features, else all observations side by side.

    Attributes:
        env: The PettingZoo environment.
    """

    def __init__(
        self,
        env: Any,
        max_steps: int | None = None,
        steady: bool = False,
        own_state: bool = True,
        close_env: bool = True,
        sides: tuple[str, ...] | None = None,
    ) -> None:
        """Looks at the spaces; the environment is reset once where its state must be looked at too.

        Args:
            env: The environment.
            max_steps: Episode limit; where None its attribute ``max_cycles``, else 500.
            steady: Promises that all agents stay until an episode ends and that nothing an agent can do is ever barred, which spares
                saying so at each step.
            own_state: Whether to ask for ``env.state()``.
            close_env: Whether ``close`` closes the environment too.
            sides: As for ``SingleEnv``.

        Raises:
            UsageError: Actions that are neither all discrete nor all boxes with bounds, or observations that can't be flattened.
        """
        from gymnasium import spaces

        self.env = env
        self.sides = sides
        self._names = list(env.possible_agents)
        self._close_env = close_env
        self._steady = steady
        self._readers, self._masked, sizes = [], [], []
        for name in self._names:
            space = env.observation_space(name)
            others = {key: part for key, part in getattr(space, "spaces", {}).items() if key != "action_mask"}
            self._masked.append(isinstance(space, spaces.Dict) and bool(others) and "action_mask" in space.spaces)
            if self._masked[-1]:
                space = others["observation"] if set(others) == {"observation"} else spaces.Dict(others)
            size, reader = _reader(space, f"{env}: agent {name!r}")
            sizes.append(size)
            self._readers.append(reader)
        self._blank = [np.zeros(size, dtype=np.float32) for size in sizes]
        actions = [env.action_space(name) for name in self._names]
        self._continuous = all(isinstance(space, spaces.Box) for space in actions)
        if all(isinstance(space, spaces.Discrete) for space in actions):
            counts = [int(space.n) for space in actions]
            self._counts, self._starts = counts, [int(space.start) for space in actions]
            # What each agent may do while it is there, and when it is gone, [A, U].
            self._may = np.arange(max(counts)) < np.array(counts)[:, None]
            self._gone = np.zeros_like(self._may)
            self._gone[:, 0] = True
        elif self._continuous:
            self._boxes = _Boxes(env, self._names, actions)
            counts = self._boxes.sizes
        else:
            found = ", ".join(f"{name!r} {space}" for name, space in zip(self._names, actions, strict=True))
            raise UsageError(f"{env}: all agents must have discrete actions, or all must have boxes, got {found}")
        self._state_dim = _state_dim(env) if own_state else None
        limit = max_steps or getattr(getattr(env, "unwrapped", env), "max_cycles", None) or _LIMIT
        self.spec = EnvSpec(len(sizes), max(sizes), self._state_dim or sum(sizes), max(counts), limit, continuous=self._continuous)
        self._fixed_avail = None if self._continuous or min(counts) == max(counts) else self._may

    def reset(self, seed: int) -> View:
        """See ``SingleEnv.reset``."""
        seen, infos = self.env.reset(seed=seed)
        return self._view(seen, infos, set(self.env.agents))

    def step(self, actions: np.ndarray) -> Outcome:
        """See ``SingleEnv.step``.

        Raises:
            RunError: An action that the agent doesn't have.
        """
        env = self.env
        acting = set(env.agents)
        joint = self._boxes.stretch(actions, acting) if self._continuous else self._choices(actions, acting)
        seen, rewards, terminations, truncations, infos = env.step(joint)
        # By name, not by `env.agents`: that list is already empty at the end of an episode.
        reward = [rewards.get(name, 0.0) for name in self._names]
        here = {name for name in env.agents if not (terminations.get(name) or truncations.get(name))}
        terminated = truncated = False
        if not here:
            truncated = any(truncations.get(name) and not terminations.get(name) for name in acting)
            terminated = not truncated
            # What a cut episode led to has a value only for those for whom the task had not ended.
            here = {name for name in acting if terminated or not terminations.get(name)}
        return Outcome(self._view(seen, infos, here), reward, terminated, truncated)

    def render(self) -> np.ndarray | None:
        """The environment's own picture, if it was made with ``render_mode="rgb_array"``."""
        if getattr(self.env, "render_mode", None) != "rgb_array":
            return None
        picture = self.env.render()
        return None if picture is None else np.array(picture, dtype=np.uint8)

    def close(self) -> None:
        """See ``SingleEnv.close``."""
        if self._close_env:
            self._close_env = False
            self.env.close()

    def _choices(self, actions: np.ndarray, acting: set[str]) -> dict[str, int]:
        """The discrete actions of those who act, by name and as they number them."""
        joint = {}
        for name, action, count, start in zip(self._names, actions.tolist(), self._counts, self._starts, strict=True):
            if name in acting:
                if not 0 <= action < count:
                    raise RunError(f"step: agent {name!r} has actions 0 to {count - 1}, got {action}")
                joint[name] = action + start
        return joint

    def _view(self, seen: Mapping[str, Any], infos: Mapping[str, Any], here: set[str]) -> View:
        """What those who are here see and may do."""
        state = None if self._state_dim is None else self._state()
        if self._steady:
            return View([reader(seen[name]) for name, reader in zip(self._names, self._readers, strict=True)], state, self._fixed_avail)
        obs = list(self._blank)
        alive = np.zeros(len(obs), dtype=bool)
        avail = None if self._continuous else self._gone.copy()
        for index, name in enumerate(self._names):
            if name not in here or name not in seen:
                continue
            alive[index] = True
            if self._masked[index]:
                others = {key: part for key, part in seen[name].items() if key != "action_mask"}
                mine = others["observation"] if set(others) == {"observation"} else others
                mask = seen[name]["action_mask"]
            else:
                mine, mask = seen[name], (infos.get(name) or {}).get("action_mask")
            obs[index] = self._readers[index](mine)
            if avail is not None:
                avail[index] = self._may[index] if mask is None else self._unbarred(name, index, mask)
        return View(obs, state, avail, alive)

    def _unbarred(self, name: str, index: int, mask: Any) -> np.ndarray:
        """An action mask, ``[U]``. Who may do nothing, because it is another's turn, waits by action 0."""
        mask = np.asarray(mask, dtype=bool)
        count = self._counts[index]
        if mask.shape != (count,):
            raise RunError(f"{self.env}: the action mask of agent {name!r} must have {count} entries, got {list(mask.shape)}")
        if not mask.any():
            return self._gone[index]
        padded = np.zeros_like(self._may[index])
        padded[:count] = mask
        return padded

    def _state(self) -> np.ndarray:
        """The environment's own state."""
        state = np.asarray(self.env.state(), dtype=np.float32)
        if state.shape != (self._state_dim,):
            raise RunError(f"{self.env}: state() must always have {self._state_dim} features, as it had at first, got {list(state.shape)}")
        return state


class _Boxes:
    """Continuous actions of all agents.

    Attributes:
        sizes: How many numbers make up each agent's action.
    """

    def __init__(self, env: Any, names: list[str], boxes: list[Any]) -> None:
        self.sizes = [math.prod(box.shape) for box in boxes]
        self._names, self._boxes = names, boxes
        self._low, self._high = np.zeros((2, len(boxes), max(self.sizes)))
        for index, (name, box, size) in enumerate(zip(names, boxes, self.sizes, strict=True)):
            if not box.is_bounded() or not np.issubdtype(box.dtype, np.floating):
                raise UsageError(f"{env}: the actions of agent {name!r} must be floats with finite bounds, got {box}")
            self._low[index, :size], self._high[index, :size] = box.low.reshape(-1), box.high.reshape(-1)
        self._middle, self._half = (self._low + self._high) / 2, (self._high - self._low) / 2

    def stretch(self, actions: np.ndarray, acting: set[str]) -> dict[str, np.ndarray]:
        """Maps ``[A, U]`` in [-1, 1] to the boxes of those who act."""
        stretched = self._middle + self._half * actions
        # Rounding must not carry an action over the edge of its box. np.clip is slow on so few numbers.
        np.minimum(np.maximum(stretched, self._low, out=stretched), self._high, out=stretched)
        return {
            name: row[:size].astype(box.dtype).reshape(box.shape)
            for name, row, size, box in zip(self._names, stretched, self.sizes, self._boxes, strict=True)
            if name in acting
        }


def accepts(task: str) -> bool:
    """Whether a task names a module (with a dot in its path) or a function; not whether it exists."""
    match = _PATH.fullmatch(task)
    return match is not None and ("." in match["module"] or match["name"] is not None)


def make_one(task: str, max_steps: int | None = None, **kwargs: object) -> ParallelTeam:
    """Imports a PettingZoo environment and makes one.

    Args:
        task: ``pettingzoo/package.module``, or ``pettingzoo/package.module:function``.
        max_steps: Episode limit; by default the environment's own, or 500 where it tells none.
        **kwargs: Options of the environment.

    Raises:
        UsageError: The module does not import or makes no such environment, or an option is unknown.
    """
    match = _PATH.fullmatch(task)
    assert match is not None, "accepts() was asked first"
    module = load(match["module"], task)
    name = match["name"] or "parallel_env"
    if not callable(getattr(module, name, None)):
        raise UsageError(f"{task}: the module {match['module']!r} has no function {name!r}: add one, or name another after a colon")
    parameters = options(module, name)
    fixed: dict[str, object] = {"render_mode": "rgb_array"} if "render_mode" in parameters else {}
    for limit in {"max_cycles", "max_steps"} & set(parameters):
        usual = parameters[limit].default
        max_steps = max_steps or (usual if isinstance(usual, int) else _LIMIT)
        fixed[limit] = max_steps
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        require_options(task, kwargs, set(parameters) - {"max_cycles", "render_mode"})
    env = build(task, getattr(module, name), kwargs, **fixed)
    if not hasattr(env, "possible_agents"):
        raise UsageError(f"{task}: expected a PettingZoo parallel environment with possible_agents, got {type(env).__name__}")
    return ParallelTeam(env, max_steps)


def load(path: str, task: str) -> ModuleType:
    """Imports a module of PettingZoo environments.

    Args:
        path: Its dotted path.
        task: Whose module it is, for the error.

    Raises:
        UsageError: It does not import.
    """
    # pygame greets on stdout, which belongs to the command line's own output.
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    if "" not in sys.path:
        sys.path.append("")  # an installed command has its own folder first, and not the user's; last, so as to hide nothing installed
    try:
        with warnings.catch_warnings():
            # PettingZoo 1.27 advises against importing its modules by path, the only way that older versions and other packages know.
            warnings.filterwarnings("ignore", "The old environment creation API", DeprecationWarning)
            return importlib.import_module(path)
    except RAISED as error:
        # Whatever a user's module raises while it is imported.
        hint = ""
        if isinstance(error, ModuleNotFoundError) and error.name:
            hint = f": install what provides {error.name.partition('.')[0]!r} with pip, or run where Python finds it"
        raise UsageError(f"{task}: tried to import {path!r}, and got {type(error).__name__}: {error}{hint}") from error


def options(module: ModuleType, name: str) -> dict[str, inspect.Parameter]:
    """The parameters of an environment's constructor, looked up behind PettingZoo's wrapping functions, which take anything."""
    behind = getattr(module, "raw_env", None) if name == "parallel_env" else None
    return dict(inspect.signature(behind or getattr(module, name)).parameters)


def _reader(space: Any, who: str) -> tuple[int, Callable[[Any], np.ndarray]]:
    """How many features an observation has, and what flattens it."""
    from gymnasium import spaces

    if isinstance(space, spaces.Box):
        return math.prod(space.shape), _flat
    if not getattr(space, "is_np_flattenable", False):
        raise UsageError(f"{who} must observe what can be flattened, got {space}")
    return spaces.flatdim(space), lambda seen: _flat(spaces.flatten(space, seen))


def _flat(seen: Any) -> np.ndarray:
    """An array as float32, row by row."""
    return np.asarray(seen, dtype=np.float32).reshape(-1)


def _state_dim(env: Any) -> int | None:
    """How many features the environment's own state has; None where it has none, or no vector."""
    declared = getattr(env, "state_space", None)
    if declared is not None and len(declared.shape or ()) != 1:
        return None
    env.reset(seed=0)
    try:
        shape = np.shape(env.state())
    except Exception:
        # What they have by that name, if anything, is never called by most who write environments.
        return None
    return shape[0] if len(shape) == 1 and shape[0] > 0 else None
