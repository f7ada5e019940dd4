"""The C++ kernels, through a plain C interface.

``csrc/`` holds them; ``pip install`` builds them where there is a compiler. The shared library is loaded when a net is first prepared,
and the widest instruction set of this machine (AVX-512 or AVX2) is chosen then. A whole acting step, from observation to action values,
is one call.

Two layouts. ``packed`` holds the kept weights of each slot, 2.1 bytes per weight and slot in float32; it halves the multiply-adds and is
the fast one. ``shared`` holds one dense weight and one bit per weight and slot; it does all multiply-adds, but reads little memory: the
small one, and the faster one when a single row per slot meets weights too large for the cache. Layers without masks are run dense, tuned
as hard, so a dense net is the honest twin of a masked one.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from k24.errors import UsageError, unknown_name
from k24.kernels.net import GRU, TWO_FOUR, Linear, Net, Prepared

VERSION = 1  # of csrc/k24.h
ISAS = {"avx512": 2, "avx2": 1}
_LAYOUTS = {"packed": 0, "shared": 1}
_LINEAR, _GRU_INPUT, _GRU_RECURRENT = range(3)


class _Layer(ctypes.Structure):
    """``k24_layer`` of csrc/k24.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("weight", "codes", "bias")]
        + [(name, ctypes.c_int64) for name in ("weight_slots", "code_slots", "bias_slots", "out_features", "in_features")]
        + [(name, ctypes.c_int32) for name in ("relu", "role")]
    )


def library_path() -> Path:
    """Where the installation puts the library, if it finds a compiler."""
    return Path(__file__).with_name("_cpu.so")


@cache
def _library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    path = library_path()
    if not path.exists():
        return "its C++ library was not built: install a C++ compiler (Debian: apt install g++), then reinstall k24"
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        return f"its C++ library does not load ({error}): reinstall k24"
    found = lib.k24_version() if hasattr(lib, "k24_version") else 0
    if found != VERSION:
        return f"its C++ library is of version {found} where this k24 needs {VERSION}: reinstall k24"
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    lib.k24_best_isa.restype = i32
    lib.k24_create.restype, lib.k24_create.argtypes = pointer, [i32, i64, i64, ctypes.POINTER(_Layer), i32, i32]
    lib.k24_free.restype, lib.k24_free.argtypes = None, [pointer]
    lib.k24_bytes.restype, lib.k24_bytes.argtypes = i64, [pointer]
    lib.k24_run.restype, lib.k24_run.argtypes = i32, [pointer, pointer, pointer, pointer, pointer, i64, pointer, i32]
    lib.k24_poison.restype, lib.k24_poison.argtypes = None, [i32]
    return lib


def best_isa() -> str | None:
    """The widest instruction set that can be used: ``avx512``, ``avx2`` or None. ``K24_ISA=avx2`` in the environment asks for less."""
    lib = _library()
    if isinstance(lib, str):
        return None
    best = lib.k24_best_isa()
    asked = os.environ.get("K24_ISA") or None
    if asked is not None and asked not in ISAS:
        raise UsageError(f"K24_ISA={asked} in the environment is not known: use {' or '.join(ISAS)}")
    return next((name for name, number in ISAS.items() if number <= best and asked in (None, name)), None)


def build() -> str:
    """Names the library and what of the CPU it uses; changes when it is built anew."""
    path = library_path()
    return f"{best_isa()}, built {path.stat().st_mtime_ns}" if path.exists() else "no library"


def poison(on: bool) -> None:
    """Fills scratch memory with NaN before every run; for tests."""
    lib = _library()
    if not isinstance(lib, str):
        lib.k24_poison(on)


def unavailable(net: Net) -> str | None:
    """Why these kernels cannot run a net here; None if they can."""
    lib = _library()
    if isinstance(lib, str):
        return lib
    if best_isa() is None:
        return "this CPU has neither AVX-512 nor AVX2, or not what K24_ISA asks for"
    if net.device.type != "cpu":
        return f"its weights are on {net.device}: move them to the CPU"
    odd = next((layer.patterns for layer in net.linears if layer.codes is not None and layer.patterns != TWO_FOUR), None)
    if odd is not None:
        return f"it runs 2:4 masks, and this net has {odd}"
    return None


class _Handle:
    """Owns a packed net; whoever uses one holds its owner."""

    def __init__(self, lib: ctypes.CDLL, handle: int) -> None:
        # Not at the interpreter's exit: a thread may be inside a call still, and the memory goes with the process anyway.
        weakref.finalize(self, lib.k24_free, handle).atexit = False

    def __reduce__(self):
        raise TypeError("a net packed for the CPU kernels cannot be copied or pickled: pickle the policy, or prepare the net again")


class Cpu(Prepared):
    """A net packed for the C++ kernels.

    Args:
        net: What to run. bfloat16 weights are held as such when packed; everything else, and every sum, is float32.
        threads: Most threads to use; as many as torch when None. Small steps use fewer.
        layout: ``packed`` or ``shared``; see above.
        isa: ``avx512`` or ``avx2``; the best when None.
    """

    def __init__(self, net: Net, threads: int | None = None, layout: str = "packed", isa: str | None = None) -> None:
        reason = unavailable(net)
        if reason is not None:
            raise UsageError(f"backend 'cpu' cannot run this net here: {reason}")
        lib = _library()
        assert not isinstance(lib, str)
        if layout not in _LAYOUTS:
            raise unknown_name("layout of the CPU kernels", layout, _LAYOUTS)
        if isa is not None and isa not in ISAS:
            raise unknown_name("instruction set", isa, ISAS)
        self.isa = isa or best_isa()
        assert self.isa is not None
        keep: list[Tensor] = []  # what the structures point to, until the library has read it

        def described(layer: Linear, role: int) -> _Layer:
            weight, bias = layer.weight.detach().float().contiguous(), layer.bias.detach().float().contiguous()
            codes = None if layer.codes is None else layer.codes.contiguous()
            if codes is not None and int(codes.max()) >= TWO_FOUR.n_patterns:  # the library takes them for indices
                raise UsageError(f"pattern codes of 2:4 lie in 0..{TWO_FOUR.n_patterns - 1}, got {int(codes.max())}")
            keep.extend(t for t in (weight, bias, codes) if t is not None)
            return _Layer(
                weight.data_ptr(),
                None if codes is None else codes.data_ptr(),
                bias.data_ptr(),
                weight.shape[0],
                0 if codes is None else codes.shape[0],
                bias.shape[0],
                layer.out_features,
                layer.in_features,
                layer.relu,
                role,
            )

        layers = []
        for block in net.blocks:
            if isinstance(block, GRU):
                layers += [described(block.input, _GRU_INPUT), described(block.recurrent, _GRU_RECURRENT)]
            else:
                layers.append(described(block, _LINEAR))
        array = (_Layer * len(layers))(*layers)
        values = int(all(layer.weight.dtype == torch.bfloat16 for layer in net.linears))
        handle = lib.k24_create(ISAS[self.isa], net.n_slots, len(layers), array, _LAYOUTS[layout], values)
        if not handle:
            raise UsageError("backend 'cpu' could not pack this net: out of memory, or an instruction set that is missing")
        self._owner = _Handle(lib, handle)
        self._handle, self._run = handle, lib.k24_run
        self.nbytes = lib.k24_bytes(handle)
        self.net, self._threads = net.to("meta"), threads  # shapes are all that is needed from here on
        # Shapes of the last call, whose like need no further checks, and its number of rows. One object, so that threads see it whole.
        self._like: tuple[torch.Size | None, torch.Size | None, torch.Size, int] = (None, None, torch.Size(), 0)
        self._hidden = net.hidden

    def __call__(self, x: Tensor, h: Tensor | None = None, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`~k24.kernels.net.Prepared.__call__`; shapes like those of the last call are not examined again."""
        if h is not None and slots is None and x.shape == self._like[0] and h.shape == self._like[1]:
            return self.run(x, h, None)
        return super().__call__(x, h, slots)

    def run(self, x: Tensor, h: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`~k24.kernels.net.Prepared`.

        A small step takes a few microseconds, and so does Python's share of it (checks, two results to allocate, the call itself),
        so what is like the last call takes a short way.
        """
        x_shape, h_shape, y_shape, rows = self._like
        if (
            slots is None
            and x.shape == x_shape
            and h.shape == h_shape
            and x.dtype is h.dtype is torch.float32
            and x.is_cpu
            and h.is_cpu
            and x.is_contiguous()
            and h.is_contiguous()
        ):
            y = x.new_empty(*y_shape)
            after = torch.empty_like(h) if self._hidden else h
            threads = self._threads or torch.get_num_threads()
            if self._run(self._handle, x.data_ptr(), h.data_ptr(), y.data_ptr(), after.data_ptr(), rows, None, threads) == 0:
                return y, after
        return self._run_any(x, h, slots)

    @torch.no_grad()
    def _run_any(self, x: Tensor, h: Tensor, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        elsewhere = [str(operand.device) for operand in (x, h, slots) if operand is not None and not operand.is_cpu]
        if elsewhere:
            raise UsageError(f"this net runs on the CPU, and an input is on {elsewhere[0]}: move it there with .cpu()")
        kind, before = x.dtype, h.dtype
        x, h = x.float().contiguous(), h.float().contiguous()
        y, after = x.new_empty(*x.shape[:-1], self.net.out_features), torch.empty_like(h)
        rows = x.shape[:-1].numel()
        if slots is None:
            self._like = (x.shape, h.shape, y.shape, rows)
        pointer = None if slots is None else (slots := slots.contiguous()).data_ptr()
        threads = self._threads or torch.get_num_threads()
        if self._run(self._handle, x.data_ptr(), h.data_ptr(), y.data_ptr(), after.data_ptr(), rows, pointer, threads):
            raise MemoryError(f"the CPU kernels found no memory for {rows} rows")
        return y.to(kind), after.to(before)
