"""Parameter-sharing schemes behind one interface.

To add one: a file with a :class:`~k24.sharing.base.Sharing` subclass, and a line in :data:`SCHEMES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

from k24.errors import UsageError, unknown_name
from k24.sharing.base import Events, Experience, Sharing, SlotLayer
from k24.sharing.dense import Dense, DenseLinear
from k24.sharing.hypermarl import HyperMARL, HyperMARLConfig
from k24.sharing.k24 import K24, K24Config, Variant, idle_settings
from k24.sharing.kaleidoscope import Kaleidoscope, KaleidoscopeConfig
from k24.sharing.seps import SePS, SePSConfig
from k24.sharing.snp import SNP, SNPConfig


@dataclass(frozen=True)
class SharingConfig:
    """Settings of all schemes; each reads its own part."""

    masks: K24Config = field(default_factory=K24Config)
    """K-2:4 and its controls."""
    kaleidoscope: KaleidoscopeConfig = field(default_factory=KaleidoscopeConfig)
    """The Kaleidoscope baseline."""
    snp: SNPConfig = field(default_factory=SNPConfig)
    """The SNP-PS baseline."""
    hypermarl: HyperMARLConfig = field(default_factory=HyperMARLConfig)
    """The HyperMARL baseline."""
    seps: SePSConfig = field(default_factory=SePSConfig)
    """The SePS baseline."""


SCHEMES: dict[str, Callable[[int, SharingConfig], Sharing]] = {
    "k24": lambda n, c: K24(n, c.masks),
    "k24_random": lambda n, c: K24(n, c.masks, "random"),
    "k24_shared": lambda n, c: K24(n, c.masks, "shared"),
    "k24_magnitude": lambda n, c: K24(n, c.masks, "magnitude"),
    "kaleidoscope": lambda n, c: Kaleidoscope(n, c.kaleidoscope),
    "snp": lambda n, c: SNP(n, c.snp),
    "hypermarl": lambda n, c: HyperMARL(n, c.hypermarl),
    "seps": lambda n, c: SePS(n, c.seps),
    "fups": lambda n, c: Dense(n),
    "fups_id": lambda n, c: Dense(n, agent_id=True),
    "fups_bias": lambda n, c: Dense(n, "biases"),
    "multihead": lambda n, c: Dense(n, "output"),
    "nops": lambda n, c: Dense(n, "everything"),
}
_VARIANTS: dict[str, Variant] = {"k24": "learned", "k24_random": "random", "k24_shared": "shared", "k24_magnitude": "magnitude"}
# Which part of SharingConfig a scheme reads; those that are not named have no settings.
_PARTS = {**dict.fromkeys(_VARIANTS, "masks"), **{name: name for name in ("kaleidoscope", "snp", "hypermarl", "seps")}}
# Those that cannot make critics of an ensemble differ, and what they make of them.
_NO_ENSEMBLE = {
    **dict.fromkeys(("fups", "fups_id", "k24_shared", "k24_magnitude"), "makes all critics one"),
    "seps": "puts agents together by what they do, and critics do nothing",
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


def why_idle(part: str, setting: str, schemes: Sequence[str], config: SharingConfig) -> str | None:
    """Why a setting changes nothing in a run, and what to do instead; None where it counts.

    Args:
        part: Field of :class:`SharingConfig` that holds the setting.
        setting: Its name there.
        schemes: Keys of :data:`SCHEMES`, those that the run uses.
        config: Settings of the run.
    """
    if all(_PARTS.get(scheme) != part for scheme in schemes):
        of = ", ".join(scheme for scheme in SCHEMES if _PARTS.get(scheme) == part)
        own = [p for p in map(_PARTS.get, schemes) if p and any(f.name == setting for f in fields(getattr(config, p)))]
        remedy = "leave it out"
        if own:
            remedy = f"use --{setting if own[0] == 'masks' else f'{own[0]}.{setting}'}".replace("_", "-")
        return f"it is a setting of {of}, and the sharing here is {' and '.join(schemes)}: {remedy}"
    reasons = [idle_settings(config.masks, _VARIANTS[scheme]).get(setting) for scheme in schemes if scheme in _VARIANTS]
    return f"{reasons[0]}: leave it out" if part == "masks" and all(reasons) else None


def make_critic_sharing(policy: str, requested: str, n_slots: int | None, ensemble: bool, config: SharingConfig | None = None) -> Sharing:
    """Builds the scheme of a critic.

    Its slots are agents where each agent has a critic of its own (IPPO), and critics where an ensemble of them judges the same joint
    action (MATD3). One critic that serves all (MAPPO) has one slot: it is not deployed, so masks would make it worse and nothing cheaper.
    ``auto`` follows the policy's scheme where agents have a critic each. In an ensemble it gives networks of their own, as TD3 has them,
    whatever the policy's scheme: critics are not deployed, and policies learned later or never from critics that were masks of one
    network (docs/results.md). Kaleidoscope's are masks, because they are part of what was published.

    Args:
        policy: The policy's scheme, a key of :data:`SCHEMES`.
        requested: A key of :data:`SCHEMES`, or ``auto``.
        n_slots: Agents with a critic each, critics of an ensemble, or 1; as many as the scheme has of an ensemble when None.
        ensemble: Whether slots are critics of an ensemble.
        config: Settings.

    Raises:
        UsageError: There is no such scheme, or it can't make critics of an ensemble differ.
    """
    if requested == "auto":
        requested = "fups" if n_slots == 1 else "nops" if ensemble and policy != "kaleidoscope" else policy
    if ensemble and requested in _NO_ENSEMBLE and n_slots != 1:
        raise UsageError(f"critic_sharing {requested} {_NO_ENSEMBLE[requested]}: use nops or a masked scheme, or set critics to 1")
    return make_sharing(requested, make_sharing(requested, 1, config).critics if n_slots is None else n_slots, config)


def dense_critics(n_slots: int | None, ensemble: bool) -> Sharing:
    """The plain scheme of critics: a dense network for each slot, two where their number is left open."""
    return Dense(n_slots or Dense.critics, "everything")


__all__ = [
    "SCHEMES",
    "Dense",
    "DenseLinear",
    "Events",
    "Experience",
    "HyperMARLConfig",
    "K24Config",
    "KaleidoscopeConfig",
    "SNPConfig",
    "SePSConfig",
    "Sharing",
    "SharingConfig",
    "SlotLayer",
    "dense_critics",
    "make_critic_sharing",
    "make_sharing",
    "why_idle",
]
