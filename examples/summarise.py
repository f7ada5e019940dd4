"""Final returns and learning curves of several seeds: a Markdown table, and a picture.

    python examples/summarise.py results/mpe/simple_spread --png docs/img/simple_spread.png
    python examples/summarise.py results/smax/smacv2_5_units --metric win_rate

Takes every run folder below the one given and groups them by the folder above ``seed<k>``. The return of a run is the
mean over the episodes of its final evaluation; the table gives the mean over seeds with its 95% interval (Student's t).
Curves of runs that were evaluated at different steps meet on straight lines between their points.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tyro.conf import Positional

# 97.5% quantiles of Student's t by degrees of freedom.
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Options:
    """Options."""

    folder: Positional[Path]
    """Folder with runs somewhere below it."""
    metric: Literal["return", "win_rate"] = "return"
    """What to compare."""
    png: Annotated[Path | None, tyro.conf.arg(help="Draw learning curves into this file.")] = None
    title: str = ""
    """Title of the picture."""


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% interval; infinite for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("inf")
    return mean, T975[min(len(values) - 1, 9)] * statistics.stdev(values) / len(values) ** 0.5


def curve(folder: Path, metric: str) -> dict[int, float]:
    """Evaluations of one run by step."""
    points: dict[int, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if f"{metric}_eval" in row:
            points[row["steps"]] = row[f"{metric}_eval"]
    return points


def draw(groups: dict[str, list[Path]], metric: str, path: Path, title: str) -> None:
    """Mean over seeds, with the range of the seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.8, 4.2), constrained_layout=True)
    for name, folders in groups.items():
        curves = [curve(f, metric) for f in folders]
        end = min(max(c) for c in curves)
        steps = sorted(s for c in curves for s in c if s <= end)
        rows = np.stack([np.interp(steps, list(c), list(c.values())) for c in curves], 1).tolist()
        (line,) = axis.plot(steps, [statistics.fmean(r) for r in rows], linewidth=2, label=f"{name} ({len(folders)} seeds)")
        axis.fill_between(steps, [min(r) for r in rows], [max(r) for r in rows], alpha=0.2, color=line.get_color())
    what = {"return": "return (sum over agents and steps)", "win_rate": "episodes won"}[metric]
    axis.set(xlabel="environment steps", ylabel=what, title=title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints the table, and the same as JSON in the last line."""
    options = tyro.cli(Options, description=__doc__)
    groups: dict[str, list[Path]] = defaultdict(list)
    for found in sorted(options.folder.rglob("eval.json")):
        groups[found.parent.parent.name].append(found.parent)
    if not groups:
        raise SystemExit(f"no finished runs below {options.folder}: a finished run holds eval.json")
    result = {}
    print(f"| scheme | seeds | {options.metric.replace('_', ' ')} | 95% interval | each seed |\n|---|---|---|---|---|")
    digits = 1 if options.metric == "return" else 3
    for name, folders in groups.items():
        key = {"return": "return_mean", "win_rate": "win_rate"}[options.metric]
        values = [json.loads((f / "eval.json").read_text())[key] for f in folders]
        mean, half = interval(values)
        low, middle, high, *each = (f"{v:.{digits}f}" for v in (mean - half, mean, mean + half, *values))
        print(f"| {name} | {len(values)} | {middle} | {low} to {high} | {', '.join(each)} |")
        result[name] = {"mean": mean, "half_width": half, "values": values}
    if options.png is not None:
        draw(groups, options.metric, options.png, options.title)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
