"""Copies of a single environment, stepped one after the other, with all that they say checked and written into arrays.

The arrays are ``[E, ...]`` for all copies; a ``Batch`` may run some of them only. They lie in plain memory, or in memory that is shared
with the process that reads them: one code for both, and one result.

An environment fails quietly where it could be found out early: numpy stretches a single reward to all agents, and a NaN shows itself as a
policy that learns nothing. So shapes are checked one by one as they are written, and values all at once.
"""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from k24.envs.base import EnvSpec, Outcome, SingleEnv, View
from k24.errors import RAISED, K24Error, RunError, describe

_log = logging.getLogger("k24")


class Frame(NamedTuple):
    """What the team sees at one moment, environments first.

    Attributes:
        obs: float32 ``[E, A * D]``, all observations side by side without padding, so the last columns may be free.
        state: float32 ``[E, S]``; free where environments give none.
        avail: bool ``[E, A, U]``; free, too.
        alive: bool ``[E, A]``; free, too.
    """

    obs: np.ndarray
    state: np.ndarray
    avail: np.ndarray
    alive: np.ndarray

    def at(self, rows: Any) -> Frame:
        """Some of the rows, chosen as numpy does it: a view for a slice, else a copy."""
        return Frame(*(array[rows] for array in self))

    def put(self, rows: Any, frame: Frame) -> None:
        """Overwrites some of the rows."""
        for ours, theirs in zip(self, frame, strict=True):
            ours[rows] = theirs

    def copy(self) -> Frame:
        """All of it anew."""
        return Frame(*(array.copy() for array in self))

    def onward(self, begun: Frame, ended: np.ndarray) -> Frame:
        """A copy, with the rows of ``begun`` where ``ended``, bool ``[E]``."""
        copy = self.copy()
        copy.put(ended, begun.at(ended))
        return copy


class Arrays:
    """All that passes between the copies and their reader.

    Attributes:
        actions: int64 ``[E, A]``, or float32 ``[E, A, U]`` where continuous.
        after: What the last step led to.
        begun: What each copy's running episode began with.
        reward: float32 ``[E, A]``.
        terminated: bool ``[E]``.
        truncated: bool ``[E]``.
        won: bool ``[E]``; free where environments know no victory.
    """

    def __init__(self, spec: EnvSpec, n_envs: int, buffer: Any = None) -> None:
        """Lays the arrays over ``buffer``, ``Arrays.size`` bytes of zeros; over memory of their own where None."""
        record = self._record(spec, n_envs)
        whole = np.zeros((), record) if buffer is None else np.ndarray((), record, buffer)
        self.actions = whole["actions"]
        self.after, self.begun = (Frame(*(whole[name][part] for part in Frame._fields)) for name in ("after", "begun"))
        self.reward = whole["reward"]
        self.terminated, self.truncated, self.won = whole["terminated"], whole["truncated"], whole["won"]

    @classmethod
    def size(cls, spec: EnvSpec, n_envs: int) -> int:
        """Bytes that the arrays take."""
        return cls._record(spec, n_envs).itemsize

    @staticmethod
    def _record(spec: EnvSpec, n_envs: int) -> np.dtype:
        agents, actions = (n_envs, spec.n_agents), (n_envs, spec.n_agents, spec.n_actions)
        frame = [
            ("obs", np.float32, (n_envs, spec.n_agents * spec.obs_dim)),
            ("state", np.float32, (n_envs, spec.state_dim)),
            ("avail", np.bool_, actions),
            ("alive", np.bool_, agents),
        ]
        fields: list[Any] = [
            ("actions", np.float32, actions) if spec.continuous else ("actions", np.int64, agents),
            ("after", np.dtype(frame, align=True)),
            ("begun", np.dtype(frame, align=True)),
            ("reward", np.float32, agents),
            ("terminated", np.bool_, (n_envs,)),
            ("truncated", np.bool_, (n_envs,)),
            ("won", np.bool_, (n_envs,)),
        ]
        return np.dtype(fields, align=True)


class Form(NamedTuple):
    """What all views and outcomes of an environment have in common.

    Attributes:
        sizes: Features of each agent's observation.
        state: Whether it gives a state of its own.
        avail: Whether it says which actions are available.
        alive: Whether it says which agents are alive.
        won: Whether it says which episodes were won; None before the first step.
    """

    sizes: list[int]
    state: bool
    avail: bool
    alive: bool
    won: bool | None = None

    def columns(self) -> list[slice]:
        """Where each agent's observation stands in ``Frame.obs``."""
        stops = itertools.accumulate(self.sizes)
        return [slice(stop - size, stop) for stop, size in zip(stops, self.sizes, strict=True)]


class Batch:
    """Some of the copies of one environment.

    Attributes:
        spec: Sizes and limits, the same for all.
        sides: As for ``TeamEnv``.
    """

    def __init__(self, module: str, task: str, kwargs: dict[str, Any], copies: range, tick: Callable[[], None] = lambda: None) -> None:
        """Makes the copies.

        Args:
            module: Import path of a module with ``make_one(task, **kwargs) -> SingleEnv``.
            task: What to make; also named in errors.
            kwargs: Options of the task.
            copies: Which of all copies these are.
            tick: Called whenever a copy is done with something that may take long.

        Raises:
            UsageError: As raised by ``make_one``.
            ImportError: As raised by ``make_one``.
            RunError: Any other exception, or copies that are not alike.
        """
        self._task, self._copies, self._tick = task, copies, tick
        self._envs: list[SingleEnv] = []
        self._form: Form | None = None
        try:
            make_one = importlib.import_module(module).make_one
            for _ in copies:
                env = make_one(task, **kwargs)
                if not isinstance(env, SingleEnv) or not isinstance(env.spec, EnvSpec):
                    raise RunError(f"{task}: expected a SingleEnv with an EnvSpec, got {type(env).__name__}")
                self._envs.append(env)
                if env.spec != self._envs[0].spec:
                    raise RunError(f"{task}: expected the same EnvSpec from every copy, got {self._envs[0].spec} and {env.spec}")
                tick()
        except RAISED as error:
            self.close()
            if isinstance(error, K24Error | ImportError):
                raise
            raise RunError(f"{task} can't be made: {describe(error)}") from error
        self.spec, self.sides = self._envs[0].spec, self._envs[0].sides
        # Of each copy: which episode it is in, and how many steps into it.
        self._episode = [0] * len(copies)
        self._clock = [0] * len(copies)
        self._lost: list[int] = []

    def bind(self, arrays: Arrays) -> None:
        """Says where to read actions from and where to write what follows."""
        mine = slice(self._copies.start, self._copies.stop)
        self._actions, self._reward = arrays.actions[mine], arrays.reward[mine]
        self._after, self._begun = arrays.after.at(mine), arrays.begun.at(mine)
        self._terminated, self._truncated, self._won = arrays.terminated[mine], arrays.truncated[mine], arrays.won[mine]

    def reset(self, seed: int) -> Form:
        """Starts the first episode of every copy; what they see is in ``begun``."""
        self._seed, self._lost = seed, []
        for j in range(len(self._envs)):
            self._put("reset", self._begun, j, self._begin(j, 0))
            self._tick()
        return self._check("reset", self._begun)

    def step(self) -> Form:
        """Takes ``actions``; what follows is in ``after``, and in ``begun`` where an episode ended."""
        limit, n_agents = self.spec.episode_limit, self.spec.n_agents
        reward, lost = self._reward, self._lost
        actions = self._actions.copy()  # an environment may keep what it gets
        last_seen = self._begun.at(lost) if lost else None
        anew = False
        for j in range(len(self._envs)):
            if j not in lost:
                view, paid, terminated, truncated, won = self._act(j, actions[j])
                self._put("step", self._after, j, view)
                try:
                    fits = len(paid) == n_agents
                    reward[j] = paid
                except (TypeError, ValueError):
                    fits = False
                if not fits:
                    self._refuse("step", f"reward to be {n_agents} numbers, one per agent", _kind(paid), j)
                # An end of the task's own is the stronger statement: nothing follows.
                truncated = not terminated and (truncated or self._clock[j] >= limit)
            else:
                reward[j], terminated, truncated, won = 0.0, False, True, False
            ended = terminated or truncated
            self._terminated[j], self._truncated[j], self._won[j] = terminated, truncated, bool(won) and ended
            if ended:
                self._put("reset", self._begun, j, self._begin(j, self._episode[j] + 1))
                anew = True
        form = self._check("step", self._after)
        if not np.isfinite(reward).all():
            j, agent = np.argwhere(~np.isfinite(reward))[0]
            self._refuse("step", f"a finite reward of agent {agent}", f"{reward[j, agent]}", j)
        if anew:
            self._check("reset", self._begun)
        if last_seen is not None:
            self._after.put(lost, last_seen)
            self._lost = []
        return form

    def replay(self, seed: int, episodes: Sequence[tuple[int, np.ndarray]]) -> int:
        """Plays the running episodes of all copies again, up to what is in ``begun``.

        An episode that comes to something else belongs to a simulator whose seed does not say everything. It can't go on: the next
        step ends it as truncated where it was, without a reward, and begins another.

        Args:
            seed: What ``reset`` got.
            episodes: For each copy which episode it is in, and the actions taken in it, ``[T, A]`` or ``[T, A, U]``.

        Returns:
            How many episodes are lost so.
        """
        self._seed = seed
        lost = np.zeros(len(self._envs), bool)
        for j, (episode, actions) in enumerate(episodes):
            view = self._begin(j, episode)
            self._put("reset", self._after, j, view)
            for joint in actions:
                try:
                    view, _, terminated, truncated, _ = self._act(j, joint)
                    lost[j] = terminated or truncated
                except RunError:
                    lost[j] = True  # in an episode that went another way, an old action may be one that can't be taken
                if lost[j]:
                    break
            self._put("step", self._after, j, view)
            self._tick()
        self._check("step", self._after)
        for now, then in zip(self._after, self._begun, strict=True):
            lost |= (now != then).reshape(len(lost), -1).any(axis=1)
        self._lost = np.flatnonzero(lost).tolist()
        return len(self._lost)

    def render(self) -> np.ndarray | None:
        """The picture of the first copy."""
        try:
            return self._envs[0].render()
        except RAISED as error:
            self._fail("render", 0, error)

    def close(self) -> None:
        """Closes the copies; one that fails at it spoils nothing that was done. May be called more than once."""
        while self._envs:
            try:
                self._envs.pop().close()
            except RAISED as error:
                _log.warning("%s: close: %s", self._task, describe(error))

    def _begin(self, j: int, episode: int) -> View:
        """Starts an episode of copy ``j``."""
        self._episode[j], self._clock[j] = episode, 0
        try:
            return self._envs[j].reset(episode_seed(self._seed, self._copies[j], episode))
        except RAISED as error:
            self._fail("reset", j, error)

    def _act(self, j: int, actions: np.ndarray) -> tuple[View, Any, bool, bool, bool | None]:
        """Takes a step of copy ``j``, and returns the parts of its outcome."""
        try:
            outcome = self._envs[j].step(actions)
            if not isinstance(outcome, Outcome):
                self._refuse("step", "an Outcome", type(outcome).__name__, j)
        except RAISED as error:
            self._fail("step", j, error)
        view, reward, terminated, truncated, won = outcome
        terminated, truncated = self._flag("terminated", terminated, j), self._flag("truncated", truncated, j)
        assert self._form is not None
        if (won is not None) is not self._form.won:
            if self._form.won is not None:
                self._refuse("step", "won given always or never", "both", j)
            self._form = self._form._replace(won=won is not None)
        self._clock[j] += 1
        return view, reward, terminated, truncated, None if won is None else self._flag("won", won, j)

    def _flag(self, name: str, value: Any, j: int) -> bool:
        """Whether the episode ended. An array with a value for each agent is none, nor is a text that holds "no"."""
        if type(value) is not bool:
            if np.shape(value) != () or np.asarray(value).dtype.kind not in "bui" or value not in (0, 1):
                self._refuse("step", f"{name} to be True or False, one for the team", _kind(value), j)
            value = bool(value)
        return value

    def _put(self, method: str, frame: Frame, j: int, view: View) -> None:
        """Writes what copy ``j`` sees, if its shapes are right; ``_check`` does the rest."""
        form = self._form or self._learn(method, j, view)
        try:
            obs, state, avail, alive = view
            # Lengths are compared before numpy may stretch something to fit; what has too many dimensions never fits.
            good = form[1:4] == (state is not None, avail is not None, alive is not None)
            row = frame.obs[j, : self._width]
            if type(obs) is np.ndarray and obs.shape == self._even:
                row[:] = obs.reshape(-1)
            elif list(map(len, obs)) == form.sizes:
                np.concatenate(obs, out=row)
            else:
                good = False
            if state is not None:
                good &= len(state) == self.spec.state_dim
                frame.state[j] = state
            if avail is not None:
                good &= np.shape(avail) == frame.avail.shape[1:]
                frame.avail[j] = avail
            if alive is not None:
                good &= len(alive) == self.spec.n_agents
                frame.alive[j] = alive
        except (TypeError, ValueError):
            good = False
        if not good:
            self._explain(method, j, view, form)

    def _learn(self, method: str, j: int, view: View) -> Form:
        """Takes the first view as the example of all others."""
        spec = self.spec
        if not isinstance(view, View):
            self._refuse(method, "a View", type(view).__name__, j)
        shapes = self._shapes(method, view, j)
        if len(shapes) != spec.n_agents or any(shape is None or len(shape) != 1 or shape[0] > spec.obs_dim for shape in shapes):
            expected = f"{spec.n_agents} observations, each a vector of at most obs_dim (={spec.obs_dim}) features"
            self._refuse(method, expected, ", ".join(map(_kind, view.obs)), j)
        sizes = [shape[0] for shape in shapes if shape is not None]
        if view.state is None and sum(sizes) != spec.state_dim:
            expected = f"a state, or a state_dim (={spec.state_dim}) that is the sum of all observations' features (={sum(sizes)})"
            self._refuse(method, expected, "neither", j)
        if view.avail is not None and spec.continuous:
            self._refuse(method, "avail to be None where actions are continuous", _kind(view.avail), j)
        self._width = sum(sizes)
        self._even = (spec.n_agents, sizes[0]) if len(set(sizes)) == 1 else None
        self._form = Form(sizes, *(one is not None for one in view[1:]))
        return self._form

    def _shapes(self, method: str, view: View, j: int) -> list[tuple[int, ...] | None]:
        """Those of all observations."""
        if not isinstance(view.obs, Sequence | np.ndarray) or isinstance(view.obs, str):
            self._refuse(method, f"{self.spec.n_agents} observations in a list, one per agent", _kind(view.obs), j)
        return [_shape(one) for one in view.obs]

    def _explain(self, method: str, j: int, view: View, form: Form) -> NoReturn:
        """Says what is wrong with a view that is not like the first."""
        spec = self.spec
        if not isinstance(view, View):
            self._refuse(method, "a View", type(view).__name__, j)
        shapes = self._shapes(method, view, j)
        if len(shapes) != spec.n_agents:
            self._refuse(method, f"{spec.n_agents} observations, one per agent", f"{len(shapes)}", j)
        for agent, (one, shape, size) in enumerate(zip(view.obs, shapes, form.sizes, strict=True)):
            if shape != (size,):
                self._refuse(method, f"the observation of agent {agent} to be a vector of {size} features, as before", _kind(one), j)
        wanted = {"state": (spec.state_dim,), "avail": (spec.n_agents, spec.n_actions), "alive": (spec.n_agents,)}
        for name, shape in wanted.items():
            value = getattr(view, name)
            if (value is not None) is not getattr(form, name):
                self._refuse(method, f"{name} given always or never", "both", j)
            if value is not None and _shape(value) != shape:
                self._refuse(method, f"{name} of shape {list(shape)}", _kind(value), j)
        self._refuse(method, "observations, state, avail and alive of numbers", ", ".join(_kind(one) for one in view.obs), j)

    def _check(self, method: str, frame: Frame) -> Form:
        """What is done for all copies at once: the dead see nothing and may do nothing, and values are looked at."""
        form = self._form
        assert form is not None
        _, state, avail, alive = frame
        obs = frame.obs[:, : self._width]
        if form.alive and not alive.all():
            for dead, columns in zip(~alive.T, form.columns(), strict=True):
                obs[dead, columns] = 0.0
            if form.avail:
                avail[~alive, 0] = True
        if not np.isfinite(obs).all():
            j, column = np.argwhere(~np.isfinite(obs))[0]
            agent = next(agent for agent, columns in enumerate(form.columns()) if column < columns.stop)
            self._refuse(method, f"finite observations of agent {agent}", f"{obs[j, column]}", j)
        if form.state and not np.isfinite(state).all():
            j, column = np.argwhere(~np.isfinite(state))[0]
            self._refuse(method, "a finite state", f"{state[j, column]}", j)
        if form.avail and not avail.any(axis=-1).all():
            j, agent = np.argwhere(~avail.any(axis=-1))[0]
            self._refuse(method, f"at least one action available for agent {agent}", "none", j)
        return form

    def _refuse(self, method: str, expected: str, got: str, j: int) -> NoReturn:
        """Raises for something that copy ``j`` must not say."""
        where = f"(environment {self._copies[j]}, step {self._clock[j]} of its episode)"
        remedy = f"check it with 'k24 check-env {self._task}'"
        raise RunError(f"{self._task}: {method}: expected {expected}, got {got} {where}; {remedy}")

    def _fail(self, method: str, j: int, error: BaseException) -> NoReturn:
        """Raises for an exception within copy ``j``."""
        if isinstance(error, K24Error):
            raise error
        raise RunError(f"{self._task}: {method}: {describe(error)} (environment {self._copies[j]})") from error


def episode_seed(seed: int, copy: int, episode: int) -> int:
    """The seed of one episode of one copy, below 2**32. Runs with neighbouring seeds share none, as they would with ``seed + copy``."""
    return int(np.random.SeedSequence(seed, spawn_key=(copy, episode)).generate_state(1)[0])


def _kind(value: Any) -> str:
    """Type and shape, for an error."""
    kind, shape = str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__, _shape(value)
    return kind if shape is None else f"{kind} {list(shape)}"


def _shape(value: Any) -> tuple[int, ...] | None:
    """None of what has no shape, because its rows differ in length."""
    try:
        return np.shape(value)
    except ValueError:
        return None
