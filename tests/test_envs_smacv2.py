"""StarCraft II battles, against a stand-in of the packages: no game can be run here, see ``fake_smacv2``."""

from __future__ import annotations

import shutil
import subprocess
import sys

import fake_smacv2
import numpy as np
import pytest
import torch
from fake_smacv2 import StarCraft2Env as Fake

from k24.envs import check_env, make_env, smacv2
from k24.envs.copies import Copies
from k24.errors import RunError, UsageError

ALWAYS = {"spec", "shapes and types", "same seed, same episodes", "two beside each other", "global generators undisturbed", "close twice"}


@pytest.fixture
def game(tmp_path, monkeypatch):
    """The packages and the game, as far as anyone looks; its folder."""
    for package in ("smacv2", "smac"):
        folder = fake_smacv2.install(tmp_path, package)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SC2PATH", str(folder))
    monkeypatch.setenv("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")
    for name, value in {"made": [], "running": 0, "strength": Fake.strength, "break_at": None, "stuck": 0}.items():
        monkeypatch.setattr(Fake, name, value)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] in ("smacv2", "smac")]:
        del sys.modules[name]


def _shoot(view):
    """The first enemy alive for everyone alive; nothing for the dead."""
    return np.where(view.alive, view.avail.shape[1] - 1 - view.avail[:, ::-1].argmax(axis=1), 0)


def _stop(view):
    return view.alive.astype(np.int64)


def _play(env, view, act):
    """To the end of an episode: the outcomes."""
    outcomes = []
    while not outcomes or not (outcomes[-1].terminated or outcomes[-1].truncated):
        outcomes.append(env.step(act(outcomes[-1].view if outcomes else view)))
    return outcomes


# --- what is made ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options", "sizes", "unit_types"),
    [
        # Agents, features, state, actions and limit, by the formulas of the packages' source.
        ("smacv2/terran_5_vs_5", {}, (5, 82, 120, 11, 200), (79, 82)),
        ("smacv2/protoss_5_vs_5", {}, (5, 92, 130, 11, 200), (89, 92)),
        ("smacv2/zerg_10_vs_11", {}, (10, 170, 306, 17, 200), (167, 170)),
        ("smacv2/terran_5_vs_5", {"obs_timestep_number": True, "max_steps": 30}, (5, 83, 120, 11, 30), (79, 82)),
        ("smacv2/terran_5_vs_5", {"conic_fov": True, "obs_own_pos": False}, (5, 82, 190, 23, 200), (79, 82)),
        ("smacv2/zerg_3_vs_2", {}, (3, 42, 57, 8, 200), (39, 42)),
        ("smac/3m", {}, (3, 30, 48, 9, 60), None),
        ("smac/2s3z", {}, (5, 80, 120, 11, 120), (78, 80)),
    ],
)
def test_sizes_and_unit_types(game, task, options, sizes, unit_types):
    assert smacv2.accepts(task)
    spec = smacv2.make_one(task, **options).spec
    assert (spec.n_agents, spec.obs_dim, spec.state_dim, spec.n_actions, spec.episode_limit) == sizes
    assert spec.unit_types == unit_types
    assert not spec.continuous


@pytest.mark.parametrize(
    ("race", "units", "weights", "exceptions"),
    [
        ("terran", ["marine", "marauder", "medivac"], [0.45, 0.45, 0.1], {"exception_unit_types": ["medivac"]}),
        ("protoss", ["stalker", "zealot", "colossus"], [0.45, 0.45, 0.1], {}),
        ("zerg", ["zergling", "baneling", "hydralisk"], [0.45, 0.1, 0.45], {"exception_unit_types": ["baneling"]}),
    ],
)
def test_the_published_configuration_is_what_the_package_gets(game, race, units, weights, exceptions):
    env = smacv2.make_one(f"smacv2/{race}_20_vs_23", difficulty=3, reward_win=100, use_unit_ranges=False)
    env.reset(7)
    for made, seed in zip(Fake.made, (None, 7), strict=True):
        given = made.given
        assert given["map_name"] == f"10gen_{race}"
        assert (given["seed"], given["continuing_episode"]) == (seed, True)
        assert (given["difficulty"], given["reward_win"], given["use_unit_ranges"], given["obs_own_pos"]) == ("3", 100, False, True)
        written = {"n_units": 20, "n_enemies": 23}  # by the package, into every part
        assert given["capability_config"] == {
            "n_units": 20,
            "n_enemies": 23,
            "team_gen": {
                "dist_type": "weighted_teams",
                "unit_types": units,
                "weights": weights,
                **exceptions,
                "observe": True,
                "env_key": "team_gen",
                **written,
            },
            "start_positions": {
                "dist_type": "surrounded_and_reflect",
                "p": 0.5,
                "map_x": 32,
                "map_y": 32,
                "env_key": "start_positions",
                **written,
            },
        }
    assert smacv2.make_one(f"smacv2/{race}_5_vs_5") and Fake.made[-1].given["use_unit_ranges"]
    env.close()


def test_maps_of_smac_are_played_by_smac_with_its_own_defaults(game):
    env = smacv2.make_one("smac/3m")
    given = Fake.made[-1].given
    assert given["map_name"] == "3m"
    assert given["capability_config"] is None
    assert not given["use_unit_ranges"]
    assert not given["obs_own_pos"]
    outcomes = _play(env, env.reset(0), _shoot)
    assert outcomes[-1].terminated
    env.close()


def test_the_table_names_what_is_published():
    assert len([task for task in smacv2.TASKS if task.startswith("smacv2/")]) == 15
    assert "smacv2/protoss_10_vs_11" in smacv2.TASKS
    assert len([task for task in smacv2.TASKS if task.startswith("smac/")]) == 23
    for wrong in ("smacv2/3m", "smacv2/terran_0_vs_5", "smacv2/orc_5_vs_5", "smacv2/terran_5_vs_5x", "smac/4m"):
        assert not smacv2.accepts(wrong)


# --- what happens ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_steps": 6}, {"obs_timestep_number": True}])
def test_keeps_the_contract(game, options):
    checks = check_env(lambda: make_env("smacv2/terran_5_vs_5", 3, workers=0, **options), steps=60)
    assert set(checks) >= ALWAYS | {"auto-reset", "terminated or truncated"}
    assert Fake.running == 0


def test_smac_keeps_the_contract(game):
    assert set(check_env(lambda: Copies("k24.envs.smacv2", "smac/2s3z", {}, 2, workers=0), steps=60)) >= ALWAYS
    assert Fake.running == 0


@pytest.mark.parametrize("options", [{}, {"obs_timestep_number": True}])
def test_unit_types_are_those_of_the_drawn_team_and_nothing_for_the_dead(game, options):
    env = smacv2.make_one("smacv2/terran_5_vs_5", **options)
    bits = slice(*env.spec.unit_types)
    teams = set()
    for seed in range(8):
        view = env.reset(seed)
        teams.add(tuple(Fake.made[-1].types))
        for outcome in _play(env, view, _stop):
            view = outcome.view
            expected = np.eye(3)[Fake.made[-1].types] * view.alive[:, None]
            np.testing.assert_array_equal(view.obs[:, bits], expected)
        assert not view.alive.any()
    assert len(teams) > 3
    env.close()


def test_the_dead_see_zeros_and_can_only_do_nothing(game):
    env = smacv2.make_one("smacv2/zerg_5_vs_5", obs_timestep_number=True)
    outcomes = _play(env, env.reset(0), _stop)
    some = [outcome.view for outcome in outcomes if 0 < outcome.view.alive.sum() < 5]
    assert some
    for view in some:
        assert not view.obs[~view.alive].any()
        assert view.obs[view.alive].any(axis=1).all()
        np.testing.assert_array_equal(view.avail[~view.alive], np.eye(11, dtype=bool)[[0] * int((~view.alive).sum())])
        assert not view.avail[view.alive, 0].any()
    env.close()


def test_victory_defeat_and_the_clock(game, monkeypatch):
    env = smacv2.make_one("smacv2/terran_5_vs_5", max_steps=9)
    ends = {}
    for name, strength, act in (("victory", 0.0, _shoot), ("defeat", 1.0, _stop), ("clock", 0.0, _stop)):
        monkeypatch.setattr(Fake, "strength", strength)
        outcomes = _play(env, env.reset(1), act)
        assert not any(outcome.won or outcome.terminated or outcome.truncated for outcome in outcomes[:-1])
        ends[name] = (outcomes[-1].terminated, outcomes[-1].truncated, outcomes[-1].won, len(outcomes))
        paid = sum(float(outcome.reward.sum()) for outcome in outcomes)
        assert {outcome.reward.shape for outcome in outcomes} == {(5,)}
        # All health of the enemies, and the victory: 20, however many agents share it.
        assert paid == pytest.approx(20.0 if name == "victory" else 0.0)
    assert ends["victory"][:3] == (True, False, True)
    assert ends["defeat"][:3] == (True, False, False)
    assert ends["clock"] == (False, True, False, 9)
    env.close()


def test_seeds_decide_what_is_drawn_whoever_plays(game):
    def episode(env, seed):
        view = env.reset(seed)
        return [view.obs, *(outcome.view.obs for outcome in _play(env, view, _shoot))]

    one, other = (smacv2.make_one("smacv2/protoss_5_vs_5") for _ in range(2))
    first = episode(one, 3)
    different = episode(one, 4)
    again = episode(one, 3)
    np.random.seed(11)
    elsewhere = episode(other, 3)
    for a, b, c in zip(first, again, elsewhere, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
    assert not np.array_equal(first[0], different[0])
    one.close()
    other.close()


def test_one_game_for_all_battles(game):
    env = smacv2.make_one("smacv2/terran_5_vs_5")
    assert Fake.running == 0, "started before it is needed"
    env.reset(0)
    env.step(_stop(env.reset(1)))  # left twice before a battle came to its end: the package would start a second game beside the first
    assert Fake.running == 1
    made = len(Fake.made)
    for seed in range(3):
        _play(env, env.reset(seed), _shoot)
    env.step(_stop(env.reset(5)))
    env.reset(6)
    assert (Fake.running, len(Fake.made)) == (1, made + 1)
    env.close()
    env.close()
    assert Fake.running == 0
    assert env.reset(0).alive.all()
    env.close()


def test_a_game_that_breaks_down_cuts_the_episode_and_is_started_again(game, monkeypatch, caplog):
    env = smacv2.make_one("smacv2/terran_5_vs_5")
    _play(env, env.reset(0), _shoot)
    view = env.reset(1)
    seen = env.step(_stop(view)).view
    monkeypatch.setattr(Fake, "break_at", 2)
    outcome = env.step(_stop(seen))
    assert (outcome.terminated, outcome.truncated, outcome.won) == (False, True, False)
    np.testing.assert_array_equal(outcome.view.obs, seen.obs)
    assert not outcome.reward.any()
    assert "broke down" in caplog.text
    monkeypatch.setattr(Fake, "break_at", None)
    made = len(Fake.made)
    assert _play(env, env.reset(2), _shoot)[-1].terminated
    assert (Fake.running, len(Fake.made)) == (1, made + 1)
    env.close()


def test_a_battle_that_does_not_begin_is_tried_in_a_new_game_once(game, monkeypatch, caplog):
    env = smacv2.make_one("smacv2/terran_5_vs_5")
    expected = env.reset(3).obs
    monkeypatch.setattr(Fake, "stuck", 1)
    np.testing.assert_array_equal(env.reset(3).obs[:, -3:], expected[:, -3:])
    assert "units don't appear" in caplog.text
    assert Fake.running == 1
    monkeypatch.setattr(Fake, "stuck", 2)
    with pytest.raises(RuntimeError, match="units don't appear"):
        env.reset(4)
    env.close()
    assert Fake.running == 0


def test_an_action_that_a_unit_cannot_take_is_an_error(game):
    env = make_env("smacv2/terran_5_vs_5", 2, workers=0)
    env.reset(0)
    with pytest.raises(RunError, match="smacv2/terran_5_vs_5: step: AssertionError: Agent 0 cannot perform action 0"):
        env.step(torch.zeros(5, 2, dtype=torch.int64))
    env.close()


# --- what can be wrong ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dificulty": "7"}, "unknown option of smacv2/terran_5_vs_5 'dificulty': did you mean 'difficulty'?"),
        ({"capability_config": {}}, "unknown option of smacv2/terran_5_vs_5 'capability_config'"),
        ({"continuing_episode": False}, "unknown option of smacv2/terran_5_vs_5 'continuing_episode'"),
        ({"difficulty": 12}, "smacv2/terran_5_vs_5: difficulty must be one of 1, 2, 3, 4, 5, 6, 7, 8, 9, A, got '12'"),
        ({"num_fov_actions": "x", "conic_fov": True}, "smacv2/terran_5_vs_5 can't be made with num_fov_actions='x', conic_fov=True: "),
    ],
)
def test_wrong_options(game, options, message):
    with pytest.raises(UsageError) as caught:
        smacv2.make_one("smacv2/terran_5_vs_5", **options)
    assert str(caught.value).startswith(message)


def test_options_that_a_package_gets_wrong_are_not_offered(game):
    for task, option in (("smacv2/terran_5_vs_5", "obs_instead_of_state"), ("smac/3m", "obs_timestep_number")):
        with pytest.raises(UsageError, match=f"unknown option of {task} '{option}'"):
            smacv2.make_one(task, **{option: True})


def test_nothing_lacks_where_everything_is_there(game):
    assert smacv2.missing() is None
    assert smacv2.missing("smac") is None
    assert not {"smacv2", "smac"} & set(sys.modules), "looking imports nothing"


def test_steps_to_take_where_nothing_is_there(monkeypatch, tmp_path):
    monkeypatch.setattr(smacv2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("SC2PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    steps = smacv2.missing().split("; ")
    assert steps[0] == 'pip install "git+https://github.com/oxwhirl/smacv2.git" "protobuf<3.21" "tensorboard<2.21"'
    assert "https://blzdistsc2-a.akamaihd.net/Linux/SC2.4.10.zip" in steps[1]
    assert steps[1].endswith(f"and set SC2PATH to its folder (there is none in {tmp_path}/StarCraftII)")
    assert steps[2] == (
        "unpack https://github.com/oxwhirl/smacv2/releases/download/maps/SMAC_Maps.zip in $SC2PATH/Maps/SMAC_Maps "
        "(there is no SMAC_Maps/32x32_flat.SC2Map)"
    )
    assert len(steps) == 3
    with pytest.raises(UsageError) as caught:
        smacv2.make_one("smacv2/terran_5_vs_5")
    assert str(caught.value) == f"smacv2/terran_5_vs_5 can't run here: {'; '.join(steps)}"
    assert "oxwhirl/smac.git" in smacv2.missing("smac")


def test_a_missing_game_a_missing_map_and_a_new_protobuf_are_each_named(game, monkeypatch):
    with pytest.raises(UsageError, match=r"smac/MMM can't run here: unpack \S+/smac/\S+ in \S+/Maps \(there is no SMAC_Maps/MMM.SC2Map\)"):
        smacv2.make_one("smac/MMM")
    (game / "Maps" / "SMAC_Maps" / "32x32_flat.SC2Map").unlink()
    assert smacv2.missing().startswith("unpack https://github.com/oxwhirl/smacv2/")
    assert smacv2.missing("smac") is None
    shutil.rmtree(game / "Versions")
    assert smacv2.missing("smac").startswith("unpack StarCraft II 4.10 for Linux")
    (game / "Versions").mkdir()
    monkeypatch.delenv("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION")
    monkeypatch.setattr(smacv2.importlib.metadata, "version", lambda name: "7.36.2")
    assert smacv2.missing("smac").startswith("set PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python, for protobuf 7.36.2 refuses")
    monkeypatch.setattr(smacv2.importlib.metadata, "version", lambda name: "3.20.3")
    assert smacv2.missing("smac") is None


def test_another_package_called_smac_is_not_taken_for_it(game):
    shutil.rmtree(game.parent / "smac" / "env")
    assert smacv2.missing("smac").startswith('pip install "git+https://github.com/oxwhirl/smac.git"')


def test_a_package_that_does_not_import_is_an_error_on_one_line(game):
    inner = game.parent / "smacv2" / "env" / "__init__.py"
    inner.write_text('raise TypeError("Descriptors cannot be created directly.\\nIf this call came from a _pb2.py file")\n')
    with pytest.raises(UsageError) as caught:
        make_env("smacv2/terran_5_vs_5", 1, workers=0)
    assert str(caught.value) == (
        "smacv2/terran_5_vs_5: tried to import 'smacv2.env', and got TypeError: "
        "Descriptors cannot be created directly. If this call came from a _pb2.py file"
    )


def test_the_module_needs_neither_package():
    code = "import sys; from k24.envs import smacv2 as s; s.TASKS; s.missing(); print({'smacv2', 'smac', 'google'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
