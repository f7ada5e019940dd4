"""The cuSPARSELt backend: 2:4 weights of each slot in NVIDIA's own sparse product, through torch.

Each masked layer is compressed once per slot (``torch.sparse.to_sparse_semi_structured``: half the values and 2 bits of position each)
and run one slot after the other, because cuSPARSELt knows single matrices only, and torch plans every product anew at every call. So it
can pay for few slots, very wide layers and many rows (2048 and more of both), and is a thing to compare with elsewhere.

Widths are padded by zeros to multiples of ``STEP``. Dense layers go through torch, slot by slot as well.

State: never run on a GPU. The tests put a dense stand-in for torch's compression, which checks all but the library itself.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from k24.kernels.net import GRU, TWO_FOUR, Linear, Net, Prepared
from k24.kernels.triton import padded
from k24.sparse.slots import by_segments

# Both sides of a sparse weight must be multiples of it.
STEP = 16


def padded_width(width: int) -> int:
    """The number of columns kept in memory for so many."""
    return -(-width // STEP) * STEP


def compress(weight: Tensor) -> Tensor:
    """A contiguous 2:4 matrix ``[O, I]`` in torch's sparse form."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SparseSemiStructuredTensor is in prototype stage")  # said once, to every user
        return torch.sparse.to_sparse_semi_structured(weight)


class CuSparseLtNet(Prepared):
    """A net whose masked layers are compressed per slot.

    Args:
        net: What to run.
    """

    def __init__(self, net: Net) -> None:
        self.net, self.nbytes = net, 0
        self._layers: dict[int, tuple[list[Tensor], Tensor]] = {}
        for block in net.blocks:
            for layer in (block.input, block.recurrent) if isinstance(block, GRU) else (block,):
                self._layers[id(layer)] = self._lay(layer, 3 if isinstance(block, GRU) else 1)

    def _lay(self, layer: Linear, parts: int) -> tuple[list[Tensor], Tensor]:
        """The weight of each slot that has its own, and the biases ``[S, O]``; counts their bytes."""
        outputs, inputs = padded_width(layer.out_features // parts), padded_width(layer.in_features)
        bias = padded(layer.bias[..., None], parts, outputs, 1)[..., 0].to(layer.weight.dtype).contiguous()
        if layer.codes is None:
            weights = list(padded(layer.weight, parts, outputs, inputs))
            held = sum(w.numel() * w.element_size() for w in weights)
        else:
            masks = (layer.patterns.mask(codes, layer.in_features, layer.weight.dtype) for codes in layer.codes)
            weights = [compress(padded(layer.weight[0] * mask, parts, outputs, inputs)) for mask in masks]
            # Half the values, and 2 bits of position for each of them.
            held = sum(w.numel() // 2 * layer.weight.element_size() + w.numel() // 8 for w in weights)
        self.nbytes += held + bias.numel() * bias.element_size()
        return weights, bias

    def _linear(self, layer: Linear, slot: int, x: Tensor) -> Tensor:
        weights, bias = self._layers[id(layer)]
        y = F.linear(x, weights[slot if len(weights) > 1 else 0], bias[slot if bias.shape[0] > 1 else 0])
        return y.relu_() if layer.relu else y

    def _slot(self, slot: int, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The net of one slot on ``[N, I]`` and ``[N, H]``."""
        net = self.net
        if not x.shape[0]:
            return x.new_zeros(0, net.out_features), h
        y, after = (F.pad(t, (0, padded_width(t.shape[1]) - t.shape[1])) for t in (x, h))
        for block in net.blocks:
            if isinstance(block, GRU):
                xr, xz, xn = self._linear(block.input, slot, y).chunk(3, 1)
                hr, hz, hn = self._linear(block.recurrent, slot, after).chunk(3, 1)
                n = torch.addcmul(xn, torch.sigmoid(xr + hr), hn).tanh_()
                y = after = torch.lerp(n, after, torch.sigmoid(xz + hz))
            else:
                y = self._linear(block, slot, y)
        return y[:, : net.out_features], after[:, : net.hidden]

    @torch.no_grad()
    def run(self, x: Tensor, h: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`~k24.kernels.net.Prepared`."""
        net, kinds = self.net, (x.dtype, h.dtype)
        x, h = x.to(net.dtype), h.to(net.dtype)
        if slots is None:
            results = [self._slot(slot, x[slot], h[slot]) for slot in range(net.n_slots)]
            y, after = (torch.stack(parts) for parts in zip(*results, strict=True))
        else:
            widths = [net.in_features, net.hidden]
            both = by_segments(
                torch.cat([x, h], 1), slots, net.n_slots, lambda slot, rows: torch.cat(self._slot(slot, *rows.split(widths, 1)), 1)
            )
            y, after = both.split([net.out_features, net.hidden], 1)
        return y.to(kinds[0]), after.to(kinds[1])


def version() -> str:
    """The version of cuSPARSELt for people, such as ``0.8.1``; ``none`` where torch has none. 0.8.0 is slow on Hopper."""
    library = getattr(torch.backends, "cusparselt", None)
    number = None if library is None or not library.is_available() else library.version()
    return "none" if number is None else f"{number // 1000}.{number // 100 % 10}.{number % 100}"


def unavailable(net: Net) -> str | None:
    """Why cuSPARSELt cannot run this net here; None if it can."""
    if net.device.type != "cuda":
        return f"it is on {net.device}: move it to a CUDA device"
    major, minor = torch.cuda.get_device_capability(net.device)
    if major < 8:
        return f"{net.device} has compute capability {major}.{minor}: 2:4 products need 8.0 or higher"
    library = getattr(torch.backends, "cusparselt", None)
    if library is None or not library.is_available():
        return f"torch {torch.__version__} comes without cuSPARSELt: install a CUDA build of torch for Linux or Windows"
    if not net.masked:
        return "none of its layers is masked: use a dense backend"
    for layer in net.linears:
        if layer.weight.dtype not in (torch.float16, torch.bfloat16):
            return f"its weights are {str(layer.weight.dtype).removeprefix('torch.')}: use float16 or bfloat16"
        if layer.codes is not None and layer.patterns != TWO_FOUR:
            return f"a layer has the pattern {layer.patterns}: the hardware knows 2:4 only"
    return None
