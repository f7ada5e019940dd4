"""Suites ``smacv2`` and ``smac``: battles in StarCraft II, by the packages of those names.

SMACv2 (Ellis et al., NeurIPS 2023) draws the units of both teams and where they start anew for every episode; SMAC (Samvelyan et al.,
2019) has fixed maps. Both need the game, which Blizzard offers for Linux under a licence of its own, and neither package is on PyPI
(the ``smac`` there is something else); ``missing`` says what to install. By its authors' word SMACv2 can't play SMAC's maps, so SMAC does.

No real game was run with this adapter. Sizes, the order of features and the ends of episodes follow the packages' documentation and
source, and are tested against a stand-in.

Returns and ends
    The package pays one reward to the whole team, at most about 20 in an episode. Each agent gets its share, so that the sum over
    agents is the return that is published. The package scales by the health of the enemies in a game's first battle, which in SMACv2
    are drawn: returns of different copies differ in scale, win rates don't. A battle that reaches the time limit is truncated, not won.
Seeds
    An episode's seed decides units and places, and everything else that the package draws. The game takes a seed only when it is
    started, with the first episode, and goes on from there, so battles are not repeatable bit for bit.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from k24.envs.base import EnvSpec, Outcome, SingleEnv, View
from k24.envs.options import build, require_options
from k24.errors import UsageError

# Unit types and how often each is drawn; who can't make up a whole team, for it could not fight or would be gone at once.
_RACES: dict[str, tuple[dict[str, float], list[str]]] = {
    "terran": ({"marine": 0.45, "marauder": 0.45, "medivac": 0.1}, ["medivac"]),
    "protoss": ({"stalker": 0.45, "zealot": 0.45, "colossus": 0.1}, []),
    "zerg": ({"zergling": 0.45, "baneling": 0.1, "hydralisk": 0.45}, ["baneling"]),
}
_SIZES = ((5, 5), (10, 10), (10, 11), (20, 20), (20, 23))
_MAPS = {
    "2c_vs_64zg": "2 colossi against 64 zerglings",
    "2m_vs_1z": "2 marines against a zealot",
    "2s3z": "2 stalkers and 3 zealots on each side",
    "2s_vs_1sc": "2 stalkers against a spine crawler",
    "3m": "3 marines on each side",
    "3s5z": "3 stalkers and 5 zealots on each side",
    "3s5z_vs_3s6z": "3 stalkers and 5 zealots against 3 and 6",
    "3s_vs_3z": "3 stalkers against 3 zealots",
    "3s_vs_4z": "3 stalkers against 4 zealots",
    "3s_vs_5z": "3 stalkers against 5 zealots",
    "1c3s5z": "a colossus, 3 stalkers and 5 zealots on each side",
    "5m_vs_6m": "5 marines against 6",
    "6h_vs_8z": "6 hydralisks against 8 zealots",
    "8m": "8 marines on each side",
    "8m_vs_9m": "8 marines against 9",
    "10m_vs_11m": "10 marines against 11",
    "25m": "25 marines on each side",
    "27m_vs_30m": "27 marines against 30",
    "MMM": "a medivac, 2 marauders and 7 marines on each side",
    "MMM2": "a medivac, 2 marauders and 7 marines against 1, 3 and 8",
    "bane_vs_bane": "20 zerglings and 4 banelings on each side",
    "corridor": "6 zealots against 24 zerglings",
    "so_many_baneling": "7 zealots against 32 banelings",
}

TASKS = {
    **{f"smacv2/{race}_{n}_vs_{m}": f"{n} random {race} units against {m}" for race in _RACES for n, m in _SIZES},
    **{f"smac/{name}": about for name, about in _MAPS.items()},
}

_DRAWN = re.compile(rf"smacv2/({'|'.join(_RACES)})_([1-9]\d?)_vs_([1-9]\d?)")
# What the configurations published with SMACv2 set to other values than the package does.
_PUBLISHED = {"use_unit_ranges": True, "obs_own_pos": True}
_FIXED = {"map_name", "capability_config", "seed", "continuing_episode"}
# SMACv2's constructor fails with the first, and the second leaves nothing to see; SMAC gets the size of the third wrong.
_BROKEN = {"smacv2": {"obs_instead_of_state", "obs_starcraft"}, "smac": {"obs_timestep_number"}}
_DIFFICULTIES = "123456789A"

_GAME = (
    "unpack StarCraft II 4.10 for Linux, https://blzdistsc2-a.akamaihd.net/Linux/SC2.4.10.zip (its password accepts a licence: see "
    "https://github.com/Blizzard/s2client-proto#downloads), and set SC2PATH to its folder"
)
_ARCHIVES = {
    "smacv2": ("https://github.com/oxwhirl/smacv2/releases/download/maps/SMAC_Maps.zip", "Maps/SMAC_Maps"),
    "smac": ("https://github.com/oxwhirl/smac/releases/download/v0.1-beta1/SMAC_Maps.zip", "Maps"),
}

_log = logging.getLogger("k24")


class Battle(SingleEnv):
    """One game of StarCraft II, a process of its own, and battle after battle in it."""

    def __init__(self, make: Callable[[int | None], Any]) -> None:
        """Starts no game yet: the first ``reset`` does.

        Args:
            make: Makes the package's environment, given the seed of the game.
        """
        self._make = make
        self._globals = _Globals()
        with self._globals:
            self._game = make(None)
        info = self._game.get_env_info()
        # Own features come last but for the time step, and in them the unit type.
        stop = info["obs_shape"] - bool(self._game.obs_timestep_number)
        bits = self._game.unit_type_bits
        self.spec = EnvSpec(
            n_agents=info["n_agents"],
            obs_dim=info["obs_shape"],
            state_dim=info["state_shape"],
            n_actions=info["n_actions"],
            episode_limit=info["episode_limit"],
            unit_types=(stop - bits, stop) if bits else None,
        )
        # Whether a battle of this game came to its end: before, the package starts another game for the next one.
        self._lasting = False

    def reset(self, seed: int) -> View:
        """See ``SingleEnv.reset``; see above for what the seed can't decide."""
        self._globals.seed(seed)
        with self._globals:
            if not self._lasting:
                self._renew(seed)
            try:
                self._begin(seed)
            except Exception as error:
                # Of pysc2, its web socket, or the package when units don't appear: a game that hangs. A fresh one may do.
                _log.warning("StarCraft II did not begin a battle (%s: %s); it is started again", type(error).__name__, error)
                self._renew(seed)
                self._begin(seed)
            self._view = self._look()
        return self._view

    def step(self, actions: np.ndarray) -> Outcome:
        """See ``SingleEnv.step``. Where the game breaks down, the episode is cut off at what was seen last."""
        n_agents = self.spec.n_agents
        with self._globals:
            reward, ended, info = self._game.step(actions.tolist())
            if "battle_won" not in info:  # the package's only sign of it
                _log.warning("StarCraft II broke down in a battle; it is started again")
                self._lasting = False
                return Outcome(self._view, np.zeros(n_agents, np.float32), terminated=False, truncated=True, won=False)
            self._view = self._look()
        self._lasting |= ended
        timeout = bool(info.get("episode_limit", False))
        return Outcome(
            self._view,
            np.full(n_agents, reward / n_agents, np.float32),
            terminated=ended and not timeout,
            truncated=ended and timeout,
            won=ended and bool(info["battle_won"]),
        )

    def close(self) -> None:
        """See ``SingleEnv.close``."""
        self._lasting = False
        self._game.close()

    def _renew(self, seed: int) -> None:
        """Ends the game, if one runs; the next battle starts another."""
        self._lasting = False
        self._game.close()
        self._game = self._make(seed)

    def _begin(self, seed: int) -> None:
        """Starts a battle. What is drawn for it has generators of its own, which the package lets nobody seed."""
        for index, (owner, name) in enumerate(_generators(self._game)):
            setattr(owner, name, np.random.default_rng([seed, index]))
        self._game.reset()

    def _look(self) -> View:
        """What the team sees."""
        avail = np.array(self._game.get_avail_actions(), dtype=bool)
        alive = ~avail[:, 0]  # doing nothing is for the dead, and all that they can do
        obs = np.array(self._game.get_obs(), dtype=np.float32)
        obs[~alive] = 0
        return View(obs, np.asarray(self._game.get_state(), dtype=np.float32), avail, alive)


def accepts(task: str) -> bool:
    """Whether a task is in the table, or one of SMACv2's with teams of other sizes."""
    return task in TASKS or _DRAWN.fullmatch(task) is not None


def missing(suite: str = "smacv2") -> str | None:
    """Says what a machine lacks for a suite, as steps to take, on one line; None where nothing. Imports and starts nothing."""
    return _lacking(suite, "32x32_flat" if suite == "smacv2" else "3m")


def make_one(task: str, max_steps: int | None = None, **kwargs: object) -> Battle:
    """Makes one task.

    Args:
        task: ``smacv2/<race>_<n>_vs_<m>``, or ``smac/<map>``.
        max_steps: Episode limit; where None the map's own, which is 200 in SMACv2.
        **kwargs: Options of the package's ``StarCraft2Env``, e.g. ``difficulty`` or ``conic_fov``. By default those of the configurations
            published with SMACv2, for SMAC the package's own.

    Raises:
        UsageError: Something is not installed, or an option is unknown.
    """
    suite, _, name = task.partition("/")
    drawn = _DRAWN.fullmatch(task)
    lacking = _lacking(suite, "32x32_flat" if drawn else name)
    if lacking is not None:
        raise UsageError(f"{task} can't run here: {lacking}")
    plain = _load(task, f"{suite}.env").StarCraft2Env
    require_options(task, kwargs, inspect.signature(plain).parameters.keys() - _FIXED - _BROKEN[suite])
    if "difficulty" in kwargs:
        kwargs["difficulty"] = str(kwargs["difficulty"])
        if kwargs["difficulty"] not in tuple(_DIFFICULTIES):
            raise UsageError(f"{task}: difficulty must be one of {', '.join(_DIFFICULTIES)}, got {kwargs['difficulty']!r}")
    constructor = _load(task, "smacv2.env.starcraft2.wrapper").StarCraftCapabilityEnvWrapper if drawn else plain

    def make(seed: int | None) -> Any:
        # Only with continuing_episode does the package say which episodes it cut; it changes nothing else.
        fixed: dict[str, Any] = {"map_name": name, "seed": seed, "continuing_episode": True}
        if drawn:
            race, n_units, n_enemies = drawn.groups()
            published = {option: value for option, value in _PUBLISHED.items() if option not in kwargs}
            config = _capabilities(race, int(n_units), int(n_enemies))
            fixed |= {"map_name": f"10gen_{race}", "capability_config": config, **published}
        game = build(task, constructor, kwargs, **fixed)
        if max_steps is not None:
            getattr(game, "env", game).episode_limit = max_steps
        return game

    return Battle(make)


def _capabilities(race: str, n_units: int, n_enemies: int) -> dict[str, Any]:
    """What SMACv2 draws for every battle. Made anew for each game: the package writes into it."""
    units, never_alone = _RACES[race]
    teams = {"dist_type": "weighted_teams", "unit_types": list(units), "weights": list(units.values()), "observe": True}
    if never_alone:
        teams["exception_unit_types"] = list(never_alone)
    places = {"dist_type": "surrounded_and_reflect", "p": 0.5, "map_x": 32, "map_y": 32}
    return {"n_units": n_units, "n_enemies": n_enemies, "team_gen": teams, "start_positions": places}


def _lacking(package: str, battle_map: str) -> str | None:
    """Steps to take before a map can be played; None where nothing lacks."""
    steps = []
    if not _installed(package):
        # The game's messages need an old protobuf, and TensorBoard a new one from 2.21 on.
        steps.append(f'pip install "git+https://github.com/oxwhirl/{package}.git" "protobuf<3.21" "tensorboard<2.21"')
    elif _new_protobuf() and os.environ.get("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION") != "python":
        steps.append(
            f"set PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python, for protobuf {importlib.metadata.version('protobuf')} refuses the game's "
            'messages otherwise, or pip install "protobuf<3.21" "tensorboard<2.21"'
        )
    # Where pysc2 looks on Linux.
    folder = Path(os.environ.get("SC2PATH") or "~/StarCraftII").expanduser()
    there = (folder / "Versions").is_dir()
    if not there:
        steps.append(f"{_GAME} (there is none in {folder})")
    if not (folder / "Maps" / "SMAC_Maps" / f"{battle_map}.SC2Map").is_file():
        archive, into = _ARCHIVES[package]
        steps.append(f"unpack {archive} in {folder if there else '$SC2PATH'}/{into} (there is no SMAC_Maps/{battle_map}.SC2Map)")
    return "; ".join(steps) or None


def _installed(package: str) -> bool:
    """Whether a package is there, and is the one meant: PyPI's ``smac`` has no environments."""
    found = importlib.util.find_spec(package)
    places = found.submodule_search_locations if found is not None else None
    return any((Path(place) / "env" / "starcraft2").is_dir() for place in places or ())


def _new_protobuf() -> bool:
    """Whether protobuf is of those that load the game's messages, made by an old one, in pure Python only."""
    try:
        major, minor = importlib.metadata.version("protobuf").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (3, 21)


def _load(task: str, path: str) -> Any:
    """Imports a module of the package."""
    try:
        with warnings.catch_warnings():
            # pysc2 and the game's messages are written for older versions of Python and protobuf, which say so.
            warnings.simplefilter("ignore")
            return importlib.import_module(path)
    except Exception as error:
        # Some of what can be wrong with protobuf is a TypeError, on many lines.
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{task}: tried to import {path!r}, and got {what}") from error


def _generators(game: Any) -> Iterator[tuple[Any, str]]:
    """The owner and the name of each generator by which SMACv2 draws what a battle begins with."""

    def within(distribution: Any) -> Iterator[tuple[Any, str]]:
        for name, value in list(vars(distribution).items()):
            if isinstance(value, np.random.Generator):
                yield distribution, name
            elif hasattr(value, "generate"):  # a distribution made of others
                yield from within(value)

    for distribution in getattr(game, "env_key_to_distribution_map", {}).values():
        yield from within(distribution)


class _Globals:
    """Python's and numpy's global generators as one game has them: the packages draw from them, and share them with nobody else."""

    def __init__(self) -> None:
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Starts the game's anew; not to be called within."""
        self._own = random.Random(seed).getstate(), np.random.RandomState(seed).get_state()

    def __enter__(self) -> None:
        self._others = random.getstate(), np.random.get_state()
        self._put(self._own)

    def __exit__(self, *_: object) -> None:
        self._own = random.getstate(), np.random.get_state()
        self._put(self._others)

    @staticmethod
    def _put(states: tuple[Any, Any]) -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
