"""Suite ``smax``: StarCraft-like battles without StarCraft, from JaxMARL.

A team of allies fights as many or more enemies that follow a heuristic: they shoot the nearest ally in range, else go for one they see. In
the ``smacv2`` tasks every episode draws new types of units and new places. Everything is as in JaxMARL's own experiments, which set nothing
that is not SMAX's default: an observation lists what the unit sees of every other one, then its own health, place, weapon and type.

* **Reward.** SMAX gives each ally the whole reward of the team: the share of the enemies' health that went, and ``won_battle_bonus`` (1)
  for a victory. Here allies share it evenly, so that the sum over agents is the team's, and a won episode returns 2.
* **Ends.** ``terminated`` when a side is dead, ``truncated`` after ``max_steps``. ``won`` when the enemies are dead and an ally is not: if
  both sides die at once, nobody won.
* **Dead allies** see zeros, their type included, and have only the action to stop.

JAX compiles two programs for each task and number of environments, which takes some seconds, once in a process (with
``JAX_COMPILATION_CACHE_DIR`` set, JAX keeps them for the next one). They run on the CPU also where tensors live on a GPU, and JAX is kept from
taking a GPU's memory, unless it was imported before.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from k24.envs.base import EnvSpec, Observation, Step, TeamEnv
from k24.envs.check import require_actions
from k24.envs.picture import Mark, draw
from k24.errors import UsageError, unknown_name

TASKS = {
    "smax/3m": "3 marines against 3",
    "smax/8m": "8 marines against 8",
    "smax/25m": "25 marines against 25",
    "smax/2s3z": "2 stalkers and 3 zealots against the same",
    "smax/3s5z": "3 stalkers and 5 zealots against the same",
    "smax/5m_vs_6m": "5 marines against 6",
    "smax/10m_vs_11m": "10 marines against 11",
    "smax/27m_vs_30m": "27 marines against 30",
    "smax/3s5z_vs_3s6z": "3 stalkers and 5 zealots against 3 and 6",
    "smax/3s_vs_5z": "3 stalkers against 5 zealots",
    "smax/6h_vs_8z": "6 hydralisks against 8 zealots",
    "smax/smacv2_5_units": "5 units of random types in random places against 5",
    "smax/smacv2_10_units": "10 units of random types in random places against 10",
    "smax/smacv2_20_units": "20 units of random types in random places against 20",
}

_OPTIONS = {
    *("max_steps", "see_enemy_actions", "walls_cause_death", "won_battle_bonus", "enemy_shoots", "attack_mode"),
    *("map_width", "map_height", "world_steps_per_env_step", "time_per_step"),
}
_ATTACK_MODES = ("closest", "random")
_BLUE, _RED = (0.2, 0.4, 0.9), (0.9, 0.25, 0.2)

# Makes compiling a third cheaper than at the highest level, and the programs no slower.
_COMPILER_OPTIONS = {"xla_backend_optimization_level": 1}


class _Battle(NamedTuple):
    """All that is to know of an environment between two steps; a JAX tree."""

    key: Any  # uint32 [2], what its random numbers come from
    units: Any  # SMAX's state
    enemy: Any  # the heuristic's memory
    enemy_obs: Any  # what it sees: SMAX computes that along with the allies' observations


class _Sight(NamedTuple):
    """The tensors of an ``Observation``; a JAX tree."""

    obs: Any
    state: Any
    avail: Any
    alive: Any


_BATCH_AXES = _Sight(1, 0, 1, 1)


class _Programs(NamedTuple):
    """What runs a task, for any number of environments.

    Attributes:
        spec: Sizes and limits.
        size: Width and height of the map.
        radii: Of each type of unit.
        blank: ``n_envs -> battles, sight``, both zeros.
        advance: ``battles, actions [A, E] -> battles, sight, reward, terminated, truncated, won``.
        restart: ``battles, sight, ended [E] -> battles, sight``, with new episodes where ``ended``.
    """

    spec: EnvSpec
    size: tuple[float, float]
    radii: np.ndarray
    blank: Callable[[int], tuple[_Battle, _Sight]]
    advance: Callable[..., tuple[Any, ...]]
    restart: Callable[..., tuple[_Battle, _Sight]]


class SmaxEnv(TeamEnv):
    """A SMAX battle against the heuristic enemy."""

    def __init__(self, task: str, n_envs: int, device: str | torch.device = "cpu", **kwargs: Any) -> None:
        """Prepares the battles; they are compiled when first needed.

        Args:
            task: A key of ``TASKS``.
            n_envs: Parallel environments.
            device: Where tensors live.
            **kwargs: ``max_steps`` (100) and other options of SMAX and of its heuristic enemy.

        Raises:
            UsageError: An unknown option, or ``attack_mode`` neither "closest" nor "random".
        """
        for name in kwargs:
            if name not in _OPTIONS:
                raise unknown_name(f"option of {task}", name, _OPTIONS)
        mode = kwargs.get("attack_mode", _ATTACK_MODES[0])
        if mode not in _ATTACK_MODES:
            raise UsageError(f"{task}: attack_mode must be {' or '.join(_ATTACK_MODES)}, got {mode!r}")
        self._programs = _programs(task, tuple(sorted(kwargs.items())))
        self.spec = self._programs.spec
        self.n_envs = n_envs
        self.device = torch.device(device)
        self._battles, _ = self._programs.blank(n_envs)

    def reset(self, seed: int) -> Observation:
        """See ``TeamEnv.reset``."""
        keys = np.random.SeedSequence(seed).generate_state(2 * self.n_envs).reshape(self.n_envs, 2)
        blank, sight = self._programs.blank(self.n_envs)
        self._battles, sight = self._programs.restart(blank._replace(key=keys), sight, np.ones(self.n_envs, dtype=bool))
        return self._observation(sight)

    def step(self, actions: Tensor) -> Step:
        """See ``TeamEnv.step``."""
        require_actions(self, actions)
        orders = actions.to("cpu", torch.int32).numpy()
        self._battles, sight, *outcome = self._programs.advance(self._battles, orders)
        reward, terminated, truncated, won = (self._tensor(one) for one in outcome)
        after = current = self._observation(sight)
        ended = terminated | truncated
        if ended.any():
            self._battles, sight = self._programs.restart(self._battles, sight, ended.cpu().numpy())
            current = self._observation(sight)
        return Step(after, current, reward, terminated, truncated, won)

    def render(self) -> Tensor:
        """The units alive in environment 0 (allies blue, enemies red), uint8 ``[320, 320, 3]``."""
        units = self._battles.units
        width, height = self._programs.size
        marks = []
        for index, (x, y) in enumerate(np.asarray(units.unit_positions)[0].tolist()):
            if np.asarray(units.unit_alive)[0, index]:
                radius = float(self._programs.radii[np.asarray(units.unit_types)[0, index]])
                colour = _BLUE if index < self.spec.n_agents else _RED
                marks.append(Mark((x - width / 2, y - height / 2), (radius, radius), colour, outline=True))
        return draw(marks, least_span=max(width, height) / 2)

    def _observation(self, sight: _Sight) -> Observation:
        """JAX's arrays as tensors."""
        return Observation(*(self._tensor(one) for one in sight))

    def _tensor(self, array: Any) -> Tensor:
        """Copies an array of JAX. Torch could share its memory, but may write to it, and DLPack takes longer than copying these."""
        return torch.from_numpy(np.array(array)).to(self.device)


def make(task: str, n_envs: int, device: str | torch.device = "cpu", **kwargs: Any) -> SmaxEnv:
    """Builds one task of ``TASKS``; see ``SmaxEnv``."""
    return SmaxEnv(task, n_envs, device, **kwargs)


@cache
def _programs(task: str, options: tuple[tuple[str, Any], ...]) -> _Programs:
    """Writes the programs of a task; JAX compiles them for each number of environments, when first called."""
    jax, smax = _import_jaxmarl()
    jnp = jax.numpy
    env = smax.HeuristicEnemySMAX(scenario=smax.map_name_to_scenario(task.removeprefix("smax/")), **dict(options))
    n_allies = env.num_allies

    def draw_key(key: Any) -> tuple[Any, Any]:
        """The key to keep, and one to use."""
        kept, used = jax.random.split(jax.random.wrap_key_data(key, impl="threefry2x32"))
        return jax.random.key_data(kept), used

    def look(state: Any, obs: dict[str, Any]) -> _Sight:
        """What the allies of one environment see."""
        avail = env.get_avail_actions(state)
        return _Sight(
            jnp.stack([obs[name] for name in env.agents]),
            obs["world_state"],
            jnp.stack([avail[name] for name in env.agents]) != 0,
            state.state.unit_alive[:n_allies],
        )

    def look_as_enemy(obs: dict[str, Any]) -> Any:
        """What its enemies see."""
        return jnp.stack([obs[name] for name in env.enemy_agents])

    def begin(key: Any) -> tuple[_Battle, _Sight]:
        """A new episode of one environment."""
        key, used = draw_key(key)
        obs, state = env.reset(used)
        enemy_obs = look_as_enemy(env.get_obs_unit_list(state.state))
        return _Battle(key, state.state, state.enemy_policy_state, enemy_obs), look(state, obs)

    def advance_one(battle: _Battle, orders: Any) -> tuple[Any, ...]:
        """One step of one environment: SMAX's ``step_env``, with the enemies' observations of the step before instead of new ones."""
        key, used = draw_key(battle.key)
        used, for_enemy = jax.random.split(used)
        enemy_orders, enemy = env.get_enemy_actions(for_enemy, battle.enemy, battle.enemy_obs)
        orders = jnp.concatenate([orders, look_as_enemy(enemy_orders)])
        obs, units, reward, _, _ = env.step_env_no_decode(used, battle.units, env._decode_discrete_actions(orders))
        alive, enemy_alive = units.unit_alive[:n_allies].any(), units.unit_alive[n_allies:].any()
        terminated = ~(alive & enemy_alive)
        sight = look(smax.heuristic_enemy_smax_env.State(units, enemy), obs)
        shares = jnp.stack([reward[name] for name in env.agents]) / n_allies
        battle = _Battle(key, units, enemy, look_as_enemy(obs))
        return battle, sight, shares, terminated, units.done & ~terminated, alive & ~enemy_alive

    def advance(battles: _Battle, actions: Any) -> tuple[Any, ...]:
        return jax.vmap(advance_one, in_axes=(0, 1), out_axes=(0, _BATCH_AXES, 1, 0, 0, 0))(battles, actions)

    def restart(battles: _Battle, sight: _Sight, ended: Any) -> tuple[_Battle, _Sight]:
        """A new episode costs a third of a step and few end at once: begins an eighth of the batch at a time, as often as needed."""
        n_envs = ended.shape[0]

        def some(carry: tuple[_Battle, _Sight, Any]) -> tuple[_Battle, _Sight, Any]:
            battles, sight, ended = carry
            # Places that are not needed point beyond the batch, and what JAX should put there it drops.
            which = jnp.nonzero(ended, size=-(-n_envs // 8), fill_value=n_envs)[0]
            fresh, seen = jax.vmap(begin, out_axes=(0, _BATCH_AXES))(battles.key[which])
            battles = jax.tree.map(lambda old, new: old.at[which].set(new), battles, fresh)
            sight = jax.tree.map(lambda axis, old, new: old.at[(slice(None),) * axis + (which,)].set(new), _BATCH_AXES, sight, seen)
            return battles, sight, ended.at[which].set(False)

        battles, sight, _ = jax.lax.while_loop(lambda carry: carry[2].any(), some, (battles, sight, ended))
        return battles, sight

    def blank(n_envs: int) -> tuple[_Battle, _Sight]:
        shapes = jax.eval_shape(jax.vmap(begin, out_axes=(0, _BATCH_AXES)), jax.ShapeDtypeStruct((n_envs, 2), jnp.uint32))
        # Programs run where their arguments are.
        where = jax.devices("cpu")[0]
        return jax.tree.map(lambda shape: jax.device_put(np.zeros(shape.shape, shape.dtype), where), shapes)

    bits = env.unit_type_bits
    spec = EnvSpec(n_allies, env.obs_size, env.state_size, env.num_ally_actions, env.max_steps, unit_types=(env.obs_size - bits, env.obs_size))
    return _Programs(
        spec,
        (env.map_width, env.map_height),
        np.asarray(env.unit_type_radiuses),
        blank,
        jax.jit(advance, compiler_options=_COMPILER_OPTIONS),
        jax.jit(restart, compiler_options=_COMPILER_OPTIONS),
    )


@cache
def _import_jaxmarl() -> tuple[Any, Any]:
    """Imports JAX and SMAX, and nothing is printed."""
    if "jax" not in sys.modules and "JAX_PLATFORMS" not in os.environ:
        # JAX takes most of a GPU's memory as soon as it finds one, and here it needs none.
        importlib.import_module("jax").config.update("jax_platforms", "cpu")
    # JaxMARL greets on stdout, and one of its modules sets sys.stdout and sys.stderr to what they were when Python started.
    streams = sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__
    sys.stdout = sys.__stdout__ = io.StringIO()  # type: ignore[misc]
    sys.__stderr__ = sys.stderr  # type: ignore[misc]
    try:
        smax = importlib.import_module("jaxmarl.environments.smax")
    finally:
        sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__ = streams  # type: ignore[misc]
    return importlib.import_module("jax"), smax
