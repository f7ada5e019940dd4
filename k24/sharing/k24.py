"""K-2:4: one shared weight, a learned N:M mask per slot; and the controls that show what learning the masks is worth.

Not every layer need have a mask for each slot (``own_masks``). In a net with a GRU the first and the last layer have, by default; what lies
between them has one learned mask for all, so that agents learn from each other there, and all of them run it as one block.

``k24_random`` draws one mask per slot at the start and never changes it. ``k24_shared`` learns ONE mask that all slots
use. ``k24_magnitude`` has one for all too, and chooses it by the size of the weights alone. All cost what K-2:4 costs to run,
so that a comparison tells the masks apart from the sparsity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from k24.errors import UsageError
from k24.sharing.base import Events, Role, Sharing
from k24.sharing.dense import DenseLinear
from k24.sparse.diversity import AdaptiveCoefficient, DiversityLoss, diversity_loss
from k24.sparse.dynamics import Reset, draw_together, of_slot, reset_layer
from k24.sparse.layers import MaskConfig, MaskedLinear
from k24.sparse.metrics import mask_metrics
from k24.sparse.patterns import PatternSet
from k24.sparse.scoring import inverse_cdf
from k24.sparse.slots import SlotWeights

# What holds where nothing is said. docs/lab-notes.md has what other values gave.
_USUAL = {"alpha_lr_scale": 60.0, "weight_lr_scale": 2.0, "alpha_decay": 0.003, "div_coef": 0.0}
Variant = Literal["learned", "random", "shared", "magnitude"]
OwnMasks = Literal["all", "feedforward", "ends", "first"]
# Roles of the layers that have one mask for all slots.
COMMON_ROLES: dict[OwnMasks, tuple[Role, ...]] = {
    "all": (),
    "feedforward": ("recurrent",),
    "ends": ("recurrent", "hidden"),
    "first": ("recurrent", "hidden", "output"),
}


@dataclass(frozen=True)
class K24Config(MaskConfig):
    """Settings of K-2:4 masks and of their training."""

    alpha_lr_scale: float | None = None
    """Learning rate of alpha, as a multiple of the learner's, which decides whether masks are learned; 60 when not given, MATD3: 1."""
    weight_lr_scale: float | None = None
    """Learning rate of masked weights, likewise: half as many inputs at twice the pace move an output as far; 2 if not given, MATD3: 1."""
    own_masks: OwnMasks | None = None
    """Layers with a mask for each agent: all, all but the GRU, first and last, or the first; ends with a GRU if not given, else all."""
    mask_rnn: bool = True
    """Whether the GRU is masked too; a dense one holds most of the multiply-adds and caps the speed-up near 1.14x."""
    alpha_decay: float | None = None
    """Share of its distance from the agents' mean that alpha loses at each gradient step; 0.003 when not given, MATD3: 0."""
    div_coef: float | None = None
    """Share of the task loss given to diversity; 0, for none, when not given, MATD3: 0.1."""
    diversity: DiversityLoss = "orthogonality"
    """Which diversity loss."""
    deque_len: int = 100
    """Gradient steps averaged by the adaptive coefficient."""
    reset_interval: int = 0
    """Gradient steps between resets; 0 for none, since no case is known where they help (docs/lab-notes.md)."""
    reset_ratio: float = 0.1
    """Share of the never-selected entries that a reset draws anew."""
    adaptive_reset: bool = False
    """Reset also when the policy has moved by more than kl_threshold since the last check."""
    kl_threshold: float = 0.1
    """Mean KL divergence of the policy between two checks that triggers a reset."""
    freeze_at: float | None = None
    """Share of training at which masks are fixed for good; that of anneal_end when not given."""

    def __post_init__(self) -> None:
        """Checks each value."""
        super().__post_init__()
        if self.alpha_lr_scale is not None and not self.alpha_lr_scale >= 0:
            raise UsageError(f"alpha_lr_scale {self.alpha_lr_scale} must not be negative")
        if self.weight_lr_scale is not None and not self.weight_lr_scale > 0:
            raise UsageError(f"weight_lr_scale {self.weight_lr_scale} must be positive")
        if self.alpha_decay is not None and not 0 <= self.alpha_decay < 1:
            raise UsageError(f"alpha_decay {self.alpha_decay} must lie in [0, 1): 0.003 is usual")
        if not (self.div_coef or 0) >= 0 or self.deque_len < 1:
            raise UsageError(f"div_coef (={self.div_coef}) must not be negative and deque_len (={self.deque_len}) at least 1")
        if self.reset_interval < 0 or not 0 <= self.reset_ratio <= 1:
            raise UsageError(f"reset_interval (={self.reset_interval}) must be >= 0 and reset_ratio (={self.reset_ratio}) in [0, 1]")
        if not self.kl_threshold > 0:
            raise UsageError(f"kl_threshold {self.kl_threshold} must be positive")
        if self.freeze_at is not None and not self.freeze_at > 0:
            raise UsageError(
                f"freeze_at {self.freeze_at} must be positive: masks need some training before they are fixed (a value "
                f"above 1 never freezes)"
            )

    @property
    def freeze_progress(self) -> float:
        """Share of training at which masks are fixed."""
        return self.anneal_end if self.freeze_at is None else self.freeze_at

    def settled(self, suits: Mapping[str, float] | None = None) -> K24Config:
        """These settings with what was left open filled in, but for ``own_masks``, which depends on the net.

        Args:
            suits: What suits a learner, by name; for the others what is usual.
        """
        found: dict[str, Any] = _USUAL | {"freeze_at": self.freeze_progress} | dict(suits or {})
        return replace(self, **{name: value for name, value in found.items() if getattr(self, name) is None})


# Settings of how masks are chosen and learned, which fixed ones do without; what is left are those of the layers themselves.
_LEARNED = frozenset(f.name for f in fields(K24Config)) - {"pattern", "own_masks", "mask_rnn", "init_gain", "weight_lr_scale"}
_DIVERSITY = frozenset({"div_coef", "diversity", "deque_len"})
_EMA = frozenset({"ema_momentum", "ema_norm", "ema_bias_correction"})


def idle_settings(config: K24Config, variant: Variant) -> dict[str, str]:
    """Settings that change nothing, each with the reason; of those only that are easily taken for a way to change something.

    Args:
        config: All of them.
        variant: Of :class:`K24`.
    """
    found = {} if config.adaptive_reset else {"kl_threshold": "adaptive_reset is off"}
    if config.logits != "sum":
        found["normalise"] = f"logits is {config.logits}, and it normalises those of sum"
    if config.forward not in ("gumbel", "gumbel_soft"):
        found["temperature_on"] = f"forward is {config.forward}, and only gumbel and gumbel_soft add noise that a temperature could divide"
    if config.reset_interval == 0 and not config.adaptive_reset:
        found["reset_ratio"] = "reset_interval is 0 and adaptive_reset is off"
    if config.ema_every == 0:
        found |= dict.fromkeys(_EMA, "ema_every is 0")
    if not config.div_coef:
        found |= dict.fromkeys(_DIVERSITY - {"div_coef"}, "div_coef is 0")
    if variant in ("shared", "magnitude"):
        found |= dict.fromkeys(_DIVERSITY | {"own_masks", "alpha_decay"}, "one mask for all agents cannot differ from itself")
    if variant == "magnitude":
        found |= dict.fromkeys(_EMA | {"ema_every", "alpha_lr_scale", "hetero_init_scale"}, "masks follow the size of weights alone")
    if variant == "random":
        found |= dict.fromkeys(_LEARNED, "the masks are drawn once and never learn")
    return found


class K24(Sharing):
    """Learned N:M masks over one shared network.

    Args:
        n_slots: Agents, or unit types.
        config: Settings.
        variant: ``learned``, or one of the controls ``random``, ``shared`` and ``magnitude``.
    """

    def __init__(self, n_slots: int, config: K24Config | None = None, variant: Variant = "learned") -> None:
        super().__init__(n_slots)
        self.config, self.variant = (config or K24Config()).settled(), variant
        if variant == "magnitude":
            # The score |W| · EMA(|x|) · g(alpha) with an EMA of one and alphas that are zero for good.
            self.config = replace(self.config, hetero_init_scale=0.0, ema_every=0)
        # 1/P is where independent masks sit; see AdaptiveCoefficient.
        floor = 1 / PatternSet.parse(self.config.pattern).n_patterns if self.config.diversity == "orthogonality" else 1e-3
        self._coefficient = AdaptiveCoefficient(self.config.div_coef or 0.0, self.config.deque_len, floor)
        self._steps = self._last_reset = 0
        self.wants_policy_kl = self.config.adaptive_reset and variant != "random"
        self._frozen = variant == "random"
        self._recurrent = False
        self._temperature = self.config.temperature_init
        self._progress = 0.0
        self._logged: dict[str, float] = {}
        self._codes: list[Tensor] | None = None

    def _make(self, in_features: int, out_features: int, role: Role) -> nn.Module:
        self._recurrent |= role == "recurrent"  # a GRU comes before the hidden layers
        if role == "recurrent" and not self.config.mask_rnn:
            return DenseLinear(in_features, out_features, self.n_slots)
        own = self.config.own_masks or ("ends" if self._recurrent else "all")
        common = self.variant in ("shared", "magnitude") or role in COMMON_ROLES[own]
        layer = MaskedLinear(in_features, out_features, 1 if common else self.n_slots, config=self.config)
        if self.variant == "random":
            legal = layer.patterns.legal(in_features).float()
            uniform = (legal / legal.sum(0))[:, None, None].expand(-1, *layer.codes.shape)
            layer.freeze(inverse_cdf(uniform, torch.rand(layer.codes.shape)))
        if self.variant in ("random", "magnitude"):
            layer.alpha.requires_grad_(False)
        return layer

    @property
    def masked(self) -> list[MaskedLinear]:
        """The layers that have masks."""
        return [layer for layer in self.layers if isinstance(layer, MaskedLinear)]

    def resample(self, progress: float, generator: torch.Generator | None = None) -> None:
        """Draws one mask per slot and layer."""
        self._progress, self._temperature = progress, self.config.temperature(progress)
        for layer in self.masked:
            layer.resample(progress, generator)

    def aux_loss(self, weights: Sequence[SlotWeights], task_loss: Tensor) -> Tensor | None:
        """Module C times its adaptive coefficient."""
        if self.config.reset_interval or self.config.adaptive_reset:
            for layer in self.masked:
                layer.count_usage()
        if not self.config.div_coef:
            return None
        pis = [made.pi for made in weights if made.pi is not None and made.pi.numel()]  # a layer may leave no group a choice
        pis = [pi for pi in pis if pi.shape[1] > 1]  # or have one mask for all
        if not pis:
            return None
        loss = diversity_loss(self.config.diversity, pis, self.masked[0].patterns)
        value = float(loss.detach())
        coefficient = self._coefficient.update(float(task_loss), value)
        self._logged = {"div_loss": value, "div_coef": coefficient}
        return coefficient * loss

    def step(self, progress: float, env_steps: int, policy_kl: float | None = None, generator: torch.Generator | None = None) -> Events:
        """Draws alphas together; resets every so often, or when the policy has moved far; freezes once."""
        if self._frozen:
            return Events()
        if progress >= self.config.freeze_progress:
            self._frozen, self._logged = True, {}
            for layer in self.masked:
                layer.freeze()
            return Events(frozen=True, retired=self.retired())
        self._steps += 1
        if self.config.alpha_decay:
            # So that agents end as different as the task makes them: what noise has parted comes back together.
            for layer in self.masked:
                if layer.n_slots > 1:
                    draw_together(layer, self.config.alpha_decay)
        every = self.config.reset_interval
        due = every and self._steps - self._last_reset >= every
        moved = self.config.adaptive_reset and policy_kl is not None and policy_kl > self.config.kl_threshold
        if not (due or moved):
            return Events()
        # Nothing is drawn anew in the last interval: what is new then cannot be learned before the masks are fixed.
        interval = progress * (self._steps - self._last_reset) / self._steps
        if progress + interval >= min(self.config.freeze_progress, 1.0):
            return Events()
        self._last_reset = self._steps
        return Events(resets=[reset for layer in self.masked for reset in reset_layer(layer, self.config.reset_ratio, generator)])

    @torch.no_grad()
    def reset_slot(self, slot: int, generator: torch.Generator | None = None) -> list[Reset]:
        """Draws one slot's alphas anew where it has its own, unless masks are frozen."""
        if self._frozen or self.variant != "learned":
            return []
        resets = []
        for layer in self.masked:
            if layer.n_slots < self.n_slots:
                continue
            fresh = torch.empty_like(layer.alpha[slot]).normal_(generator=generator)
            layer.alpha[slot] = fresh * layer.config.hetero_init_scale
            # What the old masks kept says nothing of the new ones: until the next reset all its weights count as kept.
            layer.usage[slot] = layer.usage_steps.float()
            resets.append(Reset(layer.alpha, of_slot(layer.alpha, slot)))
        return resets

    def trained_apart(self) -> list[tuple[nn.Parameter, float]]:
        """Masked weights, and every alpha that still learns.

        Adam moves a weight by about the learning rate, whatever the size of its gradient. Where a mask keeps N of M weights, or an expected
        mask is N/M on average, such steps move an output by N/M of what they would in a dense layer.
        """
        weight, alpha = self.config.weight_lr_scale, self.config.alpha_lr_scale
        assert weight is not None and alpha is not None  # settled
        return [(layer.weight, weight) for layer in self.masked] + [
            (layer.alpha, alpha) for layer in self.masked if layer.alpha.requires_grad
        ]

    def retired(self) -> list[nn.Parameter]:
        """Every alpha that learned, once masks are frozen."""
        return [layer.alpha for layer in self.masked] if self._frozen and self.variant not in ("random", "magnitude") else []

    def metrics(self) -> dict[str, float]:
        """Diversity, temperature, and all that the masks show."""
        masks, self._codes = mask_metrics(self.masked, self._codes)
        return self._logged | {"temperature": self._temperature, "progress": self._progress} | masks

    def state_dict(self) -> dict:
        """Coefficient history, the time of the last reset, and what the last metrics compared with."""
        return {
            "coefficient": self._coefficient.state_dict(),
            "steps": self._steps,
            "last_reset": self._last_reset,
            "frozen": self._frozen,
            "logged": self._logged,
            "codes": self._codes,
            "progress": self._progress,
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` gave."""
        self._coefficient.load_state_dict(state["coefficient"])
        self._steps, self._last_reset = int(state["steps"]), int(state["last_reset"])
        self._frozen, self._logged = bool(state["frozen"]), dict(state["logged"])
        self._codes = state["codes"]
        self._progress = float(state["progress"])
        self._temperature = self.config.temperature(self._progress)
        for layer in self.masked:
            layer.temperature = self._temperature
