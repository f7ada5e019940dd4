"""MATD3: deterministic policies of all agents, and an ensemble of critics that sees the state and the joint action.

Sources: TD3, Fujimoto et al. 2018 (arXiv 1802.09477); MATD3, Ackermann et al. 2019 (arXiv 1910.01465); critics as masks on one network, a
target that is the least of them and a policy that follows their mean, Kaleidoscope (arXiv 2410.08540).

The critics are one net whose slots are the ensemble's members, made by a sharing scheme like any other net: masks on one network, or a
network each. Shapes: ``A`` agents, ``N`` transitions, ``K`` critics, ``U`` action dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from k24.errors import UsageError
from k24.learners.base import Learner
from k24.learners.optimise import CriticSharing, Target, Trainee, check_rates
from k24.learners.replay import Episodes, TransitionReplay, Transitions
from k24.learners.rollout import NetActor, RandomActor, noisy, slots_of
from k24.learners.targets import smoothed, td3_target
from k24.nets import AgentNet, Weights
from k24.sharing.base import Events, steps_left


@dataclass(frozen=True)
class TD3Config:
    """Settings of MATD3; the defaults are those published for multi-agent MuJoCo with Kaleidoscope (arXiv 2410.08540)."""

    lr: float = 5e-4
    """Learning rate of the policy."""
    critic_lr: float = 1e-3
    """Learning rate of the critics."""
    lr_decay_start: float = 1.0
    """Share of training after which both learning rates fall on a line; 1 for never."""
    lr_final: float = 0.1
    """What is left of them at the end, as a share."""
    gamma: float = 0.99
    """Discount."""
    n_step: int = 10
    """Steps of reward before bootstrapping."""
    batch_size: int = 1000
    """Transitions per gradient step."""
    buffer_size: int = 1_000_000
    """Moments kept for replay: an episode's steps, and what the last of them led to."""
    env_steps_per_update: float = 20
    """Environment steps per gradient step of the critics."""
    warmup: int = 10_000
    """Environment steps of random play before anything is learned."""
    policy_delay: int = 2
    """Gradient steps of the critics for one of the policy."""
    target_tau: float = 0.005
    """Share by which targets move at each gradient step of the policy."""
    exploration_noise: float = 0.1
    """Standard deviation of the noise on actions while training."""
    target_noise: float = 0.2
    """Standard deviation of the noise on the target policy's actions."""
    target_noise_clip: float = 0.5
    """Largest size of that noise."""
    grad_clip: float = 10.0
    """Largest norm of the gradient, for policy and critics each."""
    critics: int | None = None
    """Critics in the ensemble; 5 where they are masks on one network, 2 where each is a network of its own, when not given."""
    critic_sharing: str = "auto"
    """Sharing scheme of the critics, one slot each; auto for nops, separate networks, and for kaleidoscope where the policy's is that."""
    critic_hidden: int | None = None
    """Hidden units of the critics; those of the policy when not given."""
    critic_rows: Literal["split", "all"] = "split"
    """Whether a gradient step trains each critic on its part of the batch or on all of it."""
    critic_reset_interval: int = 800_000
    """Environment steps between resets of one critic's masks, in turn; 0 for none."""
    layer_norm: bool = True
    """Whether critics normalise the inputs of their hidden units' ReLU."""

    def __post_init__(self) -> None:
        """Checks each value, and those that depend on each other."""
        check_rates(self.lr_decay_start, self.lr_final, lr=self.lr, critic_lr=self.critic_lr)
        if not 0 <= self.gamma <= 1 or not 0 < self.target_tau <= 1:
            raise UsageError(f"gamma (={self.gamma}) must lie in [0, 1] and target_tau (={self.target_tau}) in (0, 1]")
        for name in ("n_step", "batch_size", "policy_delay"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} (={getattr(self, name)}) must be at least 1")
        if self.critics is not None and self.critics < 1:
            raise UsageError(f"critics (={self.critics}) must be at least 1")
        if self.buffer_size < self.batch_size:
            raise UsageError(f"buffer_size (={self.buffer_size}) must be at least batch_size (={self.batch_size})")
        for name in ("env_steps_per_update", "grad_clip"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} (={getattr(self, name)}) must be positive")
        for name in ("warmup", "exploration_noise", "target_noise", "target_noise_clip", "critic_reset_interval"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} (={getattr(self, name)}) must not be negative")

    def check(self, algo: str, envs: int, steps: int) -> None:
        """Refuses what does not fit the rest of a run.

        Args:
            algo: ``matd3``.
            envs: Parallel environments, and so episodes of a round.
            steps: Environment steps of the run.
        """
        if self.warmup >= steps:
            raise UsageError(f"warmup (={self.warmup}) leaves nothing of steps (={steps}) to learn in: lower it, or train longer")


class TD3Learner(Learner):
    """Twin delayed deterministic policy gradients for teams. Arguments are those of :class:`Learner`; nets have two hidden layers.

    Attributes:
        critic: The critics', all in one net of as many slots, and what trains it.
        n_critics: How many (K).
        replay: Moments played.

    Raises:
        UsageError: Actions are discrete, a batch is smaller than the ensemble, or the rule has another number of slots than the scheme.
    """

    settings: ClassVar[type] = TD3Config
    config: TD3Config

    def _kind_of_policy(self) -> str:
        if not self.spec.continuous:
            raise UsageError(f"{self.algo} learns continuous actions, and this task's are discrete: use --algo qmix, mappo or another task")
        return "deterministic"

    def _build(self, hidden: int, agent_id: bool | None, critic_sharing: CriticSharing) -> None:
        c, spec = self.config, self.spec
        net = AgentNet(spec.obs_dim, spec.n_actions, hidden, spec.n_agents, self.sharing, agent_id, recurrent=False)
        judge = critic_sharing(c.critics, True)
        inputs = spec.state_dim + spec.n_agents * spec.n_actions
        critic = AgentNet(inputs, 1, c.critic_hidden or hidden, judge.n_slots, judge, False, recurrent=False, layer_norm=c.layer_norm)
        self.n_critics = judge.n_slots
        if c.batch_size < self.n_critics:
            raise UsageError(f"batch_size (={c.batch_size}) must be at least the number of critics (={self.n_critics})")
        decay = (c.lr_decay_start, c.lr_final)
        self.policy = Trainee("loss_policy", net.to(self.device), self.sharing, c.lr, c.grad_clip, decay)
        self.critic = Trainee("loss_td", critic.to(self.device), judge, c.critic_lr, c.grad_clip, decay)
        self._target, self._target_critic = Target(self.policy), Target(self.critic)
        self.replay = TransitionReplay(max(c.buffer_size, spec.episode_limit + 1), self.device)
        self._owed, self._resets, self._intervals = 0.0, 0, 0
        self._policy_kl: float | None = None

    @property
    def updates(self) -> int:
        """Gradient steps of the critics."""
        return self.critic.updates

    # Experience -------------------------------------------------------------------------------------------------------------------

    def _explorer(self, env_steps: int) -> NetActor | RandomActor:
        if env_steps < self.config.warmup:
            return RandomActor(self.spec.n_actions, self.generator, continuous=True)
        return self._actor(self.policy.acting(), noisy(self._kind, self.config.exploration_noise, self.generator))

    def _remember(self, episodes: Episodes) -> None:
        self.replay.add(episodes)
        self._owed += episodes.steps / self.config.env_steps_per_update

    # Learning ---------------------------------------------------------------------------------------------------------------------

    def learn(self, progress: float, env_steps: int) -> None:
        """Takes as many gradient steps as the experience so far is due; arguments as for :meth:`Learner.learn`."""
        c = self.config
        if env_steps < c.warmup:
            self._owed = 0.0
            return
        due, self._owed = int(self._owed), self._owed - int(self._owed)
        n_step = min(c.n_step, self.spec.episode_limit)
        if self._policy_kl is None:  # what was measured waits for a step of the policy, which not every round has
            self._policy_kl = self._moved()
        for _ in range(due):
            self.update(self.replay.sample(c.batch_size, n_step, c.gamma, self.generator), progress, env_steps)

    def update(self, batch: Transitions, progress: float, env_steps: int) -> None:
        """One gradient step of the critics, and of the policy every ``policy_delay`` of these.

        Args:
            batch: Transitions.
            progress: Share of training done, in [0, 1].
            env_steps: Environment steps done.

        Raises:
            RunError: A loss or a gradient is NaN or infinite; parameters are as they were before that step.
        """
        c = self.config
        weights = self.critic.begin(progress, self.generator)
        self.critic.step(self.critic_loss(batch, weights), weights)
        frozen = self.critic.settle(progress, env_steps, None, self.generator).frozen
        self._reset_in_turn(progress, env_steps)
        if self.updates % c.policy_delay == 0:
            weights = self.policy.begin(progress, self.generator)
            self.policy.step(self.policy_loss(batch, weights), weights)
            # How far the policy has moved in a round is said once.
            moved, self._policy_kl = self._policy_kl, None
            events = self.policy.settle(progress, env_steps, moved, self.generator)
            self._target.follow(1.0 if events.frozen else c.target_tau)
            self._target_critic.follow(c.target_tau)
        if frozen:
            self._target_critic.follow()

    def critic_loss(self, batch: Transitions, weights: Weights) -> Tensor:
        """Mean square of the temporal-difference errors of all critics.

        ``y = R + γ^m · min_k Q'_k(s', μ'(o') + ε)``; each critic learns ``y`` on its own part of the batch, or on all (``critic_rows``).

        Args:
            batch: Transitions.
            weights: The critics' effective weights of this step.
        """
        c, k, n = self.config, self.n_critics, len(batch.returns)
        with torch.no_grad():
            actions = smoothed(
                self._act(self._target.weights, batch.next_obs, batch.next_alive), c.target_noise, c.target_noise_clip, self.generator
            )
            if batch.next_alive is not None:
                actions = actions * batch.next_alive[..., None]  # the dead do nothing, as in the moments that critics learn from
            q_next = self._judge(self._target_critic.weights, batch.next_state, actions)
            target = td3_target(batch.returns, batch.discount, q_next)
        state, actions = batch.state, batch.actions
        if c.critic_rows == "split":
            # Rows come in a random order, so each critic's part is a random one. What is left over waits for another batch.
            rows = n // k
            state, actions, target = state[: rows * k], actions[:, : rows * k], target[: rows * k].view(k, rows)
        return (self._judge(weights, state, actions, split=c.critic_rows == "split", observe=True) - target).square().mean()

    def policy_loss(self, batch: Transitions, weights: Weights) -> Tensor:
        """Minus the mean over critics of the value of all agents' present actions together, ``-mean_k Q_k(s, μ(o))``.

        Args:
            batch: Transitions.
            weights: The policy's effective weights of this step.
        """
        c, k = self.config, self.n_critics
        actions, state = self._act(weights, batch.obs, batch.alive, observe=True), batch.state
        if c.critic_rows == "split":
            rows = len(state) // k * k
            state, actions = state[:rows], actions[:, :rows]
        return -self._judge(self.critic.acting(), state, actions, split=c.critic_rows == "split").mean()

    def _act(self, weights: Weights, obs: Tensor, alive: Tensor | None, observe: bool = False) -> Tensor:
        """The policy's actions, ``[A, N, U]``."""
        slots, alive = slots_of(self.rule, obs[:, None], None if alive is None else alive[:, None])
        outputs, _ = self.net(weights, obs[:, None], self.net.initial_state(obs.shape[1]), None, observe, slots, alive)
        return self._kind.mode(outputs[:, 0])

    def _judge(self, weights: Weights, state: Tensor, actions: Tensor, split: bool = False, observe: bool = False) -> Tensor:
        """Values ``[K, N]`` of joint actions; ``[K, N/K]``, each critic on rows of its own, where they are split.

        Args:
            weights: The critics'.
            state: ``[N, S]``.
            actions: ``[A, N, U]``.
            split: Whether each critic gets its own rows.
            observe: Whether the critics' layers take note of their inputs.
        """
        x = torch.cat([state, *actions.unbind(0)], -1)
        rows = x.view(self.n_critics, 1, -1, x.shape[-1]) if split else x.expand(self.n_critics, 1, -1, -1)
        net = self.critic.net
        return net(weights, rows, net.initial_state(rows.shape[2]), observe=observe)[0][:, 0, :, 0]

    def _reset_in_turn(self, progress: float, env_steps: int) -> None:
        """Draws one critic's masks anew every so often, one critic after the other; never several at once, nor any in the last interval."""
        every = self.config.critic_reset_interval
        if not every or env_steps // every <= self._intervals or steps_left(progress, env_steps) <= every:
            return
        slot, self._resets, self._intervals = self._resets % self.n_critics, self._resets + 1, env_steps // every
        self.critic.forget(Events(resets=self.critic.sharing.reset_slot(slot, self.generator)))

    def metrics(self) -> dict[str, float]:
        """What to log, under public names; those of the critics' masks and steps begin with ``critic_``."""
        return self.critic.metrics("critic_") | super().metrics()

    # Checkpoints ------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Everything that is needed to go on bit for bit."""
        targets = {"target": self._target.state_dict(), "target_critic": self._target_critic.state_dict()}
        own = {"critic": self.critic.state_dict(), "replay": self.replay.state_dict()}
        counts = {"owed": self._owed, "resets": (self._resets, self._intervals), "policy_kl": self._policy_kl}
        return super().state_dict() | targets | own | counts

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` or :meth:`final_state_dict` gave."""
        super().load_state_dict(state)
        self.critic.load_state_dict(state["critic"])
        self._target.load_state_dict(state["target"])
        self._target_critic.load_state_dict(state["target_critic"])
        if "replay" in state:
            self.replay.load_state_dict(state["replay"])
        self._owed, (self._resets, self._intervals), self._policy_kl = float(state["owed"]), state["resets"], state.get("policy_kl")
