"""What moves masks besides their gradient: slots drawn together, entries set anew, and what an optimiser must then forget.

Resets keep alternatives alive while they can still matter: alphas that never get their weight kept, weights that no slot keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k24.sparse.layers import MaskedLinear

# A weight that was kept in fewer than this share of the training steps since the last reset counts as never selected.
RARELY_KEPT = 0.01


@dataclass(frozen=True)
class Reset:
    """Entries of a parameter that were set anew; the optimiser must forget what it knew of them.

    Attributes:
        parameter: The parameter, a leaf that an optimiser holds.
        entries: bool mask of its shape.
    """

    parameter: Tensor
    entries: Tensor


def of_slot(parameter: Tensor, slot: int) -> Tensor:
    """The entries of a parameter ``[A, ...]`` that are one slot's, as a bool mask of its shape."""
    entries = torch.zeros_like(parameter, dtype=torch.bool)
    entries[slot] = True
    return entries


@torch.no_grad()
def reset_layer(layer: MaskedLinear, ratio: float, generator: torch.Generator | None = None, ema_blend: float = 0.5) -> list[Reset]:
    """Revives what the masks have given up on.

    * The running magnitude moves part-way to the last batch's.
    * Of the alphas whose weight was (almost) never kept by their slot since the last reset, a share ``ratio`` is drawn anew.
    * Of the weights that (almost) no slot kept, a share ``ratio`` is drawn anew from the initial distribution.

    Args:
        layer: A layer that is not frozen.
        ratio: Share of the candidates to reset, in [0, 1].
        generator: Source of the random numbers.
        ema_blend: How far the running magnitude moves, 0 not at all, 1 all the way. Only plain running means move; a bias-corrected one
            already follows the batches from the start.

    Returns:
        What was reset, for :func:`clear_moments`.
    """
    if layer.frozen or int(layer.usage_steps) == 0:
        return []
    if not layer.config.ema_bias_correction:
        layer.ema.lerp_(layer.last_magnitude, ema_blend)
    rate = layer.usage / layer.usage_steps
    layer.usage.zero_()
    layer.usage_steps.zero_()

    def chosen(candidates: Tensor) -> Tensor:
        return candidates & (torch.rand(candidates.shape, generator=generator, device=candidates.device) < ratio)

    alphas = chosen(rate < RARELY_KEPT)
    fresh = torch.empty_like(layer.alpha).normal_(generator=generator) * layer.config.hetero_init_scale
    layer.alpha.copy_(torch.where(alphas, fresh, layer.alpha))
    weights = chosen((rate < RARELY_KEPT).all(0))
    bound = layer.config.init_gain * layer.in_features**-0.5
    fresh = torch.empty_like(layer.weight).uniform_(-bound, bound, generator=generator)
    layer.weight.copy_(torch.where(weights, fresh, layer.weight))
    return [Reset(layer.alpha, alphas), Reset(layer.weight, weights)]


@torch.no_grad()
def draw_together(layer: MaskedLinear, share: float) -> None:
    """Moves each slot's alphas a share of the way to the slots' mean, as decoupled weight decay moves weights towards zero.

    Not a loss: Adam follows a gradient that is small and steady as far as a large one, so a penalty of any size would bring slots together
    that the task wants apart (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, section 2, on decay of weights).

    Args:
        layer: A layer that is not frozen.
        share: In [0, 1).
    """
    layer.alpha.lerp_(layer.alpha.mean(0, keepdim=True).expand_as(layer.alpha), share)


@torch.no_grad()
def clear_moments(optimizer: torch.optim.Optimizer, resets: list[Reset]) -> None:
    """Zeroes the optimiser's moments of reset entries, so that old gradients do not move new values."""
    for reset in resets:
        for value in optimizer.state.get(reset.parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == reset.entries.shape:
                value.masked_fill_(reset.entries, 0.0)


@torch.no_grad()
def drop_state(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    """Takes parameters that will never move again out of an optimiser, with their moments."""
    gone = {id(p) for p in parameters}
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
        parameter.grad = None
        parameter.requires_grad_(False)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in gone]
