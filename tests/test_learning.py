"""Learners solve games whose best return is known, by every way of sharing parameters.

A team that was never trained may be right by luck, so each run takes the first seed whose untrained team falls short.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from k24.config import TrainConfig
from k24.envs import EnvSpec
from k24.envs.toy import MatrixGame, MemoryGame, Specialisation, UnitGame
from k24.evaluate import build_env, build_learner, play
from k24.learners import LEARNERS, ValueConfig
from k24.sharing import SCHEMES, K24Config
from k24.sparse.slots import SlotRule
from k24.train import train

GAMES = {"toy/matrix": MatrixGame, "toy/specialisation": Specialisation, "toy/memory": MemoryGame}

# Games of one step: little replay and a short time of random play, so that a team soon learns from what it does now.
ONE_STEP = TrainConfig(
    steps=1200,
    envs=16,
    hidden=16,
    device="cpu",
    eval_episodes=32,
    learner=ValueConfig(lr=2e-3, batch_size=32, buffer_size=32, env_steps_per_update=4, target_update=20, epsilon_anneal=200),
)
MEMORY = dataclasses.replace(
    ONE_STEP,
    steps=6400,
    learner=ValueConfig(lr=5e-3, batch_size=32, buffer_size=256, env_steps_per_update=16, target_update=20, epsilon_anneal=2000),
)


def untrained(config: TrainConfig) -> float:
    """Return of the team before any training, which is deterministic."""
    env = build_env(config, 32)
    return float(play(build_learner(config, env.spec).actor("deploy"), env, 32).returns.mean())


def learned(config: TrainConfig, folder: Path, best: float | None = None) -> float:
    """Mean return of the trained team's deployed policy."""
    best = GAMES[config.task].optimal_return if best is None else best
    config = next(c for c in (dataclasses.replace(config, seed=s) for s in range(20)) if untrained(c) < 0.9 * best)
    return train(config, folder / "run").evaluation["return_mean"]


@pytest.mark.parametrize("algo", LEARNERS)
@pytest.mark.parametrize("task", ["toy/matrix", "toy/specialisation"])
def test_every_learner_reaches_the_optimum(tmp_path, task, algo):
    config = dataclasses.replace(ONE_STEP, task=task, algo=algo)
    assert learned(config, tmp_path) == pytest.approx(GAMES[task].optimal_return)


def test_qmix_remembers(tmp_path):
    assert learned(dataclasses.replace(MEMORY, task="toy/memory"), tmp_path) == pytest.approx(MemoryGame.optimal_return)


@pytest.mark.parametrize("sharing", [s for s in SCHEMES if s not in ("k24", "fups")])
def test_every_scheme_lets_agents_specialise(tmp_path, sharing):
    # Kaleidoscope starts with agents that are nearly alike, and takes longer to tell them apart.
    steps = 2400 if sharing == "kaleidoscope" else 1600
    config = dataclasses.replace(ONE_STEP, task="toy/specialisation", sharing=sharing, steps=steps)
    assert learned(config, tmp_path) == pytest.approx(Specialisation.optimal_return)


@pytest.mark.parametrize(("algo", "sharing"), [*((algo, "k24") for algo in LEARNERS), ("qmix", "nops"), ("qmix", "kaleidoscope")])
def test_units_learn_what_their_type_must_do(tmp_path, algo, sharing):
    config = dataclasses.replace(MEMORY, task="toy/units", algo=algo, sharing=sharing, slots="unit_type")
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
        ONE_STEP,
        task="toy/specialisation",
        env_args=("n_agents=4",),
        slots="test_learning:pairs",
        agent_id="no",
        masks=K24Config(pattern="1:2"),
        steps=2400,
    )
    assert learned(config, tmp_path, best=0.5) == pytest.approx(0.5)


def test_masks_alone_tell_agents_apart(tmp_path):
    """Same observation, no agent index: what differs between the agents is their masks, and nothing else."""
    config = dataclasses.replace(ONE_STEP, task="toy/specialisation", agent_id="no", masks=K24Config(pattern="1:2"))
    assert learned(config, tmp_path) == pytest.approx(Specialisation.optimal_return)


@pytest.mark.parametrize("sharing", ["fups", "k24_shared"])
def test_one_network_without_agent_indices_cannot_specialise(tmp_path, sharing):
    """Agents that are alike in everything do the same, so just one of the n actions is taken: 1/n."""
    config = dataclasses.replace(
        ONE_STEP, task="toy/specialisation", sharing=sharing, agent_id="no", steps=400, masks=K24Config(pattern="1:2")
    )
    assert learned(config, tmp_path) == pytest.approx(1 / 2)
