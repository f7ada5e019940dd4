"""Draws the pictures of this folder that no command of k24 draws.

    python docs/_pictures.py architecture     # what K-2:4 does, from weights to a policy file, computed on a small layer
    python docs/_pictures.py speed            # an acting step beside the same without masks, from benchmarks/results

Each writes docs/img/NAME.png, the same one every time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from json import loads
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import torch
from torch import Tensor

from k24.report.pictures import COLOURS
from k24.sparse import MaskedLinear, pack_codes, pattern_orthogonality
from k24.sparse.metrics import mask_distance, off_diagonal
from k24.sparse.scoring import score

matplotlib.use("Agg", force=False)
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = """\
by commands of k24:
  k24 inspect RUN --png docs/img/masks.png   how far apart the agents' masks are
  k24 report DIR                             learning curves of all runs below DIR, and their tables
  k24 eval RUN --gif FILE                    an episode as a moving picture
"""

# Nine inches shown at some 900 pixels: a point of font is 1.4 pixels there.
WIDTH, DPI = 9.0, 200
PAPER, INK, GREY, PALE = "#ffffff", "#222222", "#6b6b6b", "#e2e2e2"
SMALL, PLAIN, LARGE = 9.0, 9.5, 11.0

# --- architecture ---------------------------------------------------------------------------------------------------------------------

AGENTS, SIDE, STEPS = 3, 8, 100
TEMPERATURES = (1.0, 0.3, 0.03)
BAR_SHADES = (0.0, 0.45, 1.0)


@dataclass(frozen=True)
class Example:
    """A small layer after a training.

    Attributes:
        weight: ``[O, I]``.
        alpha: ``[A, O, I]``.
        score: ``[A, O, I]``.
        pi: Distribution over patterns at each of :data:`TEMPERATURES`, ``[T, P, A, O, G]``.
        mask: Deployed masks of zeros and ones ``[A, O, I]``.
        packed: Each agent's patterns as they are stored, uint8 ``[A, bytes]``.
        patterns: ``[P, M]``.
    """

    weight: Tensor
    alpha: Tensor
    score: Tensor
    pi: Tensor
    mask: Tensor
    packed: Tensor
    patterns: Tensor

    def group(self) -> tuple[int, int]:
        """Row and group to look at closely: the last of that row where all agents end up apart, least decided while it is warm."""
        codes, last = self.pi[-1].argmax(0)[..., -1], self.pi.shape[-1] - 1
        apart = torch.tensor([len(set(row)) == AGENTS for row in codes.T.tolist()])
        return int(self.pi[0, ..., -1].amax((0, 1)).masked_fill(~apart, 2.0).argmin()), last


@cache
def example() -> Example:
    """Trains three agents with inputs and targets of their own on one 8×8 layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer = MaskedLinear(SIDE, SIDE, AGENTS, bias=False)
        targets, scale = torch.randn(AGENTS, SIDE, SIDE), 0.25 + 1.5 * torch.rand(AGENTS, 1, SIDE)
        adam = torch.optim.Adam([{"params": [layer.weight], "lr": 3e-3}, {"params": [layer.alpha], "lr": 0.02}])
        for step in range(STEPS):
            layer.resample(step / STEPS)
            x = torch.randn(AGENTS, 64, SIDE) * scale
            loss = (layer(x) - x @ targets.mT).square().mean() + 0.1 * pattern_orthogonality([layer.probabilities()])
            adam.zero_grad()
            loss.backward()
            adam.step()
    with torch.no_grad():
        pi = []
        for layer.temperature in TEMPERATURES:
            pi.append(layer.probabilities())
        scores = score(layer.weight, layer.running_magnitude(), layer.alpha, layer.config.gate)
        layer.freeze()
        packed = torch.stack([pack_codes(codes, layer.patterns) for codes in layer.codes])
        mask, table = layer.mask(), layer.patterns.table
    return Example(layer.weight.detach(), layer.alpha.detach(), scores, torch.stack(pi), mask, packed, table)


class Sheet:
    """One drawing with inches for coordinates, from the top left corner."""

    cell, between = 0.112, 0.05

    def __init__(self, height: float) -> None:
        self.figure = plt.figure(figsize=(WIDTH, height), facecolor=PAPER)
        self.axis = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        self.axis.axis("off")

    def text(self, x: float, y: float, words: str, size: float = PLAIN, colour: str = INK, **how: Any) -> None:
        self.axis.text(x, y, words, **{"fontsize": size, "color": colour, "ha": "center", "va": "center", "linespacing": 1.25, **how})

    def box(self, x: float, y: float, width: float, height: float, colour: Any, **how: Any) -> None:
        self.axis.add_patch(Rectangle((x, y), width, height, **{"facecolor": colour, "linewidth": 0, **how}))

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        how = {"arrowstyle": "-|>", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.2, "color": GREY}
        self.axis.add_patch(FancyArrowPatch(start, end, **how))

    def place(self, column: int) -> float:
        """Where a column of a matrix begins, in inches from its left edge; groups of four stand apart."""
        return column * self.cell + column // 4 * self.between

    def matrix(
        self, x: float, y: float, shades: Tensor, colour: str, mask: Tensor | None = None, group: tuple[int, int] | None = None
    ) -> None:
        """Draws ``[O, I]`` of 0 to 1 as shades of a colour, empty where a mask drops the weight, one group framed."""
        for o, i in torch.cartesian_prod(*map(torch.arange, shades.shape)).tolist():
            kept = mask is None or bool(mask[o, i])
            face, edge = (shade(colour, float(shades[o, i])), PAPER) if kept else (PAPER, PALE)
            self.box(x + self.place(i), y + o * self.cell, self.cell, self.cell, face, edgecolor=edge, linewidth=0.6)
        if group is not None:
            where = x + self.place(4 * group[1]), y + group[0] * self.cell
            self.box(*where, 4 * self.cell, self.cell, "none", edgecolor=INK, linewidth=1.3, zorder=3)


def shade(colour: str, strength: float) -> tuple[float, ...]:
    """A colour mixed with white: itself at 1, a third of it at 0, which still differs from none."""
    part = (1 + 2 * strength) / 3
    return tuple(1 - part * (1 - channel) for channel in matplotlib.colors.to_rgb(colour))


def ranked(values: Tensor) -> Tensor:
    """Each value's place among all, from 0 to 1: the shades of a matrix whatever its spread."""
    return values.flatten().argsort().argsort().view(values.shape) / (values.numel() - 1)


def architecture() -> plt.Figure:
    """K-2:4 from left to right: weights, what each agent adds, scores, patterns, masked nets, file."""
    found = example()
    row, group = found.group()
    sheet = Sheet(5.4)
    size, wide = SIDE * sheet.cell, SIDE * sheet.cell + sheet.between
    tops = [1.3 + k * 1.36 for k in range(AGENTS)]
    columns = ("weights", "agents", "scores", "2:4 patterns", "masked nets", "one file")
    left = dict(zip(columns, (0.2, 1.52, 2.78, 4.05, 6.31, 7.6), strict=True))
    width = {**dict.fromkeys(columns, wide), "2:4 patterns": 1.93, "one file": WIDTH - 0.12 - left["one file"]}
    below = {
        "weights": "one matrix $W$\nfor all agents",
        "agents": "a learned $\\alpha_i$\nfor every weight",
        "scores": "$|W|\\cdot\\exp(\\alpha_i)$",
        "masked nets": "same weights,\nother halves",
        "one file": "weights once, 3 bits\nper group and agent",
    }
    for name in columns:
        centre = left[name] + width[name] / 2
        sheet.text(centre, 0.34, name, LARGE, weight="bold", va="baseline")
        for line, words in enumerate(below.get(name, "").split("\n")):
            sheet.text(centre, 0.58 + 0.19 * line, words, SMALL, GREY, va="baseline")
    _legend(sheet, left["2:4 patterns"] + width["2:4 patterns"] / 2)

    sheet.matrix(left["weights"], tops[1], ranked(found.weight.abs()), INK)
    sheet.text(left["weights"] + wide / 2, tops[1] + size + 0.15, "darker: larger", SMALL, GREY)
    for agent, top in enumerate(tops):
        colour, centre = COLOURS[agent], top + size / 2
        sheet.text(left["agents"], top - 0.1, f"agent {agent}", PLAIN, colour, ha="left", va="baseline", weight="bold")
        sheet.matrix(left["agents"], top, ranked(found.alpha[agent]), colour)
        sheet.matrix(left["scores"], top, ranked(found.score[agent]), colour, group=(row, group))
        _bars(sheet, left["2:4 patterns"], top, found.pi[:, :, agent, row, group], found.patterns, colour)
        sheet.matrix(left["masked nets"], top, ranked(found.weight.abs()), colour, found.mask[agent], (row, group))
        sheet.arrow((left["weights"] + wide + 0.06, tops[1] + size / 2), (left["agents"] - 0.07, centre))
        framed = top + (row + 0.5) * sheet.cell
        for before, after in pairwise(columns[1:]):
            y = framed if "2:4 patterns" in (before, after) else centre
            sheet.arrow((left[before] + width[before] + 0.06, y), (left[after] - 0.07, y))
        if agent:
            sheet.text(left["2:4 patterns"] + width["2:4 patterns"] / 2, top - 0.2, "↕ kept apart by the task alone", SMALL, GREY)
    apart = off_diagonal(mask_distance([found.mask]))
    words = f"two agents differ in\n{apart.min():.0%} to {apart.max():.0%} of places"
    sheet.text(left["masked nets"] + wide / 2, tops[-1] + size + 0.25, words, SMALL, GREY)
    _file(sheet, left["one file"], width["one file"], tops[0] - 0.16, tops[-1] + size, found)
    return sheet.figure


def _legend(sheet: Sheet, centre: float) -> None:
    """Which bar belongs to which temperature."""
    sheet.text(centre, 0.58, "framed group: probability at", SMALL, GREY, va="baseline")
    sheet.text(centre - 1.02, 0.77, "temperature", SMALL, GREY, ha="left", va="baseline")
    for x, temperature, strength in zip((-0.18, 0.13, 0.55), TEMPERATURES, BAR_SHADES, strict=True):
        sheet.box(centre + x, 0.68, 0.09, 0.09, shade(GREY, strength))
        sheet.text(centre + x + 0.13, 0.77, f"{temperature:g}", SMALL, GREY, ha="left", va="baseline")


def _bars(sheet: Sheet, x: float, y: float, pi: Tensor, patterns: Tensor, colour: str) -> None:
    """Probability of each pattern ``[T, P]`` while the temperature falls, above the patterns themselves."""
    pitch, cell, tall = 0.33, 0.07, SIDE * sheet.cell - 0.12
    for code, pattern in enumerate(patterns):
        left = x + code * pitch
        for k, probability in enumerate(pi[:, code].tolist()):
            sheet.box(left + k * 4 * cell / 3, y + tall * (1 - probability), 0.083, tall * probability, shade(colour, BAR_SHADES[k]))
        sheet.box(left, y + tall, 4 * cell, 0.008, GREY)
        for place, kept in enumerate(pattern.tolist()):
            sheet.box(left + place * cell, y + tall + 0.05, cell, cell, INK if kept else PAPER, edgecolor=GREY, linewidth=0.6)


def _file(sheet: Sheet, left: float, width: float, top: float, bottom: float, found: Example) -> None:
    """A policy file: the weights once, and each agent's patterns bit by bit, a row of the matrix in a line."""
    how = {"boxstyle": "round,pad=0,rounding_size=0.08", "facecolor": "#f8f8f8", "edgecolor": GREY, "linewidth": 1.0, "zorder": 0}
    sheet.axis.add_patch(FancyBboxPatch((left, top), width, bottom - top, **how))
    centre = left + width / 2
    sheet.matrix(centre - (SIDE * sheet.cell + sheet.between) / 2, top + 0.16, ranked(found.weight.abs()), INK)
    sheet.text(centre, top + 1.22, f"{4 * found.weight.numel()} bytes", SMALL)
    bits = (found.packed[..., None] >> torch.arange(8)) & 1
    for agent, stream in enumerate(bits.view(AGENTS, SIDE, -1)):
        x, y, cell = left + 0.14, top + 1.56 + agent * 0.75, 0.07
        for o, line in enumerate(stream.tolist()):
            for place, bit in enumerate(line):
                where = x + place * cell + place // 3 * 0.03, y + o * cell
                sheet.box(*where, cell, cell, COLOURS[agent] if bit else PAPER, edgecolor=COLOURS[agent], linewidth=0.4)
        sheet.text(x + 0.56, y + SIDE / 2 * cell, f"{len(found.packed[agent])} bytes", SMALL, ha="left")


# --- speed ----------------------------------------------------------------------------------------------------------------------------

MEASURED, GRID, MACHINE = ROOT / "benchmarks/results/xeon-207.json", "acting step", "an Intel Xeon (model 207, AVX-512)"
# Key of a case, name on the picture.
RIVALS = {
    "over_eager": "PyTorch, eager",
    "over_torch": "PyTorch, everything bound",
    "over_onnx": "ONNX Runtime",
    "over_twin": "our own kernel, dense",
    "over_shared": "one dense net for all",
}


@dataclass(frozen=True)
class Gain:
    """How many times faster than a rival the masked step is, over the cases of one number of rows.

    Attributes:
        middle: Median.
        low: Smallest case.
        high: Largest case.
        cases: All of them.
    """

    middle: float
    low: float
    high: float
    cases: int

    def __str__(self) -> str:
        """As on the picture, such as ``4.1x``; below 2, where a tenth is much, in steps of 0.05."""
        return f"{self.middle:.1f}x" if self.middle >= 2 else f"{round(self.middle * 20) / 20:g}x"


def gains(measured: dict[str, Any]) -> dict[int, dict[str, Gain]]:
    """What the speed picture shows, by rows per agent and by rival.

    Args:
        measured: The grid of the acting step, of a file in benchmarks/results.
    """
    found: dict[int, dict[str, Gain]] = {}
    for rows in sorted({case["envs"] for case in measured["rows"]}):
        cases = [case for case in measured["rows"] if case["envs"] == rows]
        values = {key: [case[key] for case in cases] for key in RIVALS}
        found[rows] = {key: Gain(median(v), min(v), max(v), len(v)) for key, v in values.items()}
    return found


def speed() -> plt.Figure:
    """An acting step beside four others, for one, eight and 32 rows per agent: medians, and the range of cases."""
    measured = loads(MEASURED.read_text(encoding="utf-8"))[GRID]
    found = gains(measured)
    figure, axes = plt.subplots(1, len(found), figsize=(WIDTH, 3.3), sharex=True, sharey=True, facecolor=PAPER)
    figure.subplots_adjust(left=0.21, right=0.985, top=0.79, bottom=0.235, wspace=0.06)
    for axis, (rows, by_rival) in zip(axes, found.items(), strict=True):
        axis.axvline(1, color=INK, linewidth=1.2)
        for place, gain in enumerate(by_rival.values()):
            colour = COLOURS[place]
            axis.plot([gain.low, gain.high], [place, place], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
            axis.plot(gain.middle, place, "o", color=colour, markersize=8)
            axis.text(gain.low, place - 0.2, str(gain), fontsize=PLAIN, color=INK, ha="left", va="bottom", weight="bold")
        axis.set_title(f"{rows} row{'s' if rows > 1 else ''} per agent", fontsize=PLAIN, color=INK)
        axis.set(xscale="log", xlim=(0.7, 22), ylim=(len(RIVALS) - 0.5, -0.7))
        axis.set_xticks([1, 2, 4, 8, 16], ["1x", "2x", "4x", "8x", "16x"], fontsize=SMALL)
        axis.set_xticks([], minor=True)
        axis.set_yticks(range(len(RIVALS)), list(RIVALS.values()), fontsize=PLAIN)
        axis.grid(axis="x", color=PALE, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(length=0, colors=INK)
        axis.spines[:].set_visible(False)
    machine, hidden, agents = measured["machine"], *({case[key] for case in measured["rows"]} for key in ("hidden", "agents"))
    threads = "one thread" if measured["threads"] == 1 else f"{measured['threads']} threads"
    versions = f"PyTorch {machine['torch'].partition('+')[0]}, ONNX Runtime {machine['onnxruntime']}"
    cases = f"{found[1]['over_eager'].cases} cases (hidden {min(hidden)} to {max(hidden)}, {min(agents)} and {max(agents)} agents)"
    title = "How many times faster acting is with 2:4 masks than with …"
    figure.text(0.012, 0.92, title, fontsize=LARGE, weight="bold", color=INK)
    for y, words in (
        (0.105, f"A whole acting step on {MACHINE.format(**machine)}, {threads}; {versions}. Black line: as fast."),
        (0.045, f"Dot: median of {cases}. Band: from the smallest case to the largest."),
    ):
        figure.text(0.012, y, words, fontsize=SMALL, color=GREY, va="center")
    return figure


PICTURES = {"architecture": architecture, "speed": speed}


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=ELSEWHERE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=PICTURES)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/img", help="folder to write to, docs/img when left out")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    figure = PICTURES[options.picture]()
    # A file that names the version of matplotlib would change where the picture does not.
    figure.savefig(options.out / f"{options.picture}.png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
