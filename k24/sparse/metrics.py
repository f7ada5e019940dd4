"""What masks look like, in numbers. Names follow the user's table; see docs/algorithm.md for the ranges to expect."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

import torch
from torch import Tensor

from k24.sparse.layers import MaskedLinear


def pattern_usage(codes: Sequence[Tensor], n_patterns: int) -> Tensor:
    """Share of groups in each pattern, over layers and slots.

    Args:
        codes: One uint8 ``[A, O, G]`` per layer.
        n_patterns: P.

    Returns:
        float64 ``[P]``, summing to 1.
    """
    counts = torch.stack([torch.bincount(c.reshape(-1).long(), minlength=n_patterns) for c in codes]).sum(0)
    return counts.double() / counts.sum()


def entropy_bits(distribution: Tensor) -> float:
    """Entropy in bits; for pattern usage 0 … log2 P, which is 2.585 for 2:4."""
    p = distribution.double()
    return abs(float(-(p * p.clamp_min(1e-300).log2()).sum()))


def mask_distance(masks: Sequence[Tensor]) -> Tensor:
    """Mean share of weights that two slots keep differently.

    Args:
        masks: One ``[A, O, I]`` of zeros and ones per layer.

    Returns:
        float32 ``[A, A]``, symmetric, zero diagonal; 0.5 for independent 2:4 masks.
    """
    flat = torch.cat([m.flatten(1) for m in masks], 1).float()
    kept = flat.sum(1)
    return (kept[:, None] + kept[None] - 2 * flat @ flat.t()).clamp_min(0) / flat.shape[1]


def off_diagonal(matrix: Tensor) -> Tensor:
    """The entries of a square matrix above its diagonal, flat; one zero for a single slot."""
    n = matrix.shape[0]
    if n < 2:
        return matrix.new_zeros(1)
    i, j = torch.triu_indices(n, n, 1)
    return matrix[i, j]


@torch.no_grad()
def mask_metrics(layers: Sequence[MaskedLinear], previous: Sequence[Tensor] | None = None) -> tuple[dict[str, float], list[Tensor]]:
    """All metrics of the most likely masks.

    Args:
        layers: The masked layers, in the order of the net, all of one N:M.
        previous: Codes at the last call, for ``mask_flip_rate``.

    Returns:
        The metrics under their public names, and the codes of now:

        * ``pattern_k_prob``: mean probability of pattern k at the present temperature; ``pattern_entropy``: bits, of that mean.
        * ``sparsity_layer_k``, ``overall_sparsity``: share of weights dropped.
        * ``pattern_mean_similarity`` (min, max): mean share of groups in which two slots choose the same pattern, over pairs.
        * ``mask_hamming``: mean share of weights two slots keep differently; as the similarities, of layers with a mask for each slot.
        * ``mask_flip_rate``: share of groups whose choice changed since the last call.
        * ``dead_weight_frac``: share of weights that no slot keeps.
    """
    patterns = layers[0].patterns
    chosen = [layer.best_codes() for layer in layers]
    masks = [patterns.mask(c, layer.in_features) for c, layer in zip(chosen, layers, strict=True)]
    # Groups that padding leaves no choice say nothing about choices.
    codes = [c[..., : layer.free_groups] for c, layer in zip(chosen, layers, strict=True)]
    total = max(sum(c.numel() for c in codes), 1)
    usage = (
        torch.stack([layer.probabilities().detach()[..., : layer.free_groups].double().sum((1, 2, 3)) for layer in layers]).sum(0) / total
    )
    slots = max(layer.n_slots for layer in layers)
    own = [k for k, layer in enumerate(layers) if layer.n_slots == slots]
    metrics = {f"pattern_{k}_prob": float(p) for k, p in enumerate(usage)}
    metrics["pattern_entropy"] = entropy_bits(usage)
    for k, mask in enumerate(masks):
        metrics[f"sparsity_layer_{k}"] = 1 - float(mask.mean())
    metrics["overall_sparsity"] = 1 - float(sum(m.sum() for m in masks)) / sum(m.numel() for m in masks)
    same = off_diagonal(pattern_agreement([codes[k] for k in own]))
    metrics["pattern_mean_similarity"] = float(same.mean())
    metrics["pattern_max_similarity"] = float(same.max())
    metrics["pattern_min_similarity"] = float(same.min())
    metrics["mask_hamming"] = float(off_diagonal(mask_distance([masks[k] for k in own])).mean())
    if previous is not None:
        metrics["mask_flip_rate"] = sum(int((a != b).sum()) for a, b in zip(codes, previous, strict=True)) / total
    dead = sum(float((m.sum(0) == 0).sum()) for m in masks)
    metrics["dead_weight_frac"] = dead / sum(m[0].numel() for m in masks)
    return metrics, codes


def pattern_agreement(codes: Sequence[Tensor]) -> Tensor:
    """Share of groups in which two slots choose the same pattern, float32 ``[A, A]`` with ones on the diagonal."""
    flat = torch.cat([c.flatten(1) for c in codes], 1)
    if not flat.shape[1]:
        return torch.ones(len(flat), len(flat))
    return torch.stack([(flat == row).float().mean(1) for row in flat])


def most_bits(n_patterns: int) -> float:
    """Upper end of ``pattern_entropy``."""
    return log2(n_patterns)
