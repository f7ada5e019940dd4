"""The physics of round bodies, stepped for all bodies at once.

VMAS steps its worlds body by body and pair by pair, with a few small tensors for each; at fewer than some thousand environments all its
time goes into calling torch. Worlds of the particle kind need little of what it looks after: bodies are discs that push each other apart,
and nothing joins them, turns them, slows them by friction or pulls them down. There one tensor ``[bodies, E, 2]`` does, and the numbers are
VMAS's own bit for bit: the same operations, and sums over the pairs of a body in the same order.

Follows ``World.step`` of ``vmas.simulator.core`` (version 1.5); a test holds every task that is stepped here to that.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor


def fits(world: Any) -> bool:
    """Whether a VMAS world is of the kind that ``Particles`` steps."""
    return (
        not world.joints
        and not world._gravity.any()
        and not world._linear_friction
        and not world._angular_friction
        and all(body.gravity is None and body.linear_friction is None and body.angular_friction is None for body in world.entities)
        and all(body.v_range is None and not body.state.ang_vel.any() for body in world.entities)
        and all(type(body.shape).__name__ == "Sphere" for body in world.entities if body.collide)
        and all(agent.max_f is None and agent.f_range is None and type(agent.dynamics).__name__ == "Holonomic" for agent in world.agents)
    )


class Particles:
    """Steps a world that ``fits``.

    Args:
        world: VMAS's world; its bodies keep their state.
    """

    def __init__(self, world: Any) -> None:
        self._world = world
        bodies = [body for body in world.entities if body.movable]
        self._moving = [body.state for body in bodies]
        self._forced = [index for index, body in enumerate(bodies) if body in world.agents]
        fixed = [body for body in world.entities if body.collide and not body.movable]
        self._fixed = [body.state for body in fixed]
        place = {body: index for index, body in enumerate(bodies + fixed)}
        # In VMAS's order, in which the forces on a body are added up.
        pairs = [
            (a, b)
            for a, b in combinations(world.entities, 2)
            if a.collides(b) and b.collides(a) and (a.movable or b.movable or a.rotatable or b.rotatable)
        ]
        self._pairs = [(place[a], place[b]) for a, b in pairs]

        def each(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=world.device)

        self._first, self._second = torch.tensor(self._pairs, device=world.device).view(-1, 2).unbind(1)
        # A pair is looked at where it is closer than this; VMAS adds radii as doubles here, and as floats where it works out the force.
        self._near = each([a.shape.circumscribed_radius() + b.shape.circumscribed_radius() for a, b in pairs])
        self._reach = each([a.shape.radius for a, _ in pairs]) + each([b.shape.radius for _, b in pairs])
        self._keep = each([1 - (world._drag if body.drag is None else body.drag) for body in bodies])[:, None, None]
        self._mass = each([body.mass for body in bodies])[:, None, None]
        speeds = [float("inf") if body.max_speed is None else body.max_speed for body in bodies]
        self._max_speed = each(speeds)[:, None] if min(speeds, default=0) < float("inf") else None
        edges = (world.x_semidim, world.y_semidim)
        self._edge = each([float("inf") if edge is None else edge for edge in edges]) if edges != (None, None) else None

    def step(self) -> None:
        """Moves everything by one step of time, as ``World.step`` does."""
        world = self._world
        if self._moving:
            self._move()
        if world.dim_c > 0:
            for agent in world.agents:
                if not agent.silent:
                    agent.state.c = agent.action.c

    def _move(self) -> None:
        world = self._world
        dt = world._sub_dt
        pos = torch.stack([state.pos for state in self._moving])
        vel = torch.stack([state.vel for state in self._moving])
        if len(self._forced) == len(self._moving):
            control = torch.stack([state.force for state in self._moving])
        else:
            control = torch.zeros_like(vel)
            for index in self._forced:
                control[index] = self._moving[index].force
        vel = vel * self._keep
        for _ in range(world._substeps):
            vel = vel + self._push(control, pos) / self._mass * dt
            if self._max_speed is not None:
                speed = torch.linalg.vector_norm(vel, dim=-1)
                vel = torch.where((speed > self._max_speed)[..., None], vel / speed[..., None] * self._max_speed[..., None], vel)
            pos = pos + vel * dt
            if self._edge is not None:
                pos = pos.clamp(-self._edge, self._edge)
        for state, at, v in zip(self._moving, pos.unbind(0), vel.unbind(0), strict=True):
            state.pos, state.vel = at, v

    def _push(self, control: Tensor, pos: Tensor) -> Tensor:
        """Adds to the agents' own forces ``[bodies, E, 2]`` those of the bodies that touch."""
        if not self._pairs:
            return control
        if self._fixed:
            pos = torch.cat([pos, torch.stack([state.pos for state in self._fixed])])
        apart = torch.linalg.vector_norm(pos.index_select(0, self._first) - pos.index_select(0, self._second), dim=-1)
        touching = (apart.amin(dim=1) <= self._near).nonzero().flatten().tolist()
        if not touching:
            return control
        # Laid out as in VMAS, environments first, and no other pair among them: how torch rounds exponentials depends on their place.
        at = pos.unbind(0)
        here = torch.stack([at[self._pairs[index][0]] for index in touching], dim=-2)
        there = torch.stack([at[self._pairs[index][1]] for index in touching], dim=-2)
        forces = self._world._get_constraint_forces(
            here, there, self._reach[touching].expand(here.shape[:-1]), self._world._collision_force
        )
        total = control.clone()
        rows = total.unbind(0)
        for index, *pushes in zip(touching, *(force.unbind(-2) for force in forces), strict=True):
            for body, push in zip(self._pairs[index], pushes, strict=True):
                if body < len(rows):
                    rows[body].add_(push)
        return total
