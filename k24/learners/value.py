"""IQL, VDN and QMIX in one learner: what differs between them is the mixer.

Recurrent action values over whole episodes, double Q-learning, a target network, n-step or λ-returns. Sources: IQL,
Tampuu et al. 2017 (arXiv 1511.08779); VDN (arXiv 1706.05296); QMIX (arXiv 1803.11485); settings and network layout,
EPyMARL (arXiv 2006.07869) and Kaleidoscope (arXiv 2410.08540).

Time limits cut episodes but do not end the task: targets bootstrap from the observation after the last step, and ``terminated`` is set only
where the task itself ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from k24.errors import UsageError
from k24.learners.base import Learner
from k24.learners.mixers import make_mixer
from k24.learners.optimise import CriticSharing, Target, Trainee, check_rates
from k24.learners.replay import EpisodeReplay, Episodes, last_steps
from k24.learners.rollout import NetActor, epsilon_greedy, slots_of
from k24.learners.statistics import RunningMoments
from k24.learners.targets import greedy_value, masked_mse, n_step_targets, td_lambda_targets
from k24.nets import AgentNet, Weights


@dataclass(frozen=True)
class ValueConfig:
    """Settings of the value learner."""

    lr: float = 5e-4
    """Learning rate."""
    lr_decay_start: float = 0.8
    """Share of training after which the learning rate falls on a line; 1 for never."""
    lr_final: float = 0.1
    """What is left of it at the end, as a share."""
    gamma: float = 0.99
    """Discount."""
    batch_size: int = 32
    """Episodes per gradient step."""
    buffer_size: int = 5000
    """Episodes kept for replay."""
    env_steps_per_update: int = 100
    """Environment steps per gradient step."""
    double_q: bool = True
    """Choose the best next action by the online net and judge it by the target net."""
    target_update: int = 200
    """Gradient steps between copies of the online net to the target net."""
    target_tau: float = 0.0
    """If above 0, the target moves by this share at every gradient step instead."""
    n_step: int = 1
    """Steps of reward before bootstrapping."""
    td_lambda: float = 0.0
    """λ of the return; 0 for n-step targets."""
    standardise_rewards: bool = True
    """Divide rewards by their running standard deviation, after taking off their mean."""
    individual_rewards: bool = False
    """IQL only: each agent learns from its own reward instead of the team's sum."""
    grad_clip: float = 10.0
    """Largest norm of the gradient."""
    optimiser: Literal["adam", "rmsprop"] = "adam"
    """Optimiser."""
    epsilon_start: float = 1.0
    """Chance of a random action at the start."""
    epsilon_finish: float = 0.05
    """Chance of a random action in the end."""
    epsilon_anneal: int = 50_000
    """Environment steps over which it falls."""
    mixer_embed: int = 32
    """QMIX: width of the mixing layer."""
    hypernet_hidden: int = 64
    """QMIX: hidden units of the hypernetworks."""

    def __post_init__(self) -> None:
        """Checks each value, and those that depend on each other."""
        check_rates(self.lr_decay_start, self.lr_final, lr=self.lr)
        if not 0 <= self.gamma <= 1 or not 0 <= self.td_lambda <= 1 or not 0 <= self.target_tau <= 1:
            raise UsageError(f"gamma (={self.gamma}), td_lambda (={self.td_lambda}) and target_tau (={self.target_tau}) must lie in [0, 1]")
        for name in ("batch_size", "n_step", "target_update", "env_steps_per_update", "mixer_embed", "hypernet_hidden"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} (={getattr(self, name)}) must be at least 1")
        if self.buffer_size < self.batch_size:
            raise UsageError(f"buffer_size (={self.buffer_size}) must be at least batch_size (={self.batch_size})")
        if self.td_lambda > 0 and self.n_step > 1:
            raise UsageError(f"td_lambda (={self.td_lambda}) and n_step (={self.n_step}) exclude each other: set one of them")
        if not (0 <= self.epsilon_finish <= self.epsilon_start <= 1) or self.epsilon_anneal < 1:
            raise UsageError(
                f"exploration needs 0 <= epsilon_finish (={self.epsilon_finish}) <= epsilon_start "
                f"(={self.epsilon_start}) <= 1 and epsilon_anneal >= 1"
            )
        if not self.grad_clip > 0:
            raise UsageError(f"grad_clip {self.grad_clip} must be positive")

    def check(self, algo: str, envs: int, steps: int) -> None:
        """Refuses what does not fit the rest of a run.

        Args:
            algo: ``iql``, ``vdn`` or ``qmix``.
            envs: Parallel environments, and so episodes of a round.
            steps: Environment steps of the run.
        """
        if envs > self.buffer_size:
            raise UsageError(f"envs (={envs}) must not exceed buffer_size (={self.buffer_size}): a round adds that many episodes")
        if self.individual_rewards and algo != "iql":
            raise UsageError(f"individual_rewards needs algo iql, got algo {algo}: a mixer has one value for the team")


class ValueLearner(Learner):
    """Q-learning for teams: ``iql``, ``vdn`` or ``qmix``. Arguments are those of :class:`Learner`; there is no critic.

    Attributes:
        mixer: Makes one value of the agents'; None for ``iql``.
        replay: Episodes played.
    """

    settings: ClassVar[type] = ValueConfig
    config: ValueConfig

    def _kind_of_policy(self) -> str:
        if self.spec.continuous:
            raise UsageError(f"{self.algo} chooses among discrete actions, and this task's are continuous: use --algo mappo, ippo or matd3")
        return "discrete"

    def _build(self, hidden: int, agent_id: bool | None, critic_sharing: CriticSharing) -> None:
        c, spec = self.config, self.spec
        net = AgentNet(spec.obs_dim, spec.n_actions, hidden, spec.n_agents, self.sharing, agent_id).to(self.device)
        mixer = make_mixer(self.algo, spec.n_agents, spec.state_dim, c.mixer_embed, c.hypernet_hidden)
        self.mixer = mixer.to(self.device) if mixer is not None else None
        others = [] if self.mixer is None else [self.mixer]
        self.policy = Trainee("loss_td", net, self.sharing, c.lr, c.grad_clip, (c.lr_decay_start, c.lr_final), others, c.optimiser)
        self._target = Target(self.policy, self.mixer)
        self.replay = EpisodeReplay(c.buffer_size, self.device)
        self._rewards = RunningMoments()
        self._owed = 0.0

    # Experience -------------------------------------------------------------------------------------------------------------------

    def _explorer(self, env_steps: int) -> NetActor:
        c = self.config
        epsilon = max(c.epsilon_finish, c.epsilon_start - (c.epsilon_start - c.epsilon_finish) * env_steps / c.epsilon_anneal)
        return self._actor(self.policy.acting(), epsilon_greedy(epsilon, self.generator))

    def _remember(self, episodes: Episodes) -> None:
        self.replay.add(episodes)
        reward = self._team_reward(episodes)
        self._rewards.update(reward[_like(episodes.valid, reward)])
        self._owed += episodes.steps / self.config.env_steps_per_update

    # Learning ---------------------------------------------------------------------------------------------------------------------

    def learn(self, progress: float, env_steps: int) -> None:
        """Takes as many gradient steps as the experience so far is due; arguments as for :meth:`Learner.learn`."""
        if self.replay.size < self.config.batch_size:
            self._owed = 0.0
            return
        due, self._owed = int(self._owed), self._owed - int(self._owed)
        for _ in range(due):
            self.update(self.replay.sample(self.config.batch_size, self.generator), progress, env_steps)

    def update(self, batch: Episodes, progress: float, env_steps: int) -> Tensor:
        """One gradient step.

        Args:
            batch: Episodes.
            progress: Share of training done, in [0, 1].
            env_steps: Environment steps done.

        Returns:
            The temporal-difference loss.

        Raises:
            RunError: The loss is NaN or infinite; parameters are as they were.
        """
        weights = self.policy.begin(progress, self.generator)
        loss = self.td_loss(batch, weights, observe=True)
        self.policy.step(loss, weights)
        c, whole = self.config, self.updates % self.config.target_update == 0
        events = self.policy.settle(progress, env_steps, self._moved() if whole else None, self.generator)
        if events.frozen or whole or c.target_tau > 0:
            self._target.follow(c.target_tau if c.target_tau > 0 and not events.frozen else 1.0)
        return loss.detach()

    def td_loss(self, batch: Episodes, weights: Weights, observe: bool = False) -> Tensor:
        """Mean square of the temporal-difference error over the steps played.

        Args:
            batch: Episodes.
            weights: The online net's effective weights.
            observe: Let the layers take note of their inputs.
        """
        c = self.config
        whole = bool(batch.valid.all())
        valid = None if whole else batch.valid
        # An observation counts if a step was played there or led there.
        seen = None if whole else torch.cat([batch.valid[:1], batch.valid])
        h0 = self.net.initial_state(batch.count)
        slots, alive = slots_of(self.rule, batch.obs, batch.alive)
        if slots is not None and seen is not None:
            slots = slots.where(seen, -1)  # what comes after an episode is another one, of other units
        q, _ = self.net(weights, batch.obs, h0, seen, observe, slots, alive)
        with torch.no_grad():
            q_target, _ = self.net(self._target.weights, batch.obs, h0, slots=slots, alive=alive)
            avail = None if batch.avail is None else batch.avail[:, 1:]
            v_tp1 = greedy_value((q if c.double_q else q_target)[:, 1:].detach(), q_target[:, 1:], avail)
            v_tp1 = self._mix(self._target.module, v_tp1, batch.state[1:])
            reward = (
                (self._team_reward(batch) - self._rewards.mean) / self._rewards.std if c.standardise_rewards else self._team_reward(batch)
            )
            terminated = _like(batch.terminated, reward)
            last = _like(last_steps(batch.valid), reward)
            present = alive if slots is None else slots >= 0
            if self.mixer is None and present is not None:
                # Without a mixer each agent has returns of its own, and they end with it.
                died = (present[:, :-1] & ~present[:, 1:]).permute(1, 2, 0)
                terminated, last = terminated | died, last | died
            if c.td_lambda > 0:
                target = td_lambda_targets(reward, v_tp1, terminated, last, c.gamma, c.td_lambda)
            else:
                target = n_step_targets(reward, v_tp1, terminated, last, c.gamma, min(c.n_step, self.spec.episode_limit))
        q_taken = q[:, :-1].gather(-1, batch.actions[..., None]).squeeze(-1)
        error = self._mix(self.mixer, q_taken, batch.state[:-1]) - target
        counted = None if valid is None else _like(valid, error)
        if self.mixer is None and present is not None:
            here = present[:, :-1].permute(1, 2, 0)
            counted = here if counted is None else counted & here
        return masked_mse(error, counted)

    def _mix(self, mixer: nn.Module | None, values: Tensor, state: Tensor) -> Tensor:
        """``[A, T, B]`` to ``[T, B]``, or to ``[T, B, A]`` without a mixer."""
        by_agent = values.permute(1, 2, 0)
        return by_agent if mixer is None else mixer(by_agent, state)

    def _team_reward(self, batch: Episodes) -> Tensor:
        """``[T, B]``, or ``[T, B, A]`` without a mixer."""
        total = batch.reward.sum(0)
        if self.mixer is not None:
            return total
        if self.config.individual_rewards:
            return batch.reward.permute(1, 2, 0)
        return total[..., None].expand(-1, -1, self.spec.n_agents)

    # Checkpoints ------------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Everything that is needed to go on bit for bit."""
        own = {"target": self._target.state_dict(), "replay": self.replay.state_dict(), "rewards": self._rewards.state_dict()}
        return super().state_dict() | own | {"owed": self._owed}

    def load_state_dict(self, state: dict) -> None:
        """Takes what :meth:`state_dict` or :meth:`final_state_dict` gave."""
        super().load_state_dict(state)
        self._target.load_state_dict(state["target"])
        if "replay" in state:
            self.replay.load_state_dict(state["replay"])
        self._rewards.load_state_dict(state["rewards"])
        self._owed = float(state["owed"])


def _like(flags: Tensor, values: Tensor) -> Tensor:
    """``[T, B]`` flags in the shape of ``[T, B]`` or ``[T, B, A]`` values."""
    return flags.view(*flags.shape, *[1] * (values.dim() - flags.dim())).expand_as(values)
