# mypy: disable-error-code="assignment,misc"
# Kernels are Triton's language, in which a loop may make a tuple longer.
"""Products of masked weights, in Triton: masks as bits over one shared weight.

A slot's weight ``W ∘ M_a`` is never in memory. ``W [O, I]`` is held once, and each slot adds one bit per weight. A program loads a tile of
``W`` once, keeps what the bits of each of its slots keep, in registers, and multiplies with the rows of that slot.

Layouts::

    weight  [O, I]             one for all slots where there are bits, else [S, O, I]
    bits    [S, I / 32, O]     int32; bit j of word (k, o) is the mask of weight (o, 32k + j)
    x, y    [rows, I], [rows, O]
    table   [entries, 3]       int32 (slot, first row, end of the slot's rows): which rows belong together

``O`` and ``I`` come padded to a :func:`padded_width`, with weights and bits of zero: no column needs a guard, and padded outputs are
zeros, which is what the next layer must find in its padded inputs. The words of one step along ``I`` lie side by side along ``O``, so a
warp reads them in one piece, and each thread finds those of the rows of ``W`` that it holds.

The tile is ``[BN outputs, BB rows]``: weights are the first operand, which tensor cores take from registers, and the few rows of small
batches lie along the side that may be small (8 or 16, where the other is 64). An *entry* of the table is up to BB rows of one slot; a
program takes SLOTS entries and reads ``W`` once for all of them. Consecutive programs share a tile of ``W`` (slots run fastest), so what
is not shared inside a program is found in the L2 cache.

Two kernels multiply: :func:`product` with tensor cores (float32: plain fused multiply-adds, no TF32), and :func:`product_few` for at most
``FEW`` rows a slot, where a tensor core would mostly multiply padding.

State: results are checked in Triton's interpreter (TRITON_INTERPRET=1), and every tile that :func:`choose_tile` gives compiles to machine
code for compute capability 8.0 and 9.0: masks are applied in registers between shared memory and the tensor cores, weights are loaded
16 bytes at a time, at most 16 bytes a thread spill. Nothing here has run on a GPU: speed is unmeasured, the tiles are reasoned, not tuned.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows per slot up to which a product without tensor cores is chosen.
FEW = 4
# A program takes fewer slots where there would be fewer programs than this, about two for each multiprocessor of a large GPU.
ENOUGH_PROGRAMS = 256
# So many neighbours share one tile of W before the next one's turn: keeps the rows of a large batch in the L2 cache too.
CHUNK = 64
# Rows and hidden units of one program of the gates.
GATES = (16, 64)


@triton.jit
def _place(n_groups, n_tiles, CHUNK: tl.constexpr):
    """Which group of table entries and which tile of outputs this program computes."""
    pid = tl.program_id(0)
    first = pid // (CHUNK * n_tiles) * CHUNK
    width = tl.minimum(n_groups - first, CHUNK)
    within = pid - first * n_tiles
    return first + within % width, within // width


@triton.jit(do_not_specialize=["n_groups"])  # changes with the rows, and must not bring a compilation each time
def product(
    x_ptr,
    w_ptr,
    bits_ptr,
    bias_ptr,
    y_ptr,
    table_ptr,
    n_groups,
    inputs,
    outputs,
    w_stride,
    bits_stride,
    bias_stride,
    MASKED: tl.constexpr,
    RELU: tl.constexpr,
    SLOTS: tl.constexpr,
    BN: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    CHUNK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``y = act((W ∘ M) x + b)`` for BN outputs and SLOTS entries of BB rows each; strides are those between slots, 0 where shared."""
    group, tile = _place(n_groups, outputs // BN, CHUNK)
    n = tile * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    word = tl.arange(0, BK // 32)
    bit = tl.arange(0, 32)
    slots = ()
    rows = ()
    live = ()
    sums = ()
    any_live = 0
    for s in tl.static_range(SLOTS):
        entry = table_ptr + (group * SLOTS + s) * 3
        first = tl.load(entry + 1)
        end = tl.load(entry + 2)
        row = first + tl.arange(0, BB)
        slots += (tl.load(entry).to(tl.int64),)
        rows += (row.to(tl.int64),)
        live += (row < end,)
        sums += (tl.zeros((BN, BB), tl.float32),)
        any_live += tl.maximum(end - first, 0)
    w_ptrs = w_ptr + n[:, None].to(tl.int64) * inputs + k[None, :]
    if not MASKED:
        tl.static_assert(SLOTS == 1)
        w_ptrs += slots[0] * w_stride
    # An entry without rows costs nothing: mixed rows bring as many entries as there could be, most of them empty.
    for k0 in range(0, tl.where(any_live > 0, inputs, 0), BK):
        w = tl.load(w_ptrs + k0)
        after = ()
        for s in tl.static_range(SLOTS):
            x = tl.load(x_ptr + rows[s][None, :] * inputs + (k0 + k)[:, None], mask=live[s][None, :], other=0.0)
            kept = w
            if MASKED:
                words = tl.load(bits_ptr + slots[s] * bits_stride + n[:, None] + (k0 // 32 + word)[None, :] * outputs)
                keep = tl.reshape((words[:, :, None] >> bit[None, None, :]) & 1, (BN, BK))
                kept = tl.where(keep != 0, w, 0.0)
            if UPCAST:  # the interpreter's dot takes bfloat16 for integers
                kept = kept.to(tl.float32)
                x = x.to(tl.float32)
            after += (tl.dot(kept, x, sums[s], input_precision="ieee"),)
        sums = after
    for s in tl.static_range(SLOTS):
        y = sums[s] + tl.load(bias_ptr + slots[s] * bias_stride + n).to(tl.float32)[:, None]
        if RELU:
            y = tl.maximum(y, 0.0)
        tl.store(y_ptr + rows[s][None, :] * outputs + n[:, None], y.to(y_ptr.dtype.element_ty), mask=live[s][None, :])


@triton.jit(do_not_specialize=["n_groups"])
def product_few(
    x_ptr,
    w_ptr,
    bits_ptr,
    bias_ptr,
    y_ptr,
    table_ptr,
    n_groups,
    inputs,
    outputs,
    bits_stride,
    bias_stride,
    RELU: tl.constexpr,
    SLOTS: tl.constexpr,
    BN: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The same as :func:`product` for masked weights and few rows: sums of products, reduced along the inputs at the end.

    Axes are [output, word, bit]: a thread holds the same columns of ``W`` and of every row, and nothing goes through shared memory.
    """
    group, tile = _place(n_groups, outputs // BN, CHUNK)
    n = tile * BN + tl.arange(0, BN)
    word = tl.arange(0, BK // 32)
    bit = tl.arange(0, 32)[None, None, :]
    column = word[None, :, None] * 32 + bit
    w_ptrs = w_ptr + n[:, None, None].to(tl.int64) * inputs + column
    x_ptrs = x_ptr + (n * 0)[:, None, None] + column
    bits_ptrs = bits_ptr + n[:, None] + word[None, :] * outputs
    slots = ()
    firsts = ()
    ends = ()
    sums = ()
    for s in tl.static_range(SLOTS):
        entry = table_ptr + (group * SLOTS + s) * 3
        slots += (tl.load(entry).to(tl.int64),)
        firsts += (tl.load(entry + 1),)
        ends += (tl.load(entry + 2),)
        for _ in tl.static_range(BB):
            sums += (tl.zeros((BN, BK // 32, 32), tl.float32),)
    for k0 in range(0, inputs, BK):
        w = tl.load(w_ptrs + k0).to(tl.float32)
        after = ()
        for s in tl.static_range(SLOTS):
            words = tl.load(bits_ptrs + slots[s] * bits_stride + k0 // 32 * outputs)
            kept = tl.where(((words[:, :, None] >> bit) & 1) != 0, w, 0.0)
            for b in tl.static_range(BB):
                # Rows past the end read one that exists, and are not stored.
                row = tl.maximum(tl.minimum(firsts[s] + b, ends[s] - 1), 0).to(tl.int64)
                after += (sums[s * BB + b] + kept * tl.load(x_ptrs + row * inputs + k0).to(tl.float32),)
        sums = after
    for s in tl.static_range(SLOTS):
        bias = tl.load(bias_ptr + slots[s] * bias_stride + n).to(tl.float32)
        for b in tl.static_range(BB):
            y = tl.sum(tl.sum(sums[s * BB + b], axis=2), axis=1) + bias
            if RELU:
                y = tl.maximum(y, 0.0)
            row = firsts[s] + b
            tl.store(y_ptr + row.to(tl.int64) * outputs + n, y.to(y_ptr.dtype.element_ty), mask=(n >= 0) & (row < ends[s]))


@triton.jit(do_not_specialize=["n_rows"])
def gru_gates(gates_x_ptr, gates_h_ptr, h_ptr, out_ptr, n_rows, hidden, BR: tl.constexpr, BH: tl.constexpr):
    """All that follows the two products of a GRU, element by element: ``[rows, 3H]`` twice and ``[rows, H]`` to the next ``[rows, H]``."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BH + tl.arange(0, BH))[None, :]
    live = (row < n_rows) & (column < hidden)
    gate = row * (3 * hidden) + column
    xr = tl.load(gates_x_ptr + gate, mask=live, other=0.0).to(tl.float32)
    xz = tl.load(gates_x_ptr + gate + hidden, mask=live, other=0.0).to(tl.float32)
    xn = tl.load(gates_x_ptr + gate + 2 * hidden, mask=live, other=0.0).to(tl.float32)
    hr = tl.load(gates_h_ptr + gate, mask=live, other=0.0).to(tl.float32)
    hz = tl.load(gates_h_ptr + gate + hidden, mask=live, other=0.0).to(tl.float32)
    hn = tl.load(gates_h_ptr + gate + 2 * hidden, mask=live, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + row * hidden + column, mask=live, other=0.0).to(tl.float32)
    n = 2 * tl.sigmoid(2 * (xn + tl.sigmoid(xr + hr) * hn)) - 1  # tanh
    after = n + tl.sigmoid(xz + hz) * (h - n)
    tl.store(out_ptr + row * hidden + column, after.to(out_ptr.dtype.element_ty), mask=live)


# Triton looks at TRITON_INTERPRET when a kernel is defined, so this is settled for the life of the process.
INTERPRETED = not isinstance(product, triton.JITFunction)


class Tile(NamedTuple):
    """What one program computes.

    Attributes:
        few: Whether :func:`product_few` computes it.
        outputs: BN.
        rows: BB, rows of one entry.
        inputs: BK, inputs per step.
        slots: Entries per program.
        warps: Warps per program.
        stages: Steps whose loads are under way at once.
    """

    few: bool
    outputs: int
    rows: int
    inputs: int
    slots: int
    warps: int
    stages: int


def padded_width(width: int) -> int:
    """The number of columns kept in memory for so many: 32, or a multiple of 64."""
    return 32 if width <= 32 else -(-width // 64) * 64


def entry_rows(dtype: torch.dtype, rows: int) -> int:
    """Rows of one entry for :func:`product`, given the rows per slot; independent of a layer's widths."""
    return min(max(triton.next_power_of_2(rows), 16), 64 if dtype == torch.float32 else 128)


def choose_tile(dtype: torch.dtype, inputs: int, outputs: int, slots: int, rows: int, mixed: bool) -> Tile:
    """Chooses by shape alone, so that the same call always runs the same code.

    Args:
        dtype: Type of the weights.
        inputs: Padded I.
        outputs: Padded O.
        slots: Slots that have rows.
        rows: Rows per slot, on average.
        mixed: Whether the table is one of mixed rows, made on the device: entries of :func:`entry_rows`, one per program.
    """

    def sharing(most: int, entries: int, bn: int) -> int:
        """The most entries per program, a power of two, that leave enough programs and no program half empty."""
        while most > 1 and (most > entries or triton.cdiv(entries, most) * (outputs // bn) < ENOUGH_PROGRAMS):
            most //= 2
        return most

    if rows <= FEW and not mixed:
        bb = triton.next_power_of_2(rows)
        bk = next(width for width in (256, 128, 64, 32) if inputs % width == 0)
        bn = 1024 // bk
        return Tile(True, bn, bb, bk, sharing(8 // bb, slots, bn), 4, 1)
    short = dtype != torch.float32
    bb = entry_rows(dtype, rows)
    bn = next(width for width in ((128, 64, 32) if bb == 128 else (64, 32)) if outputs % width == 0)
    bk = 64 if short and inputs % 64 == 0 else 32
    entries = slots * triton.cdiv(rows, bb)
    # Float32 accumulators of several slots spill.
    taken = sharing(max(64 // bb, 1), entries, bn) if short and not mixed else 1
    return Tile(False, bn, bb, bk, taken, 8 if bn == 128 else 4, 3)


def launch_product(x: Tensor, weight: Tensor, bits: Tensor | None, bias: Tensor, y: Tensor, table: Tensor, tile: Tile, relu: bool) -> None:
    """Runs the product that a tile stands for.

    Args:
        x: ``[rows, I]``, contiguous, padded columns zero.
        weight: ``[S, O, I]``; ``S`` is 1 where there are bits.
        bits: int32 ``[S, I / 32, O]``, or None.
        bias: ``[S, O]``.
        y: ``[rows, O]``, written where the table has rows.
        table: int32 ``[entries, 3]``, entries a multiple of ``tile.slots``.
        tile: What a program computes.
        relu: Whether ReLU follows.
    """
    _, outputs, inputs = weight.shape
    groups = table.shape[0] // tile.slots

    def stride(values: Tensor | None) -> int:
        return 0 if values is None or values.shape[0] == 1 else values.stride(0)

    shape = {"SLOTS": tile.slots, "BN": tile.outputs, "BB": tile.rows, "BK": tile.inputs, "CHUNK": CHUNK}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    grid = (groups * (outputs // tile.outputs),)
    if tile.few:
        pointers = (x, weight, bits, bias, y, table)
        product_few[grid](*pointers, groups, inputs, outputs, stride(bits), stride(bias), RELU=relu, **shape, **options)
    else:
        pointers = (x, weight, table if bits is None else bits, bias, y, table)
        strides = (stride(weight), stride(bits), stride(bias))
        flags = {"MASKED": bits is not None, "RELU": relu, "UPCAST": INTERPRETED}
        product[grid](*pointers, groups, inputs, outputs, *strides, **flags, **shape, **options)


def launch_gates(gates_x: Tensor, gates_h: Tensor, h: Tensor) -> Tensor:
    """The next hidden state ``[rows, H]`` from ``[rows, 3H]``, ``[rows, 3H]`` and ``[rows, H]``, all contiguous."""
    after = torch.empty_like(h)
    rows, hidden = h.shape
    grid = (triton.cdiv(rows, GATES[0]), triton.cdiv(hidden, GATES[1]))
    gru_gates[grid](gates_x, gates_h, h, after, rows, hidden, BR=GATES[0], BH=GATES[1], num_warps=4)
    return after
