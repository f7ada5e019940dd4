"""The configuration: what it refuses, and that what is written to a file comes back as it was."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from k24 import config as config_module
from k24.config import TrainConfig, first_difference, for_algo, from_dict, load_config, save_config, to_dict
from k24.errors import UsageError
from k24.learners import LEARNERS, PPOConfig, TD3Config, ValueConfig
from k24.presets import PRESETS, preset
from k24.sharing import SCHEMES, Dense, K24Config, Kaleidoscope, KaleidoscopeConfig, SharingConfig, make_critic_sharing

OTHER = TrainConfig(
    task="toy/memory",
    algo="iql",
    sharing="kaleidoscope",
    steps=123,
    seed=2**62,
    agent_id="no",
    env_args=("n_cues=3", "max_steps=5"),
    learner=ValueConfig(lr=1e-7, individual_rewards=True, td_lambda=0.5, optimiser="rmsprop"),
    masks=K24Config(pattern="1:4", freeze_at=0.3, diversity="hamming", hetero_init_scale=0.1 + 0.2),
    kaleidoscope=KaleidoscopeConfig(div_coef=5.0),
)
# One run of each algorithm, away from the defaults of its learner.
OF_EACH = {
    **{algo: TrainConfig(algo=algo, learner=ValueConfig(gamma=0.5, epsilon_anneal=7, double_q=False)) for algo in ("iql", "vdn", "qmix")},
    "ippo": TrainConfig(algo="ippo", learner=PPOConfig(clip=0.1, recurrent=False, individual_rewards=True)),
    "mappo": TrainConfig(algo="mappo", learner=PPOConfig(epochs=3, critic_sharing="nops", target_kl=1e-9)),
    "matd3": TrainConfig(algo="matd3", learner=TD3Config(critics=3, critic_rows="all", env_steps_per_update=0.5)),
}


# --- values --------------------------------------------------------------------------------------------------------------------


def test_defaults_are_a_valid_run():
    config = TrainConfig()
    assert (config.algo, config.sharing, config.masks.pattern, config.learner) == ("qmix", "k24", "2:4", ValueConfig())


def test_each_algorithm_has_settings_of_its_own():
    kinds = {"iql": ValueConfig, "vdn": ValueConfig, "qmix": ValueConfig, "ippo": PPOConfig, "mappo": PPOConfig, "matd3": TD3Config}
    assert {algo: TrainConfig(algo=algo).learner for algo in LEARNERS} == {algo: kind() for algo, kind in kinds.items()}
    assert OF_EACH.keys() == LEARNERS.keys()


def test_settings_of_another_algorithm_are_refused():
    with pytest.raises(UsageError, match="algo mappo has its learner's settings in a PPOConfig, got a ValueConfig: change both"):
        TrainConfig(algo="mappo", learner=ValueConfig())
    with pytest.raises(UsageError, match="algo vdn has its learner's settings in a ValueConfig, got a TD3Config"):
        dataclasses.replace(OF_EACH["matd3"], algo="vdn")


@pytest.mark.parametrize("algo", LEARNERS)
def test_no_option_has_two_meanings(algo):
    """Options of learner and masks stand beside those of the run, without a prefix."""
    config = TrainConfig(algo=algo)
    names = [f.name for part in (config, config.learner, config.masks) for f in dataclasses.fields(part)]
    assert len(names) == len(set(names))
    # What one algorithm knows is no option of the run or its masks, or another could not be told that it lacks it.
    run = {f.name for part in (config, config.masks) for f in dataclasses.fields(part)}
    assert not run & {f.name for learner in LEARNERS.values() for f in dataclasses.fields(learner.settings)}


def test_another_algorithm_takes_the_settings_that_it_understands():
    base = TrainConfig(task="toy/matrix", hidden=8, learner=ValueConfig(lr=0.1))
    assert for_algo(base, "vdn") == dataclasses.replace(base, algo="vdn")
    assert for_algo(base, "ippo") == TrainConfig(task="toy/matrix", hidden=8, algo="ippo", learner=PPOConfig())
    assert base == TrainConfig(task="toy/matrix", hidden=8, learner=ValueConfig(lr=0.1))  # as it was
    with pytest.raises(UsageError, match="unknown algorithm 'mapo': did you mean 'mappo'"):
        for_algo(base, "mapo")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_change_the_defaults(name):
    found = preset(name)
    assert first_difference(TrainConfig(algo=found.algo), found) is not None


def test_presets_of_mujoco_differ_by_what_kaleidoscope_adds():
    plain, kaleidoscope = preset("matd3_mamujoco"), preset("kaleidoscope_mamujoco")
    assert (plain.sharing, plain.learner.critics, kaleidoscope.sharing, kaleidoscope.learner.critics) == ("k24", None, "kaleidoscope", 5)
    assert kaleidoscope.kaleidoscope == KaleidoscopeConfig(div_coef=0.1, reset_interval=1_000_000, reset_ratio=0.5)
    learner = dataclasses.replace(kaleidoscope.learner, critics=None)
    assert plain.masks == K24Config()
    changed = {"sharing": "k24", "learner": learner, "kaleidoscope": KaleidoscopeConfig(), "masks": plain.masks}
    assert dataclasses.replace(kaleidoscope, **changed) == plain


@pytest.mark.parametrize(
    ("name", "usual", "suited"),
    [("alpha_lr_scale", 60.0, 1.0), ("weight_lr_scale", 2.0, 1.0), ("alpha_decay", 0.003, 0.0), ("div_coef", 0.0, 0.1)],
)
def test_masks_learn_as_suits_the_learner(name, usual, suited):
    def scale(algo, **masks):
        return getattr(TrainConfig(algo=algo, masks=K24Config(**masks)).sharing_config.masks, name)

    assert {algo: scale(algo) for algo in LEARNERS} == dict.fromkeys(LEARNERS, usual) | {"matd3": suited}
    assert scale("matd3", **{name: 0.5}) == scale("qmix", **{name: 0.5}) == 0.5


def test_settled_masks_leave_open_only_what_depends_on_the_net():
    settled = K24Config(anneal_end=0.7).settled()
    assert settled.freeze_at == 0.7
    assert [field.name for field in dataclasses.fields(settled) if getattr(settled, field.name) is None] == ["own_masks"]
    assert settled.settled({"div_coef": 0.3}) == settled


def test_the_help_of_a_name_lists_what_there_is():
    """The sentences that list schemes and learners are written by hand."""
    source = Path(config_module.__file__).read_text(encoding="utf-8")
    for field, names in (("sharing", SCHEMES), ("algo", LEARNERS)):
        line = re.search(rf'\n    {field}: str = .*\n    """([^"]*)"""', source)[1]
        assert set(re.findall(r"[a-z0-9_]+", line.split(":")[1])) - {"or"} == set(names)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algo": "qmx"}, "unknown algorithm 'qmx': did you mean 'qmix'?"),
        ({"algo": "qmx", "learner": {"clip": 0.1}}, "unknown algorithm 'qmx': did you mean 'qmix'?"),
        ({"learner": {"gama": 0.1}, "algo": "mappo"}, "here: learner: unknown setting 'gama': did you mean 'gamma'?"),
        ({"learner": {"double_q": True}, "algo": "mappo"}, "here: learner: setting 'double_q' is of iql, vdn, qmix: leave it out"),
        ({"learner": {"clip": 0.1}}, "here: learner: setting 'clip' is of ippo, mappo: leave it out"),
        ({"algo": "matd3", "learner": {"critics": 2.5}}, "here: learner: critics is 2.5, expected int"),
        ({"algo": "mappo", "learner": {"critic_sharing": "k25"}}, "unknown sharing scheme of a critic 'k25': did you mean 'k24'?"),
        ({"algo": "mappo", "learner": {"minibatches": 33}}, "minibatches (=33) must not exceed envs (=32): episodes are not cut"),
        (
            {"algo": "mappo", "sharing": "nops", "hidden": 1, "learner": {"critic_sharing": "k24_random"}},
            "hidden (=1) fits no 2:4 mask, which keeps 2 weights of a group: use 2 or more",
        ),
        (
            {"algo": "ippo", "learner": {"critic_hidden": 1}},
            "critic_hidden (=1) fits no 2:4 mask, which keeps 2 weights of a group: use 2 or ",
        ),
        ({"algo": "mappo", "learner": {"critic_hidden": 0}}, "critic_hidden (=0) must be at least 1"),
        ({"algo": "matd3", "learner": {"critic_hidden": 10**6}}, "critic_hidden (=1000000) is above "),
        ({"learner": {"critic_hidden": 8}}, "here: learner: setting 'critic_hidden' is of ippo, mappo, matd3: leave it out"),
        ({"sharing": "k25"}, "unknown sharing scheme 'k25': did you mean 'k24'?"),
        ({"sharing": "zzzzzzz"}, "unknown sharing scheme 'zzzzzzz': known: fups, fups_bias, fups_id, "),
        ({"steps": 0}, "steps (=0) must be at least 1"),
        ({"envs": -3}, "envs (=-3) must be at least 1"),
        ({"hidden": 0}, "hidden (=0) must be at least 1"),
        ({"threads": 0}, "threads (=0) must be at least 1"),
        ({"log_every": 0}, "log_every (=0) must be at least 1"),
        ({"eval_every": 0}, "eval_every (=0) must be at least 1"),
        ({"eval_episodes": 0}, "eval_episodes (=0) must be at least 1"),
        ({"final_episodes": 0}, "final_episodes (=0) must be at least 1"),
        ({"checkpoint_every": -1}, "checkpoint_every (=-1) must be at least 1"),
        ({"seed": -1}, "seed (=-1) must lie in 0 … 2^63 - 1"),
        ({"seed": 2**63}, "must lie in 0 … 2^63 - 1"),
        ({"device": "gpu"}, "device 'gpu' is not known: use auto, cpu or cuda"),
        ({"hidden": 1}, "hidden (=1) fits no 2:4 mask, which keeps 2 weights of a group: use 2 or more"),
        ({"hidden": 3, "masks": {"pattern": "4:8"}}, "hidden (=3) fits no 4:8 mask, which keeps 4 weights of a group: use 4 or more"),
        ({"hidden": 100_000}, "hidden (=100000) is above 16384"),
        ({"envs": 5001}, "envs (=5001) must not exceed buffer_size (=5000)"),
        ({"learner": {"individual_rewards": True}}, "individual_rewards needs algo iql, got algo qmix: a mixer has one value for the team"),
        ({"learner": {"n_step": 3, "td_lambda": 0.5}}, "td_lambda (=0.5) and n_step (=3) exclude each other: set one of them"),
        ({"learner": {"lr": 0.0}}, "lr (=0.0) must be positive"),
        ({"learner": {"lr": -1}}, "lr (=-1.0) must be positive"),
        ({"learner": {"gamma": 1.5}}, "gamma (=1.5)"),
        ({"learner": {"batch_size": 0}}, "batch_size"),
        ({"learner": {"buffer_size": 3}}, "buffer_size (=3) must be at least batch_size (=32)"),
        ({"learner": {"epsilon_finish": 0.5, "epsilon_start": 0.1}}, "0 <= epsilon_finish (=0.5) <= epsilon_start (=0.1) <= 1"),
        ({"learner": {"grad_clip": 0.0}}, "grad_clip 0.0 must be positive"),
        ({"masks": {"pattern": "4:4"}}, "pattern 4:4 keeps nothing or everything: use N:M with 0 < N < M, for example 2:4"),
        ({"masks": {"pattern": "2-4"}}, "pattern '2-4' is not of the form N:M: use for example 2:4, 1:4 or 4:8"),
        ({"masks": {"pattern": "8:16"}}, "pattern 8:16 has 12870 states, at most 256 are supported"),
        ({"masks": {"reset_ratio": 1.5}}, "reset_ratio (=1.5) in [0, 1]"),
        ({"masks": {"freeze_at": 0.0}}, "freeze_at 0.0 must be positive"),
        ({"masks": {"temperature_min": 9.0}}, "temperature_min (=9.0) <= temperature_init (=1.0)"),
        ({"masks": {"anneal_end": 0.0}}, "anneal_start (=0.0) < anneal_end (=0.0) <= 1"),
        ({"masks": {"hetero_init_scale": float("nan")}}, "hetero_init_scale (=nan) must be a finite number"),
        ({"masks": {"alpha_lr_scale": float("inf")}}, "alpha_lr_scale (=inf) must be a finite number"),
        ({"learner": {"lr": float("inf")}}, "lr (=inf) must be a finite number"),
        ({"kaleidoscope": {"reset_interval": 0}}, "reset_interval >= 1 (=0)"),
        ({"env_args": ["n_agents"]}, "env_args 'n_agents' is not of the form name=value: for example --env-args n_agents=5"),
        ({"env_args": ["=3"]}, "env_args '=3' is not of the form name=value"),
        ({"env_args": ["a b=3"]}, "env_args 'a b=3' is not of the form name=value"),
        ({"env_args": ["a=["]}, "env_args 'a=[' holds no value that can be read"),
        ({"env_args": ["a=2001-99-99"]}, "env_args 'a=2001-99-99' holds no value that can be read"),
        ({"env_args": ["a=1", "a=2"]}, "env_args gives a twice: leave one of them out"),
    ],
)
def test_wrong_values_name_themselves_and_the_remedy(values, message):
    with pytest.raises(UsageError) as caught:
        from_dict(TrainConfig, values, "here")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_every_number_is_checked_for_nan():
    """Comparisons with NaN are false, so that a range check written the wrong way round lets it pass."""
    for algo in LEARNERS:
        for part in ("learner", "masks", "kaleidoscope"):
            for f in dataclasses.fields(getattr(TrainConfig(algo=algo), part)):
                if f.type in (float, "float", "float | None"):
                    with pytest.raises(UsageError, match="nan"):
                        from_dict(TrainConfig, {"algo": algo, part: {f.name: float("nan")}}, "here")


def test_small_nets_are_fine_where_nothing_is_masked():
    assert TrainConfig(hidden=1, sharing="nops").hidden == 1


def test_env_args_are_read_as_what_they_look_like():
    config = TrainConfig(env_args=("a=3", "b=0.5", "c=true", "d=text", "e=", "f='3'", "g=x=y", "h=[1, 2]", "i=1e-2", "j=-1.5E3", "k=1e"))
    plain = {"a": 3, "b": 0.5, "c": True, "d": "text", "e": None, "f": "3", "g": "x=y", "h": [1, 2], "i": 0.01, "j": -1500.0, "k": "1e"}
    assert config.env_kwargs == plain


def test_yes_and_no_of_yaml(tmp_path):
    for text, found in (("no", "no"), ("yes", "yes"), ("auto", "auto"), ("'no'", "no")):
        (tmp_path / "config.yaml").write_text(f"task: toy/matrix\nagent_id: {text}\nlearner: {{lr: 1.0e-3}}\n")
        config = load_config(tmp_path / "config.yaml")
        assert config.agent_id == found and config.learner.lr == 1e-3


# --- the scheme of critics -----------------------------------------------------------------------------------------------------

LIKE_THE_POLICY = {scheme: scheme for scheme in SCHEMES}
ALIKE = ("fups", "fups_id", "k24_shared", "k24_magnitude", "seps")


@pytest.mark.parametrize(
    ("n_slots", "ensemble", "expected"),
    [
        (1, False, dict.fromkeys(SCHEMES, "fups")),  # MAPPO: one critic for all
        (1, True, dict.fromkeys(SCHEMES, "fups")),
        (3, False, LIKE_THE_POLICY),  # IPPO: one per agent
        (3, True, dict.fromkeys(SCHEMES, "nops") | {"kaleidoscope": "kaleidoscope"}),  # MATD3, and the one that was published with others
    ],
)
def test_critics_follow_the_policy_as_far_as_that_makes_sense(n_slots, ensemble, expected):
    def described(sharing):
        return type(sharing), sharing.n_slots, sharing.agent_id, getattr(sharing, "own", None), getattr(sharing, "variant", None)

    for policy in SCHEMES:
        found = make_critic_sharing(policy, "auto", n_slots, ensemble)
        assert described(found) == described(make_critic_sharing("nops", expected[policy], n_slots, ensemble)), policy
        for requested in SCHEMES:
            if ensemble and n_slots > 1 and requested in ALIKE:  # they see the same, so one set of weights would be one critic
                said = "puts agents together by what they do" if requested == "seps" else "makes all critics one"
                with pytest.raises(UsageError, match=f"critic_sharing {requested} {said}"):
                    make_critic_sharing(policy, requested, n_slots, ensemble)
                continue
            asked = make_critic_sharing(policy, requested, n_slots, ensemble)
            assert described(asked) == described(SCHEMES[requested](n_slots, SharingConfig()))


def test_a_run_that_would_never_learn_is_refused():
    with pytest.raises(UsageError, match=r"warmup \(=10000\) leaves nothing of steps \(=3000\)"):
        TrainConfig(task="toy/reach", algo="matd3", steps=3000)


def test_how_many_critics_an_ensemble_has():
    """Five where they are masks on one network, two where each is a network of its own or runs as one."""
    counts = {policy: make_critic_sharing(policy, "auto", None, True).n_slots for policy in SCHEMES}
    assert counts == dict.fromkeys(SCHEMES, 2) | {"kaleidoscope": 5}
    counts = {scheme: make_critic_sharing("fups", scheme, None, True).n_slots for scheme in SCHEMES if scheme not in ALIKE}
    assert counts == dict.fromkeys(["k24", "k24_random", "kaleidoscope", "snp"], 5) | dict.fromkeys(
        ["hypermarl", "multihead", "fups_bias", "nops"], 2
    )
    assert make_critic_sharing("nops", "kaleidoscope", None, True).n_slots == 5


def test_critics_get_the_settings_of_their_scheme():
    config = SharingConfig(kaleidoscope=KaleidoscopeConfig(div_coef=0.25), masks=K24Config(pattern="1:4"))
    critic = make_critic_sharing("kaleidoscope", "auto", 5, True, config)
    assert isinstance(critic, Kaleidoscope) and critic.config.div_coef == 0.25
    assert make_critic_sharing("fups", "k24", 5, True, config).config.pattern == "1:4"
    assert isinstance(make_critic_sharing("k24", "auto", 1, False, config), Dense)
    with pytest.raises(UsageError, match="unknown sharing scheme 'k25'"):
        make_critic_sharing("k24", "k25", 1, False)


# --- files ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [TrainConfig(), OTHER, *OF_EACH.values(), *map(preset, PRESETS)], ids=["defaults", "other", *OF_EACH, *PRESETS]
)
def test_a_file_holds_the_whole_configuration(tmp_path, config):
    path = tmp_path / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config
    written = yaml.safe_load(path.read_text())
    assert written == to_dict(config)
    assert list(written) == [f.name for f in dataclasses.fields(TrainConfig)]
    assert list(written["masks"]) == [f.name for f in dataclasses.fields(K24Config)]


def test_what_a_file_leaves_out_has_its_default(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("task: toy/matrix\nlearner: {lr: 1}\n")
    assert load_config(path) == TrainConfig(task="toy/matrix", learner=ValueConfig(lr=1.0))


# Written when there were no other learners than those of values.
WRITTEN_BEFORE = """\
task: mpe/simple_spread
algo: vdn
sharing: k24
steps: 1000000
env_args: []
workers: null
learner:
  lr: 0.002
  lr_decay_start: 0.8
  lr_final: 0.1
  gamma: 0.99
  batch_size: 32
  buffer_size: 5000
  env_steps_per_update: 100
  double_q: true
  target_update: 200
  target_tau: 0.0
  n_step: 1
  td_lambda: 0.0
  standardise_rewards: true
  individual_rewards: false
  grad_clip: 10.0
  optimiser: adam
  epsilon_start: 1.0
  epsilon_finish: 0.05
  epsilon_anneal: 50000
  mixer_embed: 32
  hypernet_hidden: 64
masks:
  pattern: '2:4'
  freeze_at: null
"""


def test_files_written_before_still_load(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(WRITTEN_BEFORE)
    assert load_config(path) == TrainConfig(task="mpe/simple_spread", algo="vdn", learner=ValueConfig(lr=0.002))


@pytest.mark.parametrize("text", ["5e-4", "5E-4", "0.0005", "5.0e-4", "+5e-4"])
def test_exponents_are_numbers(tmp_path, text):
    """YAML 1.1 takes 5e-4 for text, because it has no dot."""
    path = tmp_path / "config.yaml"
    path.write_text(f"learner:\n  lr: {text}\n")
    assert load_config(path).learner.lr == 5e-4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "{path} must hold 'name: value' lines, got NoneType"),
        ("- 1\n", "{path} must hold 'name: value' lines, got list"),
        ("just words", "{path} must hold 'name: value' lines, got str"),
        ("a: [", "{path} is no YAML: "),
        ("\x00\x01", "{path} is no YAML: "),
        ("a: 2001-99-99", "{path} is no YAML: month must be in 1..12"),
        ("[" * 5000, "{path} is no YAML: "),
        ("!!python/object/apply:os.mkdir [executed]", "{path} is no YAML: could not determine a constructor"),
        ("stepz: 3", "{path}: unknown setting 'stepz': did you mean 'steps'?"),
        ("masks: {patern: '2:4'}", "{path}: masks: unknown setting 'patern': did you mean 'pattern'?"),
        ("3: 4", "{path}: unknown setting '3': known: "),
        ("steps: many", "{path}: steps is 'many', expected int"),
        ("steps: 3.5", "{path}: steps is 3.5, expected int"),
        ("steps: true", "{path}: steps is True, expected int"),
        ("steps: null", "{path}: steps is None, expected int"),
        ("task: 3", "{path}: task is 3, expected str"),
        ("agent_id: maybe", "{path}: agent_id is 'maybe', expected one of auto, yes, no"),
        ("env_args: n_agents=3", "{path}: env_args is 'n_agents=3', expected a list"),
        ("env_args: [3]", "{path}: env_args is 3, expected str"),
        ("learner: 3", "{path}: learner must hold 'name: value' lines, got int"),
        ("learner: {lr: high}", "{path}: learner: lr is 'high', expected float"),
        ("learner: {double_q: 1}", "{path}: learner: double_q is 1, expected bool"),
        ("learner: {lr: .nan}", "lr (=nan) must be positive"),
        ("masks: {freeze_at: soon}", "{path}: masks: freeze_at is 'soon', expected float"),
        ("algo: qmx", "unknown algorithm 'qmx': did you mean 'qmix'?"),
        ("algo: 3", "{path}: algo is 3, expected str"),
        ("algo: [mappo]", "{path}: algo is ['mappo'], expected str"),
        ("algo: mappo\nlearner: {epsilon_start: 1.0}", "{path}: learner: setting 'epsilon_start' is of iql, vdn, qmix: leave"),
        ("lr: 0.1", "{path}: setting 'lr' belongs in learner or seps: write 'learner: {{lr: …}}'"),
        ("div_coef: 1", "{path}: setting 'div_coef' belongs in masks or kaleidoscope: write 'masks: {{div_coef: …}}'"),
        ("learner: {clip: 0.1}", "{path}: learner: setting 'clip' is of ippo, mappo: leave it out, or change algo"),
        ("learner: {critcs: 2}\nalgo: matd3", "{path}: learner: unknown setting 'critcs': did you mean 'critics'?"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert str(caught.value).startswith(message.format(path=path)) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xfa")
    for name, reason in (("missing", "No such file or directory"), (".", "Is a directory"), ("binary", "it is no text")):
        with pytest.raises(UsageError) as caught:
            load_config(tmp_path / name)
        assert str(caught.value) == f"cannot read the configuration {tmp_path / name}: {reason}"


def test_unknown_preset():
    with pytest.raises(UsageError, match="unknown preset 'epymrl': did you mean 'epymarl'"):
        preset("epymrl")


# --- comparison ----------------------------------------------------------------------------------------------------------------


def test_the_first_difference_has_a_dotted_name_and_both_values():
    a = TrainConfig()
    assert first_difference(a, a) is None
    assert first_difference(a, dataclasses.replace(a, seed=3)) == ("seed", 0, 3)
    assert first_difference(a, dataclasses.replace(a, device="cpu"), ("device",)) is None
    assert first_difference(a, dataclasses.replace(a, masks=K24Config(kappa=2.0))) == ("masks.kappa", 1.0, 2.0)
    assert first_difference(a, TrainConfig(algo="mappo")) == ("algo", "qmix", "mappo")
    assert first_difference(a, TrainConfig(algo="mappo"), ("algo",)) == ("learner", "ValueConfig", "PPOConfig")
    b = dataclasses.replace(a, device="cpu", masks=K24Config(freeze_at=0.5))
    assert first_difference(a, b, ("device",)) == ("masks.freeze_at", None, 0.5)
