"""Training from Python: one typed configuration in, a run folder and a result out; and a run that was stopped goes on.

    python examples/02_train.py
    python examples/02_train.py --steps 4800 --seed 1 --out results/from-python

This is what ``k24 train`` does. The same run is trained twice: in one go, and stopped half-way, as by a kill, and resumed. Both end the
same, bit for bit. The game: three agents see the same and must act differently, so that a network which can't tell them apart fails.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from k24.config import TrainConfig, load_config
from k24.evaluate import load_run
from k24.learners import ValueConfig
from k24.train import Progress, train


@dataclass(frozen=True)
class Options:
    """Options of the example."""

    steps: int = 2400
    """Environment steps."""
    seed: int = 0
    """Seed of everything random."""
    out: Path | None = None
    """Folder for the two run folders; a temporary one when not given."""


def settings(options: Options) -> TrainConfig:
    """Everything not named here has its default; each field of TrainConfig says what it is."""
    return TrainConfig(
        task="toy/specialisation",
        env_args=("n_agents=3",),
        algo="qmix",
        sharing="k24",
        steps=options.steps,
        seed=options.seed,
        envs=16,
        hidden=16,
        device="cpu",
        log_every=options.steps // 10,
        eval_every=options.steps // 10,
        eval_episodes=32,
        # Settings of the learner are of its kind: ValueConfig for iql, vdn and qmix, PPOConfig for ippo and mappo, TD3Config for matd3.
        learner=ValueConfig(
            lr=5e-3, batch_size=32, buffer_size=256, env_steps_per_update=8, target_update=20, epsilon_anneal=options.steps // 4
        ),
    )


def main(options: Options, folder: Path) -> None:
    """Trains twice, and says what came of it."""
    config = settings(options)
    seen: list[Progress] = []
    whole = train(config, folder / "whole", on_progress=seen.append)
    print(f"trained              {whole.folder}: {whole.steps:,} steps, {len(seen)} rounds")
    print(f"return               {whole.evaluation['return_mean']:.3f} over {whole.evaluation['episodes']} episodes")

    parts = folder / "parts"
    half: list[Progress] = []
    stopped = train(config, parts, on_progress=half.append, should_stop=lambda: half[-1].steps >= config.steps // 2)
    print(f"stopped              {stopped.folder}: after {stopped.steps:,} steps, finished: {stopped.finished}")
    # The run folder knows its settings. Those that change nothing of the result, such as device and threads, may be others now.
    resumed = train(replace(load_config(parts / "config.yaml"), checkpoint_every=1000), parts, resume=True)
    print(f"resumed              to {resumed.steps:,} steps, return {resumed.evaluation['return_mean']:.3f}")
    same = all((whole.folder / name).read_bytes() == (parts / name).read_bytes() for name in ("eval.json", "metrics.jsonl"))
    print(f"same as in one go    {same}: evaluation and every line of metrics")

    rows = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
    curve = [f"{row['return_eval']:.2f}" for row in rows if "return_eval" in row]
    print(f"learning curve       {' '.join(curve)}")
    run = load_run(whole.folder)  # the newest checkpoint as a learner, to look at or to play
    print(f"parameters           {sum(p.numel() for p in run.learner.net.parameters()):,} in {type(run.learner).__name__}")


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    main(chosen, chosen.out or Path(tempfile.mkdtemp(prefix="k24-train-")))
