"""IPPO and MAPPO in one learner: what differs between them is what the critic sees.

A round is one episode in every parallel environment. All of them are judged once (generalised advantage estimation), then passed over
several times with the clipped surrogate loss, whole episodes at a time. Sources: PPO, Schulman et al. 2017 (arXiv 1707.06347); MAPPO and
the settings, Yu et al. 2022 (arXiv 2103.01955); IPPO, de Witt et al. 2020 (arXiv 2011.09533).

Shapes: ``A`` agents, ``T`` steps, ``B`` episodes, ``V`` values of a state: one per agent, or one for the team where one critic serves all
and rewards are the team's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from k24.actions import KINDS, StochasticKind
from k24.errors import UsageError
from k24.learners.base import Learner
from k24.learners.optimise import CriticSharing, Trainee, check_rates
from k24.learners.replay import Episodes, last_steps
from k24.learners.rollout import NetActor, drawn, slots_of
from k24.learners.statistics import RunningMoments
from k24.learners.targets import clipped_value_loss, gae, masked_mean, ppo_loss
from k24.nets import AgentNet, Weights


@dataclass(frozen=True)
class PPOConfig:
    """Settings of IPPO and MAPPO; defaults of the MAPPO paper (Yu et al. 2022, arXiv 2103.01955), but for rates that fall at the end."""

    lr: float = 5e-4
    """Learning rate of the policy."""
    critic_lr: float = 5e-4
    """Learning rate of the critic."""
    lr_decay_start: float = 0.8
    """Share of training after which both learning rates fall on a line; 1 for never."""
    lr_final: float = 0.1
    """What is left of them at the end, as a share."""
    gamma: float = 0.99
    """Discount."""
    gae_lambda: float = 0.95
    """λ of generalised advantage estimation."""
    epochs: int = 10
    """Passes over each round of episodes."""
    minibatches: int = 1
    """Parts that a pass is split into, by whole episodes."""
    clip: float = 0.2
    """How far the probability ratio may move before its gradient stops."""
    value_clip: float = 0.2
    """How far a value may move before its loss is taken at its worst; 0 for no such limit."""
    huber_delta: float = 10.0
    """Where the value loss turns from square to linear."""
    entropy_coef: float = 0.01
    """Weight of the policy's entropy."""
    target_kl: float = 0.0
    """Stop the policy's steps of a round once it has moved this far on average; 0 for never."""
    normalise_values: bool = True
    """Let the critic predict returns in units of their running standard deviation."""
    grad_clip: float = 10.0
    """Largest norm of the gradient, for policy and critic each."""
    adam_eps: float = 1e-5
    """Epsilon of Adam."""
    recurrent: bool = True
    """Whether policy and critic have a GRU."""
    individual_rewards: bool = False
    """Each agent learns from its own reward instead of the team's sum."""
    critic_sharing: str = "auto"
    """Sharing scheme of the critic: auto for the policy's where each agent has a critic (IPPO), dense where one serves all (MAPPO)."""
    critic_hidden: int | None = None
    """Hidden units of the critic; those of the policy when not given."""

    def __post_init__(self) -> None:
        """Checks each value, and those that depend on each other."""
        check_rates(self.lr_decay_start, self.lr_final, lr=self.lr, critic_lr=self.critic_lr)
        if not 0 <= self.gamma <= 1 or not 0 <= self.gae_lambda <= 1:
            raise UsageError(f"gamma (={self.gamma}) and gae_lambda (={self.gae_lambda}) must lie in [0, 1]")
        if self.epochs < 1 or self.minibatches < 1:
            raise UsageError(f"epochs (={self.epochs}) and minibatches (={self.minibatches}) must be at least 1")
        for name in ("clip", "huber_delta", "grad_clip", "adam_eps"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} (={getattr(self, name)}) must be positive")
        for name in ("value_clip", "entropy_coef", "target_kl"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} (={getattr(self, name)}) must not be negative")

    def check(self, algo: str, envs: int, steps: int) -> None:
        """Refuses what does not fit the rest of a run.

        Args:
            algo: ``ippo`` or ``mappo``.
            envs: Parallel environments, and so episodes of a round.
            steps: Environment steps of the run.
        """
        if self.minibatches > envs:
            raise UsageError(f"minibatches (={self.minibatches}) must not exceed envs (={envs}): episodes are not cut")


class _Played(NamedTuple):
    """Episodes as the nets take them.

    Attributes:
        episodes: As they were played.
        slots: ``[A, T+1, B]``, or None.
        alive: Likewise.
        seen: bool ``[T+1, B]``, observations where a step was played or that one led to; None where all episodes are of full length.
    """

    episodes: Episodes
    slots: Tensor | None
    alive: Tensor | None
    seen: Tensor | None

    def part(self, index: Tensor) -> _Played:
        """Some of the episodes, by their number."""
        return _Played(self.episodes.part(index), *(None if x is None else x.index_select(-1, index) for x in self[1:]))


class _Round(NamedTuple):
    """What is learned from one round of episodes; ``V`` is the number of values that a state has.

    Attributes:
        played: The episodes.
        counted: bool ``[A, T, B]``, the steps that an agent acted in; None for all.
        log_prob: Of the actions, when they were taken, ``[A, T, B]``.
        advantage: Standardised, ``[A, T, B]``.
        value: As the critic gave them, ``[V, T, B]``.
        target: What they should have been, in the critic's units, ``[V, T, B]``.
        valued: bool ``[V, T, B]``, the values that count; None for all.
    """

    played: _Played
    counted: Tensor | None
    log_prob: Tensor
    advantage: Tensor
    value: Tensor
    target: Tensor
    valued: Tensor | None

    def part(self, index: Tensor) -> _Round:
        """Some of the episodes, by their number."""
        return _Round(self.played.part(index), *(None if x is None else x.index_select(-1, index) for x in self[1:]))  # type: ignore[arg-type]


class PPOLearner(Learner):
    """Proximal policy optimisation for teams: ``ippo`` or ``mappo``. Arguments are those of :class:`Learner`.

    Attributes:
        critic: The critic's net and what trains it.
    """

    settings: ClassVar[type] = PPOConfig
    config: PPOConfig

    def _kind_of_policy(self) -> str:
        return "gaussian" if self.spec.continuous else "categorical"

    @property
    def _kind(self) -> StochasticKind:
        return cast(StochasticKind, KINDS[self.kind])

    def _build(self, hidden: int, agent_id: bool | None, critic_sharing: CriticSharing) -> None:
        c, spec = self.config, self.spec
        # One critic that sees the state serves the whole team: MAPPO. Or each agent has one that sees what it observes: IPPO.
        self._central = self.algo == "mappo"
        self._n_values = spec.n_agents if c.individual_rewards or not self._central else 1
        outputs = self._kind.n_outputs(spec.n_actions)
        net = AgentNet(spec.obs_dim, outputs, hidden, spec.n_agents, self.sharing, agent_id, c.recurrent)
        judge = critic_sharing(1 if self._central else self.sharing.n_slots, False)
        width = c.critic_hidden or hidden
        critic = (
            AgentNet(spec.state_dim, self._n_values, width, 1, judge, False, c.recurrent)
            if self._central
            else AgentNet(spec.obs_dim, 1, width, spec.n_agents, judge, agent_id, c.recurrent)
        )
        decay = (c.lr_decay_start, c.lr_final)
        self.policy = Trainee("loss_policy", net.to(self.device), self.sharing, c.lr, c.grad_clip, decay, eps=c.adam_eps)
        self.critic = Trainee("loss_value", critic.to(self.device), judge, c.critic_lr, c.grad_clip, decay, eps=c.adam_eps)
        self._returns = RunningMoments()
        self._fresh: Episodes | None = None
        self._progress = 0.0
        self._logged: dict[str, Tensor] = {}
        self._draw()

    # Experience -------------------------------------------------------------------------------------------------------------------

    def _explorer(self, env_steps: int) -> NetActor:
        self._draw()
        return self._actor(self.net.snapshot("train"), drawn(self._kind, self.generator))

    def _remember(self, episodes: Episodes) -> None:
        self._fresh = episodes

    def _draw(self) -> None:
        """Draws the masks of a round: what acts in it is what learns from it, so that ratios begin at 1."""
        for trainee in (self.policy, self.critic):
            trainee.draw(self._progress, self.generator)

    # Learning ---------------------------------------------------------------------------------------------------------------------

    def learn(self, progress: float, env_steps: int) -> None:
        """Passes over the newest round several times; arguments as for :meth:`Learner.learn`."""
        if self._fresh is None:
            return
        self.update(self._fresh, progress, env_steps)
        self._fresh = None

    def update(self, episodes: Episodes, progress: float, env_steps: int) -> None:
        """All gradient steps of one round.

        Args:
            episodes: Played by the present policy.
            progress: Share of training done, in [0, 1].
            env_steps: Environment steps done.

        Raises:
            RunError: A loss or a gradient is NaN or infinite; parameters are as they were before that step.
        """
        c, seen = self.config, self._look_back(episodes.cut())
        self._progress = progress
        # How far the policy has moved is asked once a round: a single step hardly moves it.
        moved, trusted = self._moved(), True
        for _ in range(c.epochs):
            for part in self._parts(seen):
                # What the policy's steps are limited by holds for the masks that it began the round with.
                trusted = trusted and self._policy_step(part, progress, env_steps, moved)
                moved = None
                weights = self.critic.begin(progress, self.generator, draw=False)
                value = self._values(weights, part.played, observe=True)[:, :-1]
                loss = clipped_value_loss(value, part.value, part.target, c.value_clip, c.huber_delta, part.valued)
                self.critic.step(loss, weights)
                self.critic.settle(progress, env_steps, None, self.generator)

    def _policy_step(self, part: _Round, progress: float, env_steps: int, policy_kl: float | None) -> bool:
        """One gradient step of the policy; says whether another one may follow in this round."""
        c, kind = self.config, self._kind
        weights = self.policy.begin(progress, self.generator, draw=False)
        episodes = part.played.episodes
        outputs, avail = self._outputs(weights, part.played, observe=True), _before(episodes.avail)
        log_prob = kind.log_prob(outputs, episodes.actions, avail)
        surrogate, clipped, moved = ppo_loss(log_prob, part.log_prob, part.advantage, c.clip, part.counted)
        if c.target_kl and float(moved) > c.target_kl:
            return False
        entropy = masked_mean(kind.entropy(outputs, avail, self.generator), part.counted)
        # Standardised advantages sum to about 0: what the policy can gain or lose is their size.
        self.policy.step(surrogate - c.entropy_coef * entropy, weights, masked_mean(part.advantage.abs(), part.counted))
        self._logged = {"entropy": entropy.detach(), "clip_fraction": clipped, "approx_kl": moved}
        events = self.policy.settle(progress, env_steps, policy_kl, self.generator)
        return not (events.frozen or events.resets)

    @torch.no_grad()
    def _look_back(self, episodes: Episodes) -> _Round:
        """Judges what was done, before anything is learned from it."""
        c = self.config
        slots, alive = slots_of(self.rule, episodes.obs, episodes.alive)
        valid = None if bool(episodes.valid.all()) else episodes.valid
        seen = None if valid is None else torch.cat([valid[:1], valid])
        if slots is not None and seen is not None:
            slots = slots.where(seen, -1)  # what comes after an episode is another one, of other units
        played = _Played(episodes, slots, alive, seen)
        log_prob = self._kind.log_prob(self._outputs(self.net.snapshot("train"), played), episodes.actions, _before(episodes.avail))
        value = self._values(self.critic.net.snapshot("train"), played)

        present = alive if slots is None else slots >= 0
        own = self._n_values > 1 or (self.spec.n_agents == 1 and not self._central)
        terminated, last = (x.expand_as(value[:, 1:]) for x in (episodes.terminated, last_steps(episodes.valid)))
        counted = valued = None if valid is None else valid.expand(self.spec.n_agents, -1, -1)
        if present is not None:
            acted = present[:, :-1]
            counted = acted if counted is None else acted & counted
            if own:
                # An agent that has a value of its own has returns of its own, which end with it.
                died = acted & ~present[:, 1:]
                terminated, last = terminated | died, last | died
        valued = counted if own else None if valid is None else valid[None]

        std, mean = (self._returns.std, self._returns.mean) if c.normalise_values else (1.0, 0.0)
        worth = (value * std + mean).transpose(0, 1)  # time first
        reward = episodes.reward if c.individual_rewards else episodes.reward.sum(0, keepdim=True).expand(self._n_values, -1, -1)
        flags = terminated.transpose(0, 1), last.transpose(0, 1)
        advantage = gae(reward.transpose(0, 1), worth[:-1], worth[1:], *flags, c.gamma, c.gae_lambda).transpose(0, 1)
        target = advantage + worth[:-1].transpose(0, 1)
        if c.normalise_values:
            self._returns.update(target if valued is None else target[valued])
            target = (target - self._returns.mean) / self._returns.std
        advantage = advantage.expand(self.spec.n_agents, -1, -1)
        picked = advantage if counted is None else advantage[counted]
        advantage = (advantage - picked.mean()) / (picked.std() + 1e-5) if picked.numel() > 1 else advantage
        return _Round(played, counted, log_prob, advantage, value[:, :-1], target, valued)

    def _parts(self, whole: _Round) -> Iterator[_Round]:
        """Whole episodes in a random order, in so many parts."""
        if self.config.minibatches == 1:
            yield whole
            return
        order = torch.randperm(whole.played.episodes.count, generator=self.generator, device=self.device)
        for index in order.tensor_split(self.config.minibatches):
            yield whole.part(index)

    def _outputs(self, weights: Weights, played: _Played, observe: bool = False) -> Tensor:
        """What the policy says of each action taken, ``[A, T, B, K]``."""
        valid = None if played.seen is None else played.seen[1:]
        obs, h0 = played.episodes.obs[:, :-1], self.net.initial_state(played.episodes.count)
        return self.net(weights, obs, h0, valid, observe, _before(played.slots), _before(played.alive))[0]

    def _values(self, weights: Weights, played: _Played, observe: bool = False) -> Tensor:
        """What the critic gives, in its own units, ``[V, T+1, B]``."""
        net, episodes = self.critic.net, played.episodes
        h0 = net.initial_state(episodes.count)
        if self._central:
            return net(weights, episodes.state[None], h0, played.seen, observe)[0][0].movedim(-1, 0)
        return net(weights, episodes.obs, h0, played.seen, observe, played.slots, played.alive)[0][..., 0]

    def metrics(self) -> dict[str, float]:
        """What to log, under public names; those of the critic's masks and steps begin with ``critic_``."""
        logged = {name: float(value) for name, value in self._logged.items()}
        return logged | self.critic.metrics("critic_") | super().metrics()

    # Checkpoints ------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Everything that is needed to go on bit for bit."""
        own = {"critic": self.critic.state_dict(), "returns": self._returns.state_dict()}
        return super().state_dict() | own | {"logged": self._logged, "progress": self._progress}

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self.critic.load_state_dict(state["critic"])
        self._returns.load_state_dict(state["returns"])
        self._logged, self._progress = dict(state["logged"]), float(state["progress"])


def _before(values: Tensor | None) -> Tensor | None:
    """What the steps played began with, of ``[A, T+1, ...]``."""
    return None if values is None else values[:, :-1]
