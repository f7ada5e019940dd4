"""Suite ``mamujoco``: MuJoCo's bodies, their joints shared out among agents (Peng et al., FACMAC, NeurIPS 2021).

``Ant-4x2`` has four agents of two joints each, ``Humanoid-9|8`` (quote it in a shell) the upper body and the lower one. The bodies are
gymnasium's ``-v5``, the agents gymnasium-robotics' ``mamujoco_v1``. Where it lacks the partition of one joint for each agent, such as
``Humanoid-17x1``, it is added here. ``Swimmer-10x2`` is a swimmer of as many joints as its agents need, ten times two; only ``2x1`` is
gymnasium's own swimmer.

Left out is ``CoupledHalfCheetah``, which gymnasium-robotics 1.4 can't observe under MuJoCo 4, and the pendulums, which have one joint.

Returns and observations
    A body earns one reward. gymnasium-robotics hands it whole to every agent; here each gets its share, so that the sum over agents is
    the return that is published. Each agent's observation is gymnasium-robotics' own (``agent_obsk=1``: its joints and the next ones),
    the state the body's.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from k24.envs.base import Outcome, SingleEnv, View
from k24.envs.options import build, require_options
from k24.envs.pettingzoo import ParallelTeam
from k24.errors import UsageError

_BODIES = {
    "Ant": {"2x4": "front and back legs", "2x4d": "diagonal legs", "4x2": "a leg each", "8x1": "a joint each"},
    "HalfCheetah": {"2x3": "back and front leg", "6x1": "a joint each"},
    "Hopper": {"3x1": "a joint each"},
    "Humanoid": {"9|8": "upper and lower body", "17x1": "a joint each"},
    "HumanoidStandup": {"9|8": "upper and lower body", "17x1": "a joint each"},
    "Pusher": {"3p": "shoulder, elbow and wrist", "7x1": "a joint each"},
    "Reacher": {"2x1": "a joint each"},
    "Swimmer": {"2x1": "a joint each", "10x2": "ten times two joints", "5x4": "five times four joints"},
    "Walker2d": {"2x3": "right and left leg", "6x1": "a joint each"},
    "ManySegmentAnt": {"2x3": "twice three segments of two legs"},
}

TASKS = {f"mamujoco/{body}-{part}": f"{body}: {about}" for body, parts in _BODIES.items() for part, about in parts.items()}

# A joint each, which gymnasium-robotics doesn't know for these.
_ADDED = {("Ant", "8x1"), ("Humanoid", "17x1"), ("HumanoidStandup", "17x1"), ("Pusher", "7x1"), ("Walker2d", "6x1")}
_FIXED = {"xml_file", "default_camera_config", "kwargs"}
_SEGMENTED = re.compile(r"mamujoco/(?:Swimmer|ManySegmentSwimmer|ManySegmentAnt)-[1-9]\d?x[1-9]\d?")


class Body(SingleEnv):
    """One body, and one agent for each part of it.

    Attributes:
        team: The same, with the whole reward for every agent.
    """

    def __init__(self, team: ParallelTeam) -> None:
        self.team = team
        self.spec = team.spec

    def reset(self, seed: int) -> View:
        """See ``SingleEnv.reset``."""
        return self.team.reset(seed)

    def step(self, actions: np.ndarray) -> Outcome:
        """See ``SingleEnv.step``."""
        outcome = self.team.step(actions)
        return outcome._replace(reward=[one / self.spec.n_agents for one in outcome.reward])

    def render(self) -> np.ndarray | None:
        """MuJoCo's picture, uint8 ``[480, 480, 3]``; None on machines where it finds no OpenGL to draw with."""
        with contextlib.suppress(ImportError):
            # Triton's LLVM crashes the process if it is loaded after that of Mesa, which draws where there is no GPU.
            importlib.import_module("triton")
        # Unless told which, gymnasium tries GLFW first, and without a display that leaves a complaint behind.
        guess = sys.platform == "linux" and not {"MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ)
        if guess:
            os.environ["MUJOCO_GL"] = "egl"
        try:
            return np.array(self.team.env.render())
        except Exception:
            # There is no telling what drivers, and the packages that look for them, raise.
            return None
        finally:
            if guess:
                del os.environ["MUJOCO_GL"]

    def close(self) -> None:
        """See ``SingleEnv.close``."""
        self.team.close()


def accepts(task: str) -> bool:
    """Whether a task is in the table, or a swimmer or an ant of many segments."""
    return task in TASKS or _SEGMENTED.fullmatch(task) is not None


def make_one(task: str, max_steps: int | None = None, agent_obsk: int = 1, **kwargs: object) -> Body:
    """Makes one body.

    Args:
        task: ``mamujoco/<body>-<partition>``; of an ant or a swimmer of many segments, how many agents and how many segments each has.
        max_steps: Episode limit; where None the body's own, which is 1000, of the arms 50 (Reacher) or 100 (Pusher).
        agent_obsk: How far an agent observes from its own joints, in joints.
        **kwargs: Options of gymnasium's environment, e.g. ``healthy_reward`` or ``reset_noise_scale``, but none that
            change what is observed.

    Raises:
        UsageError: An option that the body doesn't have.
    """
    body, _, part = task.removeprefix("mamujoco/").partition("-")
    if body == "Swimmer" and part != "2x1":
        body = "ManySegmentSwimmer"
    if not isinstance(agent_obsk, int) or agent_obsk < 0:
        raise UsageError(f"{task}: agent_obsk must be a whole number of at least 0, got {agent_obsk!r}")
    with _quiet():
        from gymnasium_robotics import mamujoco_v1

        single, limit = _single(task, body, part, kwargs)
        # It would make a body itself, but in wrappers, and those of many segments from a file in its own folder, which processes that
        # start at once would write and remove under each other's hands.
        team = mamujoco_v1.parallel_env(body, part, agent_obsk, _joint_each(body, part), gym_env=single)
    return Body(ParallelTeam(team, max_steps or limit, steady=True))


def _single(task: str, body: str, part: str, given: dict[str, object]) -> tuple[Any, int]:
    """The body, as gymnasium's environment for one agent, and the episode limit registered for it."""
    import gymnasium
    from gymnasium.envs.registration import load_env_creator
    from gymnasium_robotics.envs.multiagent_mujoco import many_segment_ant, many_segment_swimmer

    makers = {"ManySegmentAnt": ("Ant", many_segment_ant), "ManySegmentSwimmer": ("Swimmer", many_segment_swimmer)}
    base, writer = makers.get(body, (body, None))
    registered: Any = gymnasium.spec(f"{base}-v5")
    limit = registered.max_episode_steps
    # The bare class, without the wrapper that counts steps: k24 does.
    creator = load_env_creator(registered.entry_point)
    known = [name for name in inspect.signature(creator).parameters if name not in _FIXED and not name.startswith(("include_", "exclude_"))]
    require_options(task, given, [*known, "agent_obsk"])
    if writer is None:
        return build(task, creator, given, render_mode="rgb_array"), limit
    agents, _, each = part.partition("x")
    if int(agents) * int(each) < 2:
        raise UsageError(f"{task}: expected at least 2 segments in all, got {part}")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "body.xml")
        writer.gen_asset(n_segs=int(agents) * int(each), asset_path=path)
        return build(task, creator, given, render_mode="rgb_array", xml_file=path), limit


def _joint_each(body: str, part: str) -> dict[str, Any] | None:
    """The partitions of ``_ADDED``; else None."""
    from gymnasium_robotics import mamujoco_v1

    if (body, part) not in _ADDED:
        return None
    parts, edges, shared = mamujoco_v1.get_parts_and_edges(body, next(iter(_BODIES[body])))
    return {"partition": [(joint,) for joints in parts for joint in joints], "edges": edges, "globals": shared}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what is said while bodies are made.

    gymnasium-robotics prints news of its other environments. And MuJoCo warns, in a file ``MUJOCO_LOG.TXT`` wherever it runs, that
    gymnasium's cheetah is written in an old dialect.
    """
    import mujoco

    kept = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        mujoco.set_mju_user_warning(kept)
