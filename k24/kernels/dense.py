"""Masks multiplied in once, then torch's own dense products: what 2:4 has to beat.

Two forms: ``bmm``, one batched product per layer, and ``linear``, one product per slot. Which is faster depends on sizes and on the
library behind torch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from k24.kernels.net import GRU, Linear, Net, Prepared
from k24.sparse.slots import apply_slots


class Dense(Prepared):
    """Dense weights per slot.

    On a CPU the weights are held in float32, which its matrix products want; elsewhere in the type they came in.

    Args:
        net: What to run.
        per_slot: One product per slot instead of one batched product.
    """

    def __init__(self, net: Net, per_slot: bool = False) -> None:
        self._dtype = torch.float32 if net.device.type == "cpu" else net.dtype
        self._held = net.dense().map(lambda layer: replace(layer, weight=self._as_held(layer.weight), bias=self._as_held(layer.bias)))
        self.net, self.per_slot = net.to("meta"), per_slot
        self.nbytes = sum(t.nbytes for layer in self._held.linears for t in (layer.weight, layer.bias))

    def _as_held(self, values: Tensor) -> Tensor:
        return values.detach().to(self._dtype).contiguous()

    def _linear(self, layer: Linear, x: Tensor, slot: int | None) -> Tensor:
        weight, bias = layer.weight, layer.bias
        if slot is not None:
            y = F.linear(x[0], weight[slot if weight.shape[0] > 1 else 0], bias[slot if bias.shape[0] > 1 else 0])[None]
        elif self.per_slot and x.shape[0] > 1:
            y = torch.stack([self._linear(layer, x[a : a + 1], a)[0] for a in range(x.shape[0])])
            return y
        else:
            y = apply_slots(x, weight, bias.expand(weight.shape[0], -1) if weight.shape[0] > 1 else bias)
        return y.relu_() if layer.relu else y

    def _blocks(self, x: Tensor, h: Tensor, slot: int | None = None) -> tuple[Tensor, Tensor]:
        for block in self._held.blocks:
            if isinstance(block, GRU):
                gates, before = self._linear(block.input, x, slot), self._linear(block.recurrent, h, slot)
                width = 2 * block.hidden
                r, z = (gates[..., :width] + before[..., :width]).sigmoid_().chunk(2, -1)
                n = torch.addcmul(gates[..., width:], r, before[..., width:]).tanh_()
                x = h = torch.lerp(n, h, z)
            else:
                x = self._linear(block, x, slot)
        return x, h

    @torch.no_grad()
    def run(self, x: Tensor, h: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`~k24.kernels.net.Prepared`."""
        kind = x.dtype
        x, h = x.to(self._dtype), h.to(self._dtype)
        if slots is None:
            y, after = self._blocks(x, h)
            return y.to(kind), after.to(kind)
        order = slots.argsort(stable=True)
        counts = torch.bincount(slots.clamp_min(-1) + 1, minlength=self.net.n_slots + 1).tolist()
        start = counts[0]
        y, after = x.new_zeros(x.shape[0], self.net.out_features), torch.zeros_like(h)
        for slot, count in enumerate(counts[1:]):
            rows = order[start : start + count]
            start += count
            if count:
                out, state = self._blocks(x[rows][None], h[rows][None], slot)
                y[rows], after[rows] = out[0], state[0]
        return y.to(kind), after.to(kind)


def unavailable(net: Net) -> str | None:
    """Never unavailable."""
    return None
