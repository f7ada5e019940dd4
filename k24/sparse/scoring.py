"""Modules A and B: how much each slot wants each weight, and which pattern that makes likely.

Module A scores weight ``k`` of a group for slot ``i``::

    S_i = |W| · EMA_i(|x|) · g(alpha_i),    g = sigmoid or exp

``sigmoid`` can only take away: it ends at 1, and near there alpha gets no gradient. ``exp`` goes as far up as down, and the gradient of
``log S`` to alpha is 1 everywhere.

Module B turns the M scores of a group into logits over the P patterns, a distribution ``pi = softmax(kappa · logits / tau)``, and a mask.

* ``log`` logits, ``l_p = Σ_{k∈p} log S_k``, make ``pi(p) ∝ Π_{k∈p} S_k^(kappa/tau)``: the k-subset, or conditional
  Bernoulli, distribution. It does not depend on the scale of W or of the activations, and its mode is the top N of S.
* ``sum`` logits, ``l_p = Σ_{k∈p} S_k``, have the same mode but a spread that hangs on those scales. At a temperature chosen for
  logits of order one, scores of order 0.01 give a mask that is nearly uniform noise; ``normalise`` repairs part of that.

The temperature divides the logits and not the noise. ``argmax((l + g) / tau)`` does not depend on tau at all, so a
schedule for tau that way changes the gradient alone and the masks stay as noisy at the end as at the start;
``temperature_on="all"`` is kept to show it.

Shapes: ``A`` slots, ``O`` outputs, ``I`` inputs, ``G`` groups per row, ``M`` weights per group, ``P`` patterns.
Patterns come FIRST, ``[P, A, O, G]``: a softmax over an outer axis runs across groups in SIMD lanes, over a last axis
of 6 it takes twenty times as long on a CPU.

Sources: Gumbel-max, Maddison et al. 2017 (arXiv 1611.00712) and Jang et al. 2017 (arXiv 1611.01144); learned 2:4
patterns by Gumbel-softmax, MaskLLM (arXiv 2409.17481); activation-weighted magnitudes, Wanda (arXiv 2306.11695);
straight-through gradients, Bengio et al. 2013 (arXiv 1308.3432).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from k24.errors import UsageError
from k24.sparse.patterns import PatternSet

Logits = Literal["log", "sum"]
Normalise = Literal["none", "group", "layer", "layernorm"]
MaskForward = Literal["expected", "sample", "gumbel", "gumbel_soft"]
TemperatureOn = Literal["logits", "all"]
Gate = Literal["sigmoid", "exp"]

# Smallest factor that still has a logarithm: a weight or an input that is exactly zero scores lowest, not minus infinity or NaN.
EPS = 1e-12


def score(weight: Tensor, ema: Tensor, alpha: Tensor, gate: Gate = "exp") -> Tensor:
    """Module A: ``|W| · EMA · g(alpha)``.

    Args:
        weight: Shared weight ``[O, I]``; detached, for W learns through the masked product alone.
        ema: Mean magnitude of each slot's inputs ``[A, I]``.
        alpha: Learned heterogeneity ``[A, O, I]``.
        gate: What g is.

    Returns:
        ``[A, O, I]``.
    """
    return (weight.detach().abs() * ema[:, None]) * (torch.sigmoid(alpha) if gate == "sigmoid" else alpha.exp())


def log_score(weight: Tensor, ema: Tensor, alpha: Tensor, gate: Gate = "exp") -> Tensor:
    """Logarithm of :func:`score`, stable for large alpha of either sign; shapes as there."""
    log_w = weight.detach().abs().clamp_min(EPS).log()
    return (F.logsigmoid(alpha) if gate == "sigmoid" else alpha) + (log_w + ema.clamp_min(EPS).log()[:, None])


def pattern_logits(
    weight: Tensor,
    ema: Tensor,
    alpha: Tensor,
    patterns: PatternSet,
    kind: Logits = "log",
    normalise: Normalise = "none",
    gate: Gate = "exp",
) -> Tensor:
    """Module B, first half: one logit per pattern, illegal ones ``-inf``.

    Args:
        weight: ``[O, I]``.
        ema: ``[A, I]``.
        alpha: ``[A, O, I]``.
        patterns: The N:M patterns.
        kind: ``log`` (k-subset distribution) or ``sum`` (the plain sum of scores).
        normalise: For ``sum`` only. ``group`` divides by the mean score of the group, ``layer`` by that of the slot's layer (both without
            gradient), ``layernorm`` standardises the P logits of each group.
        gate: What alpha goes through.

    Returns:
        ``[P, A, O, G]``.
    """
    in_features = weight.shape[1]
    s = (log_score if kind == "log" else score)(weight, ema, alpha, gate)
    n_groups = patterns.groups(in_features)
    padding = n_groups * patterns.m - in_features
    if padding:
        s = F.pad(s, (0, padding))
    if kind == "sum" and normalise in ("group", "layer"):
        grouped = s.detach().view(*s.shape[:2], n_groups, patterns.m)
        mean = grouped.mean(-1, keepdim=True) if normalise == "group" else grouped.mean((1, 2, 3), keepdim=True)
        s = (s.view_as(grouped) / (mean + EPS)).view_as(s)
    # One small product sums each pattern's N scores and lays the patterns out first.
    table = patterns.table.to(device=s.device, dtype=s.dtype)
    logits = (table @ s.reshape(-1, patterns.m).t()).view(patterns.n_patterns, *s.shape[:2], n_groups)
    if kind == "sum" and normalise == "layernorm":
        centred = logits - logits.mean(0)
        logits = centred / (centred.square().mean(0) + 1e-5).sqrt()
    if padding:
        logits = logits.masked_fill(~patterns.legal(in_features).to(s.device)[:, None, None], -torch.inf)
    return logits


def first_argmax(values: Tensor) -> Tensor:
    """Index of the largest value along axis 0, the first one among equals, as uint8.

    ``Tensor.argmax`` over an outer axis is not vectorised on CPUs; three elementwise passes are twenty times as fast.
    """
    rank = torch.arange(values.shape[0], 0, -1, device=values.device, dtype=torch.int16)
    best = (values == values.amax(0)).to(torch.int16) * rank.view(-1, *[1] * (values.dim() - 1))
    return (values.shape[0] - best.amax(0)).to(torch.uint8)


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draws one code per group from one uniform number, by inverting the cumulative distribution.

    Args:
        probabilities: ``[P, ...]``, summing to 1 along axis 0.
        uniform: ``[...]`` in [0, 1).

    Returns:
        uint8 ``[...]``; a pattern of probability 0 is never drawn.
    """
    cdf = probabilities.cumsum(0)
    # The last sum is 1 up to rounding. Shrinking u a little keeps u·total strictly below it, so trailing zeros stay unreachable.
    u = uniform * (1 - 2**-23) * cdf[-1]
    return (u >= cdf[:-1]).sum(0).to(torch.uint8)


class _MaskOfPatterns(torch.autograd.Function):
    """Mask from a distribution over patterns; hard codes forward if given, the expected mask's gradient backward in either case."""

    @staticmethod
    def forward(ctx, q: Tensor, codes: Tensor | None, patterns: PatternSet) -> Tensor:
        """Returns ``[A, O, G·M]``: one pattern per group where codes are given, otherwise ``Σ_p q_p · pattern_p``."""
        ctx.patterns = patterns
        if codes is not None:
            return patterns.mask(codes, q.shape[-1] * patterns.m, q.dtype)
        table = patterns.table.to(device=q.device, dtype=q.dtype)
        return (q.reshape(patterns.n_patterns, -1).t() @ table).view(*q.shape[1:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """``dL/dq_p = Σ_{k∈p} dL/dmask_k``."""
        patterns: PatternSet = ctx.patterns
        table = patterns.table.to(device=grad.device, dtype=grad.dtype)
        groups = grad.reshape(-1, patterns.m)
        shape = (patterns.n_patterns, *grad.shape[:-1], grad.shape[-1] // patterns.m)
        return (table @ groups.t()).view(shape), None, None


def mask_of_patterns(q: Tensor, codes: Tensor | None, patterns: PatternSet, in_features: int) -> Tensor:
    """The mask, with the straight-through gradient of the expected mask.

    Forward: the patterns that ``codes`` name, or the expectation ``Σ_p q_p · pattern_p`` when it is None.
    Backward, in both: as if the forward had been the expectation. This is the surrogate that the tests hold.

    Args:
        q: Relaxed choice ``[P, A, O, G]``.
        codes: uint8 ``[A, O, G]``, or None.
        patterns: The N:M patterns.
        in_features: Real inputs (I).

    Returns:
        ``[A, O, I]``.
    """
    mask = _MaskOfPatterns.apply(q, codes, patterns)
    return mask[..., :in_features]


def draw_noise(
    shape: torch.Size, forward: MaskForward, n_patterns: int, generator: torch.Generator | None, device: torch.device
) -> Tensor | None:
    """Random numbers of one step's masks: a uniform per group, a Gumbel per pattern and group, or nothing.

    Args:
        shape: ``[A, O, G]``.
        forward: How the mask is chosen.
        n_patterns: P.
        generator: Source of the random numbers.
        device: Where they are wanted.
    """
    if forward == "expected":
        return None
    if forward == "sample":
        return torch.rand(shape, generator=generator, device=device)
    exponential = torch.empty(n_patterns, *shape, device=device).exponential_(generator=generator)
    return -exponential.clamp_min(EPS).log()


def choose(
    logits: Tensor,
    temperature: float,
    noise: Tensor | None,
    forward: MaskForward,
    kappa: float = 1.0,
    temperature_on: TemperatureOn = "logits",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Module B, second half: the distribution, its relaxation, and the codes drawn.

    Args:
        logits: ``[P, A, O, G]``.
        temperature: tau > 0.
        noise: From :func:`draw_noise`.
        forward: ``expected``: no draw, the mask is its expectation. ``sample``: one uniform per group through the
            inverse CDF, gradient through pi.
            ``gumbel``: Gumbel-max forward, softmax of the perturbed logits backward. ``gumbel_soft``: that softmax forward too.
        kappa: Inverse-temperature factor on the logits.
        temperature_on: ``logits`` divides the logits alone. ``all`` divides the noise as well; then the draw ignores tau.

    Returns:
        ``pi [P, A, O, G]`` (noise-free, for diversity and metrics), the relaxed choice ``q`` that carries the gradient,
        and the codes or None.
    """
    if not temperature > 0:
        raise UsageError(f"temperature {temperature} must be positive: set temperature_min above 0")
    scaled = logits * (kappa / temperature)
    pi = scaled.softmax(0)
    if forward == "expected":
        return pi, pi, None
    assert noise is not None
    if forward == "sample":
        return pi, pi, inverse_cdf(pi.detach(), noise)
    z = scaled + (noise if temperature_on == "logits" else noise / temperature)
    q = z.softmax(0)
    return pi, q, (first_argmax(z.detach()) if forward == "gumbel" else None)
