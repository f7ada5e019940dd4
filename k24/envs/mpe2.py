"""Suite ``mpe2``: Farama's multi-agent particle environments.

MPE2 (the home of the MPE tasks that left PettingZoo) simulates one environment at a time in numpy, so it is slow. It is here because it is
the reference: five actions, and the rewards of the literature. With ``continuous_actions=True`` an agent sets how hard it pushes in each
of the four directions instead.

The particle environments only ever end by their clock (unless told to stop on success), which is a truncation: the value of what follows
is not 0.
"""

from __future__ import annotations

from typing import Any

from k24.envs.options import build, require_options
from k24.envs.pettingzoo import ParallelTeam, load, options

_MODULES = {
    "simple": ("simple_v3", "one agent goes to one landmark"),
    "simple_adversary": ("simple_adversary_v3", "two agents hide their landmark from an adversary (two sides)"),
    "simple_crypto": ("simple_crypto_v3", "Alice and Bob talk, Eve listens in (two sides)"),
    "simple_formation": ("simple_formation_v1", "agents stand on a circle round a landmark"),
    "simple_line": ("simple_line_v1", "agents stand on the line between two landmarks"),
    "simple_push": ("simple_push_v3", "an agent and an adversary push for one landmark (two sides)"),
    "simple_reference": ("simple_reference_v3", "two agents tell each other where to go"),
    "simple_speaker_listener": ("simple_speaker_listener_v4", "one speaks, the other goes where it is told"),
    "simple_spread": ("simple_spread_v3", "three agents cover three landmarks and do not collide"),
    "simple_tag": ("simple_tag_v3", "three chase one (two sides)"),
    "simple_world_comm": ("simple_world_comm_v3", "a leader tells chasers where the prey hides (two sides)"),
    "collect_treasure": ("collect_treasure_v1", "collectors fetch treasure, depositors take it in"),
}

TASKS = {f"mpe2/{name}": about for name, (_, about) in _MODULES.items()}


def make_one(task: str, max_steps: int = 25, **kwargs: object) -> ParallelTeam:
    """Makes one task of ``TASKS``.

    Args:
        task: A key of ``TASKS``.
        max_steps: Episode limit.
        **kwargs: Options of the environment, e.g. ``N`` (agents of simple_spread), ``local_ratio`` or ``continuous_actions``.

    Raises:
        UsageError: An option that the environment doesn't know.
    """
    module: Any = load(f"mpe2.{_MODULES[task.removeprefix('mpe2/')][0]}", task)
    require_options(task, kwargs, set(options(module, "parallel_env")) - {"max_cycles", "render_mode"})
    env = build(task, module.parallel_env, kwargs, max_cycles=max_steps, render_mode="rgb_array")
    sides = tuple("adversary" if name.startswith(("adversary", "leadadversary", "eve")) else "good" for name in env.possible_agents)
    # Its state is all observations side by side, each computed once more; k24 puts them together itself where it gets none. And closing
    # one quits pygame for the whole process, so that no other could be drawn any more; they hold no window.
    two = sides if len(set(sides)) > 1 else None
    return ParallelTeam(env, max_steps, steady=True, own_state=False, close_env=False, sides=two)
