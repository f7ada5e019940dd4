"""``k24 eval``, ``k24 export`` and ``k24 inspect``: what can be done with a policy, be it a run's newest or a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from k24.commands.options import RunFolder, parse
from k24.errors import UsageError


def is_policy_file(path: Path) -> bool:
    """Whether a path is meant as a policy file; a run is a folder."""
    return path.is_file() or (path.suffix == ".safetensors" and not path.is_dir())


# eval -------------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalOptions:
    """Play a trained policy without exploration."""

    run: RunFolder
    """Run folder, or policy file."""
    episodes: int = 256
    """Episodes."""
    seed: int = 1
    """Seed of the episodes."""
    masks: Literal["argmax", "sampled", "expected"] = "argmax"
    """Which masks act: the most likely ones, as deployed; a fresh draw per round; or what training behaves by. A file has the first."""
    backend: str = "auto"
    """What runs a policy file; auto takes the fastest here."""
    env_args: tuple[str, ...] = ()
    """Arguments of a policy file's task in place of those it was trained with, each as name=value."""
    gif: Path | None = None
    """Save one episode as a moving picture."""
    task: str | None = None
    """Of a policy file, what to play; the task it was trained on when left out."""
    sample: bool = False
    """Draw actions from a policy that is a distribution (IPPO, MAPPO) instead of taking its likeliest ones."""
    random: bool = False
    """Play at random instead, for comparison."""
    device: str = "auto"
    """cpu, cuda or auto."""


def eval_command(arguments: list[str]) -> None:
    """Reads the options, plays, and prints the result as JSON in the last line."""
    options = parse(
        EvalOptions, arguments, "eval", description="Play a trained policy without exploration; returns are summed over agents and steps."
    )
    import torch

    from k24.allocator import told_when_memory_is_short
    from k24.evaluate import EVAL_SEED, open_policy, open_run, play, record_gif, require_picture, resolve_device, summary

    if options.episodes < 1:
        raise UsageError(f"episodes (={options.episodes}) must be at least 1")
    if not 0 <= options.seed < 2**20:
        raise UsageError(f"seed (={options.seed}) must lie in 0 … {2**20 - 1}")
    if options.sample and options.random:
        raise UsageError("--sample and --random exclude each other: give one of them")
    device = resolve_device(options.device)
    if is_policy_file(options.run):
        if options.masks != "argmax":
            raise UsageError(f"--masks {options.masks} needs a run: a policy file holds its most likely masks alone")
        player = open_policy(options.run, device, options.backend, options.env_args, options.random, options.task, options.sample)
    else:
        if options.backend != "auto" or options.env_args or options.task is not None:
            given = "--env-args" if options.env_args else "--task" if options.task is not None else f"--backend {options.backend}"
            raise UsageError(f"{given} needs a policy file: {options.run} is a run, export it with 'k24 export' first")
        phase: Any = {"argmax": "deploy", "sampled": "sampled", "expected": "act"}[options.masks]
        player = open_run(options.run, device, phase, options.random, options.sample, options.seed)
    with told_when_memory_is_short("play fewer --episodes, or shorter ones"), torch.random.fork_rng(devices=[]):
        if options.gif is not None:
            canvas = player.make_env(1)
            canvas.reset(EVAL_SEED)
            require_picture(canvas)  # before all episodes are played
        env = player.make_env(min(options.episodes, 64))
        torch.manual_seed(options.seed)
        seed = EVAL_SEED + options.seed * 1000
        found = summary(play(player.actor, env, options.episodes, seed))
    if options.gif is not None:
        record_gif(player.actor, canvas, options.gif, seed)
        print(f"episode drawn in {options.gif}")
    low, high = found["return_ci95"]
    # Asked now, because auto may settle on a backend while it plays.
    how = "" if player.policy is None else f", {player.policy.backend}"
    print(f"return {found['return_mean']:.2f} (95% interval {low:.2f} to {high:.2f}, {found['episodes']} episodes{how})")
    if "win_rate" in found:
        low, high = found["win_rate_ci95"]
        print(f"won {found['win_rate']:.1%} (95% interval {low:.1%} to {high:.1%})")
    print(
        json.dumps(
            {**found, "masks": options.masks, "sample": options.sample, "steps": player.steps, "task": player.task, "policy": player.name}
        )
    )


# export -----------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportOptions:
    """Write a run's newest policy into one file."""

    run: RunFolder
    """Run folder."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Policy file to write, *.safetensors."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the weights; biases stay float32."""
    onnx: Path | None = None
    """Also write an ONNX file, *.onnx: float32, with masks multiplied in."""


def export_command(arguments: list[str]) -> None:
    """Reads the options, writes, and prints what was written as JSON in the last line."""
    options = parse(
        ExportOptions, arguments, "export", description="Write a run's newest policy, with its most likely masks, into one file."
    )
    from k24.export import export_run

    done = export_run(options.run, options.out, options.dtype, options.onnx)
    one, agents = done.dense_bytes, done.agents
    print(f"policy of {agents} agents in {done.policy}: {done.bytes:,} bytes, weights in {done.dtype}")
    print(f"{done.bytes / one:.2f} of one dense network ({one:,} bytes), {done.bytes / one / agents:.2f} of {agents} ({one * agents:,})")
    if done.steps < done.planned:
        print(f"trained for {done.steps:,} of {done.planned:,} steps: an unfinished policy")
    if done.onnx is not None:
        print(f"ONNX, float32 with masks multiplied in: {done.onnx}, {done.onnx.stat().st_size:,} bytes")
    print(json.dumps(asdict(done), default=str))


# inspect ----------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InspectOptions:
    """Look at a policy's masks."""

    run: RunFolder
    """Run folder, or policy file."""
    png: Path | None = None
    """Draw mask distances, pattern usage and sparsity into this file."""


# What the JSON line holds of what is found.
PUBLIC = ("overall_sparsity", "pattern_entropy", "mask_hamming", "params", "macs_per_act", "bytes", "layers", "pattern_usage", "distance")


def inspect_command(arguments: list[str]) -> None:
    """Reads the options and prints tables, then the figures as JSON in the last line."""
    options = parse(InspectOptions, arguments, "inspect", description="Look at masks as they are deployed, of a run or of a policy file.")
    from rich.console import Console
    from rich.table import Table

    from k24.inspection import inspect_learner, inspect_net, plot_inspection
    from k24.sparse.metrics import most_bits

    if is_policy_file(options.run):
        from k24.artifact import read_policy

        net, spec, _ = read_policy(options.run)
        about: Any = spec
        steps, found, counted = spec.steps, inspect_net(net, spec.n_agents), "in the file"
    else:
        from k24.evaluate import load_run

        run = load_run(options.run)
        about, steps, found, counted = run.config, run.steps, inspect_learner(run.learner), "trained"
    console = Console(markup=False)
    title = f"{about.task}  {about.algo}-{about.sharing}  step {steps:,}"
    console.print(title)
    table = Table()
    table.add_column("layer")
    table.add_column("sparsity", justify="right")
    for name, sparsity in found["layers"].items():
        table.add_row(name, f"{sparsity:.3f}")
    table.add_row("overall", f"{found['overall_sparsity']:.3f}")
    console.print(table)
    if found["pattern_usage"] is not None:
        usage = found["pattern_usage"]
        if len(usage) <= 12:
            console.print("pattern usage  " + "  ".join(f"{k}: {p:.3f}" for k, p in enumerate(usage)))
        console.print(
            f"pattern entropy {found['pattern_entropy']:.3f} bits of {most_bits(len(usage)):.3f}; weights that no agent "
            f"keeps {found['dead_weight_frac']:.3f}"
        )
    console.print("mask distance between agents (0 same, 0.5 independent)")
    for row in found["distance"][:16]:
        console.print("  " + " ".join(f"{v:.2f}" for v in row[:16]))
    console.print(f"parameters {counted}: {found['params']:,}")
    console.print(f"deployed: {found['bytes']:,} bytes, {found['macs_per_act']:,} multiply-adds per joint action")
    if options.png is not None:
        plot_inspection(found, options.png, title)
        console.print(f"drawn in {options.png}")
    print(json.dumps({k: found[k] for k in PUBLIC}))
