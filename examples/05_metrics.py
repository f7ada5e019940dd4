"""What a run has logged, read back and drawn: return, temperature, pattern entropy, and the masks themselves.

    python examples/05_metrics.py
    python examples/05_metrics.py --run results/mpe/simple_spread/qmix-k24/seed0 --out results/pictures

A run folder keeps the same numbers twice: in ``metrics.jsonl``, one line per time of logging, and in TensorBoard's event files. Both are
read here, and must agree. The masks come from the newest checkpoint. ``k24 inspect RUN --png FILE`` draws more of them, and
``tensorboard --logdir RUN`` all curves.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from k24.config import TrainConfig
from k24.evaluate import Run, load_run
from k24.learners import ValueConfig
from k24.sparse import MaskedLinear
from k24.train import train

Curve = list[tuple[int, float]]
DRAWN = {"return_eval": "return (deployed masks)", "temperature": "temperature", "pattern_entropy": "pattern entropy [bits]"}


@dataclass(frozen=True)
class Options:
    """Options of the example."""

    run: Path | None = None
    """Run folder of a k24 scheme; a small one is trained when not given."""
    steps: int = 2400
    """Environment steps of that training."""
    out: Path | None = None
    """Folder for everything written; a temporary one when not given."""


def train_small(steps: int, folder: Path) -> None:
    """Four agents that see the same learn to act differently."""
    config = TrainConfig(
        task="toy/specialisation",
        env_args=("n_agents=4",),
        steps=steps,
        envs=16,
        hidden=16,
        device="cpu",
        log_every=steps // 50,
        eval_every=steps // 25,
        eval_episodes=32,
        learner=ValueConfig(lr=5e-3, batch_size=32, buffer_size=256, env_steps_per_update=8, target_update=20, epsilon_anneal=steps // 4),
    )
    train(config, folder)


def from_jsonl(run: Path) -> dict[str, Curve]:
    """Every metric as (environment steps, value); not every line has every metric."""
    curves: dict[str, Curve] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name != "steps":
                curves.setdefault(name, []).append((row["steps"], value))
    return curves


def from_events(run: Path) -> dict[str, Curve]:
    """The same from TensorBoard's event files, which keep float32."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})  # 0: all of them, none left out
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def agree(one: dict[str, Curve], other: dict[str, Curve]) -> bool:
    """Whether both hold the same curves, to the precision of float32."""
    return one.keys() == other.keys() and all(np.allclose(one[name], other[name], rtol=1e-6, equal_nan=True) for name in one)


def masks_of(run: Run) -> tuple[str, np.ndarray]:
    """The largest masked layer's name and each agent's mask of it ``[agents, outputs, inputs]``, as it would be deployed."""
    masked = {name: layer for name, layer in run.learner.net.layers.items() if isinstance(layer, MaskedLinear)}
    name = max(masked, key=lambda name: masked[name].weight.numel())
    return name, masked[name].eval().mask().numpy()


def draw(curves: dict[str, Curve], name: str, masks: np.ndarray, path: Path) -> None:
    """Three curves above, the masks of the first four agents below."""
    shown = masks[:4]
    figure = plt.figure(figsize=(12, 7.5), constrained_layout=True)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    for axis, (metric, label) in zip(above.subplots(1, 3), DRAWN.items(), strict=True):
        steps, values = zip(*curves[metric], strict=True)
        axis.plot(steps, values, color="C0")
        axis.set(xlabel="environment steps", title=label)
        axis.grid(alpha=0.3)
        if metric != "return_eval":
            axis.set_ylim(0, 1.05 * max(values))
    for k, axis in enumerate(np.atleast_1d(below.subplots(1, len(shown)))):
        axis.imshow(shown[k], cmap="Greys", aspect="auto", interpolation="nearest")
        axis.set(title=f"{name}, agent {k}", xlabel="inputs", ylabel="outputs" if k == 0 else "")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(options: Options, folder: Path) -> None:
    """Reads, compares, draws."""
    folder.mkdir(parents=True, exist_ok=True)
    run = options.run or folder / "run"
    if options.run is None:
        train_small(options.steps, run)
    curves, events = from_jsonl(run), from_events(run)
    print(f"metrics.jsonl        {len(curves)} metrics, {len(curves['temperature'])} lines")
    print(f"TensorBoard events   {len(events)} metrics, the same values: {agree(curves, events)}")
    for metric in DRAWN:
        (first, begun), (last, ended) = curves[metric][0], curves[metric][-1]
        print(f"{metric:<20} {begun:.3f} at step {first:,}, {ended:.3f} at step {last:,}")
    name, masks = masks_of(load_run(run))
    apart = [float((masks[i] != masks[j]).mean()) for i in range(len(masks)) for j in range(i)]
    print(f"masks of {name:<11} {masks.mean():.3f} of the weights kept; agents differ in {np.mean(apart or [0.0]):.3f} of them")
    draw(curves, name, masks, folder / "metrics.png")
    print(f"picture              {folder / 'metrics.png'}")


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__)
    main(chosen, chosen.out or Path(tempfile.mkdtemp(prefix="k24-metrics-")))
