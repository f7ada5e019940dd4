"""What a parameter-sharing scheme is: a kind of layer, a loss of its own, and what happens to it over time.

Every scheme comes down to one *effective weight per slot*. A net asks its layers for these once per step
(``materialise``) and then runs the same code for all schemes; a rollout, an evaluation and a target network each use a
set of effective weights made once and kept. Learners call the methods below and never ask which scheme it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from k24.sparse.dynamics import Reset
from k24.sparse.slots import Phase, SlotWeights

Role = Literal["input", "hidden", "recurrent", "output"]


class SlotLayer(nn.Module, ABC):
    """A linear map per slot.

    Attributes:
        in_features: Inputs (I).
        out_features: Outputs (O).
        n_slots: Slots (A).
    """

    in_features: int
    out_features: int
    n_slots: int

    @abstractmethod
    def materialise(self, phase: Phase = "train") -> SlotWeights:
        """Effective weights, ``[A, O, I]`` or ``[1, O, I]``; with their gradient in the ``train`` phase."""


@dataclass
class Events:
    """What a scheme did in ``step``.

    Attributes:
        frozen: Masks were fixed just now: the target network must follow.
        resets: Entries that were set anew, whose optimiser moments must go.
        retired: Parameters that will never be trained again.
    """

    frozen: bool = False
    resets: list[Reset] = field(default_factory=list)
    retired: list[nn.Parameter] = field(default_factory=list)


class Experience(NamedTuple):
    """What was played at random before training: one row for each moment of a unit that was there before and after it.

    Attributes:
        steps: Environment steps it took.
        slots: int64 ``[N]``, whose row it is.
        obs: ``[N, D]``.
        actions: ``[N, U]``, one-hot where they are discrete.
        reward: ``[N]``, the unit's own.
        next_obs: ``[N, D]``.
    """

    steps: int
    slots: Tensor
    obs: Tensor
    actions: Tensor
    reward: Tensor
    next_obs: Tensor


class Sharing(ABC):
    """A parameter-sharing scheme.

    Args:
        n_slots: Agents, or unit types (A).

    Attributes:
        agent_id: Whether nets append the agent's one-hot index to its observation, unless told otherwise.
        wants_policy_kl: Whether ``step`` should be told how far the policy has moved.
        critics: Critics of an ensemble whose slots they are, unless told otherwise.
        random_play: Environment steps of random play that ``prepare`` wants to see before training; 0 for none.
        layers: The layers handed out so far, in order.
    """

    agent_id: bool = True
    wants_policy_kl: bool = False
    critics: int = 5
    random_play: int = 0

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.layers: list[nn.Module] = []

    def linear(self, in_features: int, out_features: int, role: Role) -> nn.Module:
        """A layer of this scheme; the scheme remembers it.

        Args:
            in_features: Inputs.
            out_features: Outputs.
            role: The layer's place in the net; some schemes treat the output or the recurrent part in their own way.
        """
        layer = self._make(in_features, out_features, role)
        self.layers.append(layer)
        return layer

    @abstractmethod
    def _make(self, in_features: int, out_features: int, role: Role) -> nn.Module:
        """Builds one layer: a :class:`SlotLayer` or a :class:`~k24.sparse.layers.MaskedLinear`."""

    def prepare(self, experience: Experience, generator: torch.Generator) -> None:
        """Learns of the slots what there is to know before training; called once, of a run that is new, before any layer is made.

        Args:
            experience: At least ``random_play`` environment steps.
            generator: Source of the random numbers, on the CPU.
        """

    def follow(self, policy: Sharing) -> None:
        """Takes over what the policy's scheme found out before training: asked of the scheme of critics that are the agents'."""

    def resample(self, progress: float, generator: torch.Generator | None = None) -> None:
        """Starts a gradient step: draws what the scheme draws once per step."""

    def aux_loss(self, weights: Sequence[SlotWeights], task_loss: Tensor) -> Tensor | None:
        """The scheme's own loss, already scaled; None if it has none.

        Args:
            weights: What ``materialise`` gave for this step, one per layer in the order of ``layers``.
            task_loss: Size of the learner's loss, for adaptive coefficients; not differentiated.
        """
        return None

    def step(self, progress: float, env_steps: int, policy_kl: float | None = None, generator: torch.Generator | None = None) -> Events:
        """Ends a gradient step: resets and freezes.

        Args:
            progress: Share of training done, in [0, 1].
            env_steps: Environment steps done.
            policy_kl: How far the policy has moved since it was last asked, where the learner measures it.
            generator: Source of the random numbers.
        """
        return Events()

    def reset_slot(self, slot: int, generator: torch.Generator | None = None) -> list[Reset]:
        """Draws anew what tells one slot from the others, and leaves what they share; what was reset, nothing by default.

        Args:
            slot: Which.
            generator: Source of the random numbers.
        """
        return []

    def trained_apart(self) -> list[tuple[nn.Parameter, float]]:
        """Parameters that want a learning rate of their own, each with its factor on the learner's."""
        return []

    def retired(self) -> list[nn.Parameter]:
        """Parameters that were trained and never will be again, as of now."""
        return []

    def idle(self) -> int:
        """Values of its parameters that no slot uses."""
        return 0

    def metrics(self) -> dict[str, float]:
        """What to log, under public names."""
        return {}

    def state_dict(self) -> dict:
        """What a checkpoint keeps besides the layers."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` gave."""


def steps_left(progress: float, env_steps: int) -> float:
    """Environment steps to the end of training, of which ``progress`` is the share that ``env_steps`` are; infinite at the start."""
    return round(env_steps / progress) - env_steps if progress > 0 else math.inf
