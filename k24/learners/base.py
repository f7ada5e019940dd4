"""What all learners have in common: a policy made by a sharing scheme, how it acts, and what is told of it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from k24.actions import KINDS, ActionKind, StochasticKind
from k24.envs.base import EnvSpec, TeamEnv
from k24.errors import UsageError
from k24.learners.optimise import CriticSharing, Trainee, rule_for
from k24.learners.replay import Episodes
from k24.learners.rollout import Choice, NetActor, RandomActor, collect_episodes, drawn, likeliest
from k24.learners.statistics import PolicyPool
from k24.nets import AgentNet, Weights
from k24.sharing import dense_critics
from k24.sharing.base import Sharing
from k24.sparse.slots import Phase, SlotRule


class Learner(ABC):
    """One or several algorithms that learn a team's policy.

    A subclass builds its nets in ``_build``, says who explores in ``_explorer`` and what becomes of what was played in ``_remember``, and
    takes gradient steps in ``learn``. It never asks which scheme it trains.

    Args:
        algo: Its name in :data:`k24.learners.LEARNERS`; one class may go by several.
        spec: The environment's sizes.
        sharing: The policy's parameter-sharing scheme; fresh, it becomes the learner's own.
        config: Settings, of the class that ``settings`` names; their defaults when None.
        hidden: Hidden units of the nets, of critics where their settings name no others.
        agent_id: Append agent indices to observations; the scheme's preference when None.
        seed: Seed of initial weights and of all random numbers of the learner.
        device: Where it learns.
        rule: Which slot of the scheme each row uses; the agent's index when None.
        critic_sharing: Makes the scheme of critics, for learners that have them; a dense network for each of their slots when None.

    Attributes:
        policy: The policy's net and what trains it.
        kind: What the net's outputs mean, a key of ``k24.actions.KINDS``.
        generator: Source of all its random numbers.

    Raises:
        UsageError: The task's actions are of the wrong kind, or the rule has another number of slots than the scheme.
    """

    settings: ClassVar[type]
    kind: str
    policy: Trainee

    def __init__(
        self,
        algo: str,
        spec: EnvSpec,
        sharing: Sharing,
        config: Any = None,
        hidden: int = 64,
        agent_id: bool | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rule: SlotRule | None = None,
        critic_sharing: CriticSharing | None = None,
    ) -> None:
        self.algo, self.spec, self.sharing, self.config = algo, spec, sharing, config or self.settings()
        self.kind = self._kind_of_policy()
        self.rule, self.device = rule_for(rule, spec, sharing), torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(hidden, agent_id, critic_sharing or dense_critics)
        self._pool = PolicyPool(self._kind, self.net, self.rule)

    @abstractmethod
    def _kind_of_policy(self) -> str:
        """What the policy's outputs mean in this task, a key of ``KINDS``; refuses a task whose actions it can't learn."""

    @abstractmethod
    def _build(self, hidden: int, agent_id: bool | None, critic_sharing: CriticSharing) -> None:
        """Makes nets and what trains them; initial weights come from torch's own generator, which is seeded."""

    @property
    def net(self) -> AgentNet:
        """The policy's net."""
        return self.policy.net

    @property
    def _kind(self) -> ActionKind:
        return KINDS[self.kind]

    @property
    def updates(self) -> int:
        """Gradient steps taken."""
        return self.policy.updates

    # Experience -------------------------------------------------------------------------------------------------------------------

    def gather(self, env: TeamEnv, env_steps: int, seed: int) -> Episodes:
        """Plays one episode in every parallel environment, and keeps what is to be learned from.

        Args:
            env: The training environments.
            env_steps: Environment steps done before.
            seed: Seed of this round.
        """
        episodes = collect_episodes(env, self._explorer(env_steps), seed)
        self._remember(episodes)
        self._pool.fill(episodes)
        return episodes

    @abstractmethod
    def _explorer(self, env_steps: int) -> NetActor | RandomActor:
        """Who plays while training."""

    @abstractmethod
    def _remember(self, episodes: Episodes) -> None:
        """Keeps what was played."""

    def actor(self, phase: Phase = "act", sample: bool = False, seed: int = 0) -> NetActor:
        """Who acts with the weights of ``phase``, by the best or likeliest action, or by drawing from the policy.

        Args:
            phase: Which masks; ``sampled`` ones are drawn anew whenever episodes begin, from torch's own generator.
            sample: Whether to draw.
            seed: Of the draws.

        Raises:
            UsageError: Actions are to be drawn from a policy that is no distribution.
        """
        if not sample:
            choose = likeliest(self._kind)
        elif isinstance(self._kind, StochasticKind):
            choose = drawn(self._kind, torch.Generator(self.device).manual_seed(seed))
        else:
            raise UsageError(f"{self.algo} learns a {self.kind} policy, which is no distribution to draw from: leave sample out")
        if phase == "sampled":
            return NetActor(self.net, (), choose, self.rule, redraw=lambda: self.net.snapshot(phase))
        return self._actor(self.policy.acting() if phase == "act" else self.net.snapshot(phase), choose)

    def _actor(self, weights: Weights, choose: Choice) -> NetActor:
        return NetActor(self.net, weights, choose, self.rule)

    def random_actor(self) -> RandomActor:
        """A policy that does not look."""
        return RandomActor(self.spec.n_actions, torch.Generator(self.device).manual_seed(0), self.spec.continuous)

    # Learning ---------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def learn(self, progress: float, env_steps: int) -> None:
        """Takes the gradient steps that are due.

        Args:
            progress: Share of training done, in [0, 1].
            env_steps: Environment steps done.
        """

    def _moved(self) -> float | None:
        """How far the policy has moved since the call before, where the scheme wants to know."""
        return self._pool.moved() if self.sharing.wants_policy_kl else None

    def metrics(self) -> dict[str, float]:
        """What to log, under public names."""
        return self.policy.metrics() | self._pool.metrics()

    # Checkpoints ------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Everything that is needed to go on bit for bit."""
        return {"policy": self.policy.state_dict(), "generator": self.generator.get_state(), "pool": self._pool.state_dict()}

    def final_state_dict(self) -> dict:
        """What of :meth:`state_dict` a finished run keeps: all but the replay, which may be gigabytes that nothing will be learned from."""
        return {name: part for name, part in self.state_dict().items() if name != "replay"}

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` or :meth:`final_state_dict` gave."""
        self.policy.load_state_dict(state["policy"])
        drawn = state["generator"].cpu()
        if len(drawn) == len(self.generator.get_state()):
            self.generator.set_state(drawn)
        else:  # of another kind of device, which goes on with other random numbers
            self.generator.manual_seed(int.from_bytes(hashlib.sha256(drawn.numpy().tobytes()).digest()[:4], "little"))
        self._pool.load_state_dict(state["pool"])

    def load_policy_state(self, state: dict) -> None:
        """Takes the policy's net and scheme alone: enough to act and to inspect."""
        self.policy.load_policy_state(state["policy"])
