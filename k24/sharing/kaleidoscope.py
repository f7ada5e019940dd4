"""Kaleidoscope: one shared weight, a learned per-agent threshold on each of its entries.

Re-implemented from the facts of Li, Pan and Zhang, "Kaleidoscope: Learnable Masks for Heterogeneous Multi-agent
Reinforcement Learning", NeurIPS 2024 (arXiv 2410.08540). Agent i multiplies with ``sign(W) · relu(|W| -
sigmoid(s_i))``: a soft threshold, so agents differ in the VALUES of their weights and not just in which are kept. The
recurrent part and all biases are shared and dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k24.errors import UsageError
from k24.sharing.base import Events, Role, Sharing, SlotLayer, steps_left
from k24.sharing.dense import DenseLinear
from k24.sparse.diversity import AdaptiveCoefficient
from k24.sparse.dynamics import Reset, of_slot
from k24.sparse.metrics import mask_distance, off_diagonal
from k24.sparse.slots import Phase, SlotWeights


@dataclass(frozen=True)
class KaleidoscopeConfig:
    """Settings of the Kaleidoscope baseline; the defaults are its published ones for MPE."""

    threshold_lr_scale: float = 1.0
    """Learning rate of the thresholds, as a multiple of the learner's."""
    div_coef: float = 0.5
    """Share of the task loss given to diversity (0.5 on MPE, 5 on SMACv2, 0.1 on MaMuJoCo)."""
    deque_len: int = 100
    """Gradient steps averaged by the adaptive coefficient."""
    reset_interval: int = 200_000
    """Environment steps between resets."""
    reset_ratio: float = 0.1
    """Chance that a weight masked by all agents is drawn anew."""

    def __post_init__(self) -> None:
        """Checks each value."""
        for name in ("threshold_lr_scale", "div_coef"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"kaleidoscope.{name} (={getattr(self, name)}) must not be negative: 0 switches it off")
        if self.reset_interval < 1 or not 0 <= self.reset_ratio <= 1 or self.deque_len < 1:
            raise UsageError(
                f"kaleidoscope needs reset_interval >= 1 (={self.reset_interval}), reset_ratio in [0, 1] (={self.reset_ratio}), "
                f"deque_len >= 1 (={self.deque_len})"
            )


class _KeptOrNot(torch.autograd.Function):
    """1 where positive, 0 elsewhere; the gradient passes through a tanh, as in the original."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return torch.tanh(grad)


class KaleidoscopeLinear(SlotLayer):
    """Soft-thresholded shared weight.

    Attributes:
        weight: ``[O, I]``.
        bias: ``[O]``.
        threshold: Logits s of the thresholds ``[A, O, I]``, from -10 to -5 at the start, so that nearly nothing is masked.
    """

    def __init__(self, in_features: int, out_features: int, n_slots: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.n_slots = in_features, out_features, n_slots
        dense = nn.Linear(in_features, out_features)
        self.weight, self.bias = dense.weight, dense.bias
        self.threshold = nn.Parameter(-(torch.rand(n_slots, out_features, in_features) * 5 + 5))

    def materialise(self, phase: Phase = "train") -> SlotWeights:
        """``sign(W) · relu(|W| - sigmoid(s_i))``; ``extra`` holds the thresholds for the diversity loss."""
        threshold = torch.sigmoid(self.threshold)
        return SlotWeights(torch.sign(self.weight) * F.relu(self.weight.abs() - threshold), self.bias[None], extra=threshold)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Which weights each agent keeps, ``[A, O, I]`` of zeros and ones."""
        return (self.weight.abs() > torch.sigmoid(self.threshold)).float()


class Kaleidoscope(Sharing):
    """The scheme, with its weighted L1 diversity and its reset of weights that nobody uses.

    The diversity loss of layer l has the weight ``c_l = 1, 2, 4, 8`` from the input to the output. Weights masked by all agents are
    drawn anew, with their thresholds; where there is a GRU not those of the first layer. Nothing is reset in the last interval of training.
    All as published.

    Args:
        n_slots: Agents.
        config: Settings.
    """

    def __init__(self, n_slots: int, config: KaleidoscopeConfig | None = None) -> None:
        super().__init__(n_slots)
        self.config = config or KaleidoscopeConfig()
        self._coefficient = AdaptiveCoefficient(self.config.div_coef, self.config.deque_len)
        self._last_reset = 0
        self._logged: dict[str, float] = {}

    def _make(self, in_features: int, out_features: int, role: Role) -> nn.Module:
        if role == "recurrent":
            return DenseLinear(in_features, out_features, self.n_slots)
        return KaleidoscopeLinear(in_features, out_features, self.n_slots)

    @property
    def _masked(self) -> list[KaleidoscopeLinear]:
        return [layer for layer in self.layers if isinstance(layer, KaleidoscopeLinear)]

    def diversity(self, weights: Sequence[SlotWeights]) -> Tensor:
        """``-Σ_l c_l Σ_{i≠j} ‖|W|∘(M_i - M_j)‖₁ / (A(A-1)·params)``, W detached, masks straight-through."""
        pairs = self.n_slots * (self.n_slots - 1)
        terms: list[Tensor] = []
        count = 0
        for layer, made in zip(self.layers, weights, strict=True):
            if not isinstance(layer, KaleidoscopeLinear) or made.extra is None:
                continue
            size = layer.weight.detach().abs()
            masked = size * _KeptOrNot.apply(size - made.extra)
            # One pass over ordered pairs at a time keeps memory at A copies of a layer and not A².
            terms.append(2.0 ** len(terms) * torch.stack([(masked - masked[i]).abs().sum() for i in range(self.n_slots)]).sum())
            count += size.numel()
        return -torch.stack(terms).sum() / (pairs * count)

    def aux_loss(self, weights: Sequence[SlotWeights], task_loss: Tensor) -> Tensor | None:
        """Diversity times its adaptive coefficient; None for a single agent or coefficient 0."""
        if self.n_slots < 2 or self.config.div_coef == 0:
            return None
        loss = self.diversity(weights)
        value = float(loss.detach())
        coefficient = self._coefficient.update(float(task_loss), value)
        self._logged = {"div_loss": value, "div_coef": coefficient}
        return coefficient * loss

    def step(self, progress: float, env_steps: int, policy_kl: float | None = None, generator: torch.Generator | None = None) -> Events:
        """Draws weights anew that every agent masks, every ``reset_interval`` environment steps but for the last ones."""
        every = self.config.reset_interval
        if env_steps - self._last_reset < every or steps_left(progress, env_steps) <= every:
            return Events()
        self._last_reset = env_steps
        masked = self._masked
        reset = masked if len(masked) == len(self.layers) else masked[1:]
        return Events(resets=[part for layer in reset for part in self._reset(layer, generator)])

    @torch.no_grad()
    def _reset(self, layer: KaleidoscopeLinear, generator: torch.Generator | None) -> list[Reset]:
        unused = layer.mask().sum(0) == 0
        chosen = unused & (torch.rand(unused.shape, generator=generator, device=unused.device) < self.config.reset_ratio)
        bound = layer.in_features**-0.5
        fresh = torch.empty_like(layer.weight).uniform_(-bound, bound, generator=generator)
        layer.weight.copy_(torch.where(chosen, fresh, layer.weight))
        thresholds = self._fresh_thresholds(layer.threshold, generator)
        layer.threshold.copy_(torch.where(chosen, thresholds, layer.threshold))
        return [Reset(layer.weight, chosen), Reset(layer.threshold, chosen.expand_as(layer.threshold))]

    @staticmethod
    def _fresh_thresholds(like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Logits as at the start."""
        return -(torch.empty_like(like).uniform_(generator=generator) * 5 + 5)

    @torch.no_grad()
    def reset_slot(self, slot: int, generator: torch.Generator | None = None) -> list[Reset]:
        """Draws one slot's thresholds anew."""
        resets = []
        for layer in self._masked:
            layer.threshold[slot] = self._fresh_thresholds(layer.threshold[slot], generator)
            resets.append(Reset(layer.threshold, of_slot(layer.threshold, slot)))
        return resets

    def trained_apart(self) -> list[tuple[nn.Parameter, float]]:
        """The thresholds."""
        return [(layer.threshold, self.config.threshold_lr_scale) for layer in self._masked]

    def metrics(self) -> dict[str, float]:
        """Diversity and what the thresholds mask."""
        masks = [layer.mask() for layer in self._masked]
        kept = sum(float(m.sum()) for m in masks) / sum(m.numel() for m in masks)
        metrics = {f"sparsity_layer_{k}": 1 - float(m.mean()) for k, m in enumerate(masks)}
        return self._logged | metrics | {"overall_sparsity": 1 - kept, "mask_hamming": float(off_diagonal(mask_distance(masks)).mean())}

    def state_dict(self) -> dict:
        """Coefficient history and the time of the last reset."""
        return {"coefficient": self._coefficient.state_dict(), "last_reset": self._last_reset, "logged": self._logged}

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` gave."""
        self._coefficient.load_state_dict(state["coefficient"])
        self._last_reset, self._logged = int(state["last_reset"]), dict(state["logged"])
