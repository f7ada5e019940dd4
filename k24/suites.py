"""Suites of tasks for ``k24 sweep --suite``: what is compared, by which learner, with which settings, and over how many seeds.

A method gets the settings of the task, whichever scheme it is. Baselines have one set of defaults for all tasks; those of k24 were found on
some of these tasks (docs/sweep.md).
"""

from __future__ import annotations

from typing import NamedTuple


class SuiteTask(NamedTuple):
    """A task of a suite.

    Attributes:
        task: ``TASK`` or ``TASK,name=value,…``, as for ``k24 sweep --tasks``.
        algo: Learner.
        settings: Options of ``k24 train``, in one line.
        seeds: How many, from 0.
        note: What it asks of a team.
    """

    task: str
    algo: str
    settings: str
    seeds: int
    note: str


class Suite(NamedTuple):
    """What is compared on which tasks.

    Attributes:
        methods: As for ``k24 sweep --sharing``; compared where none is named.
        tasks: Where.
    """

    methods: tuple[str, ...]
    tasks: tuple[SuiteTask, ...]


_SPECIALISATION = (
    "--steps 10000 --envs 16 --lr 2e-3 --batch-size 32 --buffer-size 256 --env-steps-per-update 4 --target-update 20 "
    "--epsilon-anneal 4000 --log-every 500 --eval-every 500 --eval-episodes 32 --checkpoint-every 10000"
)
# Critics are equally wide whatever the policy: wider ones would be a reason of their own why a wider policy plays better.
_CRITIC = "--critic-hidden 64"
_MAPPO = f"--envs 32 --lr 7e-4 --critic-lr 7e-4 {_CRITIC}"


# Deterministic policies: a speaker that draws its words tells nothing at first, and a listener that has learned to ignore them goes on
# so. By QMIX and MAPPO not even separate networks ever listened. 50 steps, because VMAS's agents hardly get anywhere in 25. Critics of 64
# teach only every other dense network to listen (docs/lab-notes.md).
_SPEAKER = (
    "--steps 500000 --envs 16 --hidden 64 --critic-hidden 128 --batch-size 256 --lr 1e-3 --critic-lr 1e-3 "
    "--eval-every 50000 --eval-episodes 128"
)


# What is learned of it, by QMIX slowly and by MAPPO soon: MAPPO hardly tells learned masks from random ones there, QMIX does.
_BLIND = {"qmix": ("--steps 600000 --env-steps-per-update 200", 3), "mappo": (f"{_MAPPO} --steps 200000", 5)}


def _blind_spread(agents: int, algo: str) -> SuiteTask:
    settings, seeds = _BLIND[algo]
    note = f"{agents} agents of {min(agents, 4)} colours that nobody sees"
    return SuiteTask(f"vmas/blind_spread,n_agents={agents}", algo, settings, seeds, note)


def _specialisation(agents: int) -> SuiteTask:
    note = f"{agents} agents see the same and must act differently"
    return SuiteTask(f"toy/specialisation,n_agents={agents}", "qmix", _SPECIALISATION, 5, note)


# k24 and its control with fixed random masks, each at the width of the others, with half their multiply-adds, and at their multiply-adds
# (nearly all of a recurrent net's sit in H x H matrices, so 64·√2 ≈ 92); the baselines that matter most, kaleidoscope also with thresholds
# that learn as fast as makes it best in the regression, since k24's alphas do; and separate networks, which show whether a task can be
# solved at all.
_COMPARED = (
    *("k24", "k24:hidden=92", "k24_random", "k24_random:hidden=92"),
    *("kaleidoscope", "kaleidoscope:kaleidoscope.threshold_lr_scale=20", "fups_id", "fups_bias", "nops"),
)

# k24 with one thing changed, or what was the default together.
_ABLATED = (
    "k24",
    "k24:gate=sigmoid",
    "k24:gate=sigmoid,temperature_init=5,temperature_min=0.1,anneal_end=0.8",
    "k24:logits=sum,normalise=layer",
    "k24:forward=sample",
    "k24:forward=gumbel",
    "k24:forward=gumbel,temperature_on=all",
    "k24:alpha_lr_scale=1",
    "k24:alpha_lr_scale=20",
    "k24:weight_lr_scale=1",
    "k24:weight_lr_scale=4",
    "k24:ema_every=1",
    "k24:alpha_decay=0",
    "k24:hetero_init_scale=0.01",
    "k24:div_coef=0.1",
    "k24:alpha_decay=0,div_coef=0.1,hetero_init_scale=0.01",
    "k24:reset_interval=200",
    "k24:freeze_at=2",
    "k24:own_masks=feedforward",
    "k24:own_masks=first",
    "k24:own_masks=all",
    "k24:mask_rnn=false",
    "k24_shared",
    "k24_magnitude",
    "k24_random",
)

SUITES: dict[str, Suite] = {
    # Teams whose agents must differ, from games of one step to battles.
    "hetero": Suite(
        _COMPARED,
        (
            *(_specialisation(n) for n in (2, 4, 8)),
            _blind_spread(8, "qmix"),
            _blind_spread(16, "qmix"),
            SuiteTask(
                "mpe/simple_speaker_listener,continuous_actions=true,max_steps=50",
                "matd3",
                _SPEAKER,
                5,
                "one agent sees the goal and speaks, the other one moves",
            ),
            SuiteTask(
                "mpe/simple_spread",
                "mappo",
                f"--preset mappo_mpe --steps 1000000 --lr-decay-start 0.8 {_CRITIC}",
                3,
                "three agents cover three landmarks; roles follow from places",
            ),
            SuiteTask(
                "vmas/navigation,continuous_actions=true",
                "mappo",
                f"{_MAPPO} --steps 500000",
                3,
                "each agent sees its own goal, so nobody needs to be told apart",
            ),
            SuiteTask(
                "smax/smacv2_5_units",
                "qmix",
                "--preset smacv2 --steps 1000000 --envs 32 --final-episodes 2048",
                3,
                "five units of six types, a mask for each type",
            ),
            SuiteTask(
                "vmas/dispersion",
                "mappo",
                f"--envs 64 --lr 7e-4 --critic-lr 7e-4 {_CRITIC} --individual-rewards --steps 1500000",
                3,
                "four agents must go to four pieces of food, one each",
            ),
        ),
    ),
    # Which part of k24 gives what.
    "ablation": Suite(_ABLATED, (_specialisation(8), _blind_spread(4, "mappo"))),
    # Does more agents mean more to gain?
    "agents": Suite(_COMPARED, (*(_specialisation(n) for n in (2, 4, 8, 16)), *(_blind_spread(n, "mappo") for n in (2, 4, 8, 16)))),
}
