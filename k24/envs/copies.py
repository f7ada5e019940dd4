"""Many copies of a single environment as one batch, in worker processes.

Simulators are the part of a training run that breaks: they meet a bug of the C++ below them, run out of memory, or wait for a game that
hangs. A worker that dies or hangs is started again here, and the running episodes of its copies are played again: an episode follows from
its seed and the actions, so nothing is lost, and the run is bit for bit what it would have been without the accident.

Every episode of every copy has a seed of its own, so results depend neither on the number of workers nor on who is first.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import pickle
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from k24.envs.base import Observation, Step, TeamEnv
from k24.envs.batch import Arrays, Batch, Form, Frame
from k24.envs.check import require_actions
from k24.envs.worker import Worker, WorkerDied, end_all, nameless_memory
from k24.errors import LAST_GOOD, RunError, UsageError

MOST_DEATHS = 3  # of one worker over one request

_log = logging.getLogger("k24")


class Copies(TeamEnv):
    """A ``SingleEnv``, many times.

    Observations are padded with zeros, and those of dead agents are zeros. A state that the environment does not give is all observations
    side by side. Episodes are cut after ``spec.episode_limit`` steps, or earlier by the simulator.
    """

    may_cut = True

    def __init__(
        self,
        module: str,
        task: str,
        kwargs: dict[str, Any],
        n_envs: int,
        device: str | torch.device = "cpu",
        workers: int | None = None,
    ) -> None:
        """Makes the copies.

        Args:
            module: Import path of a module with ``make_one(task, **kwargs) -> SingleEnv``.
            task: What to make; also named in errors.
            kwargs: Options of the task.
            n_envs: How many copies (E).
            device: Where tensors live.
            workers: Processes to share them out to, at most one per copy; one per core when None, 0 for none but this.

        Raises:
            UsageError: As raised by ``make_one``; or options that can't be handed to another process.
            ImportError: As raised by ``make_one``.
            RunError: Any other exception of ``make_one``, or copies that are not alike.
        """
        self.n_envs = n_envs
        self.device = torch.device(device)
        self._task = self.called = task
        self._ready = self._closed = False
        if workers is None:
            workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if os.name != "posix":
            workers = 0  # descriptors and process groups are handed on as only POSIX has it
        self._runner: Batch | _Crew
        if workers:
            self._runner = _Crew(module, task, kwargs, n_envs, min(workers, n_envs))
            self._arrays = self._runner.arrays
        else:
            self._runner = Batch(module, task, kwargs, range(n_envs))
            self._arrays = Arrays(self._runner.spec, n_envs)
            self._runner.bind(self._arrays)
        self.spec, self.sides = self._runner.spec, self._runner.sides

    def reset(self, seed: int) -> Observation:
        """See ``TeamEnv.reset``."""
        self._require_open("reset")
        with self._between_moments():
            form = self._runner.reset(seed)
        return self._observe(form, self._arrays.begun)

    def step(self, actions: Tensor) -> Step:
        """See ``TeamEnv.step``.

        Raises:
            RunError: An exception of the simulator, something that it must not say, or a worker that dies again and again.
        """
        self._require_open("step")
        require_actions(self, actions)
        if not self._ready:
            raise RunError(f"{self._task}: step: expected running episodes, got none: call reset first, and after a step that failed")
        arrays = self._arrays
        arrays.actions[...] = actions.detach().cpu().numpy().swapaxes(0, 1)
        with self._between_moments():
            form = self._runner.step()
        after = current = self._observe(form, arrays.after)
        ended = arrays.terminated | arrays.truncated
        if ended.any():
            current = self._observe(form, arrays.after.onward(arrays.begun, ended))
        won = self._tensor(arrays.won) if form.won else None
        return Step(after, current, self._tensor(arrays.reward.T), self._tensor(arrays.terminated), self._tensor(arrays.truncated), won)

    def render(self) -> Tensor | None:
        """See ``TeamEnv.render``."""
        self._require_open("render")
        picture = self._runner.render()
        if picture is None:
            return None
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
            got = f"{picture.dtype} {list(picture.shape)}"
            raise RunError(f"{self._task}: render: expected uint8 [height, width, 3] or None, got {got}")
        return torch.from_numpy(picture.copy())

    def close(self) -> None:
        """See ``TeamEnv.close``."""
        self._closed = True
        self._runner.close()

    def _require_open(self, method: str) -> None:
        if self._closed:
            raise RunError(f"{self._task}: {method}: expected an open environment, got one that was closed")

    @contextlib.contextmanager
    def _between_moments(self) -> Iterator[None]:
        """Whoever breaks off inside, by Ctrl-C too, leaves episodes that can't go on."""
        self._ready = False
        try:
            yield
        finally:
            if isinstance(self._runner, _Crew):
                self.restarts = self._runner.restarts
        self._ready = True

    def _observe(self, form: Form, frame: Frame) -> Observation:
        """A copy as tensors, padded."""
        obs = np.zeros((self.spec.n_agents, self.n_envs, self.spec.obs_dim), np.float32)
        for agent, (size, columns) in enumerate(zip(form.sizes, form.columns(), strict=True)):
            obs[agent, :, :size] = frame.obs[:, columns]
        state = frame.state if form.state else frame.obs[:, : sum(form.sizes)]
        avail = self._tensor(frame.avail.swapaxes(0, 1)) if form.avail else None
        alive = self._tensor(frame.alive.T) if form.alive else None
        return Observation(torch.from_numpy(obs).to(self.device), self._tensor(state), avail, alive)

    def _tensor(self, array: np.ndarray) -> Tensor:
        """A copy as a tensor."""
        return torch.from_numpy(array.copy()).to(self.device)


class _Crew:
    """Workers that share the copies among them, and what it takes to restore one.

    To its user it is a ``Batch`` of all copies.

    Attributes:
        spec: Sizes and limits.
        sides: As for ``TeamEnv``.
        arrays: In shared memory.
        restarts: How often a worker was started again.
        close: Ends the workers; called once at the latest when the interpreter ends.
    """

    def __init__(self, module: str, task: str, kwargs: dict[str, Any], n_envs: int, n_workers: int) -> None:
        """Starts the workers; raises what ``Batch`` raises."""
        self._task, self._n_envs = task, n_envs
        self.restarts = 0
        # What the running episodes follow from, and what they have come to.
        self._seed = 0
        self._episode = np.zeros(n_envs, np.int64)
        self._began = np.zeros(n_envs, np.int64)  # the step, counted from reset, before which it began
        self._now = 0
        self._past: deque[np.ndarray] = deque()  # all actions, as far back as the longest running episode
        self._last_seen: Frame | None = None
        try:
            options = pickle.dumps(kwargs)
        except Exception as error:  # each kind of object fails in its own way
            raise UsageError(f"{task}: expected options that can be sent to workers, got {kwargs} ({error}); use workers=0") from error
        memory = nameless_memory()
        edges = [n_envs * k // n_workers for k in range(n_workers + 1)]
        blocks = [range(*edge) for edge in itertools.pairwise(edges)]
        self._workers = [Worker(k, block, (module, task, options), memory) for k, block in enumerate(blocks)]
        self.close = weakref.finalize(self, end_all, self._workers, memory, os.getpid())
        try:
            for worker in self._workers:
                worker.start()
            made = [_good(worker.answer()) for worker in self._workers]
            self.spec, self.sides = self._common("EnvSpec and sides", made)
            size = Arrays.size(self.spec, n_envs)
            os.ftruncate(memory, size)
            self.arrays = Arrays(self.spec, n_envs, mmap.mmap(memory, size))
            for worker in self._workers:
                worker.ask("bind", n_envs)
            for worker in self._workers:
                _good(worker.answer())
        except BaseException as error:
            self.close()
            if isinstance(error, WorkerDied):
                raise RunError(f"{task} can't be made: {error}") from None
            raise

    def reset(self, seed: int) -> Form:
        """See ``Batch.reset``."""
        self._last_seen = None
        self._seed, self._now = seed, 0
        self._episode[:] = self._began[:] = 0
        self._past.clear()
        form = self._ask_all("reset", seed)
        self._last_seen = self.arrays.begun.copy()
        return form

    def step(self) -> Form:
        """See ``Batch.step``."""
        arrays = self.arrays
        actions = arrays.actions.copy()
        form = self._ask_all("step")
        self._past.append(actions)
        self._now += 1
        ended = arrays.terminated | arrays.truncated
        self._episode[ended] += 1
        self._began[ended] = self._now
        while len(self._past) > self._now - self._began.min():
            self._past.popleft()
        self._last_seen = arrays.after.onward(arrays.begun, ended)
        return form

    def render(self) -> np.ndarray | None:
        """See ``Batch.render``."""
        self._workers[0].ask("render")
        return _good(self._answer(self._workers[0], "render"))

    def _ask_all(self, method: str, *arguments: Any) -> Form:
        """Has all workers do the same, and returns the form that all copies have."""
        for worker in self._workers:
            worker.ask(method, *arguments)
        # Every answer is taken before an error is raised, so that none is left for a later question.
        answers = [self._answer(worker, method, *arguments) for worker in self._workers]
        forms = [_good(answer) for answer in answers]
        # A worker none of whose copies took a step since it was started can't know about victories.
        known = next((form.won for form in forms if form.won is not None), None)
        return self._common("kind of views", [form._replace(won=known) if form.won is None else form for form in forms])

    def _answer(self, worker: Worker, method: str, *arguments: Any) -> Any:
        """The answer to what was asked last, from a new process if need be; it may be an exception."""
        how = ""
        for deaths in range(MOST_DEATHS):
            try:
                if deaths:
                    self._restore(worker, how)
                    worker.ask(method, *arguments)
                return worker.answer()
            except WorkerDied as death:
                how = str(death)
        remedy = "fewer environments need less memory, and workers=0 shows where it happens"
        raise RunError(f"{self._task}: {method}: {how}, the last of {MOST_DEATHS} in a row; {remedy}; {LAST_GOOD}")

    def _restore(self, worker: Worker, how: str) -> None:
        """Starts a worker again, and brings its copies to where they were."""
        self.restarts += 1
        lost = 0
        try:
            worker.start()
            _good(worker.answer())
            worker.ask("bind", self._n_envs)
            _good(worker.answer())
            if self._last_seen is not None:
                mine = slice(worker.copies.start, worker.copies.stop)
                self.arrays.begun.put(mine, self._last_seen.at(mine))
                worker.ask("replay", self._seed, [(int(self._episode[i]), self._since(i)) for i in worker.copies])
                lost = _good(worker.answer())
        except BaseException:
            worker.end(0.0)  # half restored is worse than gone
            raise
        unlike = f", cut short as they did not go the same way again: {lost}" if lost else ""
        _log.warning("%s: %s; started again, environments restored: %d%s", self._task, how, len(worker.copies) - lost, unlike)

    def _since(self, copy: int) -> np.ndarray:
        """Actions since the episode of a copy began, ``[T, A]`` or ``[T, A, U]``."""
        first = len(self._past) - self._now + int(self._began[copy])
        return np.array([joint[copy] for joint in itertools.islice(self._past, first, None)])

    def _common(self, what: str, values: Sequence[Any]) -> Any:
        """The value that all are."""
        for value in values:
            if value != values[0]:
                raise RunError(f"{self._task}: expected the same {what} from every copy, got {values[0]} and {value}")
        return values[0]


def _good(answer: Any) -> Any:
    """An answer that is no exception."""
    if isinstance(answer, Exception):
        raise answer
    return answer
