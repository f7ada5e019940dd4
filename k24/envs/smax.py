"""Suite ``smax``: StarCraft-like battles without StarCraft, from JaxMARL.

A team of allies fights as many or more enemies that follow a heuristic: they shoot the nearest ally in range, else go for one they see. In
the ``smacv2`` tasks every episode draws new types of units and new places. Everything is as in JaxMARL's own experiments, which set nothing
that is not SMAX's default: an observation lists what the unit sees of every other one, then its own health, place, weapon and type.

* **State.** JaxMARL's, scaled into [-1, 1]: places by the map's size, weapons by the longest cooldown, types by their number. As it comes,
  with places up to 36, QMIX starts with a loss ten thousand times as large.
* **Reward.** SMAX gives each ally the whole reward of the team: the share of the enemies' health that went, and ``won_battle_bonus`` (1)
  for a victory. Here allies share it evenly, so that the sum over agents is the team's, and a won episode returns 2.
* **Ends.** ``terminated`` when a side is dead, ``truncated`` after ``max_steps`` (SMAX itself allows one more). ``won`` when the enemies
  are dead and an ally is not: if both sides die at once, nobody won.
* **Dead allies** see zeros, their type included, and have only the action to stop.

JAX compiles one program for each task and number of environments, which takes some seconds, once in a process. It runs on the CPU also
where tensors live on a GPU, and JAX is kept from taking a GPU's memory unless it was imported before.
"""

from __future__ import annotations

import importlib
import io
import os
import random
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from k24.envs.base import EnvSpec, Observation, Step, TeamEnv
from k24.envs.check import require_actions
from k24.envs.options import require_options
from k24.envs.picture import Mark, draw
from k24.errors import UsageError

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

# Options of SMAX and of its heuristic enemy, and their defaults.
_OPTIONS: dict[str, Any] = {
    "max_steps": 100,
    "see_enemy_actions": True,
    "walls_cause_death": True,
    "won_battle_bonus": 1.0,
    "enemy_shoots": True,
    "attack_mode": "closest",
    "map_width": 32,
    "map_height": 32,
    "world_steps_per_env_step": 8,
    "time_per_step": 1 / 16,
}
_ATTACK_MODES = ("closest", "random")
_BLUE, _RED = (0.2, 0.4, 0.9), (0.9, 0.25, 0.2)

# Makes compiling a third cheaper than at the highest level, and the programs no slower.
_COMPILER_OPTIONS = {"xla_backend_optimization_level": 1}


class _Battle(NamedTuple):
    """All that is to know of an environment between two steps; a JAX tree."""

    key: Any  # uint32 [2], what its random numbers come from
    state: Any  # HeuristicEnemySMAX's: that of the units, and what the enemies remember
    enemy_obs: Any  # what the enemies see


class _Sight(NamedTuple):
    """The tensors of an ``Observation``; a JAX tree."""

    obs: Any
    state: Any
    avail: Any
    alive: Any


_BATCH_AXES = _Sight(1, 0, 1, 1)


class _Program(NamedTuple):
    """What runs a task, for any number of environments.

    Attributes:
        spec: Sizes and limits.
        size: Width and height of the map.
        radii: Of each type of unit.
        place: Puts arrays where the program is to run.
        blank: ``n_envs -> battles``, with nobody alive.
        step: ``battles, actions [A, E], anew -> battles, after, current, reward, terminated, truncated, won``. With ``anew`` all episodes
            start anew, and only ``current`` means anything.
    """

    spec: EnvSpec
    size: tuple[float, float]
    radii: np.ndarray
    place: Callable[[Any], Any]
    blank: Callable[[int], _Battle]
    step: Callable[[_Battle, np.ndarray, bool], tuple[Any, ...]]


class SmaxEnv(TeamEnv):
    """A SMAX battle against the heuristic enemy."""

    def __init__(self, task: str, n_envs: int, device: str | torch.device = "cpu", **kwargs: Any) -> None:
        """Prepares the battles; they are compiled when first needed.

        Args:
            task: A key of ``TASKS``.
            n_envs: Parallel environments.
            device: Where tensors live.
            **kwargs: Options of SMAX and of its heuristic enemy, see ``_OPTIONS``; ``attack_mode`` is "closest" or "random".

        Raises:
            UsageError: An unknown option, or a value of another type than its default.
        """
        require_options(task, kwargs, _OPTIONS)
        options = _OPTIONS | {name: _checked(task, name, value) for name, value in kwargs.items()}
        self._program = _write_program(task, tuple(options.items()))
        self.spec = self._program.spec
        self.n_envs = n_envs
        self.device = torch.device(device)
        self._blank = self._battles = self._program.blank(n_envs)

    def reset(self, seed: int) -> Observation:
        """See ``TeamEnv.reset``."""
        keys = np.random.SeedSequence(seed).generate_state(2 * self.n_envs).reshape(self.n_envs, 2)
        idle = np.zeros((self.spec.n_agents, self.n_envs), dtype=np.int32)
        self._battles, _, current, *_ = self._program.step(self._blank._replace(key=self._program.place(keys)), idle, True)
        return self._observation(current)

    def step(self, actions: Tensor) -> Step:
        """See ``TeamEnv.step``."""
        require_actions(self, actions)
        orders = actions.to("cpu", torch.int32).numpy()
        self._battles, after, current, reward, terminated, truncated, won = self._program.step(self._battles, orders, False)
        ended = np.asarray(terminated) | np.asarray(truncated)
        seen = self._observation(after)
        return Step(
            seen,
            self._observation(current) if ended.any() else seen,
            *(self._tensor(one) for one in (reward, terminated, truncated, won)),
        )

    def render(self) -> Tensor:
        """The units alive in environment 0 (allies blue, enemies red), uint8 ``[320, 320, 3]``."""
        units = self._battles.state.state
        width, height = self._program.size
        marks = []
        for index, (x, y) in enumerate(np.asarray(units.unit_positions)[0].tolist()):
            if np.asarray(units.unit_alive)[0, index]:
                radius = float(self._program.radii[np.asarray(units.unit_types)[0, index]])
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


def _checked(task: str, name: str, value: Any) -> Any:
    """An option's value, which SMAX itself would notice too late or not at all to be wrong."""
    kind = type(_OPTIONS[name])
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise UsageError(f"{task}: {name} must be of type {kind.__name__}, as its default {_OPTIONS[name]!r}, got {value!r}")
    if name == "attack_mode" and value not in _ATTACK_MODES:
        raise UsageError(f"{task}: {name} must be {' or '.join(_ATTACK_MODES)}, got {value!r}")
    return kind(value)


@cache
def _write_program(task: str, options: tuple[tuple[str, Any], ...]) -> _Program:
    """Writes the program of a task; JAX compiles it for each number of environments, when first called."""
    jax, smax = _import_jaxmarl()
    jnp = jax.numpy
    env = smax.HeuristicEnemySMAX(scenario=smax.map_name_to_scenario(task.removeprefix("smax/")), **dict(options))
    n_allies = env.num_allies

    # The state lists health, place, weapon and type of each unit, then all teams, then all types as numbers.
    n_units, most = len(env.all_agents), float(np.max(env.unit_type_weapon_cooldowns))
    unit = [1, 1 / env.map_width, 1 / env.map_height, 1 / most] + [1] * env.unit_type_bits
    scale = jnp.array(unit * n_units + [1] * n_units + [1 / env.unit_type_bits] * n_units)

    def draw_key(key: Any) -> tuple[Any, Any]:
        """The key to keep, and one to use."""
        kept, used = jax.random.split(jax.random.wrap_key_data(key, impl="threefry2x32"))
        return jax.random.key_data(kept), used

    def of_allies(of_agent: dict[str, Any]) -> Any:
        return jnp.stack([of_agent[name] for name in env.agents])

    def of_enemies(of_agent: dict[str, Any]) -> Any:
        return jnp.stack([of_agent[name] for name in env.enemy_agents])

    def look(state: Any, obs: dict[str, Any]) -> _Sight:
        """What the allies of one environment see."""
        avail = of_allies(env.get_avail_actions(state)) != 0
        return _Sight(of_allies(obs), jnp.clip(obs["world_state"] * scale, -1, 1), avail, state.state.unit_alive[:n_allies])

    def begin(key: Any) -> tuple[_Battle, _Sight]:
        """A new episode of one environment."""
        key, used = draw_key(key)
        obs, state = env.reset(used)
        return _Battle(key, state, of_enemies(env.get_obs_unit_list(state.state))), look(state, obs)

    def advance(battle: _Battle, orders: Any) -> tuple[Any, ...]:
        """One step of one environment: SMAX's ``step_env``, but the enemies' observations are those of the last step, not made again."""
        key, used = draw_key(battle.key)
        used, for_enemy = jax.random.split(used)
        enemy_orders, enemy = env.get_enemy_actions(for_enemy, battle.state.enemy_policy_state, battle.enemy_obs)
        orders = env._decode_discrete_actions(jnp.concatenate([orders, of_enemies(enemy_orders)]))
        obs, units, rewards, _, _ = env.step_env_no_decode(used, battle.state.state, orders)
        state = battle.state.replace(state=units, enemy_policy_state=enemy)
        alive, enemy_alive = units.unit_alive[:n_allies].any(), units.unit_alive[n_allies:].any()
        terminated = ~(alive & enemy_alive)
        # SMAX compares the steps before it has counted this one, and so would go on for one more.
        truncated = (units.step >= env.max_steps) & ~terminated
        outcome = of_allies(rewards) / n_allies, terminated, truncated, alive & ~enemy_alive
        return _Battle(key, state, of_enemies(obs)), look(state, obs), *outcome

    def begin_where(ended: Any, battles: _Battle, sight: _Sight) -> tuple[_Battle, _Sight]:
        """A new episode costs a third of a step or more, and few end at once: begins an eighth of the batch, as often as needed."""
        n_envs = ended.shape[0]

        def some(carry: tuple[Any, _Battle, _Sight]) -> tuple[Any, _Battle, _Sight]:
            ended, battles, sight = carry
            # Places that are not needed point beyond the batch, and what JAX should put there it drops.
            which = jnp.nonzero(ended, size=-(-n_envs // 8), fill_value=n_envs)[0]
            fresh, seen = jax.vmap(begin, out_axes=(0, _BATCH_AXES))(battles.key[which])
            battles = jax.tree.map(lambda old, new: old.at[which].set(new), battles, fresh)
            sight = jax.tree.map(lambda axis, old, new: old.at[(slice(None),) * axis + (which,)].set(new), _BATCH_AXES, sight, seen)
            return ended.at[which].set(False), battles, sight

        return jax.lax.while_loop(lambda carry: carry[0].any(), some, (ended, battles, sight))[1:]

    def step(battles: _Battle, actions: Any, anew: Any) -> tuple[Any, ...]:
        many = jax.vmap(advance, in_axes=(0, 1), out_axes=(0, _BATCH_AXES, 1, 0, 0, 0))
        battles, after, reward, terminated, truncated, won = many(battles, actions)
        battles, current = begin_where(terminated | truncated | anew, battles, after)
        return battles, after, current, reward, terminated, truncated, won

    def place(arrays: Any) -> Any:
        return jax.device_put(arrays, jax.devices("cpu")[0])

    def blank(n_envs: int) -> _Battle:
        shapes = jax.eval_shape(lambda keys: jax.vmap(begin)(keys)[0], np.zeros((n_envs, 2), np.uint32))
        return place(jax.tree.map(lambda one: np.zeros(one.shape, one.dtype), shapes))

    bits = env.unit_type_bits
    spec = EnvSpec(
        n_allies, env.obs_size, env.state_size, env.num_ally_actions, env.max_steps, unit_types=(env.obs_size - bits, env.obs_size)
    )
    program = jax.jit(step, compiler_options=_COMPILER_OPTIONS)
    return _Program(spec, (env.map_width, env.map_height), np.asarray(env.unit_type_radiuses), place, blank, program)


@cache
def _import_jaxmarl() -> tuple[Any, Any]:
    """Imports JAX and SMAX without the side effects."""
    # Something that they import draws from the global generators.
    generators = random.getstate(), np.random.get_state()
    # JaxMARL greets on stdout, and one of its modules sets sys.stdout and sys.stderr to what they were when Python started.
    streams = sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__
    sys.stdout = sys.__stdout__ = io.StringIO()  # type: ignore[assignment, misc]
    sys.__stderr__ = sys.stderr  # type: ignore[assignment, misc]
    try:
        chosen = "jax" in sys.modules or "JAX_PLATFORMS" in os.environ
        jax = importlib.import_module("jax")
        if not chosen:
            # JAX takes most of a GPU's memory as soon as it finds one, and here it needs none.
            jax.config.update("jax_platforms", "cpu")
        return jax, importlib.import_module("jaxmarl.environments.smax")
    finally:
        sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__ = streams  # type: ignore[misc]
        random.setstate(generators[0])
        np.random.set_state(generators[1])
