"""Learners solve games whose best return is known, by every way of sharing parameters.

A team that was never trained may be right by luck, so each run takes the first seed whose untrained team falls short.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k24.config import TrainConfig
from k24.envs import EnvSpec
from k24.envs.toy import MatrixGame, MemoryGame, ReachGame, Specialisation, UnitGame
from k24.evaluate import build_env, build_learner, play
from k24.learners import LEARNERS, PPOConfig, TD3Config, ValueConfig
from k24.sharing import SCHEMES, K24Config, SePSConfig
from k24.sparse.slots import SlotRule
from k24.train import train

GAMES = {"toy/matrix": MatrixGame, "toy/specialisation": Specialisation, "toy/memory": MemoryGame, "toy/reach": ReachGame}
CHOOSE = ["iql", "vdn", "qmix", "ippo", "mappo"]  # one of a few actions
STEER = ["ippo", "mappo", "matd3"]  # by continuous ones
# Schemes that no learner can treat in a way of its own: one learner of each kind tries them.
BASELINES = ["k24_magnitude", "snp", "hypermarl", "seps", "fups_bias", "multihead"]
# What cannot tell agents apart: one network for all, and one for agents that random play shows no difference between.
ALIKE = ["fups", "seps"]

# Games of one step. Value learners: little replay and a short time of random play, so that a team soon learns from what it does now.
VALUES = TrainConfig(
    steps=1200,
    envs=16,
    hidden=16,
    device="cpu",
    eval_episodes=32,
    learner=ValueConfig(lr=2e-3, batch_size=32, buffer_size=32, env_steps_per_update=4, target_update=20, epsilon_anneal=200),
)
# Policies start where both agents toss coins, a saddle point: the gradient is nothing but noise until one of them leans to a side. Many
# episodes a round keep that noise small, and entropy keeps both from settling on the same action before they differ.
POLICIES = TrainConfig(
    algo="ippo",
    steps=5120,
    envs=128,
    hidden=32,
    device="cpu",
    eval_episodes=32,
    learner=PPOConfig(lr=5e-3, critic_lr=5e-3, epochs=5, entropy_coef=0.1, recurrent=False),
)
ONE_STEP = {ValueConfig: VALUES, PPOConfig: POLICIES}

# Games of several steps, with memory.
SEVERAL_STEPS = {
    ValueConfig: dataclasses.replace(
        VALUES,
        steps=6400,
        learner=ValueConfig(lr=5e-3, batch_size=32, buffer_size=256, env_steps_per_update=16, target_update=20, epsilon_anneal=2000),
    ),
    PPOConfig: dataclasses.replace(POLICIES, steps=6400, envs=32, hidden=16, learner=PPOConfig(lr=5e-3, critic_lr=5e-3, epochs=5)),
}

# Continuous actions. What is paid peaks at places that random play hardly gets to, and a wall is close behind them.
REACH = {
    PPOConfig: dataclasses.replace(
        POLICIES, task="toy/reach", steps=3840, envs=32, hidden=16, learner=PPOConfig(lr=5e-3, critic_lr=5e-3, epochs=5, recurrent=False)
    ),
    TD3Config: dataclasses.replace(
        POLICIES,
        task="toy/reach",
        algo="matd3",
        steps=5760,
        envs=32,
        learner=TD3Config(
            lr=1e-3,
            lr_decay_start=0.5,
            critic_lr=3e-3,
            n_step=1,
            batch_size=64,
            env_steps_per_update=6,
            warmup=600,
            target_tau=0.05,
            exploration_noise=0.3,
            target_noise=0.1,
            target_noise_clip=0.2,
        ),
    ),
}


def by(algo: str, games: dict[type, TrainConfig], **values: Any) -> TrainConfig:
    """What this learner needs for such games, with other values."""
    return dataclasses.replace(games[LEARNERS[algo].settings], algo=algo, **values)


def untrained(config: TrainConfig) -> float:
    """Return of the team before any training, which is deterministic."""
    env = build_env(config, 32)
    return float(play(build_learner(config, env.spec).actor("deploy"), env, 32).returns.mean())


def learned(config: TrainConfig, folder: Path, best: float | None = None) -> float:
    """Mean return of the trained team's deployed policy."""
    best = GAMES[config.task].optimal_return if best is None else best
    config = next(c for c in (dataclasses.replace(config, seed=s) for s in range(20)) if untrained(c) < 0.9 * best)
    return train(config, folder / "run").evaluation["return_mean"]


def test_every_learner_is_here():
    assert {*CHOOSE, *STEER} == set(LEARNERS)


@pytest.mark.parametrize(("algo", "sharing"), [(a, s) for s in SCHEMES for a in (["qmix", "ippo"] if s in BASELINES else CHOOSE)])
def test_every_learner_lets_agents_specialise_by_every_scheme(tmp_path, algo, sharing):
    # What cannot tell agents apart gets a game where it need not.
    task = "toy/matrix" if sharing in ALIKE else "toy/specialisation"
    config = by(algo, ONE_STEP, sharing=sharing, task=task, seps=SePSConfig(random_play=256))
    if LEARNERS[algo].settings is ValueConfig and sharing == "kaleidoscope":
        config = dataclasses.replace(config, steps=2400)  # it starts with agents that are nearly alike, and takes longer to tell them apart
    if algo == "iql" and sharing == "k24_shared":
        # Independent learners that only an index tells apart settle for half the return now and then, the sooner the faster they learn; and
        # masked weights learn at twice the rate.
        config = dataclasses.replace(config, learner=dataclasses.replace(config.learner, lr=1e-3))
    assert learned(config, tmp_path) == pytest.approx(GAMES[config.task].optimal_return)


@pytest.mark.parametrize("algo", CHOOSE)
def test_every_learner_finds_the_best_pair(tmp_path, algo):
    assert learned(by(algo, ONE_STEP, task="toy/matrix"), tmp_path) == pytest.approx(MatrixGame.optimal_return)


@pytest.mark.parametrize(
    ("algo", "sharing"),
    [*((a, s) for s in SCHEMES if s not in BASELINES for a in STEER), ("matd3", "snp"), ("matd3", "hypermarl"), ("matd3", "multihead")],
)
def test_every_learner_steers_agents_apart_by_every_scheme(tmp_path, algo, sharing):
    config = by(algo, REACH, sharing=sharing, agent_id="yes" if sharing == "fups" else "auto")
    # Of an agent that stops at the wall, 0.2 behind its goal, 1/16 is missing: what steers by a learned value may end up there.
    assert learned(config, tmp_path) == pytest.approx(ReachGame.optimal_return, abs=0.07 if algo == "matd3" else 0.03)


@pytest.mark.parametrize("algo", STEER)
def test_nobody_steers_agents_apart_that_are_alike(tmp_path, algo):
    """One network, the same observations and no agent index: both are in one place, and the best one pays 0."""
    config = by(algo, REACH, sharing="fups", agent_id="no", steps=960)
    assert learned(config, tmp_path) <= 1e-5


@pytest.mark.parametrize("algo", ["qmix", "ippo", "mappo"])
def test_what_was_seen_is_remembered(tmp_path, algo):
    assert learned(by(algo, SEVERAL_STEPS, task="toy/memory"), tmp_path) == pytest.approx(MemoryGame.optimal_return)


@pytest.mark.parametrize(("algo", "sharing"), [*((algo, "k24") for algo in CHOOSE), ("qmix", "nops"), ("qmix", "kaleidoscope")])
def test_units_learn_what_their_type_must_do(tmp_path, algo, sharing):
    config = by(algo, SEVERAL_STEPS, task="toy/units", sharing=sharing, slots="unit_type")
    if LEARNERS[algo].settings is PPOConfig:
        # Rounds are half as long as those of toy/memory. A type that has settled on the wrong action has to leave it again.
        config = dataclasses.replace(config, steps=3200, learner=dataclasses.replace(config.learner, entropy_coef=0.05))
    else:
        # At the rate of toy/memory one of ten runs of VDN and QMIX never leaves the wrong action, whether masks are drawn together or not.
        config = dataclasses.replace(config, learner=dataclasses.replace(config.learner, lr=2e-3))
    found = train(config, tmp_path / "run").evaluation
    assert found["win_rate"] == 1
    assert found["return_mean"] == pytest.approx(UnitGame(1).optimal_return, abs=0.1)  # how many die is luck


def pairs(spec: EnvSpec) -> SlotRule:
    """Agents 0 and 2 share one slot, 1 and 3 the other."""

    def of(obs: Tensor) -> Tensor:
        own = torch.arange(len(obs)) % 2
        return own.view(-1, *[1] * (obs.dim() - 2)).expand(obs.shape[:-1])

    return SlotRule(2, of)


def test_a_rule_of_the_users_own_decides_who_can_differ(tmp_path):
    """Four agents that see the same, in two slots: two of the four actions, and no more."""
    config = dataclasses.replace(
        VALUES,
        task="toy/specialisation",
        env_args=("n_agents=4",),
        slots="test_learning:pairs",
        agent_id="no",
        masks=K24Config(pattern="1:2"),
        steps=2400,
    )
    assert learned(config, tmp_path, best=0.5) == pytest.approx(0.5)


def test_clusters_tell_agents_apart_where_there_is_one_for_each(tmp_path):
    """Random play shows two agents that are alike; with as many clusters as agents nobody needs to look."""
    config = dataclasses.replace(VALUES, task="toy/specialisation", sharing="seps", seps=SePSConfig(clusters=2))
    assert learned(config, tmp_path) == pytest.approx(Specialisation.optimal_return)


def test_masks_alone_tell_agents_apart(tmp_path):
    """Same observation, no agent index: what differs between the agents is their masks, and nothing else."""
    config = dataclasses.replace(VALUES, task="toy/specialisation", agent_id="no", masks=K24Config(pattern="1:2"))
    assert learned(config, tmp_path) == pytest.approx(Specialisation.optimal_return)


@pytest.mark.parametrize("sharing", ["fups", "k24_shared", "k24_magnitude"])
@pytest.mark.parametrize("algo", ["qmix", "mappo"])
def test_one_network_without_agent_indices_cannot_specialise(tmp_path, algo, sharing):
    """Agents that are alike in everything do the same, so just one of the n actions is taken: 1/n."""
    config = by(algo, ONE_STEP, task="toy/specialisation", sharing=sharing, agent_id="no", steps=400, masks=K24Config(pattern="1:2"))
    assert learned(config, tmp_path) == pytest.approx(1 / 2)
