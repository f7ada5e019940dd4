"""MATD3: losses written out, whose rows are whose, and what happens when."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from k24.envs.base import EnvSpec, Observation, Step, TeamEnv
from k24.errors import RunError, UsageError
from k24.learners import TD3Config, TD3Learner
from k24.learners.replay import Transitions
from k24.nets import AgentNet, Weights
from k24.sharing import K24Config, SharingConfig, make_sharing
from k24.sparse import MaskedLinear

AGENTS, OBS, STATE, ACTIONS, LIMIT, CRITICS = 2, 3, 4, 2, 5, 3
CPU = torch.device("cpu")
SPEC = EnvSpec(AGENTS, OBS, STATE, ACTIONS, LIMIT, continuous=True)


def some_learner(scheme: str = "fups", critic: str = "nops", seed: int = 0, **settings) -> TD3Learner:
    settings = {"critics": CRITICS, "batch_size": 12, "target_noise": 0.0, "critic_reset_interval": 0} | settings
    masks = SharingConfig(masks=K24Config(**settings.pop("masks", {})))
    return TD3Learner(
        *("matd3", SPEC, make_sharing(scheme, AGENTS, masks), TD3Config(**settings)),
        hidden=8,
        seed=seed,
        critic_sharing=lambda n, ensemble: make_sharing(critic, n or CRITICS, masks),
    )


def some_batch(rows: int = 12, alive: bool = False, seed: int = 0) -> Transitions:
    g = torch.Generator().manual_seed(seed)
    return Transitions(
        obs=torch.randn(AGENTS, rows, OBS, generator=g),
        state=torch.randn(rows, STATE, generator=g),
        actions=torch.rand(AGENTS, rows, ACTIONS, generator=g) * 2 - 1,
        returns=torch.randn(rows, generator=g),
        discount=torch.where(torch.rand(rows, generator=g) < 0.3, 0.0, 0.9),
        next_obs=torch.randn(AGENTS, rows, OBS, generator=g),
        next_state=torch.randn(rows, STATE, generator=g),
        alive=torch.rand(AGENTS, rows, generator=g) < 0.7 if alive else None,
        next_alive=torch.rand(AGENTS, rows, generator=g) < 0.7 if alive else None,
    )


def shake(net: AgentNet, seed: int = 7) -> None:
    """Moves all parameters, so that a net is no longer what its target is."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=g)


def moved_learner(**settings) -> TD3Learner:
    learner = some_learner(**settings)
    for trainee in (learner.policy, learner.critic):
        shake(trainee.net)
        trainee._acting = None
    return learner


def plain(weights: Weights, slot: int, x: Tensor, layer_norm: bool = False) -> Tensor:
    """One slot's net of three layers."""
    for k, made in enumerate(weights):
        x = F.linear(x, made.weight[min(slot, len(made.weight) - 1)], made.bias[min(slot, len(made.bias) - 1)])
        if k < 2:
            x = ((x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() if layer_norm else x).relu()
    return x


def joint(weights: Weights, obs: Tensor, alive: Tensor | None = None) -> Tensor:
    """Actions of all agents side by side, ``[N, A·U]``."""
    actions = [plain(weights, agent, obs[agent]).tanh() for agent in range(AGENTS)]
    if alive is not None:
        actions = [a * alive[agent][:, None] for agent, a in enumerate(actions)]
    return torch.cat(actions, -1)


def values(learner: TD3Learner, weights: Weights, state: Tensor, actions: Tensor) -> Tensor:
    """``[K, N]``."""
    x, norm = torch.cat([state, actions], -1), learner.config.layer_norm
    return torch.stack([plain(weights, k, x, norm)[:, 0] for k in range(learner.n_critics)])


def side_by_side(actions: Tensor) -> Tensor:
    return torch.cat([actions[agent] for agent in range(AGENTS)], -1)


class Drift(TeamEnv):
    """Random observations, five steps an episode; keeps the actions that it got."""

    def __init__(self, n_envs: int = 4) -> None:
        self.spec, self.n_envs, self.device = SPEC, n_envs, CPU
        self.got: list[Tensor] = []

    def _see(self) -> Observation:
        return Observation(torch.randn(AGENTS, self.n_envs, OBS, generator=self._g), torch.randn(self.n_envs, STATE, generator=self._g))

    def reset(self, seed: int) -> Observation:
        self._g, self._time = torch.Generator().manual_seed(seed), 0
        return self._see()

    def step(self, actions: Tensor) -> Step:
        self.got.append(actions.clone())
        self._time += 1
        after, over = self._see(), torch.full((self.n_envs,), self._time % LIMIT == 0)
        return Step(after, after, torch.randn(AGENTS, self.n_envs, generator=self._g), torch.zeros_like(over), over)


# --- losses ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alive", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("rows", [12, 14])
@pytest.mark.parametrize("critic_rows", ["split", "all"])
def test_losses_by_hand(critic_rows: str, rows: int, layer_norm: bool, alive: bool) -> None:
    learner, batch = moved_learner(critic_rows=critic_rows, layer_norm=layer_norm), some_batch(rows, alive)
    online, policy = learner.critic.net.snapshot("train"), learner.net.snapshot("train")
    with torch.no_grad():
        next_actions = joint(learner._target.weights, batch.next_obs, batch.next_alive)
        q_next = values(learner, learner._target_critic.weights, batch.next_state, next_actions)
        target = batch.returns + batch.discount * torch.stack([q_next[:, n].min() for n in range(rows)])
        q = values(learner, online, batch.state, side_by_side(batch.actions))
        q_policy = values(learner, online, batch.state, joint(policy, batch.obs, batch.alive))
    # Four rows for each of three critics, in order; two of fourteen are left over.
    own = torch.zeros(CRITICS, rows, dtype=torch.bool)
    for k in range(CRITICS):
        own[k, 4 * k : 4 * k + 4] = True
    own |= critic_rows == "all"
    assert learner.critic_loss(batch, online).item() == pytest.approx(float((q - target).square()[own].mean()), rel=1e-5)
    assert learner.policy_loss(batch, policy).item() == pytest.approx(-float(q_policy[own].mean()), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("alive", [False, True])
def test_the_target_policy_is_smoothed_by_clipped_noise(alive: bool) -> None:
    """But not where an agent is dead: it does nothing, there as in what was played."""
    learner, batch = moved_learner(target_noise=0.6, target_noise_clip=0.4, critic_rows="all"), some_batch(alive=alive)
    before = learner.generator.get_state()
    online = learner.critic.net.snapshot("train")
    loss = learner.critic_loss(batch, online).item()
    noise = torch.empty(AGENTS, 12, ACTIONS).normal_(generator=torch.Generator().set_state(before)) * 0.6
    assert (noise.abs() > 0.4).any()
    actions = (joint(learner._target.weights, batch.next_obs) + side_by_side(noise.clamp(-0.4, 0.4))).clamp(-1, 1)
    if alive:
        actions = actions * side_by_side(batch.next_alive[..., None].expand(-1, -1, ACTIONS))
    target = batch.returns + batch.discount * values(learner, learner._target_critic.weights, batch.next_state, actions).amin(0)
    q = values(learner, online, batch.state, side_by_side(batch.actions))
    assert loss == pytest.approx(float((q - target).square().mean()), rel=1e-5)


@pytest.mark.parametrize("scheme", ["nops", "k24"])
def test_split_and_all_agree_where_every_critic_gets_the_same_rows(scheme: str) -> None:
    part = some_batch(4)
    again = {
        name: torch.cat([value] * CRITICS, -2 if value.dim() > 1 else 0) for name, value in part._asdict().items() if value is not None
    }
    batch = part._replace(**again)
    losses = []
    for critic_rows in ("split", "all"):
        learner = moved_learner(critic=scheme, critic_rows=critic_rows)
        weights, policy = learner.critic.begin(0.1, learner.generator), learner.policy.begin(0.1, learner.generator)
        losses.append((learner.critic_loss(batch, weights).item(), learner.policy_loss(batch, policy).item()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_each_row_has_one_critic_and_each_critic_its_rows() -> None:
    learner, batch = moved_learner(), some_batch(14)
    state = batch.state.clone().requires_grad_()
    weights = learner.critic.net.materialise("train")
    q = learner._judge(weights, state[:12], batch.actions[:, :12], split=True)
    assert q.shape == (CRITICS, 4)
    everyone = values(learner, weights, batch.state, side_by_side(batch.actions))
    for k in range(CRITICS):
        assert torch.allclose(q[k], everyone[k, 4 * k : 4 * k + 4], atol=1e-6)
        reached = torch.autograd.grad(q[k].sum(), state, retain_graph=True)[0].ne(0).any(-1)
        assert reached.nonzero().flatten().tolist() == list(range(4 * k, 4 * k + 4))
    (learner.critic_loss(batch._replace(state=state), weights)).backward()
    assert state.grad is not None
    assert state.grad.ne(0).any(-1).tolist() == [True] * 12 + [False] * 2, "what is left over waits for another batch"


def test_a_policy_step_leaves_the_critics_alone_and_the_other_way_round() -> None:
    learner, batch = moved_learner(), some_batch()
    learner.policy_loss(batch, learner.policy.begin(0.1, learner.generator)).backward()
    assert all(p.grad is None for p in learner.critic.net.parameters())
    assert all(p.grad is not None for p in learner.net.parameters())
    learner.policy.optimiser.zero_grad()
    learner.critic_loss(batch, learner.critic.begin(0.1, learner.generator)).backward()
    assert all(p.grad is not None for p in learner.critic.net.parameters())
    assert all(p.grad is None for p in learner.net.parameters())


# --- when what happens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_a_policy_step_and_moving_targets_every_so_often(delay: int) -> None:
    learner, tau = moved_learner(policy_delay=delay, target_tau=0.25), 0.25
    targets = learner._target, learner._target_critic

    def held() -> list[Tensor]:
        return [t.clone() for target in targets for made in target.weights for t in (made.weight, made.bias)]

    for k in range(1, 7):
        before = held()
        policy = copy.deepcopy(learner.net.state_dict())
        learner.update(some_batch(seed=k), 0.1, 0)
        due = k % delay == 0
        assert learner.updates == k
        assert learner.policy.updates == k // delay
        assert all(torch.equal(value, policy[name]) for name, value in learner.net.state_dict().items()) != due
        online = [t for net in (learner.net, learner.critic.net) for made in net.snapshot("act") for t in (made.weight, made.bias)]
        for old, new, source in zip(before, held(), online, strict=True):
            expected = (1 - tau) * old + tau * source if due else old
            assert torch.allclose(new, expected, atol=1e-6)
            assert not due or not torch.equal(new, old)


def test_targets_follow_all_the_way_when_masks_freeze() -> None:
    learner = some_learner("k24", "k24", masks={"freeze_at": 0.5}, policy_delay=2)
    learner.update(some_batch(), 0.4, 0)
    learner.update(some_batch(), 0.4, 0)
    for made, target in zip(learner.net.snapshot("act"), learner._target.weights, strict=True):
        assert not torch.equal(made.weight, target.weight)
    behind = [target.weight.clone() for target in learner._target.weights]
    learner.update(some_batch(), 0.5, 0)  # the critics freeze, the policy has no step
    assert all(torch.equal(target.weight, old) for target, old in zip(learner._target.weights, behind, strict=True))
    for made, target in zip(learner.critic.net.snapshot("deploy"), learner._target_critic.weights, strict=True):
        assert torch.equal(made.weight, target.weight)
    learner.update(some_batch(), 0.5, 0)  # and now the policy
    for made, target in zip(learner.net.snapshot("deploy"), learner._target.weights, strict=True):
        assert torch.equal(made.weight, target.weight)


def test_critics_are_reset_in_turn_until_they_freeze() -> None:
    learner = some_learner(critic="k24", masks={"freeze_at": 0.5, "reset_interval": 0}, critic_reset_interval=100)
    layers = [layer for layer in learner.critic.net.layers.values() if isinstance(layer, MaskedLinear)]
    assert len(layers) == 3
    turns, optimiser = [], learner.critic.optimiser
    # A round that jumps over several intervals resets one critic, not one after the other in consecutive steps.
    for env_steps in (0, 99, 100, 150, 199, 230, 300, 399, 400, 720, 720, 720, 720):
        learner.update(some_batch(seed=env_steps), 0.1, env_steps)
        cleared = []
        for layer in layers:
            moments = [optimiser.state[layer.alpha][name] for name in ("exp_avg", "exp_avg_sq")]
            empty = [{k for k in range(CRITICS) if not m[k].any()} for m in moments]
            assert empty[0] == empty[1]
            cleared.append(empty[0])
            assert all(m.any() for name, m in optimiser.state[layer.weight].items() if name != "step"), "what all critics share is kept"
        assert cleared[0] == cleared[1] == cleared[2]
        turns.append(cleared[0])
    assert turns == [set(), set(), {0}, set(), set(), {1}, {2}, set(), {0}, {1}, set(), set(), set()]
    learner.update(some_batch(), 0.6, 720)
    frozen = [layer.alpha.detach().clone() for layer in layers]
    for env_steps in (800, 900, 1000):
        learner.update(some_batch(), 0.7, env_steps)
    assert all(torch.equal(layer.alpha, alpha) for layer, alpha in zip(layers, frozen, strict=True)), "nothing after the freeze"
    assert not any(layer.alpha in optimiser.state for layer in layers)


def test_a_reset_changes_one_critic_and_is_acted_by_at_once() -> None:
    learner = some_learner(critic="k24", masks={"freeze_at": 2.0, "hetero_init_scale": 1.0}, critic_reset_interval=100)
    learner.update(some_batch(), 0.1, 0)
    before = [made.weight.clone() for made in learner.critic.acting()]
    learner._reset_in_turn(0.1, 100)
    for made, old in zip(learner.critic.acting(), before, strict=True):
        assert (made.weight != old).flatten(1).any(1).tolist() == [True, False, False]


def test_no_critic_is_reset_in_the_last_interval() -> None:
    learner, resets = some_learner(critic="k24", masks={"freeze_at": 2.0}, critic_reset_interval=100), []
    learner.critic.sharing.reset_slot = lambda *_: resets.append(steps) or []  # type: ignore[method-assign]
    for steps in range(50, 501, 50):
        learner._reset_in_turn(steps / 500, steps)
    assert resets == [100, 200, 300]


def test_no_interval_no_resets() -> None:
    learner = some_learner(critic="k24", critic_reset_interval=0)
    learner.critic.sharing.reset_slot = lambda *_: pytest.fail("no reset was asked for")  # type: ignore[method-assign]
    learner.update(some_batch(), 0.1, 10**9)


# --- experience ------------------------------------------------------------------------------------------------------------------


def test_play_is_random_at_first_and_teaches_nothing() -> None:
    learner, env = some_learner(warmup=40, env_steps_per_update=5), Drift()
    learner.net.forward = lambda *_, **__: pytest.fail("the policy is not asked")  # type: ignore[method-assign]
    for k in range(2):
        learner.gather(env, 20 * k, seed=k)
    learner.learn(0.1, 39)
    assert learner.updates == 0
    drawn = torch.stack(env.got)
    assert -1 <= drawn.min() < -0.8
    assert 0.8 < drawn.max() <= 1
    assert abs(float(drawn.mean())) < 0.15
    assert learner.replay.size == 8 * (LIMIT + 1)
    del learner.net.forward
    learner.gather(env, 40, seed=2)
    learner.learn(0.1, 60)
    assert learner.updates == 4, "20 steps of 4 environments at 5 a step; what was played at random owes nothing"


def test_steps_that_are_owed_are_carried_over() -> None:
    learner, env, updates = some_learner(warmup=0, env_steps_per_update=8.0), Drift(), []
    for k in range(4):
        learner.gather(env, 20 * k, seed=k)
        learner.learn(0.1, 20 * (k + 1))
        updates.append(learner.updates)
    assert updates == [2, 5, 7, 10], "20 steps a round, 2.5 gradient steps"


def test_what_was_measured_waits_for_a_step_of_the_policy(monkeypatch) -> None:
    """One step of the critics a round, and one of the policy in every second one."""
    learner, env = some_learner("k24", warmup=0, env_steps_per_update=20.0, policy_delay=2, masks={"adaptive_reset": True}), Drift()
    measured, told = [], []
    monkeypatch.setattr(learner, "_moved", lambda: measured.append(float(len(measured) + 1)) or measured[-1])
    settle = learner.policy.settle
    monkeypatch.setattr(learner.policy, "settle", lambda *args: told.append(args[2]) or settle(*args))
    for k in range(6):
        learner.gather(env, 20 * k, seed=k)
        learner.learn(0.1, 20 * (k + 1))
    assert told == measured == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("noise", [0.0, 0.1, 5.0])
def test_noise_keeps_actions_in_range(noise: float) -> None:
    learner, env = some_learner(warmup=0, exploration_noise=noise), Drift(50)
    batch = learner.gather(env, 0, seed=0)
    weights = learner.policy.acting()
    with torch.no_grad():
        meant = torch.stack([plain(weights, a, batch.obs[a, :-1]) for a in range(AGENTS)]).tanh()
    added = batch.actions - meant
    assert batch.actions.abs().max() <= 1
    if noise == 5.0:
        assert 0.7 < batch.actions.abs().eq(1).float().mean() < 1
    else:
        assert torch.allclose(added.std(), torch.tensor(noise), atol=0.01)
    learner.gather(env, 0, seed=1)
    assert not noise or not torch.equal(torch.stack(env.got[:LIMIT]), torch.stack(env.got[LIMIT:]))


def test_evaluation_has_no_noise_and_disturbs_nothing() -> None:
    learner = some_learner()
    before, now = learner.generator.get_state(), Observation(torch.randn(AGENTS, 6, OBS), torch.randn(6, STATE))
    for phase in ("act", "deploy"):
        actor = learner.actor(phase)
        actor.reset(6)
        expected = torch.stack([plain(learner.net.snapshot(phase), a, now.obs[a]) for a in range(AGENTS)]).tanh()
        assert torch.allclose(actor(now), expected, atol=1e-6)
    learner.random_actor()(now)
    assert torch.equal(learner.generator.get_state(), before)


# --- refusals --------------------------------------------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="matd3 learns a deterministic policy, which is no distribution"):
        some_learner().actor(sample=True)
    with pytest.raises(UsageError, match=r"batch_size \(=2\) must be at least the number of critics \(=3\)"):
        some_learner(batch_size=2)
    discrete = EnvSpec(AGENTS, OBS, STATE, ACTIONS, LIMIT)
    with pytest.raises(UsageError, match="matd3 learns continuous actions, and this task's are discrete"):
        TD3Learner("matd3", discrete, make_sharing("fups", AGENTS))


def test_a_round_larger_than_replay_is_kept_in_part() -> None:
    learner = some_learner(buffer_size=19, warmup=0, env_steps_per_update=20)  # three episodes of six moments
    batch = learner.gather(Drift(4), 0, seed=0)
    assert learner.replay.size == 19
    drawn = learner.replay.sample(100, 1, 0.9, torch.Generator().manual_seed(0))
    assert set(drawn.state[:, 0].tolist()) == set(batch.state[:-1, 1:, 0].flatten().tolist())
    learner.learn(0.1, 20)
    assert learner.updates == 1


@pytest.mark.parametrize("where", ["returns", "obs"])
def test_numbers_that_are_none_leave_that_net_as_it_was(where: str) -> None:
    learner, batch = some_learner(policy_delay=1), some_batch()
    getattr(batch, where).view(-1)[0] = torch.nan
    net = learner.critic.net if where == "returns" else learner.net
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RunError, match=("loss_td" if where == "returns" else "loss_policy") + " is nan"):
        learner.update(batch, 0.1, 0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# --- metrics and checkpoints -----------------------------------------------------------------------------------------------------


def test_metrics_of_critics_have_a_name_of_their_own() -> None:
    learner = some_learner("fups", "k24", policy_delay=1)
    learner.update(some_batch(), 0.2, 0)
    metrics = learner.metrics()
    assert {"loss_td", "loss_policy", "grad_norm", "critic_grad_norm", "critic_temperature", "critic_overall_sparsity"} <= set(metrics)
    assert not {"temperature", "overall_sparsity", "critic_loss_td"} & set(metrics)
    assert metrics["critic_lr"] == pytest.approx(1e-3)
    assert metrics["lr"] == pytest.approx(5e-4)


def test_critics_are_as_wide_as_asked_and_the_policy_stays_the_same() -> None:
    usual, narrow = some_learner(), some_learner(critic_hidden=5, policy_delay=1)
    assert [(learner.net.hidden, learner.critic.net.hidden) for learner in (usual, narrow)] == [(8, 8), (8, 5)]
    same = narrow.net.state_dict()
    assert all(value.equal(same[name]) for name, value in usual.net.state_dict().items())
    before = narrow.critic.net.layers["fc2"].weight.detach().clone()
    narrow.update(some_batch(), 0.2, 0)
    assert before.shape == (CRITICS, 5, 5) and not before.equal(narrow.critic.net.layers["fc2"].weight)


def test_the_ensemble_is_as_large_as_its_scheme_has_it() -> None:
    for scheme, expected in (("nops", 2), ("k24", 5)):
        sharing = make_sharing(scheme, 1).critics
        learner = some_learner(critic=scheme, critics=sharing)
        assert learner.n_critics == learner.critic.net.n_slots == expected
    assert TD3Learner("matd3", SPEC, make_sharing("k24", AGENTS), hidden=8).n_critics == 2, "dense ones unless told otherwise"


def test_a_run_that_is_taken_up_again_is_the_same_run() -> None:
    def learner() -> TD3Learner:
        return some_learner(
            *("k24", "k24"),
            masks={"forward": "sample", "freeze_at": 2.0},
            target_noise=0.2,
            warmup=10,
            env_steps_per_update=7,
            critic_reset_interval=30,
            buffer_size=30,
        )

    def go_on(learner: TD3Learner, rounds: range) -> None:
        for k in rounds:
            learner.gather(Drift(), 20 * k, seed=k)
            learner.learn(0.2 * k, 20 * (k + 1))
            logged.append(learner.metrics())

    logged: list[dict[str, float]] = []
    whole, first, second = learner(), learner(), learner()
    go_on(whole, range(5))
    go_on(first, range(2))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    go_on(second, range(2, 5))
    assert logged[:5] == logged[5:]
    for mine, other in ((whole.net, second.net), (whole.critic.net, second.critic.net)):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in mine.state_dict().items())
    for name in ("_target", "_target_critic"):
        for mine, other in zip(getattr(whole, name).weights, getattr(second, name).weights, strict=True):
            assert torch.equal(mine.weight, other.weight)
