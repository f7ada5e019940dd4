"""Can one shared network be many? The smallest test of a sharing scheme.

Every agent sees the SAME inputs and must match its own random two-layer teacher (16 → 32 → 8). A network that cannot
tell its agents apart can only learn the mean of the teachers. The student is 16 → H → H → 8, its layers come from the
sharing scheme, and it gets no agent index (``fups_bias``, one bias vector per agent and layer, is the strongest form of
it). Reported is the mean squared error over the variance of the targets, with the masks that would be deployed.

    python examples/hetero_regression.py --sharing k24 --agents 8
    python examples/hetero_regression.py --sharing k24 fups_bias nops --agents 2 3 8 16 32 --match macs --png regression.png
    python examples/hetero_regression.py --sharing k24 multihead --agents 2 3 8 16 32 --json regression.json   # can be stopped, and goes on

The formulation that k24 started from, in this script's options: docs/algorithm.md.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from k24.export import linear_of
from k24.files import write_atomically
from k24.inspection import deployed_bytes
from k24.sharing import SCHEMES, HyperMARLConfig, K24Config, KaleidoscopeConfig, Sharing, SharingConfig, SNPConfig, make_sharing
from k24.sparse import apply_slots
from k24.sparse.metrics import mask_distance, off_diagonal

INPUTS, TEACHER_HIDDEN, OUTPUTS, ROWS = 16, 32, 8, 256


@dataclass(frozen=True)
class Options:
    """Options of the regression."""

    sharing: tuple[str, ...] = ("k24",)
    """Sharing schemes."""
    agents: tuple[int, ...] = (3,)
    """Agents, each with its own teacher; one run for each number."""
    hidden: int = 64
    """Hidden units of the student (H)."""
    inputs: Literal["alike", "silent", "scaled"] = "alike"
    """alike: standard normal; silent: with as many between them that are always 0; scaled: with standard deviations from 0.1 to 10."""
    match: Literal["width", "macs", "bytes"] = "width"
    """What is equal between schemes: hidden units, or as near as can be the multiply-adds or the deployed bytes of k24 at --hidden."""
    png: Path | None = None
    """Draw the error over the number of agents into this file."""
    json: Path | None = None
    """Keep what is measured in this file, case by case: the same command then goes on after a stop, and the picture is drawn from it."""
    seeds: int = 5
    """Runs, with seeds 0, 1, 2, …"""
    steps: int = 3000
    """Gradient steps."""
    lr: float = 1e-3
    """Learning rate (Adam), constant for 60% of the steps and then falling to a twentieth."""
    masks: Annotated[K24Config, tyro.conf.arg(name="")] = field(default_factory=K24Config)
    """Settings of k24."""
    kaleidoscope: KaleidoscopeConfig = field(default_factory=KaleidoscopeConfig)
    """Settings of kaleidoscope."""
    snp: SNPConfig = field(default_factory=SNPConfig)
    """Settings of snp."""
    hypermarl: HyperMARLConfig = field(default_factory=HyperMARLConfig)
    """Settings of hypermarl."""

    @property
    def schemes(self) -> SharingConfig:
        """Settings of all schemes."""
        return SharingConfig(self.masks, self.kaleidoscope, self.snp, self.hypermarl)

    def settings(self) -> dict[str, Any]:
        """All that changes a number, as JSON has it."""
        asked = {key: value for key, value in asdict(self).items() if key not in ("sharing", "agents", "png", "json")}
        return json.loads(json.dumps(asked))


class Student(nn.Module):
    """Three layers of a sharing scheme, with ReLU between them."""

    def __init__(self, hidden: int, sharing: Sharing, inputs: int = INPUTS) -> None:
        super().__init__()
        sharing.linear(inputs, hidden, "input")
        sharing.linear(hidden, hidden, "hidden")
        sharing.linear(hidden, OUTPUTS, "output")
        self.layers = nn.ModuleList(sharing.layers)

    def forward(self, x: Tensor, phase: str, observe: bool = False) -> tuple[Tensor, list]:
        """Returns the outputs ``[A, rows, 8]`` and the effective weights used."""
        weights = [layer.materialise(phase) for layer in self.layers]
        for k, (layer, made) in enumerate(zip(self.layers, weights, strict=True)):
            if observe and hasattr(layer, "observe"):
                layer.observe(x.detach())
            x = apply_slots(x if k == 0 else F.relu(x), made.weight, made.bias)
        return x, weights


def teachers(agents: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random two-layer networks, one per agent, with outputs of about unit variance."""
    g = torch.Generator().manual_seed(1000 + seed)
    first = torch.randn(agents, TEACHER_HIDDEN, INPUTS, generator=g) / INPUTS**0.5
    second = torch.randn(agents, OUTPUTS, TEACHER_HIDDEN, generator=g) / TEACHER_HIDDEN**0.5
    return first, second


def sizes_of(kind: str) -> Tensor:
    """The standard deviation of each input."""
    if kind == "silent":
        return torch.tensor([1.0, 0.0]).repeat(INPUTS)
    return torch.logspace(-1, 1, INPUTS) if kind == "scaled" else torch.ones(INPUTS)


@torch.no_grad()
def cost(student: Student) -> dict[str, float]:
    """Multiply-adds of one agent's pass, and bytes that a deployment needs, as ``k24 inspect`` counts them."""
    made = [layer.materialise("deploy").weight for layer in student.layers]
    macs = sum(float((weight != 0).sum()) / len(weight) for weight in made)
    return {"macs": macs, "bytes": deployed_bytes(linear_of(layer) for layer in student.layers)}


def matched(options: Options, scheme: str, agents: int) -> int:
    """Hidden units of a scheme that cost what k24 costs at ``options.hidden``; multiples of 4, as untrained."""
    if options.match == "width":
        return options.hidden

    inputs = len(sizes_of(options.inputs))

    def costs(name: str, hidden: int) -> float:
        return cost(Student(hidden, make_sharing(name, agents, options.schemes), inputs))[options.match]

    target = costs("k24", options.hidden)
    return min(range(4, 4 * options.hidden + 1, 4), key=lambda hidden: abs(costs(scheme, hidden) - target))


def run(options: Options, scheme: str, agents: int, hidden: int, seed: int) -> dict[str, float]:
    """Trains one student and returns its normalised error and what its masks look like."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    first, second = teachers(agents, seed)
    sharing = make_sharing(scheme, agents, options.schemes)
    sizes = sizes_of(options.inputs)
    student = Student(hidden, sharing, len(sizes))
    apart = {id(p): scale for p, scale in sharing.trained_apart()}
    groups = [{"params": [p], "scale": apart.get(id(p), 1.0)} for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(groups, lr=options.lr)

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(1, rows, INPUTS, generator=generator).expand(agents, -1, -1)
        y = F.relu(x @ first.transpose(1, 2)) @ second.transpose(1, 2)
        seen = torch.zeros(agents, rows, len(sizes))
        seen[..., sizes > 0] = x
        return seen * sizes, y

    for step in range(options.steps):
        progress = step / options.steps
        factor = 1.0 if progress < 0.6 else max(0.05, 1 - (progress - 0.6) / 0.4)
        for group in optimiser.param_groups:
            group["lr"] = options.lr * group["scale"] * factor
        sharing.resample(progress, generator)
        x, y = batch(ROWS)
        out, weights = student(x, "train", observe=True)
        loss = F.mse_loss(out, y)
        aux = sharing.aux_loss(weights, loss.detach())
        optimiser.zero_grad()
        (loss if aux is None else loss + aux).backward()
        optimiser.step()
        sharing.step(progress, step, generator=generator)

    with torch.no_grad():
        x, y = batch(4096)
        out, weights = student(x, "deploy")
        nmse = float(F.mse_loss(out, y) / y.var())
        kept = [(w.weight != 0).float().expand(agents, -1, -1) for w in weights]
        distance = float(off_diagonal(mask_distance(kept)).mean())
    return {"nmse": nmse, "mask_hamming": distance, **cost(student)}


def measured(options: Options) -> list[dict]:
    """Rows of an earlier run with the same settings, from ``options.json``."""
    if options.json is None or not options.json.exists():
        return []
    try:
        kept = json.loads(options.json.read_text())
        settings, rows = kept["settings"], kept["rows"]
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"{options.json} is not what --json writes: name another file") from None
    for key, value in options.settings().items():
        if settings.get(key) != value:
            raise SystemExit(f"{options.json} was measured with {key}={settings.get(key)}, now it is {value}: name another file")
    return rows


def draw(rows: list[dict], path: Path, match: str) -> None:
    """The error over the number of agents, a line for each scheme, with the range of its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from k24.report.pictures import COLOURS

    figure, axis = plt.subplots(figsize=(6.8, 4.4), constrained_layout=True)
    for k, scheme in enumerate(dict.fromkeys(row["sharing"] for row in rows)):
        mine = [row for row in rows if row["sharing"] == scheme]
        x, y = [row["agents"] for row in mine], [row["nmse"] for row in mine]
        low, high = ([f(row["nmse_by_seed"]) for row in mine] for f in (min, max))
        style = {"linewidth": 2.6, "marker": "o"} if scheme == "k24" else {"linewidth": 1.4, "marker": "."}
        (line,) = axis.plot(x, y, label=scheme, color=COLOURS[k % len(COLOURS)], **style)  # type: ignore[arg-type]
        axis.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    equal = {"width": "hidden units", "macs": "multiply-adds", "bytes": "deployed bytes"}[match]
    axis.set(
        xscale="log", yscale="log", xlabel="agents", ylabel="normalised squared error", title=f"Agents that see the same, equal {equal}"
    )
    axis.set_xticks(sorted({row["agents"] for row in rows}), [str(n) for n in sorted({row["agents"] for row in rows})])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Runs all seeds of all cases, prints a line for each case, and all of it as JSON in the last line."""
    options = tyro.cli(Options, description=__doc__)
    for scheme in options.sharing:
        if scheme not in SCHEMES:
            raise SystemExit(f"unknown sharing scheme {scheme!r}: known are {', '.join(SCHEMES)}")
        if scheme == "seps":
            raise SystemExit("seps groups agents by what random play shows of them, and nothing is played here: leave it out")
    torch.set_num_threads(1)
    rows = measured(options)
    done = {(row["sharing"], row["agents"]) for row in rows}
    for agents in options.agents:
        print(f"| {agents} agents | hidden | error of {options.seeds} seeds (range) | multiply-adds | bytes | mask distance | s |")
        print("|---|---|---|---|---|---|---|", flush=True)
        for scheme in options.sharing:
            start = time.perf_counter()
            if (scheme, agents) not in done:
                hidden = matched(options, scheme, agents)
                found = [run(options, scheme, agents, hidden, seed) for seed in range(options.seeds)]
                row: dict[str, Any] = {key: statistics.fmean(r[key] for r in found) for key in found[0]}
                by_seed = [round(r["nmse"], 5) for r in found]
                rows.append(row | {"nmse_by_seed": by_seed, "sharing": scheme, "agents": agents, "hidden": hidden})
                if options.json is not None:
                    write_atomically(options.json, json.dumps({"settings": options.settings(), "rows": rows}).encode())
            row = next(row for row in rows if (row["sharing"], row["agents"]) == (scheme, agents))
            print(
                f"| {scheme} | {row['hidden']} | {row['nmse']:.4f} ({min(row['nmse_by_seed']):.4f} to {max(row['nmse_by_seed']):.4f}) | "
                f"{row['macs']:,.0f} | {row['bytes']:,.0f} | {row['mask_hamming']:.2f} | "
                f"{(time.perf_counter() - start) / options.seeds:.0f} |",
                flush=True,
            )
    asked = [row for row in rows if row["sharing"] in options.sharing and row["agents"] in options.agents]
    if options.png is not None:
        draw(asked, options.png, options.match)
    print(json.dumps(asked[0] if len(asked) == 1 else {"match": options.match, "rows": asked}))


if __name__ == "__main__":
    main()
