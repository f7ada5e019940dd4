"""A stand-in for the packages ``smacv2`` and ``smac``: their documented interface, and battles of a few lines.

Units stand on a line and shoot at whoever is nearest. Sizes and the order of features are those that the packages document, and it draws
from where they draw: the generators of the distributions, and Python's and numpy's global ones. Like them it starts a game with the
first battle, and again until one came to its end.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

UNITS = {
    "terran": ("marine", "marauder", "medivac"),
    "protoss": ("stalker", "zealot", "colossus"),
    "zerg": ("zergling", "hydralisk", "baneling"),
}
MAPS = {
    **{f"10gen_{race}": {"race": race, "n": 10, "m": 10, "limit": 200, "bits": 3} for race in UNITS},
    "3m": {"race": "terran", "n": 3, "m": 3, "limit": 60, "bits": 0},
    "2s3z": {"race": "protoss", "n": 5, "m": 5, "limit": 120, "bits": 2},
}


class StarCraft2Env:
    """One team against the game's own.

    Attributes:
        made: All of them, in order, with the arguments they got.
        running: How many games run.
        strength: Damage of an enemy's shot; 0 makes battles that only the clock ends.
        break_at: The step of a battle at which the game breaks down; None for never.
        stuck: How many of the next battles don't begin.
    """

    made: ClassVar[list[StarCraft2Env]] = []
    running: ClassVar[int] = 0
    strength: ClassVar[float] = 0.1
    break_at: ClassVar[int | None] = None
    stuck: ClassVar[int] = 0

    def __init__(
        self,
        map_name: str = "8m",
        difficulty: str = "7",
        seed: int | None = None,
        continuing_episode: bool = False,
        obs_instead_of_state: bool = False,
        obs_timestep_number: bool = False,
        obs_own_pos: bool = False,
        obs_starcraft: bool = True,
        conic_fov: bool = False,
        num_fov_actions: int = 12,
        reward_win: float = 200,
        use_unit_ranges: bool = False,
        capability_config: dict[str, Any] | None = None,
    ) -> None:
        self.given = dict(vars(), self=None)
        self.capability_config = capability_config or {}
        self.map = MAPS[map_name]
        team = self.capability_config.get("team_gen", {"n_units": self.map["n"], "n_enemies": self.map["m"]})
        self.n_agents, self.n_enemies = team["n_units"], team["n_enemies"]
        self.episode_limit = self.map["limit"]
        self.unit_type_bits = self.map["bits"]
        self.shields = self.map["race"] == "protoss"
        self.obs_timestep_number, self.obs_own_pos, self.continuing_episode = obs_timestep_number, obs_own_pos, continuing_episode
        self.conic_fov, self.fov = conic_fov, num_fov_actions if conic_fov else 0
        self.reward_win = reward_win
        self.n_actions = 6 + self.fov + self.n_enemies
        self.open = False
        self.battles = 0
        self.made.append(self)

    def get_env_info(self) -> dict[str, int]:
        seen = 5 + self.shields + self.unit_type_bits
        self.own = 1 + self.shields + 2 * self.obs_own_pos + 2 * self.conic_fov + self.unit_type_bits
        return {
            "n_agents": self.n_agents,
            "n_actions": self.n_actions,
            "obs_shape": 4 + (self.n_enemies + self.n_agents - 1) * seen + self.own + self.obs_timestep_number,
            "state_shape": self.n_agents * (4 + self.shields + 2 * self.conic_fov + self.unit_type_bits + self.n_actions)
            + self.n_enemies * (3 + self.shields + self.unit_type_bits),
            "episode_limit": self.episode_limit,
        }

    def reset(self, episode: dict[str, Any] | None = None) -> tuple[list[np.ndarray], np.ndarray]:
        cls = StarCraft2Env
        if self.battles == 0:
            assert not self.open, "a second game is started beside the first"
            self.open = True
            cls.running += 1
        if cls.stuck:
            cls.stuck -= 1
            raise RuntimeError("units don't appear")
        episode = episode or {}
        names = UNITS[self.map["race"]]
        team = episode.get("team_gen", {}).get("ally_team") or [names[i % max(1, self.unit_type_bits)] for i in range(self.n_agents)]
        places = episode.get("ally_start_positions", {}).get("item")
        self.types = [names.index(name) for name in team]
        self.at = np.linspace(0, 1, self.n_agents) if places is None else places[:, 0] / 32
        self.health = np.ones(self.n_agents)
        self.enemies = np.ones(self.n_enemies)
        self.last_action = np.zeros((self.n_agents, self.n_actions))
        self.clock = 0
        return self.get_obs(), self.get_state()

    def get_obs(self) -> list[np.ndarray]:
        random.shuffle(order := list(range(self.n_agents)))  # as the package does, and to no effect
        return [self.get_obs_agent(agent) for agent in range(len(order))]

    def get_obs_agent(self, agent: int) -> np.ndarray:
        info = self.get_env_info()
        obs = np.zeros(info["obs_shape"])
        if self.obs_timestep_number:
            obs[-1] = (self.clock + 1) / self.episode_limit  # for the dead, too
        if self.health[agent] > 0:
            own = obs[info["obs_shape"] - self.obs_timestep_number - self.own :]
            obs[:4] = self.get_avail_agent_actions(agent)[2:6]
            obs[4 : 4 + self.n_enemies] = self.enemies
            own[0] = self.health[agent]
            if self.obs_own_pos:
                own[1 + self.shields] = self.at[agent]
            if self.unit_type_bits:
                own[self.own - self.unit_type_bits + self.types[agent]] = 1
        return obs

    def get_state(self) -> np.ndarray:
        state = np.zeros(self.get_env_info()["state_shape"], np.float32)
        known = np.concatenate([self.health, self.at, self.enemies, self.last_action.reshape(-1)])
        state[: len(known)] = known
        return state

    def get_avail_agent_actions(self, agent: int) -> list[int]:
        if self.health[agent] <= 0:
            return [1] + [0] * (self.n_actions - 1)
        return [0] + [1] * (5 + self.fov) + [int(health > 0) for health in self.enemies]

    def get_avail_actions(self) -> list[list[int]]:
        return [self.get_avail_agent_actions(agent) for agent in range(self.n_agents)]

    def step(self, actions: list[int]) -> tuple[float, bool, dict[str, Any]]:
        for agent, action in enumerate(actions):
            assert self.get_avail_agent_actions(agent)[action], f"Agent {agent} cannot perform action {action}"
        if self.clock + 1 == self.break_at:
            return 0, True, {}
        self.clock += 1
        self.last_action = np.eye(self.n_actions)[actions]
        before = self.enemies.sum()
        for action in actions:
            if action >= 6 + self.fov:
                self.enemies[action - 6 - self.fov] -= 0.2 + 0.1 * np.random.rand()
        self.enemies = self.enemies.clip(0)
        if self.strength:
            for _ in range(int((self.enemies > 0).sum())):
                self.health[random.choice(range(self.n_agents))] -= self.strength
            self.health = self.health.clip(0)
        reward = 10 * float(before - self.enemies.sum())
        won, lost = not self.enemies.any(), not self.health.any()
        info: dict[str, Any] = {
            "battle_won": won and not lost,
            "dead_allies": int((self.health <= 0).sum()),
            "dead_enemies": int((self.enemies <= 0).sum()),
        }
        ended = won or lost
        if info["battle_won"]:
            reward += self.reward_win
        if not ended and self.clock >= self.episode_limit:
            ended = True
            if self.continuing_episode:
                info["episode_limit"] = True
        self.battles += ended
        return reward / (10 * self.n_enemies + self.reward_win) * 20, ended, info

    def close(self) -> None:
        StarCraft2Env.running -= self.open
        self.open = False


class _Teams:
    """Draws unit types."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.rng = np.random.default_rng()

    def generate(self) -> dict[str, Any]:
        config = self.config
        team: list[str] = []
        while not team or set(team) <= set(config.get("exception_unit_types", ())):
            team = list(self.rng.choice(config["unit_types"], size=config["n_units"], p=config["weights"]))
            random.shuffle(team)
        return {"team_gen": {"ally_team": team, "id": 0}}


class _Reflected:
    """Draws places on one half of the map."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.rng = np.random.default_rng()

    def generate(self) -> dict[str, Any]:
        return {"ally_start_positions": {"item": self.rng.uniform(0, self.config["map_x"] / 2, (self.config["n_units"], 2)), "id": 0}}


class _Places:
    """Draws whether the team is surrounded, a distribution made of another."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.reflected = _Reflected(config)
        self.rng = np.random.default_rng()

    def generate(self) -> dict[str, Any]:
        if self.rng.random() < self.config["p"]:
            return self.reflected.generate()
        middle = np.full((self.config["n_units"], 2), self.config["map_x"] / 2)
        return {"ally_start_positions": {"item": middle, "id": 0}}


class StarCraftCapabilityEnvWrapper:
    """Draws what a battle begins with."""

    def __init__(self, **kwargs: Any) -> None:
        config = kwargs["capability_config"]
        kinds = {"weighted_teams": _Teams, "surrounded_and_reflect": _Places}
        self.env_key_to_distribution_map = {}
        for key, one in config.items():
            if key not in ("n_units", "n_enemies"):
                one |= {"env_key": key, "n_units": config["n_units"], "n_enemies": config["n_enemies"]}
                self.env_key_to_distribution_map[key] = kinds[one["dist_type"]](one)
        self.env = StarCraft2Env(**kwargs)

    def reset(self) -> None:
        """Returns nothing, as the package does where it had to try twice."""
        episode: dict[str, Any] = {}
        for distribution in self.env_key_to_distribution_map.values():
            episode |= distribution.generate()
        self.env.reset(episode)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)


def install(folder: Path, package: str = "smacv2") -> Path:
    """Writes the package's modules below a folder of Python's path, and where the game would be.

    Returns:
        The game's folder, for ``SC2PATH``.
    """
    inner = folder / package / "env" / "starcraft2"
    inner.mkdir(parents=True)
    (folder / package / "__init__.py").write_text("")
    (folder / package / "env" / "__init__.py").write_text("from fake_smacv2 import StarCraft2Env\n")
    (inner / "__init__.py").write_text("")
    if package == "smacv2":
        (inner / "wrapper.py").write_text("from fake_smacv2 import StarCraftCapabilityEnvWrapper\n")
    game = folder / "StarCraftII"
    (game / "Versions").mkdir(parents=True, exist_ok=True)
    maps = game / "Maps" / "SMAC_Maps"
    maps.mkdir(parents=True, exist_ok=True)
    for name in ("32x32_flat", "3m", "2s3z"):
        (maps / f"{name}.SC2Map").write_text("")
    return game
