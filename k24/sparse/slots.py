"""Products over slots: one block of rows per slot, or rows of mixed slots.

Shapes: ``A`` slots, ``N`` rows, ``I`` inputs, ``O`` outputs. No weight is ever gathered per row: ``[N, O, I]`` would be most of the work.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from k24.errors import UsageError

# Running a net once more for another slot costs about as much as this many rows.
_WORTH_A_RUN = 128

# Which of its weights a layer is asked for: those of this training step, of behaviour and targets, of a fresh draw, or of deployment.
Phase = Literal["train", "act", "sampled", "deploy"]


class SlotWeights(NamedTuple):
    """What a layer multiplies with, made once per step and used for all its rows.

    Attributes:
        weight: ``[A, O, I]``, or ``[1, O, I]`` where all slots share it.
        bias: ``[A, O]`` or ``[1, O]``.
        pi: Pattern distribution ``[P, A, O, G]`` that the diversity loss reads; None for layers without one.
        extra: What else a scheme's loss needs of this step; None for most.
    """

    weight: Tensor
    bias: Tensor
    pi: Tensor | None = None
    extra: Tensor | None = None


class SlotRule(NamedTuple):
    """Which slot, and so which mask, each row uses.

    Attributes:
        n_slots: Slots (A).
        of: Takes observations ``[agents, ..., D]`` and returns each row's slot, int64 ``[agents, ...]``, negative for a row of none.
            Without it the slot is the agent's index.
        unit_types: The features that :func:`by_unit_type` reads; None for any other rule.
    """

    n_slots: int
    of: Callable[[Tensor], Tensor] | None = None
    unit_types: tuple[int, int] | None = None


def by_unit_type(start: int, stop: int) -> SlotRule:
    """One slot per unit type, read from the observation features ``start`` to ``stop`` that say it one-hot; all zero is a row of none."""

    def of(obs: Tensor) -> Tensor:
        most, slot = obs[..., start:stop].max(-1)
        return torch.where(most > 0, slot, -1)

    return SlotRule(stop - start, of, (start, stop))


def apply_slots(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``y[a] = x[a] @ W[a].T + b[a]``.

    Args:
        x: ``[A, N, I]``.
        weight: ``[A, O, I]``, or ``[1, O, I]`` for one weight for all slots.
        bias: ``[A, O]`` or ``[1, O]``.

    Returns:
        ``[A, N, O]``.
    """
    if weight.shape[0] == 1 and x.shape[0] > 1:
        y = F.linear(x, weight[0])
        return y + bias[:, None] if bias.shape[0] > 1 else y.add_(bias[0])
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


class Pack(NamedTuple):
    """Sequences of one slot without padding: the longest first, and all their rows of a step together, step after step.

    Attributes:
        slot: Whose they are.
        sequences: int64 ``[n]``, the number of each sequence.
        counts: How many of them have a row at step 0, 1, …; never more than at the step before.
        at: int64 ``[sum(counts)]``, the number of each row.
    """

    slot: int
    sequences: Tensor
    counts: list[int]
    at: Tensor


def pack_by_slot(own: Tensor, alive: Tensor, n_slots: int) -> tuple[list[Pack], Tensor]:
    """Sorts sequences by slot, and leaves out the rows that do not count.

    Args:
        own: int64 ``[A, N]``, the slot of each sequence; negative for one of none.
        alive: bool ``[A, T, N]``, the rows that count: for each sequence those up to some step.
        n_slots: Slots.

    Returns:
        One pack for each slot that has any, and where each row's result is among those of all packs: int64 ``[A * T * N]``, 0 for a row
        that does not count.
    """
    a, t, n = alive.shape
    lengths, own = alive.sum(1).flatten(), own.flatten()
    order = (own * (t + 1) - lengths).argsort(stable=True)
    none, *counts = torch.bincount(own + 1, minlength=n_slots + 1).tolist()
    moments = torch.arange(t, device=own.device)[:, None]
    packs = []
    for slot, sequences in enumerate(order[none:].split(counts)):
        if len(sequences):
            here = moments[: int(lengths[sequences[0]])] < lengths[sequences]
            # Step t of sequence (a, n) is row (a·T + t)·N + n.
            rows = sequences // n * (t * n) + sequences % n + moments[: len(here)] * n
            packs.append(Pack(slot, sequences, here.sum(1).tolist(), rows[here]))
    back = own.new_zeros(a * t * n)
    if packs:
        at = torch.cat([pack.at for pack in packs])
        back.index_copy_(0, at, torch.arange(len(at), device=own.device))
    return packs, back


def sort_by_slot(own: Tensor, n_slots: int) -> tuple[list[tuple[list[int], Tensor]], Tensor]:
    """Sorts single rows by slot, into one block per slot, or into one for all where filling up costs less than running each by itself.

    Args:
        own: int64 ``[rows]``, the slot of each row; negative for one of none.
        n_slots: Slots.

    Returns:
        Blocks: the slots, and the number of each row ``[slots, rows]``, where lines that are too short are filled up with any. And where
        each row's result is among those of all blocks, int64 ``[rows]``, 0 for a row of no slot.
    """
    none, *all_counts = torch.bincount(own + 1, minlength=n_slots + 1).tolist()
    present = [slot for slot, count in enumerate(all_counts) if count]
    counts = [all_counts[slot] for slot in present]
    back = torch.zeros_like(own)
    if not present:
        return [], back
    longest, total = max(counts), sum(counts)
    order = own.argsort(stable=True)[none:]
    place = torch.arange(total, device=own.device)
    if len(present) > 1 and len(present) * longest - total <= _WORTH_A_RUN * len(present):
        gaps = torch.tensor([k * longest - start for k, start in enumerate(accumulate([0, *counts[:-1]]))], device=own.device)
        place = place + gaps.repeat_interleave(torch.tensor(counts, device=own.device), output_size=total)
        blocks = [(present, order.new_zeros(len(present) * longest).index_copy_(0, place, order).view(-1, longest))]
    else:
        blocks = [([slot], rows[None]) for slot, rows in zip(present, order.split(counts), strict=True)]
    return blocks, back.index_copy_(0, order, place)


def by_segments(x: Tensor, slots: Tensor, n_slots: int, function: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Runs rows of mixed slots, slot by slot.

    Args:
        x: ``[N, ...]``.
        slots: int64 ``[N]``; a negative slot marks a row that belongs to none, whose result is zero.
        n_slots: A.
        function: Takes a slot and its rows, returns ``[rows, O]``.

    Returns:
        ``[N, O]`` in the order of ``x``.
    """
    if slots.shape != x.shape[:1] or slots.dtype != torch.int64:
        raise UsageError(f"slots must be int64 of shape {tuple(x.shape[:1])}, got {slots.dtype} {tuple(slots.shape)}")
    if slots.numel() and int(slots.max()) >= n_slots:
        raise UsageError(f"slot {int(slots.max())} does not exist: this layer has the slots 0..{n_slots - 1}")
    order = slots.argsort(stable=True)
    counts = torch.bincount(slots.clamp_min(-1) + 1, minlength=n_slots + 1).tolist()
    sorted_x = x.index_select(0, order)
    parts, start = [], counts[0]
    for slot in range(n_slots):
        parts.append(function(slot, sorted_x[start : start + counts[slot + 1]]))
        start += counts[slot + 1]
    result = torch.cat([parts[0].new_zeros(counts[0], *parts[0].shape[1:]), *parts])
    return torch.empty_like(result).index_copy(0, order, result)
