"""Patterns, their packed form, and the numbers that describe masks."""

from __future__ import annotations

from itertools import combinations
from math import ceil, comb, log2

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from k24.errors import UsageError
from k24.sparse import MaskedLinear, PatternSet, mask_metrics, pack_codes, unpack_codes
from k24.sparse.metrics import entropy_bits, mask_distance, most_bits, off_diagonal, pattern_usage
from k24.sparse.scoring import first_argmax, inverse_cdf, pattern_logits

PATTERNS = ["1:2", "1:4", "2:4", "3:4", "2:8", "4:8"]
any_pattern = st.sampled_from(PATTERNS).map(PatternSet.parse)


def draw_legal(patterns: PatternSet, shape: tuple[int, ...], in_features: int, seed: int) -> Tensor:
    """Codes that are uniform over what each group may take."""
    legal = patterns.legal(in_features).float()
    uniform = torch.rand(*shape, patterns.groups(in_features), generator=torch.Generator().manual_seed(seed))
    return inverse_cdf((legal / legal.sum(0)).view(patterns.n_patterns, *[1] * len(shape), -1).expand(-1, *uniform.shape), uniform)


# --- patterns --------------------------------------------------------------------------------------------------------------------


def test_order_of_the_six_patterns() -> None:
    rows = ["".join(str(int(bit)) for bit in row) for row in PatternSet.parse("2:4").table]
    assert rows == ["1100", "1010", "1001", "0110", "0101", "0011"]


@pytest.mark.parametrize("text", PATTERNS)
def test_table_holds_every_pattern_once_in_lexicographic_order(text: str) -> None:
    patterns = PatternSet.parse(text)
    n, m = (int(part) for part in text.split(":"))
    kept = [tuple(row.nonzero().flatten().tolist()) for row in patterns.table]
    assert kept == list(combinations(range(m), n))
    assert patterns.n_patterns == comb(m, n)
    assert str(patterns) == text
    assert PatternSet.parse(f" {n} : {m}\n") == PatternSet.parse(patterns) == patterns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("24", "'24' is not of the form N:M"),
        ("2:4:8", "not of the form N:M"),
        ("-2:4", "not of the form N:M"),
        ("a:b", "not of the form N:M"),
        ("0:4", "0:4 keeps nothing or everything"),
        ("4:4", "4:4 keeps nothing or everything"),
        ("5:4", "keeps nothing or everything"),
        ("8:16", "8:16 has 12870 states, at most 256"),
        ("99999999:999999999", "99999999:999999999 has more than 256 states, at most 256"),
    ],
)
def test_unusable_patterns_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PatternSet.parse(text)


@given(
    any_pattern, st.integers(1, 40), st.integers(1, 3), st.integers(1, 5), st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
)
def test_mask_keeps_exactly_n_of_every_m(patterns: PatternSet, in_features: int, slots: int, rows: int, dtype: torch.dtype) -> None:
    codes = draw_legal(patterns, (slots, rows), in_features, seed=in_features)
    mask = patterns.mask(codes, in_features, dtype)
    assert mask.dtype == dtype
    assert mask.shape == (slots, rows, in_features)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    for group in mask.float().split(patterns.m, -1):
        # A last group of r real columns keeps as many as it can; padding is never kept in place of one.
        assert (group.sum(-1) == min(patterns.n, group.shape[-1])).all()


@given(any_pattern, st.integers(1, 40))
def test_legal_patterns_of_a_padded_group(patterns: PatternSet, in_features: int) -> None:
    legal = patterns.legal(in_features)
    groups = patterns.groups(in_features)
    real = in_features - (groups - 1) * patterns.m
    assert groups == ceil(in_features / patterns.m)
    assert legal[:, :-1].all()
    # Choices that differ in padding alone count once.
    assert legal[:, -1].sum() == (comb(real, patterns.n) if real >= patterns.n else 1)
    assert patterns.free_groups(in_features) == sum(int(legal[:, g].sum()) > 1 for g in range(groups))


def test_legal_patterns_by_hand() -> None:
    patterns = PatternSet.parse("2:4")
    names = ["1100", "1010", "1001", "0110", "0101", "0011"]

    def last(in_features: int) -> list[str]:
        return [name for name, ok in zip(names, patterns.legal(in_features)[:, -1], strict=True) if ok]

    assert last(8) == names
    assert last(7) == ["1100", "1010", "0110"]
    assert last(6) == ["1100"]
    assert last(5) == ["1100"], "one real column: it is kept, and of the paddings the first"
    assert patterns.free_groups(7) == 2
    assert patterns.free_groups(6) == patterns.free_groups(5) == 1


@pytest.mark.parametrize("text", PATTERNS)
def test_every_pattern_can_be_drawn_and_can_win(text: str) -> None:
    patterns = PatternSet.parse(text)
    uniform = torch.full((patterns.n_patterns, 20_000), 1 / patterns.n_patterns)
    drawn = inverse_cdf(uniform, torch.rand(20_000))
    assert set(drawn.tolist()) == set(range(patterns.n_patterns))
    # A weight that is large just where a pattern keeps makes that pattern the best.
    weight = patterns.table + 0.1
    logits = pattern_logits(weight, torch.ones(1, patterns.m), torch.zeros(1, *weight.shape), patterns)
    assert first_argmax(logits).flatten().tolist() == list(range(patterns.n_patterns))


# --- packing ---------------------------------------------------------------------------------------------------------------------


@given(any_pattern, st.lists(st.integers(0, 7), min_size=1, max_size=3), st.integers(0, 2**31 - 1))
def test_packing_round_trip_in_the_fewest_whole_bits(patterns: PatternSet, shape: list[int], seed: int) -> None:
    codes = torch.randint(0, patterns.n_patterns, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_codes(codes, patterns)
    assert 2 ** (patterns.code_bits - 1) < patterns.n_patterns <= 2**patterns.code_bits
    assert packed.dtype == torch.uint8
    assert packed.numel() == ceil(codes.numel() * ceil(log2(patterns.n_patterns)) / 8)
    back = unpack_codes(packed, tuple(shape), patterns)
    assert back.dtype == torch.uint8
    assert torch.equal(back, codes)


def test_layout_of_the_stream_by_hand() -> None:
    # Codes 5, 1, 4 take three bits each, lowest first: 101 100 00|1 -> bits 1,0,1, 1,0,0, 0,0,1.
    packed = pack_codes(torch.tensor([5, 1, 4]), PatternSet.parse("2:4"))
    assert packed.tolist() == [0b00_001_101, 0b1]
    assert np.unpackbits(packed.numpy(), bitorder="little")[:9].tolist() == [1, 0, 1, 1, 0, 0, 0, 0, 1]


def test_packing_refuses_what_is_no_code() -> None:
    patterns = PatternSet.parse("2:4")
    for bad in (6, -1):
        with pytest.raises(UsageError, match=r"pattern codes of 2:4 must lie in 0\.\.5"):
            pack_codes(torch.tensor([0, bad]), patterns)
    packed = pack_codes(torch.tensor([[0, 1, 2], [3, 4, 5]]), patterns)
    for stream, shape in ((packed[:-1], (2, 3)), (packed, (2, 6)), (packed.int(), (2, 3))):
        with pytest.raises(UsageError, match=r"take \d bytes, got"):
            unpack_codes(stream, shape, patterns)
    for code in (6, 7):
        with pytest.raises(UsageError, match=f"hold {code}, which is no pattern of 2:4"):
            unpack_codes(torch.tensor([code << 3], dtype=torch.uint8), (2,), patterns)
    assert unpack_codes(torch.tensor([0b11_000_101], dtype=torch.uint8), (2,), patterns).tolist() == [5, 0], "spare bits do not count"


# --- metrics ---------------------------------------------------------------------------------------------------------------------


def frozen_layer(codes: list, in_features: int) -> MaskedLinear:
    """A layer whose patterns are given, ``[A][O][G]``."""
    wanted = torch.tensor(codes, dtype=torch.uint8)
    layer = MaskedLinear(in_features, wanted.shape[1], wanted.shape[0])
    layer.freeze(wanted)
    return layer


def test_mask_metrics_by_hand() -> None:
    # Two slots. First layer: 1100 | 1100 against 1100 | 0011, one output. Second: one group each, 1010 against 0110.
    layers = [frozen_layer([[[0, 0]], [[0, 5]]], 8), frozen_layer([[[1]], [[3]]], 4)]
    metrics, codes = mask_metrics(layers)
    assert [metrics[f"pattern_{k}_prob"] for k in range(6)] == pytest.approx([3 / 6, 1 / 6, 0, 1 / 6, 0, 1 / 6])
    assert metrics["pattern_entropy"] == pytest.approx(0.5 * 1 + 3 * log2(6) / 6)
    assert metrics["sparsity_layer_0"] == metrics["sparsity_layer_1"] == metrics["overall_sparsity"] == 0.5
    for name in ("pattern_mean_similarity", "pattern_max_similarity", "pattern_min_similarity"):
        assert metrics[name] == pytest.approx(1 / 3), name
    # Different: all four of the second group, and two of the last.
    assert metrics["mask_hamming"] == pytest.approx(6 / 12)
    # Kept by nobody: columns 2 and 3 of the first group, 3 of the last.
    assert metrics["dead_weight_frac"] == pytest.approx(3 / 12)
    assert "mask_flip_rate" not in metrics
    metrics, _ = mask_metrics([frozen_layer([[[0, 0]], [[2, 5]]], 8), layers[1]], codes)
    assert metrics["mask_flip_rate"] == pytest.approx(1 / 6)


def test_similarity_tells_pairs_apart() -> None:
    metrics, _ = mask_metrics([frozen_layer([[[0], [1], [2], [3]], [[0], [1], [2], [3]], [[0], [4], [4], [4]]], 4)])
    assert metrics["pattern_max_similarity"] == 1.0
    assert metrics["pattern_min_similarity"] == 0.25
    assert metrics["pattern_mean_similarity"] == pytest.approx(0.5)


def test_groups_without_a_choice_count_as_no_choice_but_as_weights() -> None:
    # Six inputs: the last group can only be 11.., so two slots always agree there, and its sparsity is 0.
    metrics, codes = mask_metrics([frozen_layer([[[0, 0]], [[5, 0]]], 6)])
    assert codes[0].shape == (2, 1, 1)
    assert metrics["pattern_max_similarity"] == 0.0
    assert metrics["pattern_entropy"] == pytest.approx(1.0)
    assert metrics["overall_sparsity"] == pytest.approx(1 / 3)
    assert metrics["mask_hamming"] == pytest.approx(4 / 6)


def test_pattern_entropy_spans_zero_to_log2_of_the_patterns() -> None:
    assert most_bits(6) == pytest.approx(2.585, abs=1e-3)
    assert mask_metrics([frozen_layer([[[4, 4]]], 8)])[0]["pattern_entropy"] == 0.0
    every = frozen_layer([[[k] for k in range(6)]], 4)
    assert mask_metrics([every])[0]["pattern_entropy"] == pytest.approx(log2(6))
    assert entropy_bits(torch.tensor([0.5, 0.25, 0.25, 0.0])) == pytest.approx(1.5)
    assert pattern_usage([every.codes, every.codes[:, :2]], 6).tolist() == pytest.approx([0.25, 0.25, 0.125, 0.125, 0.125, 0.125])


def test_probabilities_are_those_of_the_present_temperature() -> None:
    layer = MaskedLinear(16, 32, 2)
    with torch.no_grad():
        layer.alpha.normal_()
    entropies = []
    for progress in (0.0, 0.4, 0.8):
        layer.resample(progress)
        metrics, _ = mask_metrics([layer])
        pi = (layer.logits() / layer.config.temperature(progress)).softmax(0).mean((1, 2, 3))
        assert [metrics[f"pattern_{k}_prob"] for k in range(6)] == pytest.approx(pi.tolist(), abs=1e-6)
        entropies.append(metrics["pattern_entropy"])
        assert sum(metrics[f"pattern_{k}_prob"] for k in range(6)) == pytest.approx(1.0)
    assert all(0 < e <= log2(6) + 1e-9 for e in entropies)


def test_hamming_of_independent_masks_is_one_half() -> None:
    patterns = PatternSet.parse("2:4")
    masks = [patterns.mask(draw_legal(patterns, (3, 64), 64, seed), 64) for seed in range(2)]
    distance = mask_distance(masks)
    explicit = torch.stack([torch.stack([torch.cat([(m[i] != m[j]).float() for m in masks]).mean() for j in range(3)]) for i in range(3)])
    assert torch.allclose(distance, explicit)
    assert off_diagonal(distance).tolist() == pytest.approx([0.5] * 3, abs=0.02)
    assert off_diagonal(torch.ones(1, 1)).tolist() == [0.0], "a single slot has no pair"
