"""Log scores, pattern distribution, mask and masked weight in one differentiable step.

What :mod:`k24.sparse.scoring` composes out of small functions, for the default case (``log`` logits, ``expected`` or
``sample`` forward) and with the backward pass written by hand: half the memory traffic and a third of the operations of
the composition, which stays the definition that the tests compare with. With ``s = log S``, ``q = softmax(c · T s)``
over patterns (T the 0/1 table) and ``mask = Tᵀ q``::

    dL/dq = T · dL/dmask + dL/dpi      dL/dl = q ∘ (dL/dq - q·dL/dq)      dL/ds = c · Tᵀ dL/dl
    dL/dalpha = dL/ds ∘ sigmoid(-alpha), or dL/ds alone where alpha goes through exp
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from k24.sparse.patterns import PatternSet
from k24.sparse.scoring import Gate, inverse_cdf, log_score


class _MaskedWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        weight: Tensor,
        alpha: Tensor,
        ema: Tensor,
        patterns: PatternSet,
        scale: float,
        uniform: Tensor | None,
        codes: Tensor | None,
        gate: Gate,
    ):
        slots, outputs, inputs = alpha.shape
        n_groups = patterns.groups(inputs)
        padding = n_groups * patterns.m - inputs
        s = log_score(weight, ema, alpha, gate)
        if padding:
            s = F.pad(s, (0, padding))
        table = patterns.table.to(s)
        pi = (table @ s.view(-1, patterns.m).t()).mul_(scale).view(-1, slots, outputs, n_groups)
        if padding:
            illegal = ~patterns.legal(inputs)[:, -1].to(s.device)
            pi[..., -1].masked_fill_(illegal[:, None, None], -torch.inf)
        pi = pi.softmax(0)
        if uniform is None:
            mask = (table.t() @ pi.view(patterns.n_patterns, -1)).t().reshape(slots, outputs, -1)[..., :inputs]
            codes = pi.new_empty(0, dtype=torch.uint8)
        else:
            codes = inverse_cdf(pi, uniform) if codes is None else codes
            mask = patterns.mask(codes, inputs, s.dtype)
        ctx.patterns, ctx.scale, ctx.padding, ctx.gate = patterns, scale, padding, gate
        ctx.save_for_backward(weight, alpha, mask, pi)
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)
        return weight * mask, pi, mask.detach(), codes

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_pi: Tensor | None, _mask: Tensor | None, _codes: Tensor | None):
        weight, alpha, mask, pi = ctx.saved_tensors
        patterns: PatternSet = ctx.patterns
        grad = torch.zeros_like(mask) if grad is None else grad
        table = patterns.table.to(grad)
        grad_mask = grad * weight
        if ctx.padding:
            grad_mask = F.pad(grad_mask, (0, ctx.padding))
        flat = pi.view(patterns.n_patterns, -1)
        grad_q = table @ grad_mask.reshape(-1, patterns.m).t()
        if grad_pi is not None:
            grad_q += grad_pi.reshape(grad_q.shape)
        grad_l = flat * grad_q
        grad_l.addcmul_(flat, grad_l.sum(0), value=-1)
        grad_s = (table.t() @ grad_l).t().reshape(*alpha.shape[:2], -1)[..., : alpha.shape[2]]
        grad_alpha = grad_s * ctx.scale if ctx.gate == "exp" else torch.sigmoid(-alpha).mul_(grad_s).mul_(ctx.scale)
        return (grad * mask).sum(0), grad_alpha, None, None, None, None, None, None


def masked_weight(
    weight: Tensor,
    alpha: Tensor,
    ema: Tensor,
    patterns: PatternSet,
    scale: float,
    uniform: Tensor | None = None,
    codes: Tensor | None = None,
    gate: Gate = "exp",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each slot's masked weight by log scores.

    Args:
        weight: ``[O, I]``.
        alpha: ``[A, O, I]``.
        ema: ``[A, I]``.
        patterns: The N:M patterns.
        scale: ``kappa / tau``.
        uniform: ``[A, O, G]`` in [0, 1): draw one pattern per group, with the straight-through gradient; None for the expected mask.
        codes: uint8 ``[A, O, G]``, patterns already drawn in this step; only with ``uniform``.
        gate: What alpha goes through.

    Returns:
        Masked weight ``[A, O, I]``, ``pi [P, A, O, G]`` with its gradient, the mask and the codes without.
    """
    return _MaskedWeight.apply(weight, alpha, ema, patterns, scale, uniform, codes, gate)
