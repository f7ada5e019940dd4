"""Codes as a dense stream of bits.

A 2:4 code has 6 states and takes 3 bits, so one slot of an ``[O, I]`` layer costs ``3·O·I/32`` bytes: 3/4 of a bit per
weight, where a second set of float32 values would cost 32. The stream is little-endian: code ``k`` occupies the bits
``k·b … k·b + b - 1``, and bit ``j`` of the stream is bit ``j mod 8`` of byte ``j // 8``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from k24.errors import UsageError
from k24.sparse.patterns import PatternSet


def pack_codes(codes: Tensor, patterns: PatternSet) -> Tensor:
    """Packs codes into the fewest whole bits each.

    Args:
        codes: Integer tensor of any shape, every value below ``patterns.n_patterns``.
        patterns: The N:M patterns the codes belong to.

    Returns:
        uint8 ``[ceil(codes.numel() * patterns.code_bits / 8)]``.

    Raises:
        UsageError: A code is out of range.
    """
    flat = codes.detach().cpu().reshape(-1).to(torch.int64).numpy()
    if flat.size and (flat.min() < 0 or flat.max() >= patterns.n_patterns):
        raise UsageError(f"pattern codes of {patterns} must lie in 0..{patterns.n_patterns - 1}, got {flat.min()}..{flat.max()}")
    bits = (flat[:, None] >> np.arange(patterns.code_bits)) & 1
    return torch.from_numpy(np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little"))


def unpack_codes(packed: Tensor, shape: tuple[int, ...], patterns: PatternSet) -> Tensor:
    """Reads what ``pack_codes`` wrote.

    Args:
        packed: uint8 stream.
        shape: Shape of the codes.
        patterns: The N:M patterns the codes belong to.

    Returns:
        uint8 codes of the given shape.

    Raises:
        UsageError: The stream has another length than the shape asks for, or holds a code that is no pattern.
    """
    count = int(np.prod(shape, dtype=np.int64))
    expected = -(-count * patterns.code_bits // 8)
    if packed.dtype != torch.uint8 or packed.numel() != expected:
        raise UsageError(f"packed codes of shape {shape} take {expected} bytes, got {packed.numel()} of {packed.dtype}")
    bits = np.unpackbits(packed.cpu().numpy(), bitorder="little")[: count * patterns.code_bits]
    values = (bits.reshape(count, patterns.code_bits).astype(np.int64) << np.arange(patterns.code_bits)).sum(1)
    if count and values.max() >= patterns.n_patterns:
        raise UsageError(
            f"packed codes hold {values.max()}, which is no pattern of {patterns}: legal codes are 0..{patterns.n_patterns - 1}"
        )
    return torch.from_numpy(values.astype(np.uint8)).view(shape)
