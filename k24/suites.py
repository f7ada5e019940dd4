"""Suites of tasks for ``k24 sweep --suite``: what is compared, by which learner, with which settings, and over how many seeds.

A method gets the settings of the task, whichever scheme it is: none is tuned for itself.
"""

from __future__ import annotations

from typing import NamedTuple

# Compared where no method is named: k24 and its control with fixed random masks, each at the width of the others, with half their
# multiply-adds, and at their multiply-adds (nearly all of a recurrent net's sit in H x H matrices, so 64·√2 ≈ 92); the baselines that
# matter most; and separate networks, which show whether a task can be solved at all.
METHODS = ("k24", "k24:hidden=92", "k24_random", "k24_random:hidden=92", "kaleidoscope", "fups_id", "fups_bias", "nops")


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


_SPECIALISATION = (
    "--steps 10000 --envs 16 --lr 2e-3 --batch-size 32 --buffer-size 256 --env-steps-per-update 4 --target-update 20 "
    "--epsilon-anneal 4000 --log-every 500 --eval-every 500 --eval-episodes 32 --checkpoint-every 10000"
)
_MAPPO = "--envs 32 --lr 7e-4 --critic-lr 7e-4"

SUITES: dict[str, tuple[SuiteTask, ...]] = {
    # Teams whose agents must differ, from games of one step to battles.
    "hetero": (
        SuiteTask("toy/specialisation,n_agents=2", "qmix", _SPECIALISATION, 5, "two agents see the same and must act differently"),
        SuiteTask("toy/specialisation,n_agents=4", "qmix", _SPECIALISATION, 5, "the same for four"),
        SuiteTask("toy/specialisation,n_agents=8", "qmix", _SPECIALISATION, 5, "the same for eight"),
        SuiteTask("vmas/blind_spread,n_agents=8", "mappo", f"{_MAPPO} --steps 400000", 3, "eight agents of four colours that nobody sees"),
        SuiteTask("vmas/blind_spread,n_agents=16", "mappo", f"{_MAPPO} --steps 400000", 3, "sixteen agents of the same four colours"),
        SuiteTask(
            "mpe/simple_speaker_listener",
            "qmix",
            "--steps 500000 --env-steps-per-update 100",
            3,
            "one agent sees the goal and speaks, the other one moves",
        ),
        SuiteTask(
            "mpe/simple_spread",
            "mappo",
            "--preset mappo_mpe --steps 1000000 --lr-decay-start 0.8",
            3,
            "three agents cover three landmarks; roles follow from places",
        ),
        SuiteTask(
            "vmas/navigation,continuous_actions=true",
            "mappo",
            f"{_MAPPO} --steps 1000000",
            3,
            "each agent sees its own goal, so nobody needs to be told apart",
        ),
        SuiteTask(
            "smax/smacv2_5_units",
            "qmix",
            "--preset smacv2 --steps 1000000 --envs 32",
            3,
            "five units of six types, a mask for each type",
        ),
        SuiteTask(
            "vmas/dispersion",
            "mappo",
            "--envs 64 --lr 7e-4 --critic-lr 7e-4 --individual-rewards --steps 1500000",
            3,
            "four agents must go to four pieces of food, one each",
        ),
    ),
}
