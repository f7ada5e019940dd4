"""The definition of correct: plain torch, one slot after the other, with autograd.

Weights are taken to the type of the inputs, so float64 inputs give a float64 result. Every other backend is compared with this one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from k24.kernels.net import GRU, Linear, Net, Prepared
from k24.sparse.gru import gru_step


def run_slot(net: Net, slot: int, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The net of one slot.

    Args:
        net: The net.
        slot: Which slot.
        x: ``[N, I]``.
        h: ``[N, H]``.

    Returns:
        ``[N, O]`` and ``[N, H]``.
    """

    def own(values: Tensor) -> Tensor:
        return values[slot if values.shape[0] > 1 else 0]

    def weight(layer: Linear) -> Tensor:
        dense = own(layer.weight).to(x.dtype)
        return dense if layer.codes is None else dense * layer.patterns.mask(own(layer.codes), layer.in_features, x.dtype)

    def linear(layer: Linear, x: Tensor) -> Tensor:
        y = F.linear(x, weight(layer), own(layer.bias).to(x.dtype))
        return F.relu(y) if layer.relu else y

    for block in net.blocks:
        if isinstance(block, GRU):
            recurrent = block.recurrent
            h = gru_step(linear(block.input, x)[None], h[None], weight(recurrent)[None], own(recurrent.bias).to(x.dtype)[None])[0]
            x = h
        else:
            x = linear(block, x)
    return x, h


def run(net: Net, x: Tensor, h: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The net on blocks ``[A, N, I]``, or on mixed rows ``[N, I]``; see :class:`~k24.kernels.net.Prepared`."""
    if slots is None:
        results = [run_slot(net, slot, x[slot], h[slot]) for slot in range(net.n_slots)]
        return torch.stack([y for y, _ in results]), torch.stack([after for _, after in results])
    y, after = x.new_zeros(x.shape[0], net.out_features), h.new_zeros(h.shape)
    for slot in range(net.n_slots):
        rows = (slots == slot).nonzero()[:, 0]
        if rows.numel():
            out, state = run_slot(net, slot, x[rows], h[rows])
            y, after = y.index_copy(0, rows, out), after.index_copy(0, rows, state)
    return y, after


class Reference(Prepared):
    """The reference as a backend: shared weights and codes as they are, masks expanded at every call."""

    holds_net = True

    def __init__(self, net: Net) -> None:
        self.net = net
        held = [t for layer in net.linears for t in (layer.weight, layer.bias, layer.codes) if t is not None]
        self.nbytes = sum(t.numel() * t.element_size() for t in held)

    def run(self, x: Tensor, h: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :func:`run`."""
        return run(self.net, x, h, slots)


def unavailable(net: Net) -> str | None:
    """Never unavailable."""
    return None
