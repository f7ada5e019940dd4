"""``k24 bench env``: what acts and what it is told. No test looks at how long anything took."""

from __future__ import annotations

import json

import pytest

from k24.bench import env as env_module
from k24.cli import main
from k24.learners import NetActor, RandomActor


@pytest.mark.parametrize("task", ["toy/matrix", "toy/reach"])
def test_a_net_acts_in_tasks_of_both_kinds(capfd, monkeypatch, task: str) -> None:
    actors = []

    def noted(env, actor, right=env_module._player):
        actors.append((actor, right(env, actor)))
        actions = actor(env.reset(0))
        assert actions.is_floating_point() == env.spec.continuous
        actor.reset(env.n_envs)
        return actors[-1][1]

    monkeypatch.setattr(env_module, "_SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(env_module, "_player", noted)
    assert main(["bench", "env", task, "--envs", "2", "--hidden", "8", "--seconds", "0.001"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [type(actor) for actor, _ in actors] == [NetActor, RandomActor]
    assert found["task"] == task and found["env_steps_per_s"] > 0 and found["random_steps_per_s"] > 0
    assert found["raw_steps_per_s"] is None and found["over_raw"] is None
