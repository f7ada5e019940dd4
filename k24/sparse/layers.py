"""The masked linear layer: one shared weight, one N:M mask per slot.

``MaskedLinear`` takes ``[A, N, features]``, one block of rows per slot, so that a layer is one batched matrix product.
Rows of mixed slots, ``[N, features]`` with a slot index each, are sorted into segments first; no weight is ever
gathered per row.

Life of a mask, as with dropout or batch normalisation:

* ``layer.train()``: the mask of the present step. ``resample(progress)`` sets its temperature and draws what is drawn,
  and both hold until the next call. With ``ema_every`` the forward pass also updates the running mean of the
  inputs' magnitude.
* ``layer.eval()``: the most likely pattern of every group.
* after ``freeze()``: the pattern that was most likely then, for good, in both modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k24.errors import UsageError
from k24.sparse.fused import masked_weight
from k24.sparse.patterns import PatternSet
from k24.sparse.schedule import TemperatureSchedule
from k24.sparse.scoring import (
    Gate,
    Logits,
    MaskForward,
    Normalise,
    TemperatureOn,
    choose,
    draw_noise,
    first_argmax,
    mask_of_patterns,
    pattern_logits,
)
from k24.sparse.slots import Phase, SlotWeights, apply_slots, by_segments


@dataclass(frozen=True)
class MaskConfig:
    """How masks are scored and chosen."""

    pattern: str = "2:4"
    """Weights kept of every so many consecutive ones, N:M."""
    gate: Gate = "exp"
    """What alpha goes through before it scales a weight's score: exp, or sigmoid, which ends at 1 and can hardly bring a weight forward."""
    forward: MaskForward = "expected"
    """What a training step multiplies with: the expected mask, one drawn by inverse CDF, or one drawn with Gumbel noise."""
    logits: Logits = "log"
    """Pattern logits: sum of log scores (k-subset distribution) or sum of scores."""
    normalise: Normalise = "none"
    """Normalisation of sum logits."""
    temperature_on: TemperatureOn = "logits"
    """Whether the temperature divides the logits, or the noise too (then annealing does not calm the masks)."""
    kappa: float = 1.0
    """Factor on the logits."""
    init_gain: float = 2.0
    """Factor on the initial weights; masks take away energy, up to 1 - (N/M)² of it while they are soft and even."""
    hetero_init_scale: float = 0.3
    """Standard deviation of alpha at the start."""
    ema_every: int = 0
    """Scale scores by the running magnitude of inputs, updated every so many training forward passes; 0 leaves it out."""
    ema_momentum: float = 0.99
    """Momentum of the running input magnitude."""
    ema_norm: Literal["mean", "rms"] = "mean"
    """Magnitude of an input over a batch: mean of absolute values, or root mean square as in Wanda."""
    ema_bias_correction: bool = False
    """Start the running mean from the first batch instead of from one."""
    temperature_init: float = 1.0
    """Temperature at the start."""
    temperature_min: float = 0.03
    """Temperature at the end."""
    anneal_start: float = 0.0
    """Share of training after which the temperature begins to fall."""
    anneal_end: float = 0.6
    """Share of training after which it stays."""

    def __post_init__(self) -> None:
        """Checks each value."""
        PatternSet.parse(self.pattern)
        if not 0 <= self.ema_momentum < 1:
            raise UsageError(f"ema_momentum {self.ema_momentum} must lie in [0, 1): 0.99 is usual")
        if self.ema_every < 0:
            raise UsageError(f"ema_every {self.ema_every} must not be negative: 0 is never, 1 at every pass")
        if not self.kappa > 0:
            raise UsageError(f"kappa {self.kappa} must be positive")
        if not self.init_gain > 0:
            raise UsageError(f"init_gain {self.init_gain} must be positive")
        if self.hetero_init_scale < 0:
            raise UsageError(f"hetero_init_scale {self.hetero_init_scale} must not be negative")
        _ = self.temperature

    @property
    def temperature(self) -> TemperatureSchedule:
        """The schedule of tau over training progress."""
        return TemperatureSchedule(self.temperature_init, self.temperature_min, self.anneal_start, self.anneal_end)


class MaskedLinear(nn.Module):
    """A linear layer with one shared weight and a learned N:M mask per slot.

    Args:
        in_features: Inputs (I); any number, padding is internal. A group with fewer than N real columns keeps them all.
        out_features: Outputs (O).
        n_slots: Agents, or unit types (A).
        pattern: N:M; overrides that of ``config`` when given.
        bias: Whether there is a bias, dense and shared by the slots.
        config: How masks are scored and chosen.

    Attributes:
        weight: ``[O, I]``, shared; half as many inputs per output as a dense layer has, so wants twice the learning rate.
        bias: ``[O]``, shared, or None.
        alpha: ``[A, O, I]``, each slot's heterogeneity; wants an optimiser group with a learning rate of its own.
        ema: ``[A, I]``, each slot's mean input magnitude.
        codes: uint8 ``[A, O, G]``, patterns once frozen.
        usage: ``[A, O, I]``, how often each weight was kept since the last reset (sum over training steps).

    Example:
        >>> layer = MaskedLinear(16, 8, n_slots=3)
        >>> layer.resample(progress=0.0)
        >>> layer(torch.randn(3, 32, 16)).shape
        torch.Size([3, 32, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_slots: int,
        pattern: str | PatternSet | None = None,
        bias: bool = True,
        config: MaskConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config or MaskConfig()
        self.patterns = PatternSet.parse(pattern or self.config.pattern)
        for name, value in (("in_features", in_features), ("out_features", out_features), ("n_slots", n_slots)):
            if value < 1:
                raise UsageError(f"{name} (={value}) must be at least 1")
        self.in_features, self.out_features, self.n_slots = in_features, out_features, n_slots
        dense = nn.Linear(in_features, out_features, bias=bias)
        self.weight: nn.Parameter = dense.weight  # type: ignore[assignment]  # torch declares a Tensor
        self.bias = dense.bias
        with torch.no_grad():
            self.weight.mul_(self.config.init_gain)
        n_groups = self.patterns.groups(in_features)
        self.alpha = nn.Parameter(torch.randn(n_slots, out_features, in_features) * self.config.hetero_init_scale)
        start = torch.zeros if self.config.ema_bias_correction else torch.ones
        self.ema: Tensor
        self.last_magnitude: Tensor
        self.seen: Tensor
        self.codes: Tensor
        self.frozen: Tensor
        self.usage: Tensor
        self.usage_steps: Tensor
        self.register_buffer("ema", start(n_slots, in_features))
        self.register_buffer("last_magnitude", torch.ones(n_slots, in_features))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("codes", torch.zeros(n_slots, out_features, n_groups, dtype=torch.uint8))
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))
        self.register_buffer("usage", torch.zeros(n_slots, out_features, in_features))
        self.register_buffer("usage_steps", torch.zeros((), dtype=torch.int64))
        self.free_groups = self.patterns.free_groups(in_features)
        self.temperature = self.config.temperature_init
        self._noise: Tensor | None = None
        self._drawn: Tensor | None = None
        self._in_use: Tensor | None = None

    def extra_repr(self) -> str:
        """Sizes for ``print(layer)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, n_slots={self.n_slots}, pattern={self.patterns}"

    # Masks ------------------------------------------------------------------------------------------------------------------------

    def resample(self, progress: float, generator: torch.Generator | None = None) -> None:
        """Draws the masks of this step, one per slot.

        Args:
            progress: Share of training done, in [0, 1]; sets the temperature.
            generator: Source of the random numbers; torch's own when None.
        """
        self.temperature = self.config.temperature(progress)
        if not self.frozen:
            self._noise = draw_noise(self.codes.shape, self.config.forward, self.patterns.n_patterns, generator, self.weight.device)
            self._drawn = None

    def running_magnitude(self) -> Tensor:
        """EMA of the inputs' magnitude ``[A, I]``, corrected for its start if so configured."""
        return self._corrected(self._updates())

    def _updates(self) -> int:
        """How often the running magnitude has been updated."""
        return int(self.seen) // self.config.ema_every if self.config.ema_every else 0

    def _corrected(self, updates: int) -> Tensor:
        """The running magnitude, taken as it stands after so many updates."""
        if not self.config.ema_bias_correction:
            return self.ema
        return self.ema / (1 - self.config.ema_momentum**updates) if updates else torch.ones_like(self.ema)

    def logits(self) -> Tensor:
        """Pattern logits ``[P, A, O, G]`` (module B)."""
        c = self.config
        return pattern_logits(self.weight, self.running_magnitude(), self.alpha, self.patterns, c.logits, c.normalise, c.gate)

    def probabilities(self) -> Tensor:
        """Pattern distribution ``pi [P, A, O, G]`` at the present temperature, with its gradient to alpha.

        After a freeze it is one-hot at the frozen patterns, without gradient.
        """
        if self.frozen:
            return F.one_hot(self.codes.long(), self.patterns.n_patterns).movedim(-1, 0).to(self.weight.dtype)
        return (self.logits() * (self.config.kappa / self.temperature)).softmax(0)

    def best_codes(self) -> Tensor:
        """The most likely pattern of each group, uint8 ``[A, O, G]``."""
        if self.frozen:
            return self.codes
        with torch.no_grad():
            return first_argmax(self.logits())

    def materialise(self, phase: Phase = "train") -> SlotWeights:
        """Each slot's masked weight, made once and used for all rows of a step.

        Args:
            phase: Which mask: this training step's (``train``), what behaviour and targets use (``act``: the expected mask if
                that is what trains, else the most likely one), a fresh draw (``sampled``), or the most likely one
                (``deploy``). After a freeze they are all the same.
        """
        bias = self.bias if self.bias is not None else self.weight.new_zeros(self.out_features)
        if self._is_fused(phase):
            made: tuple[Tensor, Tensor | None, Tensor, Tensor] = masked_weight(
                self.weight,
                self.alpha,
                self.running_magnitude(),
                self.patterns,
                self.config.kappa / self.temperature,
                self._noise,
                self._drawn,
                self.config.gate,
            )
            weight, pi, self._in_use, codes = made
            self._drawn = codes if self._noise is not None else None
        else:
            mask, pi = self._mask(phase)
            weight = self.weight * mask
        return SlotWeights(weight, bias[None], pi if pi is None else pi[..., : self.free_groups])

    def _is_fused(self, phase: Phase) -> bool:
        """Whether the one-step form of :mod:`k24.sparse.fused` covers this case."""
        forward = self.config.forward
        if self.frozen or self.config.logits != "log" or phase in ("sampled", "deploy"):
            return False
        return forward == "expected" or (forward == "sample" and phase == "train" and self._noise is not None)

    def mask(self) -> Tensor:
        """The mask in force ``[A, O, I]``: this step's in training mode, the most likely one in evaluation mode."""
        return self._mask("train" if self.training else "deploy")[0]

    def _mask(self, phase: Phase) -> tuple[Tensor, Tensor | None]:
        config = self.config
        if self.frozen or phase == "deploy" or (phase == "act" and config.forward != "expected"):
            return self.patterns.mask(self.best_codes(), self.in_features, self.weight.dtype), None
        if phase == "sampled":
            noise = draw_noise(self.codes.shape, "sample", self.patterns.n_patterns, None, self.weight.device)
            pi, q, codes = choose(self.logits(), self.temperature, noise, "sample", config.kappa)
            return mask_of_patterns(q, codes, self.patterns, self.in_features), pi
        if self._noise is None and config.forward != "expected":
            raise UsageError("MaskedLinear has no mask for this step: call resample(progress) before the first training forward pass")
        pi, q, codes = choose(self.logits(), self.temperature, self._noise, config.forward, config.kappa, config.temperature_on)
        # The first pass after resample fixes the draw, so that several passes in one step see one mask although the EMA moves between them.
        if codes is not None:
            self._drawn = codes if self._drawn is None else self._drawn
        mask = mask_of_patterns(q, self._drawn if codes is not None else None, self.patterns, self.in_features)
        self._in_use = mask.detach()
        return mask, pi

    @torch.no_grad()
    def freeze(self, codes: Tensor | None = None) -> None:
        """Fixes every group for good; alpha gets no gradient from then on.

        Args:
            codes: uint8 ``[A, O, G]``; each group's most likely pattern when None.
        """
        self.codes.copy_(self.best_codes() if codes is None else codes)
        self.frozen.fill_(True)
        self._noise = self._drawn = self._in_use = None

    # Statistics -------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, x: Tensor, valid: Tensor | None = None) -> None:
        """Updates the running input magnitude.

        Args:
            x: ``[A, N, I]``.
            valid: bool ``[A, N]`` or ``[N]``, rows that count (no padding, nobody dead); None for all. A slot without
                valid rows keeps its value.
        """
        if not self._is_update_due():
            return
        if self.n_slots == 1:
            x, valid = x.reshape(1, -1, self.in_features), valid if valid is None else valid.expand(x.shape[:2]).reshape(1, -1)
        size = self._size(x)
        if valid is None:
            self._take_in(size.mean(1))
        else:
            rows = valid.expand(x.shape[:2])
            self._take_in(torch.where(rows[..., None], size, 0.0).sum(1), rows.sum(1, keepdim=True))

    @torch.no_grad()
    def observe_segments(self, segments: Sequence[tuple[int, Tensor, Tensor]]) -> None:
        """Updates the running input magnitude from rows that are sorted by slot.

        Args:
            segments: Slot, ``x [N, I]``, and ``valid`` bool ``[N]``, the rows that count; N differs from one to the next.
        """
        if not self._is_update_due():
            return
        total, count = torch.zeros_like(self.ema), self.ema.new_zeros(self.n_slots, 1)
        for slot, x, valid in segments:
            mine = slot if self.n_slots > 1 else 0
            total[mine] += torch.where(valid[:, None], self._size(x), 0.0).sum(0)
            count[mine] += valid.sum()
        self._take_in(total, count)

    def _is_update_due(self) -> bool:
        """Counts a training pass; every ``ema_every``-th one updates the running magnitude, until the freeze."""
        if self.frozen or not self.config.ema_every:
            return False
        self.seen += 1
        return int(self.seen) % self.config.ema_every == 0

    def _size(self, x: Tensor) -> Tensor:
        return x.square() if self.config.ema_norm == "rms" else x.abs()

    def _take_in(self, size: Tensor, count: Tensor | None = None) -> None:
        """Moves the running magnitude towards a batch's mean size ``[A, I]``; its sum where the rows' ``count [A, 1]`` is given."""
        now = size if count is None else size / count.clamp_min(1)
        if self.config.ema_norm == "rms":
            now = now.sqrt()
        if count is not None:
            # A slot without rows keeps the value it had before this update.
            now = torch.where(count > 0, now, self._corrected(self._updates() - 1))
        self.last_magnitude.copy_(now)
        self.ema.lerp_(now, 1 - self.config.ema_momentum)

    @torch.no_grad()
    def count_usage(self) -> None:
        """Adds this step's mask to the tally that resets go by."""
        if self._in_use is not None and not self.frozen:
            self.usage += self._in_use
            self.usage_steps += 1

    # Forward ----------------------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, slots: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Applies each slot's masked weight to its rows.

        Args:
            x: ``[A, N, I]``, or ``[N, I]`` with ``slots``.
            slots: int64 ``[N]``, each row's slot; -1 for a row of none (its output is zero).
            valid: bool ``[A, N]``, rows that count for the running magnitude; only without ``slots``.

        Returns:
            ``[A, N, O]``, or ``[N, O]`` with ``slots``.

        Raises:
            UsageError: A shape is off.
        """
        if x.shape[-1] != self.in_features:
            raise UsageError(f"MaskedLinear takes {self.in_features} features, got an input of shape {tuple(x.shape)}")
        weight, bias = self.materialise("train" if self.training else "deploy")[:2]
        if slots is not None:
            return self._forward_rows(x, slots, weight, bias)
        if x.dim() != 3 or x.shape[0] != self.n_slots:
            raise UsageError(
                f"MaskedLinear takes [n_slots={self.n_slots}, rows, features], got {tuple(x.shape)}: pass slots= for rows of mixed slots"
            )
        if self.training and torch.is_grad_enabled():
            self.observe(x.detach(), valid)
        return apply_slots(x, weight, bias)

    def _forward_rows(self, x: Tensor, slots: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if x.dim() != 2:
            raise UsageError(f"with slots=, MaskedLinear takes [rows, features], got {tuple(x.shape)}")
        y = by_segments(x, slots, self.n_slots, lambda slot, rows: F.linear(rows, weight[slot], bias[0]))
        if self.training and torch.is_grad_enabled():
            self._observe_rows(x.detach(), F.one_hot(slots.clamp_min(0), self.n_slots).t().bool() & (slots >= 0))
        return y

    def _observe_rows(self, x: Tensor, member: Tensor) -> None:
        """Running magnitude from rows of mixed slots: one product per call, no copy of x per slot."""
        if self._is_update_due():
            self._take_in(member.to(x.dtype) @ self._size(x), member.sum(1, keepdim=True))
