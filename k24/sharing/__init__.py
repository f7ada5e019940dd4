"""Parameter-sharing schemes behind one interface.

To add one: a file with a :class:`~k24.sharing.base.Sharing` subclass, and a line in :data:`SCHEMES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from k24.errors import unknown_name
from k24.sharing.base import Events, Sharing, SlotLayer
from k24.sharing.dense import Dense, DenseLinear
from k24.sharing.k24 import K24, K24Config
from k24.sharing.kaleidoscope import Kaleidoscope, KaleidoscopeConfig


@dataclass(frozen=True)
class SharingConfig:
    """Settings of all schemes; each reads its own part."""

    masks: K24Config = field(default_factory=K24Config)
    """K-2:4 and its controls."""
    kaleidoscope: KaleidoscopeConfig = field(default_factory=KaleidoscopeConfig)
    """The Kaleidoscope baseline."""


SCHEMES: dict[str, Callable[[int, SharingConfig], Sharing]] = {
    "k24": lambda n, c: K24(n, c.masks),
    "k24_random": lambda n, c: K24(n, c.masks, "random"),
    "k24_shared": lambda n, c: K24(n, c.masks, "shared"),
    "kaleidoscope": lambda n, c: Kaleidoscope(n, c.kaleidoscope),
    "fups": lambda n, c: Dense(n),
    "fups_id": lambda n, c: Dense(n, agent_id=True),
    "nops": lambda n, c: Dense(n, own=True),
}


def make_sharing(name: str, n_slots: int, config: SharingConfig | None = None) -> Sharing:
    """Builds a scheme by name.

    Args:
        name: A key of :data:`SCHEMES`.
        n_slots: Agents, or unit types.
        config: Settings.

    Raises:
        UsageError: There is no such scheme.
    """
    if name not in SCHEMES:
        raise unknown_name("sharing scheme", name, SCHEMES)
    return SCHEMES[name](n_slots, config or SharingConfig())


__all__ = [
    "SCHEMES",
    "Dense",
    "DenseLinear",
    "Events",
    "K24Config",
    "KaleidoscopeConfig",
    "Sharing",
    "SharingConfig",
    "SlotLayer",
    "make_sharing",
]
