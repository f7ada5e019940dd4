"""One typed configuration for a training run. Every field has a default and one sentence, which is also its help on the command line."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from k24.errors import UsageError, unknown_name
from k24.files import write_atomically
from k24.learners import LEARNERS, LearnerConfig
from k24.sharing import SCHEMES, HyperMARLConfig, K24Config, KaleidoscopeConfig, SePSConfig, SharingConfig, SNPConfig, why_idle
from k24.sparse.patterns import PatternSet

MAX_HIDDEN = 16_384
# Beyond any count of steps, episodes or environments.
MAX_COUNT = 10**12
# Where others than K24's own suit masks: a policy that follows critics' gradients loses its way when it runs ahead of them. Alphas as
# slow as that cannot hold out against being drawn together, and what pushes them apart has been better there (docs/lab-notes.md).
_MASKS_FOR = {"matd3": {"alpha_lr_scale": 1.0, "weight_lr_scale": 1.0, "alpha_decay": 0.0, "div_coef": 0.1}}


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    task: str = ""
    """What to learn, as suite/name; 'k24 tasks' lists what there is."""
    algo: str = "qmix"
    """Learner: iql, vdn, qmix, ippo, mappo or matd3."""
    sharing: str = "k24"
    """How agents share parameters: k24, k24_random, k24_shared, k24_magnitude, kaleidoscope, snp, hypermarl, seps, fups, fups_id,
    fups_bias, multihead or nops."""
    steps: int = 1_000_000
    """Environment steps, counted over all parallel environments."""
    seed: int = 0
    """Seed of everything random."""
    envs: int = 32
    """Parallel environments."""
    hidden: int = 64
    """Hidden units of the agent net."""
    slots: str = "agent"
    """Whose masks a row uses: agent (its index), unit_type (what it is, where the task says so), or package.module:function of your own."""
    agent_id: Literal["auto", "yes", "no"] = "auto"
    """Append each agent's index to its observation; auto asks the sharing scheme."""
    env_args: tuple[str, ...] = ()
    """Arguments of the task, each as name=value."""
    device: str = "auto"
    """Where to learn: cpu, cuda, or auto for cuda where there is one."""
    threads: int = 1
    """Threads of torch on the CPU; for nets of this size one is usually fastest."""
    workers: int | None = None
    """Processes for simulators that step one environment at a time; one per core when not given, 0 for none but this one."""
    log_every: int = 10_000
    """Environment steps between lines of metrics."""
    eval_every: int = 50_000
    """Environment steps between evaluations."""
    eval_episodes: int = 64
    """Episodes of one evaluation."""
    final_episodes: int = 256
    """Episodes of the evaluation at the end; no less than of the others."""
    checkpoint_every: int = 50_000
    """Environment steps between checkpoints."""
    # Given or not, it is settings of algo's kind once built: None stands for their defaults. Of the union, the command line offers the part
    # that its default is of.
    learner: Annotated[LearnerConfig, tyro.conf.AvoidSubcommands, tyro.conf.arg(name="")] = None  # type: ignore[assignment]
    """Settings of the learner; which there are depends on algo."""
    masks: Annotated[K24Config, tyro.conf.arg(name="")] = field(default_factory=K24Config)
    """Settings of k24 and its controls."""
    kaleidoscope: KaleidoscopeConfig = field(default_factory=KaleidoscopeConfig)
    """Settings of the kaleidoscope baseline."""
    snp: SNPConfig = field(default_factory=SNPConfig)
    """Settings of the snp baseline."""
    hypermarl: HyperMARLConfig = field(default_factory=HyperMARLConfig)
    """Settings of the hypermarl baseline."""
    seps: SePSConfig = field(default_factory=SePSConfig)
    """Settings of the seps baseline."""

    def __post_init__(self) -> None:
        """Checks each value, then those that depend on each other; no environment is built."""
        if self.algo not in LEARNERS:
            raise unknown_name("algorithm", self.algo, LEARNERS)
        settings = LEARNERS[self.algo].settings
        if self.learner is None:
            object.__setattr__(self, "learner", settings())
        if type(self.learner) is not settings:
            raise UsageError(
                f"algo {self.algo} has its learner's settings in a {settings.__name__}, got a {type(self.learner).__name__}: change both"
            )
        if self.sharing not in SCHEMES:
            raise unknown_name("sharing scheme", self.sharing, SCHEMES)
        if self.critic_sharing != "auto" and self.critic_sharing not in SCHEMES:
            raise unknown_name("sharing scheme of a critic", self.critic_sharing, ["auto", *SCHEMES])
        counts = ("steps", "envs", "threads", "log_every", "eval_every", "eval_episodes", "final_episodes", "checkpoint_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} (={getattr(self, name)}) must be at least 1")
        self._check_widths()
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed (={self.seed}) must lie in 0 … 2^63 - 1")
        _require_finite(self)
        if self.workers is not None and self.workers < 0:
            raise UsageError(f"workers (={self.workers}) must be at least 0")
        if self.slots not in ("agent", "unit_type") and ":" not in self.slots:
            raise UsageError(f"slots {self.slots!r} is not known: use agent, unit_type or package.module:function")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError(f"device {self.device!r} is not known: use auto, cpu or cuda")
        self.learner.check(self.algo, self.envs, self.steps)
        _ = self.env_kwargs

    def _check_widths(self) -> None:
        """Refuses nets that are too wide for a machine, or too narrow for their masks."""
        kept = PatternSet.parse(self.masks.pattern).n
        # Of schemes that follow the policy's by themselves, only IPPO's critic may be masked.
        judge = self.sharing if self.algo == "ippo" and self.critic_sharing == "auto" else self.critic_sharing
        for name, width, scheme in (("hidden", self.hidden, self.sharing), ("critic_hidden", self.critic_hidden, judge)):
            if width is None:
                continue
            if width < 1:
                raise UsageError(f"{name} (={width}) must be at least 1")
            if width > MAX_HIDDEN:
                raise UsageError(f"{name} (={width}) is above {MAX_HIDDEN}: one layer alone would take gigabytes, use less")
            if scheme.startswith("k24") and width < kept:
                raise UsageError(
                    f"{name} (={width}) fits no {self.masks.pattern} mask, which keeps {kept} weights of a group: use {kept} or more"
                )

    @property
    def sharing_config(self) -> SharingConfig:
        """Settings of all schemes, with what is left open filled in by what suits the learner."""
        masks = self.masks.settled(_MASKS_FOR.get(self.algo))
        return SharingConfig(masks, self.kaleidoscope, self.snp, self.hypermarl, self.seps)

    @property
    def critic_sharing(self) -> str:
        """The scheme asked for of critics; ``auto`` for learners that have none."""
        return getattr(self.learner, "critic_sharing", "auto")

    @property
    def critic_hidden(self) -> int | None:
        """Hidden units of critics; None for learners that have none."""
        if not hasattr(self.learner, "critic_hidden"):
            return None
        own = self.learner.critic_hidden
        return self.hidden if own is None else own

    @property
    def append_id(self) -> bool | None:
        """``agent_id`` as nets take it."""
        return {"auto": None, "yes": True, "no": False}[self.agent_id]

    @property
    def env_kwargs(self) -> dict[str, Any]:
        """``env_args`` as a dictionary; values are read as YAML, so that 3, 0.5, true and text all mean what they look like."""
        result = {}
        for item in self.env_args:
            name, equals, value = item.partition("=")
            if not equals or not name.isidentifier():
                raise UsageError(f"env_args {item!r} is not of the form name=value: for example --env-args n_agents=5")
            if name in result:
                raise UsageError(f"env_args gives {name} twice: leave one of them out")
            try:
                result[name] = float(value) if _EXPONENT.fullmatch(value.strip()) else yaml.safe_load(value)
            except (yaml.YAMLError, ValueError, RecursionError) as error:
                raise UsageError(f"env_args {item!r} holds no value that can be read: put text in quotes, name='\"text\"'") from error
        return result


# YAML 1.1 takes 5e-4 for text, because it has no dot, and 1.0e3, because it has no sign.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def _require_finite(config: Any) -> None:
    """Refuses a setting that is NaN or infinite, which range checks may miss (comparisons with NaN are false), or beyond counting."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            _require_finite(value)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{f.name} (={value}) must be a finite number")
        elif isinstance(value, int) and value > MAX_COUNT and f.name != "seed":
            raise UsageError(f"{f.name} (={value}) is above {MAX_COUNT:.0e}: nothing here can be that many")


def for_algo(config: TrainConfig, algo: str) -> TrainConfig:
    """The same run by another algorithm; learner settings of another kind than it takes give way to its defaults, all of them.

    Not checked: its values need to fit together only once those of the command line are in.

    Raises:
        UsageError: There is no such algorithm.
    """
    if algo not in LEARNERS:
        raise unknown_name("algorithm", algo, LEARNERS)
    changed, settings = copy.copy(config), LEARNERS[algo].settings
    object.__setattr__(changed, "algo", algo)
    if type(config.learner) is not settings:
        object.__setattr__(changed, "learner", settings())
    return changed


def why_ignored(config: TrainConfig, option: str) -> str | None:
    """Why an option of ``k24 train`` changes nothing in a run, and what to do instead; None where it counts.

    Args:
        config: Of the run.
        option: Its name with underscores, e.g. ``div_coef`` or ``kaleidoscope.div_coef``.
    """
    part, _, setting = option.rpartition(".")
    if (part or "masks") not in _names(SharingConfig) or setting not in _names(type(getattr(config, part or "masks"))):
        return None
    schemes = [config.sharing, *([config.critic_sharing] if config.critic_sharing not in ("auto", config.sharing) else [])]
    return why_idle(part or "masks", setting, schemes, config.sharing_config)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain values that YAML can hold."""
    plain = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        plain[f.name] = to_dict(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple) else value
    return plain


def from_dict(cls: type, values: Any, where: str) -> Any:
    """Builds a dataclass; keys left out keep their defaults.

    Args:
        cls: The dataclass.
        values: A dictionary of plain values.
        where: Named in errors.

    Raises:
        UsageError: A key is unknown or a value of the wrong kind.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{where} must hold 'name: value' lines, got {type(values).__name__}")
    hints = get_type_hints(cls)
    if cls is TrainConfig:
        algo = _read(values.get("algo", TrainConfig.algo), str, f"{where}: algo")
        if algo not in LEARNERS:
            raise unknown_name("algorithm", algo, LEARNERS)
        hints["learner"] = LEARNERS[algo].settings
    taken = {}
    for name, value in values.items():
        if name not in hints:
            raise UsageError(f"{where}: {_misplaced(str(name), cls, hints) or unknown_name('setting', str(name), hints)}")
        taken[name] = _read(value, hints[name], f"{where}: {name}")
    return cls(**taken)


def _misplaced(name: str, cls: type, hints: dict[str, Any]) -> str | None:
    """What to do about a setting that exists, but elsewhere."""
    parts = [part for part, hint in hints.items() if dataclasses.is_dataclass(hint) and name in _names(hint)]
    if parts and cls is TrainConfig:
        return f"setting {name!r} belongs in {' or '.join(parts)}: write '{parts[0]}: {{{name}: …}}'"
    algos = [algo for algo, learner in LEARNERS.items() if name in _names(learner.settings)]
    if algos and any(cls is learner.settings for learner in LEARNERS.values()):
        return f"setting {name!r} is of {', '.join(algos)}: leave it out, or change algo"
    return None


def _names(cls: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def _read(value: Any, hint: Any, where: str) -> Any:
    """A plain value as the field's type wants it."""
    origin, args = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _read(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        if isinstance(value, bool) and {"yes", "no"} <= set(args):
            value = "yes" if value else "no"  # which YAML 1.1 takes for truth values
        if value not in args:
            raise UsageError(f"{where} is {value!r}, expected one of {', '.join(map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where} is {value!r}, expected a list")
        return tuple(_read(v, args[0], where) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UsageError(f"{where} is {value!r}, expected {hint.__name__}")
    return value


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes the complete configuration as YAML."""
    write_atomically(path, yaml.safe_dump(to_dict(config), sort_keys=False).encode())


def load_config(path: Path) -> TrainConfig:
    """Reads a configuration.

    Raises:
        UsageError: The file is missing, is no YAML, or holds something that is no setting.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"cannot read the configuration {path}: {reason}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no YAML: {' '.join(str(error).split())[:200]}") from error
    return from_dict(TrainConfig, values, str(path))


def first_difference(a: Any, b: Any, ignore: tuple[str, ...] = ()) -> tuple[str, Any, Any] | None:
    """The first setting in which two configurations differ, as (dotted name, value in a, value in b)."""
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if f.name in ignore or x == y:
            continue
        if not dataclasses.is_dataclass(x):
            return f.name, x, y
        if type(x) is not type(y):
            return f.name, type(x).__name__, type(y).__name__
        inner = first_difference(x, y)
        if inner is not None:
            return f"{f.name}.{inner[0]}", inner[1], inner[2]
    return None
