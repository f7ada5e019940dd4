"""Gradient steps on a net that a sharing scheme made: learning rates, finite losses, clipping, resets and freezes.

A learner has one :class:`Trainee` per net (policy, critic) and takes a step with each in three calls::

    weights = trainee.begin(progress, generator)       # this step's masks
    trainee.step(loss_of(weights), weights)
    events = trainee.settle(progress, env_steps, None, generator)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from k24.envs.base import EnvSpec
from k24.errors import LAST_GOOD, RunError, UsageError
from k24.nets import AgentNet, Weights, detach_weights
from k24.sharing.base import Events, Sharing
from k24.sparse.dynamics import clear_moments, drop_state
from k24.sparse.slots import SlotRule, SlotWeights

# Makes the scheme of critics: given how many slots (None: as many as it likes), and whether these are an ensemble, critics of one thing, or
# one critic per agent.
CriticSharing = Callable[[int | None, bool], Sharing]


def rule_for(rule: SlotRule | None, spec: EnvSpec, sharing: Sharing) -> SlotRule:
    """A learner's slot rule: that given, or the agents' indices.

    Raises:
        UsageError: It has another number of slots than the scheme.
    """
    rule = rule or SlotRule(spec.n_agents)
    if rule.n_slots != sharing.n_slots:
        raise UsageError(f"the slot rule has {rule.n_slots} slots and the sharing scheme {sharing.n_slots}: give both the same")
    return rule


def check_rates(decay_start: float, final: float, **rates: float) -> None:
    """Refuses learning rates, and a decay of theirs, that make no sense.

    Args:
        decay_start: Share of training after which they fall.
        final: Share of them left at the end.
        **rates: By the name of their setting.
    """
    if not all(rate > 0 for rate in rates.values()) or not 0 <= final <= 1 or not 0 <= decay_start <= 1:
        named = " and ".join(f"{name} (={rate})" for name, rate in rates.items())
        raise UsageError(f"{named} must be positive, lr_final (={final}) and lr_decay_start (={decay_start}) in [0, 1]")


class Trainee:
    """A net, the scheme it is made by, and the optimiser of both.

    Args:
        name: What its loss is called, in metrics and errors.
        net: The net.
        sharing: Its scheme.
        lr: Learning rate; parameters that the scheme wants trained apart get a multiple of it.
        grad_clip: Largest norm of the gradient.
        decay: Share of training after which learning rates fall on a line, and the share of them left at the end.
        others: What is trained along with it, such as a mixer.
        optimiser: Which one.
        eps: Epsilon of Adam.

    Attributes:
        updates: Gradient steps taken.
    """

    def __init__(
        self,
        name: str,
        net: AgentNet,
        sharing: Sharing,
        lr: float,
        grad_clip: float,
        decay: tuple[float, float] = (1.0, 1.0),
        others: Sequence[nn.Module] = (),
        optimiser: Literal["adam", "rmsprop"] = "adam",
        eps: float = 1e-8,
    ) -> None:
        self.name, self.net, self.sharing, self.updates = name, net, sharing, 0
        self._lr, self._grad_clip, self._decay = lr, grad_clip, decay
        self._others = nn.ModuleList(others)
        self._acting: Weights | None = None
        self._logged: dict[str, float] = {}
        apart = sharing.trained_apart()
        ids = {id(p) for p, _ in apart}
        own = [p for p in net.parameters() if id(p) not in ids and p.requires_grad]
        groups: list[dict] = [{"params": own + list(self._others.parameters()), "scale": 1.0}]
        for scale in sorted({s for _, s in apart}):
            groups.append({"params": [p for p, s in apart if s == scale], "scale": scale})
        if optimiser == "adam":
            self.optimiser: torch.optim.Optimizer = torch.optim.Adam(groups, lr=lr, eps=eps, fused=True)
        else:
            self.optimiser = torch.optim.RMSprop(groups, lr=lr, alpha=0.99, eps=1e-5)

    def acting(self) -> Weights:
        """Effective weights to behave by, made when first asked for after a step."""
        if self._acting is None:
            self._acting = self.net.snapshot("act")
        return self._acting

    def draw(self, progress: float, generator: torch.Generator) -> None:
        """Draws the masks of the steps to come, until the next call."""
        self.sharing.resample(progress, generator)
        self._acting = None  # the temperature has moved, and the masks with it

    def begin(self, progress: float, generator: torch.Generator, draw: bool = True) -> Weights:
        """Starts a gradient step: sets the learning rate, and makes the step's effective weights, with their gradient.

        Args:
            progress: Share of training done, in [0, 1].
            generator: Source of the random numbers.
            draw: Whether masks are drawn for this step, or those drawn last hold.
        """
        start, final = self._decay
        fallen = max(0.0, progress - start) / (1 - start) if start < 1 else 0.0
        for group in self.optimiser.param_groups:
            group["lr"] = self._lr * group["scale"] * (1 + (final - 1) * min(fallen, 1.0))
        if draw:
            self.draw(progress, generator)
        return self.net.materialise("train")

    def step(self, loss: Tensor, weights: Weights, size: Tensor | None = None) -> None:
        """One step down the loss, and the scheme's own.

        Args:
            loss: A scalar.
            weights: What :meth:`begin` gave.
            size: How large the loss's terms are, where they cancel and their sum does not say; the loss itself when None.

        Raises:
            RunError: Loss or gradient is NaN or infinite, or depends on nothing that learns; parameters are as they were.
        """
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RunError(
                f"{self.name} is {value} after {self.updates} updates: lower lr (={self._lr}) or grad_clip (={self._grad_clip}); "
                f"{LAST_GOOD}"
            )
        if not loss.requires_grad:
            raise RunError(f"no row of the batch has a slot after {self.updates} updates, so there is nothing to learn from: see slots")
        aux = self.sharing.aux_loss(weights, loss.detach() if size is None else size)
        self.optimiser.zero_grad(set_to_none=True)
        (loss if aux is None else loss + aux).backward()
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self._grad_clip, foreach=True)
        if not bool(torch.isfinite(norm)):
            raise RunError(
                f"the gradient of {self.name} is {float(norm)} after {self.updates} updates, parameters are as they were: lower lr "
                f"(={self._lr}) or div_coef; {LAST_GOOD}"
            )
        self.optimiser.step()
        self.updates += 1
        self._acting = None
        self._logged = {self.name: value, "grad_norm": float(norm)}

    def settle(self, progress: float, env_steps: int, policy_kl: float | None, generator: torch.Generator) -> Events:
        """Lets the scheme reset and freeze what is due, and the optimiser forget it; arguments as for ``Sharing.step``."""
        return self.forget(self.sharing.step(progress, env_steps, policy_kl, generator))

    def forget(self, events: Events) -> Events:
        """Takes what was set anew, or will never move again, out of the optimiser's memory."""
        clear_moments(self.optimiser, events.resets)
        if events.retired:
            drop_state(self.optimiser, events.retired)
        if events.resets or events.frozen:
            self._acting = None
        return events

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Loss, norm of the gradient, the scheme's own metrics, steps taken and the learning rate.

        Args:
            prefix: Before every name but that of the loss, which is told apart by itself.
        """
        counted = {"updates": float(self.updates), "lr": self.optimiser.param_groups[0]["lr"]}
        found = self._logged | self.sharing.metrics() | counted
        return {name if name == self.name else prefix + name: value for name, value in found.items()}

    def state_dict(self) -> dict:
        """Everything that is needed to go on bit for bit."""
        return {
            "net": self.net.state_dict(),
            "others": self._others.state_dict(),
            "sharing": self.sharing.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "updates": self.updates,
            "logged": self._logged,
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` gave."""
        self.load_policy_state(state)
        drop_state(self.optimiser, self.sharing.retired())
        self.optimiser.load_state_dict(state["optimiser"])
        self.updates, self._logged = int(state["updates"]), dict(state["logged"])

    def load_policy_state(self, state: dict) -> None:
        """Takes the net and the scheme alone: enough to act and to inspect."""
        self.net.load_state_dict(state["net"])
        self._others.load_state_dict(state["others"])
        self.sharing.load_state_dict(state["sharing"])
        self._acting = None


class Target:
    """Effective weights, and a module, that follow those of a trainee.

    Args:
        trainee: Whose net it follows.
        module: What else follows, such as a mixer; None for nothing.

    Attributes:
        weights: The effective weights.
        module: The module's copy.
    """

    def __init__(self, trainee: Trainee, module: nn.Module | None = None) -> None:
        self._trainee, self._source = trainee, module
        self.weights: Weights = trainee.net.snapshot("act")
        self.module = copy.deepcopy(module)

    def follow(self, rate: float = 1.0) -> None:
        """Moves by a share of the way to what is behaved by now; 1 for all of it."""
        track(_tensors(self.weights), _tensors(self._trainee.acting()), rate)
        if self.module is not None and self._source is not None:
            track(list(self.module.parameters()), list(self._source.parameters()), rate)

    def state_dict(self) -> dict:
        """Weights and module."""
        weights = [(made.weight, made.bias) for made in self.weights]
        return {"weights": weights, "module": None if self.module is None else self.module.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` gave."""
        here = self.weights[0].weight.device
        self.weights = detach_weights([SlotWeights(weight.to(here), bias.to(here)) for weight, bias in state["weights"]])
        if self.module is not None:
            self.module.load_state_dict(state["module"])


def _tensors(weights: Weights) -> list[Tensor]:
    return [t for made in weights for t in (made.weight, made.bias)]


@torch.no_grad()
def track(target: list[Tensor], source: list[Tensor], rate: float) -> None:
    """Moves target tensors towards the sources: all the way at rate 1, otherwise ``target += rate · (source - target)``."""
    for t, s in zip(target, source, strict=True):
        t.copy_(s) if rate >= 1 else t.lerp_(s, rate)
