"""Suites ``lbf`` and ``rware``: level-based foraging, and the robotic warehouse (Papoudakis et al., NeurIPS 2021).

``lbf/8x8-2p-2f-coop`` is a field of 8 times 8 with two players and two foods that take both to lift; ``2s-`` in front limits their sight to
two cells. ``rware/tiny-2ag`` has two robots in a tiny warehouse; ``-easy`` asks for more shelves at a time, ``-hard`` for fewer. The names
are those of the packages, without what never changes, and sizes beyond those that they register work too.

Both packages report their own time limit as an end of the task, and a learner that believes them takes what follows for worthless. Here
their clocks are off: k24 counts the steps, and its limit is a cut. What is left ends a task indeed: the last food eaten, or
``max_inactivity_steps`` without a delivery.

Returns and observations:
    The return, the sum over agents, is the published one: in foraging 1 when all food is eaten (shares go by the players' levels), in the
    warehouse the number of shelves delivered. A ``reward_type="global"`` that pays each robot for every delivery is split evenly, to the
    same sum. Observations are the packages' own vectors, and the state is all of them side by side.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from k24.envs.base import EnvSpec, Outcome, SingleEnv, View
from k24.envs.options import build, require_options
from k24.envs.picture import Mark, draw
from k24.errors import UsageError, unknown_name

TASKS = {
    "lbf/8x8-2p-2f-coop": "two foragers lift each of two foods together",
    "lbf/2s-8x8-2p-2f-coop": "the same, seeing two cells far",
    "lbf/10x10-3p-3f": "three foragers, three foods, some too heavy for one",
    "lbf/2s-10x10-3p-3f": "the same, seeing two cells far",
    "lbf/15x15-3p-5f": "three foragers, five foods on a large field",
    "lbf/15x15-4p-3f": "four foragers, three foods on a large field",
    "lbf/15x15-4p-5f": "four foragers, five foods on a large field",
    "lbf/4s-11x11-3p-2f": "three foragers, two foods, seeing four cells far",
    "lbf/7s-20x20-5p-3f": "five foragers, three foods on a very large field, seeing seven cells far",
    "rware/tiny-2ag": "two robots fetch shelves in a tiny warehouse",
    "rware/tiny-4ag": "four robots in a tiny warehouse",
    "rware/small-4ag": "four robots in a small warehouse",
    "rware/tiny-2ag-hard": "two robots, one shelf wanted at a time",
    "rware/tiny-4ag-hard": "four robots, two shelves wanted at a time",
    "rware/small-4ag-hard": "four robots in a small warehouse, two shelves wanted at a time",
    "rware/tiny-2ag-easy": "two robots, four shelves wanted at a time",
    "rware/medium-6ag": "six robots in a medium warehouse",
}

_FIELD = re.compile(
    r"lbf/(?:(?P<sight>[1-9]\d?)s-)?(?P<side>[1-9]\d?)x(?P=side)-(?P<players>[1-9]\d?)p-(?P<foods>[1-9]\d?)f(?P<coop>-coop)?"
)
_WAREHOUSE = re.compile(r"rware/(?P<size>tiny|small|medium|large)-(?P<agents>[1-9]\d?)ag(?P<level>-easy|-hard)?")

_SHELVES = {"tiny": (1, 3), "small": (2, 3), "medium": (2, 5), "large": (3, 5)}
_WANTED = {None: 1, "-easy": 2, "-hard": 0.5}


class TupleTeam(SingleEnv):
    """A gymnasium environment whose observations, actions and rewards come as one for each agent.

    Attributes:
        env: The gymnasium environment.
    """

    def __init__(self, env: Any, max_steps: int, share: float, marks: Callable[[Any], list[Mark]]) -> None:
        """Looks at the spaces.

        Args:
            env: The environment, without wrappers: gymnasium's look at each step for what k24 looks for too.
            max_steps: Episode limit.
            share: What rewards are multiplied with.
            marks: Says what there is to draw in it.
        """
        self.env, self._share, self._marks = env, share, marks
        sizes = [math.prod(space.shape) for space in env.observation_space]
        counts = [int(space.n) for space in env.action_space]
        self.spec = EnvSpec(len(sizes), max(sizes), sum(sizes), max(counts), max_steps)

    def reset(self, seed: int) -> View:
        """See ``SingleEnv.reset``."""
        for player in getattr(self.env, "players", ()):
            # Else players start where the last ones of the episode before did not end: the same seed would give other episodes.
            player.position = None
        seen, _ = self.env.reset(seed=seed)
        return View([one.reshape(-1) for one in seen])

    def step(self, actions: np.ndarray) -> Outcome:
        """See ``SingleEnv.step``."""
        seen, rewards, terminated, truncated, _ = self.env.step(actions.tolist())
        return Outcome(View([one.reshape(-1) for one in seen]), [reward * self._share for reward in rewards], bool(terminated), truncated)

    def render(self) -> np.ndarray:
        """The grid from above, uint8 ``[320, 320, 3]``; the packages' own viewers need a display."""
        return draw(self._marks(self.env)).numpy()


def accepts(task: str) -> bool:
    """Whether a task is named like those of the table; rooms that are too small for what they hold show when they are made."""
    return _FIELD.fullmatch(task) is not None or _WAREHOUSE.fullmatch(task) is not None


def make_one(task: str, **kwargs: Any) -> TupleTeam:
    """Makes one field or one warehouse.

    Args:
        task: A key of ``TASKS``, or a name like those.
        **kwargs: ``max_steps``, the episode limit (50 steps in a field, 500 in a warehouse), and options of the package, e.g. ``penalty``
            or ``sensor_range``. ``reward_type`` is ``individual``, ``two_stage`` or ``global``, ``observation_type`` ``flattened``
            or ``image``.

    Raises:
        UsageError: An option that the package doesn't know, or a room too small for what it should hold.
    """
    field = _FIELD.fullmatch(task)
    return _field(task, field, **kwargs) if field else _warehouse(task, **kwargs)


def _field(task: str, name: re.Match[str], max_steps: int = 50, **kwargs: Any) -> TupleTeam:
    """Level-based foraging."""
    from lbforaging.foraging import ForagingEnv

    side = int(name["side"])
    fixed = {
        "players": int(name["players"]),
        "max_num_food": int(name["foods"]),
        "field_size": (side, side),
        "force_coop": name["coop"] is not None,
        "max_episode_steps": math.inf,
        "grid_observation": False,
    }
    require_options(task, kwargs, _free(ForagingEnv, fixed))
    usual = {"min_player_level": 1, "max_player_level": 2, "min_food_level": 1, "max_food_level": None, "sight": int(name["sight"] or side)}
    return TupleTeam(_begun(task, ForagingEnv, {**usual, **fixed}, kwargs), max_steps, 1.0, _field_marks)


def _warehouse(task: str, max_steps: int = 500, **kwargs: Any) -> TupleTeam:
    """The robotic warehouse."""
    from rware.warehouse import ObservationType, RewardType, Warehouse

    name = _WAREHOUSE.fullmatch(task)
    assert name is not None, "accepts() was asked first"
    n_agents = int(name["agents"])
    rows, columns = _SHELVES[name["size"]]
    fixed = {
        "n_agents": n_agents,
        "shelf_rows": rows,
        "shelf_columns": columns,
        "max_steps": None,
        "msg_bits": 0,
    }
    require_options(task, kwargs, _free(Warehouse, fixed) - {"image_observation_layers"})
    for option, kind, known in (
        ("reward_type", RewardType, {"individual", "two_stage", "global"}),
        ("observation_type", ObservationType, {"flattened", "image"}),
    ):
        if option in kwargs:
            if kwargs[option] not in known:
                raise unknown_name(f"{option} of {task}", str(kwargs[option]), known)
            kwargs[option] = kind[kwargs[option].upper()]
    usual = {
        "column_height": 8,
        "sensor_range": 1,
        "request_queue_size": int(n_agents * _WANTED[name["level"]]),
        "max_inactivity_steps": None,
        "reward_type": RewardType.INDIVIDUAL,
    }
    env = _begun(task, Warehouse, {**usual, **fixed}, kwargs)
    if not env.request_queue:
        raise UsageError(f"{task}: no shelf is ever wanted there, so nothing can be earned; set request_queue_size to at least 1")
    return TupleTeam(env, max_steps, 1 / n_agents if env.reward_type is RewardType.GLOBAL else 1.0, _warehouse_marks)


def _free(constructor: Callable[..., Any], fixed: dict[str, Any]) -> set[str]:
    """The parameters that are left to the user."""
    return set(inspect.signature(constructor).parameters) - set(fixed) - {"render_mode"}


def _begun(task: str, constructor: Callable[..., Any], usual: dict[str, Any], given: dict[str, Any]) -> Any:
    """An environment that began an episode, for only then does too small a room show."""
    env = build(task, constructor, given, **usual)
    try:
        env.reset(seed=0)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{task} has no room for all that it should hold: make it larger, or ask for less ({error})") from error
    return env


def _placed(row: float, column: float, size: tuple[int, int]) -> tuple[float, float]:
    """Where the middle of a cell is drawn."""
    scale = 2.4 / max(size)
    return (column + 0.5 - size[1] / 2) * scale, (size[0] / 2 - row - 0.5) * scale


def _field_marks(env: Any) -> list[Mark]:
    """Foods (green) and players (blue), the larger the higher their level."""
    size = env.field.shape
    cell = 1.2 / max(size)
    most = max(env.field.max(), 1)
    foods = [
        Mark(_placed(row, column, size), (cell * (0.3 + 0.4 * env.field[row, column] / most),) * 2, (0.4, 0.7, 0.3), round=False)
        for row, column in zip(*env.field.nonzero(), strict=True)
    ]
    strongest = max(player.level for player in env.players)
    return foods + [
        Mark(
            _placed(player.position[0], player.position[1], size),
            (cell * (0.3 + 0.5 * player.level / strongest),) * 2,
            (0.2, 0.4, 0.8),
            outline=True,
        )
        for player in env.players
    ]


def _warehouse_marks(env: Any) -> list[Mark]:
    """Goals (black), shelves (grey, green where wanted) and robots (orange, red with a shelf), each with a dot where it looks to."""
    size = env.grid_size
    cell = 1.2 / max(size)
    marks = [Mark(_placed(row, column, size), (cell, cell), (0.2, 0.2, 0.2), round=False) for column, row in env.goals]
    for shelf in env.shelfs:
        colour = (0.4, 0.7, 0.3) if shelf in env.request_queue else (0.75, 0.75, 0.75)
        marks.append(Mark(_placed(shelf.y, shelf.x, size), (cell * 0.8, cell * 0.8), colour, round=False))
    for robot in env.agents:
        colour = (0.9, 0.2, 0.2) if robot.carrying_shelf else (1.0, 0.6, 0.1)
        marks.append(Mark(_placed(robot.y, robot.x, size), (cell * 0.6, cell * 0.6), colour, outline=True))
        right, down = {"UP": (0, -1), "DOWN": (0, 1), "LEFT": (-1, 0), "RIGHT": (1, 0)}[robot.dir.name]
        nose = _placed(robot.y + 0.4 * down, robot.x + 0.4 * right, size)
        marks.append(Mark(nose, (cell * 0.2, cell * 0.2), (0.1, 0.1, 0.1)))
    return marks
