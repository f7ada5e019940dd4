"""The cuSPARSELt backend with torch's compression replaced by a dense stand-in: all but the library itself, without a GPU."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from k24.errors import UsageError
from k24.kernels import GRU, Linear, Net, prepare, reference
from k24.kernels import cusparselt as backend
from k24.sparse.patterns import PatternSet


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes only what cuSPARSELt takes, and multiplies densely."""

    def compress(weight: Tensor) -> Tensor:
        assert weight.ndim == 2 and weight.is_contiguous() and weight.dtype in (torch.float16, torch.bfloat16)
        assert all(side % 16 == 0 for side in weight.shape)
        assert (weight.unflatten(1, (-1, 4)) != 0).sum(-1).max() <= 2, "more than two of four"
        warnings.warn("The PyTorch API of SparseSemiStructuredTensor is in prototype stage and will change", UserWarning, stacklevel=2)
        return weight

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", compress)


def masked(inputs: int, outputs: int, slots: int, relu: bool = False, dtype: torch.dtype = torch.bfloat16, pattern: str = "2:4") -> Linear:
    patterns = PatternSet.parse(pattern)
    codes = (torch.rand(slots, outputs, patterns.groups(inputs), patterns.n_patterns) * patterns.legal(inputs).T).argmax(-1).to(torch.uint8)
    weight = torch.randn(1, outputs, inputs) / inputs**0.5
    return Linear(weight.to(dtype), torch.randn(slots, outputs), codes, patterns, relu)


def net_of(slots: int, dtype: torch.dtype = torch.bfloat16) -> Net:
    dense = Linear((torch.randn(slots, 20, 20) / 20**0.5).to(dtype), torch.randn(slots, 20))
    gru = GRU(masked(20, 60, slots, dtype=dtype), masked(20, 60, slots, dtype=dtype))
    return Net((masked(13, 20, slots, True, dtype), gru, dense, masked(20, 5, slots, dtype=dtype)), slots)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_blocks_and_mixed_rows_are_the_references(rows: int, dtype: torch.dtype) -> None:
    net = net_of(3, dtype)
    prepared = backend.CuSparseLtNet(net)
    x, h = torch.randn(3, rows, 13).to(dtype), torch.randn(3, rows, 20).to(dtype)
    slots = torch.arange(3 * rows) % 3 - 1
    for operands in ((x, h, None), (x.flatten(0, 1), h.flatten(0, 1), slots)):
        got = prepared(*operands)
        wanted = reference.run(net, operands[0].double(), operands[1].double(), operands[2])
        for one, other in zip(got, wanted, strict=True):
            assert one.shape == other.shape and one.dtype == dtype
            if other.numel():
                assert (one.double() - other).abs().max() <= 8 * torch.finfo(dtype).eps * other.abs().max()
    y, after = prepared(x.flatten(0, 1), h.flatten(0, 1), slots)
    assert not y[slots < 0].any() and not after[slots < 0].any()


def test_memory_is_half_the_values_and_their_positions() -> None:
    prepared = backend.CuSparseLtNet(Net((masked(64, 32, 3),), 3))
    assert prepared.nbytes == 3 * (64 * 32 // 2 * 2 + 64 * 32 // 8) + 3 * 32 * 2


def test_unavailable_without_a_gpu() -> None:
    with pytest.raises(UsageError, match=r"backend 'cusparselt' cannot run this net here: it is on cpu: move it to a CUDA device"):
        prepare(net_of(2), "cusparselt")


def test_unavailable_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    capability, has = [9, 0], [True]
    monkeypatch.setattr(Net, "device", property(lambda self: torch.device("cuda:0")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    monkeypatch.setattr(torch.backends, "cusparselt", SimpleNamespace(is_available=lambda: has[0], version=lambda: 801))
    assert backend.unavailable(net_of(2)) is None
    assert backend.version() == "0.8.1"
    assert "its weights are float32: use float16 or bfloat16" in str(backend.unavailable(net_of(2, torch.float32)))
    assert "pattern 1:4" in str(backend.unavailable(Net((masked(8, 4, 2, pattern="1:4"),), 2)))
    assert "none of its layers is masked" in str(backend.unavailable(net_of(2).dense()))
    has[0] = False
    assert "without cuSPARSELt" in str(backend.unavailable(net_of(2)))
    assert backend.version() == "none"
    capability[:] = 7, 5
    assert "compute capability 7.5" in str(backend.unavailable(net_of(2)))
    monkeypatch.delattr(torch.backends, "cusparselt")
    assert backend.version() == "none"
