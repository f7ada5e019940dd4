"""Can one shared network be many? The smallest test of a sharing scheme.

Every agent sees the SAME inputs and must match its own random two-layer teacher (16 → 32 → 8). A network that cannot
tell its agents apart can only learn the mean of the teachers. The student is 16 → H → H → 8, its layers come from the
sharing scheme, and it gets no agent index (``fups_id`` here means one bias vector per agent and layer, the strongest
form of it). Reported is the mean squared error over the variance of the targets, with the masks that would be deployed.

    python examples/hetero_regression.py --sharing k24 --agents 8 python examples/hetero_regression.py --logits sum
    --normalise none --alpha-lr-scale 1 --forward gumbel --temperature-on all   # the first formulation
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from k24.sharing import SCHEMES, DenseLinear, K24Config, KaleidoscopeConfig, Sharing, SharingConfig, make_sharing
from k24.sparse import apply_slots
from k24.sparse.metrics import mask_distance, off_diagonal

INPUTS, TEACHER_HIDDEN, OUTPUTS, ROWS = 16, 32, 8, 256


@dataclass(frozen=True)
class Options:
    """Options of the regression."""

    sharing: str = "k24"
    """Sharing scheme."""
    hidden: int = 64
    """Hidden units of the student (H)."""
    agents: int = 3
    """Agents, each with its own teacher."""
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


class Student(nn.Module):
    """Three layers of a sharing scheme, with ReLU between them."""

    def __init__(self, hidden: int, sharing: Sharing, own_bias: bool) -> None:
        super().__init__()
        n = sharing.n_slots
        if own_bias:
            sharing.layers.extend(DenseLinear(i, o, n, own_bias=True, bias_scale=0.1) for i, o in self.sizes(hidden))
        else:
            for (i, o), role in zip(self.sizes(hidden), ("input", "hidden", "output"), strict=True):
                sharing.linear(i, o, role)  # type: ignore[arg-type]
        self.layers = nn.ModuleList(sharing.layers)

    @staticmethod
    def sizes(hidden: int) -> list[tuple[int, int]]:
        """Inputs and outputs of each layer."""
        return [(INPUTS, hidden), (hidden, hidden), (hidden, OUTPUTS)]

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


def run(options: Options, seed: int) -> dict[str, float]:
    """Trains one student and returns its normalised error and what its masks look like."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    first, second = teachers(options.agents, seed)
    sharing = make_sharing(options.sharing, options.agents, SharingConfig(options.masks, options.kaleidoscope))
    student = Student(options.hidden, sharing, own_bias=options.sharing == "fups_id")
    apart = {id(p): scale for p, scale in sharing.trained_apart()}
    groups = [{"params": [p], "scale": apart.get(id(p), 1.0)} for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(groups, lr=options.lr)

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(1, rows, INPUTS, generator=generator).expand(options.agents, -1, -1)
        return x, F.relu(x @ first.transpose(1, 2)) @ second.transpose(1, 2)

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
        kept = [(w.weight != 0).float() for w in weights]
        macs = sum(float(k.mean()) * i * o for k, (i, o) in zip(kept, Student.sizes(options.hidden), strict=True))
        distance = float(off_diagonal(mask_distance(kept)).mean())
    return {"nmse": nmse, "macs": round(macs), "mask_hamming": distance}


def main() -> None:
    """Runs all seeds, prints each, and the means as JSON in the last line."""
    options = tyro.cli(Options, description=__doc__)
    if options.sharing not in SCHEMES:
        raise SystemExit(f"unknown sharing scheme {options.sharing!r}: known are {', '.join(SCHEMES)}")
    torch.set_num_threads(1)
    results = []
    for seed in range(options.seeds):
        start = time.perf_counter()
        results.append(run(options, seed))
        print(
            f"seed {seed}: nmse {results[-1]['nmse']:.4f}  mask distance {results[-1]['mask_hamming']:.3f} "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    mean = {key: sum(r[key] for r in results) / len(results) for key in results[0]}
    print(
        json.dumps({**mean, "nmse_by_seed": [round(r["nmse"], 5) for r in results], "sharing": options.sharing, "hidden": options.hidden})
    )


if __name__ == "__main__":
    main()
