"""Trained policies that run without the training stack.

::

    policy = k24.load_policy("policy.safetensors")
    state = None
    while playing:
        actions, state = policy.act(obs, state)    # obs [n_agents, n_envs, obs_dim], actions [n_agents, n_envs]

For a net of a few thousand weights the Python around the kernel costs as much as the kernel, so :meth:`Policy.act` checks by comparing
numbers it already has, and converts what has another type or place and nothing else.

``policy.spec.action`` says what the net's outputs mean and what an action is; see :mod:`k24.actions`.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from k24.actions import KINDS, StochasticKind
from k24.artifact import PolicySpec, check_shapes, read_policy
from k24.artifact import write_policy as save_policy
from k24.errors import PolicyFileError, UsageError
from k24.kernels import Net, prepare
from k24.sparse.slots import by_unit_type


def load_policy(
    path: str | os.PathLike[str], device: torch.device | str = "cpu", backend: str = "auto", threads: int | None = None
) -> Policy:
    """Loads a policy; runs no code from the file.

    Args:
        path: A file that ``k24 export`` or :func:`save_policy` wrote.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``.
        backend: A name of ``k24.kernels.BACKENDS``, or ``auto`` for the fastest here.
        threads: CPU threads of backends that have their own; as many as torch uses when None.

    Raises:
        PolicyFileError: The file cannot be read, or anything in it is not as it should be; names the file and the fault.
        UsageError: There is no such device or backend here, or it cannot run this net.
    """
    where = _device(device)
    net, spec, digest = read_policy(path)
    return Policy(net.to(where), spec, backend, threads, source=(Path(path).absolute(), digest))


def _load_again(path: Path, digest: str, device: torch.device, backend: str, threads: int | None) -> Policy:
    """A copy of a policy, from its file; refused if that is another one by now."""
    copy = load_policy(path, device, backend, threads)
    copy._require_source(digest)
    return copy


class Policy:
    """A net that acts. It keeps what its backend runs, and of the net as it is in the file no more than the backend keeps.

    Args:
        net: The net, on the device it is to run on.
        spec: How it is driven.
        backend: A name of ``k24.kernels.BACKENDS``, or ``auto``.
        threads: CPU threads of backends that have their own; as many as torch uses when None.
        source: File and digest that the net can be read from again; without them it is kept.

    Attributes:
        spec: How it is driven: what it was trained on, and its sizes.
        device: Where it runs.

    Raises:
        UsageError: Net and spec do not fit, or the backend cannot run the net here.
    """

    def __init__(
        self, net: Net, spec: PolicySpec, backend: str = "auto", threads: int | None = None, source: tuple[Path, str] | None = None
    ) -> None:
        check_shapes(net, spec)
        self.spec, self.device = spec, net.device
        self._prepared, self._backend = prepare(net, backend, threads), backend
        self._source, self._net = source, None if source else net
        self._slots, self._obs_dim, self._hidden = net.n_slots, spec.obs_dim, net.hidden
        self._of = by_unit_type(*spec.slots).of if isinstance(spec.slots, tuple) else None
        self._agents = spec.n_agents if spec.n_agents == net.n_slots and spec.slots == "agent" else None
        self._dtypes = (torch.float32, net.dtype)
        self._kind = KINDS[spec.action]
        self._mode, self._continuous = self._kind.mode, self._kind.continuous
        self._never = torch.tensor(float("-inf"), device=self.device)
        self._threads = threads

    def __repr__(self) -> str:
        s = self.spec
        return (
            f"Policy({s.task}, {s.algo}-{s.sharing}, {s.n_agents} agents, {s.obs_dim} -> {s.n_actions} {s.action}, "
            f"{self.backend}, {self.device})"
        )

    def __reduce__(self) -> tuple:
        """Another process loads the file again, or takes the net along where there is no file."""
        if self._source is None:
            return Policy, (self.net, self.spec, self._backend, self._threads)
        return _load_again, (*self._source, self.device, self._backend, self._threads)

    @property
    def backend(self) -> str:
        """Name of what runs now; with ``auto`` it may depend on the batches seen."""
        return getattr(self._prepared, "name", self._backend)

    @property
    def nbytes(self) -> int:
        """Bytes of weights, biases and masks in memory: of what runs, and of the net as it is in the file where that is kept besides."""
        form, net = self._prepared.nbytes, self._kept_net()
        canonical = sum(t.nbytes for layer in net.linears for t in (layer.weight, layer.bias, layer.codes) if t is not None) if net else 0
        return form if self._prepared.holds_net else form + canonical

    @property
    def net(self) -> Net:
        """The net as it is in the file; read again where only the backend's form of it is in memory.

        Raises:
            PolicyFileError: The file is gone or is another one now.
        """
        net = self._kept_net()
        if net is None:
            assert self._source is not None
            net, _, found = read_policy(self._source[0])
            self._require_source(found)
            net = net.to(self.device)
        return net

    def _require_source(self, digest: str) -> None:
        """Refuses a file that has become another one."""
        if self._source is not None and self._source[1] != digest:
            raise PolicyFileError(f"policy file {str(self._source[0])!r} is another one than was loaded: load it again")

    def _kept_net(self) -> Net | None:
        """The net if it is in memory. A backend that does not need it keeps its shapes alone, on torch's device ``meta``."""
        net = self._net or self._prepared.net
        return None if net.device.type == "meta" else net

    def act(
        self,
        obs: Any,
        state: Tensor | None = None,
        *,
        avail: Any = None,
        slots: Any = None,
        sample: bool = False,
        generator: torch.Generator | None = None,
    ) -> tuple[Any, Tensor]:
        """Chooses the best or likeliest action, or draws one.

        Args:
            obs: Observations ``[n_agents, n_envs, obs_dim]``, or ``[n_agents, obs_dim]`` of one environment, or ``[rows, obs_dim]`` with
                ``slots``; a tensor or an array.
            state: What the call before returned; None at the start of an episode. Where environments end at different times, those that
                begin anew are reset by ``state[:, done] = 0``.
            avail: bool, which actions can be taken, as ``obs`` with ``n_actions`` in place of ``obs_dim``; a row without any gets action 0.
                Only for discrete actions.
            slots: int64, of the shape of ``obs`` without ``obs_dim``: whose policy each row follows (units of several types); negative for
                a row that counts for nothing. Not needed where the policy reads it from the observation (``spec.slots``).
            sample: Draw from the policy's distribution.
            generator: Source of the draw, on the policy's device; torch's own when None.

        Returns:
            Actions, an array where ``obs`` was none of torch's: int64 of the shape of ``obs`` without ``obs_dim``, or float32 in [-1, 1] of
            that of ``obs`` with ``n_actions`` in place of ``obs_dim``. And the next state.

        Raises:
            UsageError: A shape or a slot does not fit the policy, or it has no distribution to draw from.
        """
        outputs, state = self._outputs(obs, state, slots)
        if self._continuous:
            outputs = outputs.float()
        if avail is not None:
            outputs = self._masked(outputs, avail)
        actions = self._draw(outputs, generator) if sample else self._mode(outputs)
        return actions if isinstance(obs, Tensor) else actions.cpu().numpy(), state

    def outputs(self, obs: Any, state: Tensor | None = None, slots: Any = None) -> tuple[Any, Tensor]:
        """What :meth:`act` chooses by: the net's outputs as they are, of which :mod:`k24.actions` says what they mean.

        Args:
            obs: As for :meth:`act`.
            state: As for :meth:`act`.
            slots: As for :meth:`act`.

        Returns:
            Outputs, of the shape of ``obs`` with ``spec.n_outputs`` in place of ``obs_dim``, an array where ``obs`` was none of torch's;
            and the next state.

        Raises:
            UsageError: A shape or a slot does not fit the policy.
        """
        outputs, state = self._outputs(obs, state, slots)
        return outputs if isinstance(obs, Tensor) else outputs.cpu().numpy(), state

    def q_values(self, obs: Any, state: Tensor | None = None, slots: Any = None) -> tuple[Any, Tensor]:
        """:meth:`outputs` of a policy that chooses by action values.

        Raises:
            UsageError: This one does not, or a shape or a slot does not fit it.
        """
        if self.spec.action != "discrete":
            raise UsageError(f"this policy's outputs mean {self.spec.action} actions and are no action values: use outputs")
        return self.outputs(obs, state, slots)

    def _outputs(self, obs: Any, state: Tensor | None, slots: Any) -> tuple[Tensor, Tensor]:
        x = obs if isinstance(obs, Tensor) else _tensor(obs, np.float32, "obs")
        if x.dtype not in self._dtypes or x.device != self.device:
            x = x.to(self.device, x.dtype if x.dtype in self._dtypes else torch.float32)
        if self._of is not None and slots is None:
            return self._agents_of_slots(x, None, state)
        if slots is not None and (x.ndim == 3 or (self.spec.agent_id and self.spec.slots != "agent" and x.shape[0] == self.spec.n_agents)):
            return self._agents_of_slots(x, _slots(slots, x), state)
        shape = x.shape
        rank = len(shape)
        if slots is not None or not 2 <= rank <= 3 or shape[0] != self._agents or shape[-1] != self._obs_dim:
            return self._mixed_rows(x, state, slots)  # or an error
        rows = shape[1] if rank == 3 else 1
        if state is None:
            state = x.new_zeros(self._slots, rows, self._hidden)
        else:
            state = self._checked_state(state, x, shape[:-1])
            if rank == 2:
                state = state.unsqueeze(1)
        if rank == 2:
            x = x.unsqueeze(1)
        if self.spec.agent_id:
            x = torch.cat((x, self._ids.to(x.dtype).expand(-1, rows, -1)), -1)
        values, state = self._prepared.run(x, state, None)
        return (values, state) if rank == 3 else (values.squeeze(1), state.squeeze(1))

    def _agents_of_slots(self, x: Tensor, slots: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows of agents, each with a slot that is not its agent's index; read from the observation when None."""
        n, d = self.spec.n_agents, self._obs_dim
        if not 2 <= x.ndim <= 3 or x.shape[0] != n or x.shape[-1] != d:
            raise UsageError(f"obs must be [{n}, envs, {d}] or [{n}, {d}] (agents first), got {list(x.shape)}")
        if slots is None:
            assert self._of is not None
            slots = self._of(x)
        if state is not None:
            state = self._checked_state(state, x, x.shape[:-1]).reshape(slots.numel(), self._hidden)
        lead = x.shape[:-1]
        if self.spec.agent_id:
            if self.spec.slots == "agent":  # a row that follows another agent's policy is told that agent's index
                ids = self._ids[slots.clamp(0, self._slots - 1), 0]
            else:
                ids = self._ids.expand(-1, lead[1], -1) if x.ndim == 3 else self._ids[:, 0]
            x = torch.cat((x, ids.to(x.dtype)), -1)
        values, state = self._prepared(x.reshape(slots.numel(), x.shape[-1]), state, slots.reshape(-1))
        return values.view(*lead, self.spec.n_outputs), state.view(*lead, self._hidden)

    def _mixed_rows(self, x: Tensor, state: Tensor | None, slots: Any) -> tuple[Tensor, Tensor]:
        if slots is None:
            if self._agents is None:
                raise UsageError(f"this policy has {self._slots} slots for {self.spec.n_agents} agents: say with slots whose each row is")
            n, d = self._slots, self._obs_dim
            raise UsageError(f"obs must be [{n}, envs, {d}] or [{n}, {d}] (agents first), got {list(x.shape)}")
        slots = _slots(slots, x)
        if tuple(x.shape) != (*slots.shape, self._obs_dim):
            raise UsageError(
                f"with slots, obs must be [rows, {self._obs_dim}] or [{self.spec.n_agents}, envs, {self._obs_dim}], got {list(x.shape)}"
            )
        if state is not None:
            state = self._checked_state(state, x, x.shape[:-1])
        if self.spec.agent_id:
            if self.spec.slots != "agent":
                raise UsageError(f"this policy needs each agent's index: give obs as [{self.spec.n_agents}, envs, {self._obs_dim}]")
            x = torch.cat((x, self._ids[slots.clamp(0, self._slots - 1), 0].to(x.dtype)), -1)
        return self._prepared(x, state, slots)

    def _checked_state(self, state: Tensor, x: Tensor, rows: torch.Size) -> Tensor:
        if not isinstance(state, Tensor) or state.shape[:-1] != rows or state.shape[-1] != self._hidden:
            found = list(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise UsageError(f"state must be the tensor {[*rows, self._hidden]} that the call before returned, got {found}")
        return state if state.dtype is x.dtype and state.device == self.device else state.to(x)

    def _draw(self, outputs: Tensor, generator: torch.Generator | None) -> Tensor:
        # What is not available has an output of -inf by now, and so is never drawn.
        if not isinstance(self._kind, StochasticKind):
            able = ", ".join(name for name, kind in KINDS.items() if kind.stochastic)
            raise UsageError(f"a {self.spec.action} policy has no distribution to sample from, only {able} ones have: leave sample out")
        if generator is not None and generator.device.type != self.device.type:
            raise UsageError(f"the generator is on {generator.device} and the policy on {self.device}: make it there")
        return self._kind.sample(outputs, generator=generator)

    def _masked(self, values: Tensor, avail: Any) -> Tensor:
        if self._continuous:
            raise UsageError(f"avail is for discrete actions, and those of this policy are {self.spec.action}: leave avail out")
        avail = avail if isinstance(avail, Tensor) else _tensor(avail, np.bool_, "avail")
        if avail.shape != values.shape:
            raise UsageError(f"avail must be {list(values.shape)}, got {list(avail.shape)}")
        if avail.dtype is not torch.bool or avail.device != self.device:
            avail = avail.to(self.device, torch.bool)
        return torch.where(avail, values, self._never)

    @cached_property
    def _ids(self) -> Tensor:
        """One-hot index of each agent ``[A, 1, A]``; made when first needed, because it is the one thing here larger than the file."""
        return torch.eye(self.spec.n_agents, dtype=torch.float32, device=self.device)[:, None]


def _tensor(values: Any, dtype: type | None, name: str) -> Tensor:
    """An array as a tensor; copied only where torch could not use its memory."""
    try:
        return torch.from_numpy(np.require(values, dtype, ["C", "W"]))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} must be a tensor or an array of numbers ({error})") from error


def _slots(slots: Any, x: Tensor) -> Tensor:
    """One slot for each row of ``x``."""
    slots = slots if isinstance(slots, Tensor) else _tensor(slots, None, "slots")
    if slots.dtype != torch.int64 or slots.shape != x.shape[:-1]:
        raise UsageError(f"slots must be int64 {list(x.shape[:-1])} for obs {list(x.shape)}, got {slots.dtype} {list(slots.shape)}")
    return slots.to(x.device)


def _device(name: torch.device | str) -> torch.device:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device {name!r} is not known: use cpu, cuda or cuda:<index>") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {str(name)!r} cannot run policies: use cpu, cuda or cuda:<index>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {str(name)!r} was asked for and torch finds {torch.cuda.device_count()} CUDA devices: use cpu")
    return device


__all__ = ["Policy", "PolicySpec", "load_policy", "save_policy"]
