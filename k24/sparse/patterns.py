"""N:M patterns: which N of M consecutive weights of a row are kept.

A *group* is M consecutive inputs of one output row. Each group keeps exactly N of them, so a group is in one of ``P = C(M, N)`` states and
a mask is one small integer, the *code*, per group. For 2:4 the six codes are, in this order::

    0: 1100   1: 1010   2: 1001   3: 0110   4: 0101   5: 0011

An input width that is no multiple of M is padded at the end. Padding is never kept in place of a real weight: only patterns that keep as
many real columns as they can are legal in the last group, and of those that differ in padding alone just one is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations
from math import ceil, comb, log2

import torch
from torch import Tensor

from k24.errors import UsageError

# 4:8 has 70 patterns and 5:10 would have 252. Beyond one byte per code neither the training (P values per group) nor the packing pays.
MAX_PATTERNS = 256


@dataclass(frozen=True)
class PatternSet:
    """All patterns that keep ``n`` of ``m`` weights.

    Attributes:
        n: Weights kept per group.
        m: Group size.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        """Refuses patterns that keep nothing, keep all, or are too many to enumerate."""
        if not 0 < self.n < self.m:
            raise UsageError(f"pattern {self.n}:{self.m} keeps nothing or everything: use N:M with 0 < N < M, for example 2:4")
        # There are at least M of them, and of a huge M nobody would see the count.
        if self.m > MAX_PATTERNS or comb(self.m, self.n) > MAX_PATTERNS:
            count = f"{comb(self.m, self.n)}" if self.m <= MAX_PATTERNS else f"more than {MAX_PATTERNS}"
            raise UsageError(f"pattern {self.n}:{self.m} has {count} states, at most {MAX_PATTERNS} are supported: use a smaller M")

    @classmethod
    def parse(cls, text: str | PatternSet) -> PatternSet:
        """Reads ``"2:4"``.

        Raises:
            UsageError: The text is no N:M pattern.
        """
        if isinstance(text, PatternSet):
            return text
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))
        if match is None:
            raise UsageError(f"pattern {text!r} is not of the form N:M: use for example 2:4, 1:4 or 4:8")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        """Returns ``"2:4"``."""
        return f"{self.n}:{self.m}"

    @cached_property
    def n_patterns(self) -> int:
        """Number of patterns, P = C(M, N)."""
        return comb(self.m, self.n)

    @cached_property
    def code_bits(self) -> int:
        """The fewest whole bits that hold one code (3 for 2:4)."""
        return max(1, ceil(log2(self.n_patterns)))

    @cached_property
    def table(self) -> Tensor:
        """float32 ``[P, M]`` of zeros and ones, kept positions in lexicographic order."""
        rows = torch.zeros(self.n_patterns, self.m)
        for code, kept in enumerate(combinations(range(self.m), self.n)):
            rows[code, list(kept)] = 1.0
        return rows

    def groups(self, in_features: int) -> int:
        """Groups per row, padding included."""
        return -(-in_features // self.m)

    @cache  # noqa: B019 - a handful of patterns and widths live as long as the process
    def legal(self, in_features: int) -> Tensor:
        """Which patterns each group may take, bool ``[P, G]``; all True except where the last group holds padding."""
        n_groups = self.groups(in_features)
        allowed = torch.ones(self.n_patterns, n_groups, dtype=torch.bool)
        real = in_features - (n_groups - 1) * self.m
        if real < self.m:
            kept_real = self.table[:, :real].sum(1)
            fits = kept_real == min(real, self.n)
            # The table is lexicographic, so the first that fits is the one whose padding comes earliest.
            if real < self.n:
                only = torch.zeros_like(fits)
                only[int(fits.nonzero()[0])] = True
                fits = only
            allowed[:, -1] = fits
        return allowed

    @cache  # noqa: B019
    def free_groups(self, in_features: int) -> int:
        """Groups per row that have a choice: all of them, or all but a last one whose padding leaves a single legal pattern."""
        n_groups = self.groups(in_features)
        return n_groups if int(self.legal(in_features)[:, -1].sum()) > 1 else n_groups - 1

    def mask(self, codes: Tensor, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Expands codes to a mask of zeros and ones.

        Args:
            codes: Integer ``[..., G]``.
            in_features: Real inputs (I); padding is cut off.
            dtype: Type of the mask.

        Returns:
            ``[..., I]``.
        """
        table = self.table.to(device=codes.device, dtype=dtype)
        rows = table.index_select(0, codes.reshape(-1).to(torch.int32))
        return rows.view(*codes.shape[:-1], -1)[..., :in_features]
