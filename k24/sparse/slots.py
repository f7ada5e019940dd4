"""Products over slots: one block of rows per slot, or rows of mixed slots.

Shapes: ``A`` slots, ``N`` rows, ``I`` inputs, ``O`` outputs. No weight is ever gathered per row: ``[N, O, I]`` would be most of the work.
"""

from __future__ import annotations

from collections.abc import Callable
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


class Block(NamedTuple):
    """Sequences of rows that are run together, one slot to each line.

    Attributes:
        slots: Whose the lines are.
        sequences: int64 ``[slots, rows]``, the number of each sequence; lines that are too short are filled up with any.
        real: bool ``[slots, rows]``, those that are not filling.
        at: int64 ``[slots * T * rows]``, the number of each row, step after step within a line.
    """

    slots: list[int]
    sequences: Tensor
    real: Tensor
    at: Tensor


class Sorted(NamedTuple):
    """Rows sorted by slot, and the way back.

    Attributes:
        blocks: What is run; none where no row has a slot.
        back: int64 ``[A * T * N]``, where each row's result is among those of all blocks; anywhere for a row of no slot.
        last_back: int64 ``[A * N]``, the same for results of a whole sequence.
    """

    blocks: list[Block]
    back: Tensor
    last_back: Tensor


def sort_by_slot(own: Tensor, steps: int, n_slots: int) -> Sorted:
    """Sorts sequences by slot, into one block per slot, or into one for all where filling up costs less than running each by itself.

    Args:
        own: int64 ``[A, N]``, the slot of each sequence; negative for one of none.
        steps: Steps of a sequence (T). Rows come as ``[A, T, N]``.
        n_slots: Slots.

    Raises:
        UsageError: A slot does not exist.
    """
    (a, n), device, own = own.shape, own.device, own.flatten()
    none, *all_counts = torch.bincount(own.clamp_min(-1) + 1, minlength=n_slots + 1).tolist()
    if len(all_counts) > n_slots:
        raise UsageError(f"slot {len(all_counts) - 1} does not exist: there are the slots 0 to {n_slots - 1}")
    present = [slot for slot, count in enumerate(all_counts) if count]
    counts = [all_counts[slot] for slot in present]
    if not present:
        return Sorted([], own, own)
    longest, total = max(counts), sum(counts)
    together = len(present) > 1 and (len(present) * longest - total) * steps <= _WORTH_A_RUN * len(present)
    order = own.argsort(stable=True)[none:]
    sizes = torch.tensor(counts, device=device)
    line = torch.arange(len(present), device=device).repeat_interleave(sizes, output_size=total)
    before = (sizes.cumsum(0) - sizes)[line]
    place = torch.arange(total, device=device) - before
    if together:
        width = torch.full_like(line, longest)
        row = line * longest + place
        filled = order.new_zeros(len(present) * longest).index_copy_(0, row, order)
        lines = [(present, filled.view(-1, longest), torch.arange(longest, device=device) < sizes[:, None])]
    else:
        width, row = sizes[line], before + place
        lines = [
            ([slot], one[None], torch.ones_like(one[None], dtype=torch.bool))
            for slot, one in zip(present, order.split(counts), strict=True)
        ]
    moments = torch.arange(steps, device=device)[:, None]
    # Step t of sequence (a, n) is row (a·T + t)·N + n.
    blocks = [
        Block(slots, sequences, real, ((sequences // n * (steps * n) + sequences % n)[:, None] + moments * n).flatten())
        for slots, sequences, real in lines
    ]
    # A line's results stand together, step after step: what came before it, its own steps so far, and the place in this one.
    result = (row - place) * steps + moments * width + place
    back = own.new_zeros(steps, a * n).index_copy_(1, order, result).view(steps, a, n).transpose(0, 1).flatten()
    return Sorted(blocks, back, own.new_zeros(a * n).index_copy_(0, order, row))


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
