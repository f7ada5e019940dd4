"""The first five minutes: train, look, compare. This is what ``make demo`` runs.

Three agents learn to cover three landmarks (simple_spread). They share one network, and each keeps its own two of every
four weights. At the end there is a run folder like that of any ``k24 train``, with pictures of the learning curve and
of the masks beside it, and the policy in one file that runs without the training stack.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from k24.bench import BenchInference, measure, plan
from k24.commands.train import run_training
from k24.config import TrainConfig
from k24.errors import K24Error, UsageError
from k24.evaluate import build_env, build_learner, load_run, play, record_gif
from k24.export import export_run
from k24.inspection import inspect_learner, plot_curve, plot_inspection

EPISODES = 256


@dataclass(frozen=True)
class Options:
    """Options of the demo."""

    steps: int = 300_000
    """Environment steps."""
    task: str = "mpe/simple_spread"
    """Task, as suite/name."""
    out: Path | None = None
    """Run folder; results/demo-1, demo-2, … when not given."""


def free_folder() -> Path:
    """The first of ``results/demo-1``, ``demo-2``, … that does not exist: no demo overwrites another."""
    k = 1
    while (folder := Path("results") / f"demo-{k}").exists():
        k += 1
    return folder


def told(row: dict[str, Any]) -> str:
    """How fast the exported policy acts, from a row of the inference benchmark."""
    over = [(row[f"over_{rival}"], name) for rival, name in (("eager", "torch"), ("twin", "our own dense kernel"))]
    return f"{row['us']:.0f} µs: " + ", ".join(f"{factor:.1f}x over {name}" for factor, name in over if factor is not None)


def demo(options: Options) -> None:
    """Trains, evaluates, draws, and prints the table."""
    start = time.perf_counter()
    folder = options.out or free_folder()
    if folder.exists():
        raise UsageError(f"run folder {folder} exists: choose another --out")
    config = TrainConfig(task=options.task, steps=options.steps, eval_every=max(options.steps // 15, 1))
    env = build_env(config, 64)
    fresh = build_learner(config, env.spec)
    random_return = float(play(fresh.random_actor(), env, EPISODES).returns.mean())
    before = float(play(fresh.actor("deploy"), env, EPISODES).returns.mean())
    result = run_training(config, folder)

    run = load_run(folder)
    found = inspect_learner(run.learner)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [(line["steps"], line["return_eval"]) for line in lines if "return_eval" in line]
    plot_curve(points, folder / "curve.png", f"{config.task}, {config.algo}-{config.sharing}", {"random policy": random_return})
    plot_inspection(found, folder / "masks.png", f"masks after {run.steps:,} steps")
    record_gif(run.learner.actor("deploy"), build_env(config, 1), folder / "episode.gif")

    policy = export_run(folder, folder / "policy.safetensors")
    bench = BenchInference(policy=policy.policy, envs=(1, 32), compile="off", repeats=10)
    speed = {case.envs: measure(case, bench) for case in plan(bench)}

    table = Table(title=f"{config.task}: {config.algo} with {config.sharing}", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    low, high = result.evaluation["return_ci95"]
    rows = {
        "return of a random policy": f"{random_return:.1f}",
        "return before training": f"{before:.1f}",
        "return after training": f"{result.evaluation['return_mean']:.1f}  ({low:.1f} to {high:.1f})",
        "overall sparsity": f"{found['overall_sparsity']:.3f}",
        "mask distance between agents": f"{found['mask_hamming']:.3f}  (0 same, 0.5 independent)",
        "multiply-adds per joint action": f"{found['macs_per_act']:,}",
        "policy file": f"{policy.bytes:,} bytes: {policy.bytes / policy.dense_bytes:.2f} of one dense network, "
        f"{policy.bytes / policy.dense_bytes / policy.agents:.2f} of {policy.agents}",
        "one acting step, 1 environment": told(speed[1]),
        "one acting step, 32 environments": told(speed[32]),
        "environment steps per second": f"{result.steps_per_second:,.0f}",
        "minutes, everything included": f"{(time.perf_counter() - start) / 60:.1f}",
        "run folder": str(folder),
        "learning curve": str(folder / "curve.png"),
        "masks": str(folder / "masks.png"),
        "one episode": str(folder / "episode.gif"),
        "policy": str(policy.policy),
        "all metrics": f"tensorboard --logdir {folder}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console = Console(width=max(Console().width, 100))
    console.print(table)
    console.print("Returns are undiscounted, summed over agents and the 25 steps of an episode, and averaged over 256 episodes.")


if __name__ == "__main__":
    try:
        demo(tyro.cli(Options, description="Train K-2:4 on simple_spread and look at the result."))
    except K24Error as error:
        sys.exit(f"k24: {error}")
