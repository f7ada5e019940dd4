"""Looking at masks as they are deployed, of a run or of a policy file: numbers for the terminal, pictures for the eye.

A policy is looked at where nothing of the training stack is installed, so what belongs to a run is imported when one is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from k24.artifact import layer_names
from k24.kernels import Linear, Net
from k24.sparse.metrics import entropy_bits, mask_distance, off_diagonal, pattern_usage

if TYPE_CHECKING:
    from k24.evaluate import Run


def deployed_bytes(net: Net) -> int:
    """Bytes that a deployment needs.

    A masked layer: the shared weight once and one packed code per group and slot. Any other: what is stored of it, see :func:`_stored`. A
    policy file holds as much, but where slots have the same weights, or lack some of them: there it has a copy for each.
    """
    total = 0
    for layer in net.linears:
        (weights, bits), (biases, more_bits) = _stored(layer.weight), _stored(layer.bias)
        total += weights * layer.weight.element_size() + 4 * biases
        bits += more_bits if layer.codes is None else layer.codes.numel() * layer.patterns.code_bits
        total += -(-bits // 8)
    return total


def _stored(values: Tensor) -> tuple[int, int]:
    """How many values must be stored of those of all slots ``[S, O, I]`` or ``[S, O]``, and bits that say which of them a slot has.

    Slots that have the same values need them once. So do slots that lack some of the same values: these need bits besides, one for each
    row and each column of a slot that lacks whole ones, else one for each value.
    """
    distinct = values.flatten(1).unique(dim=0)
    common = distinct.gather(0, distinct.abs().argmax(0, keepdim=True))
    if len(distinct) == 1 or not bool(((distinct == 0) | (distinct == common)).all()):
        return distinct.numel(), 0
    has = values != 0
    if has.dim() == 2:
        return common.numel(), 0  # rows that a weight of the same layer tells
    rows, columns = has.any(2), has.any(1)
    whole = bool(torch.equal(has, rows[:, :, None] & columns[:, None]))
    return common.numel(), rows.numel() + columns.numel() if whole else has.numel()


def _kept(layer: Linear) -> Tensor:
    """Which weights a slot multiplies with, ``[S, O, I]`` of zeros and ones."""
    if layer.codes is not None:
        return layer.patterns.mask(layer.codes, layer.in_features)
    return (layer.weight != 0).float()


@torch.no_grad()
def inspect_net(net: Net) -> dict[str, Any]:
    """Everything ``k24 inspect`` prints of a policy.

    Args:
        net: A net.

    Returns:
        ``overall_sparsity`` (of the masked layers where there are any), ``pattern_entropy`` (bits of the chosen patterns' usage; None
        without masks), ``mask_hamming``, ``params`` (values stored, masks aside), ``macs_per_act`` (multiply-adds of one joint action:
        every weight that an agent keeps), ``bytes``; and for the tables ``layers`` (name, sparsity per layer), ``distance``
        (``[A, A]``), ``pattern_usage``.
    """
    masks = [_kept(layer) for layer in net.linears]
    everyones = [mask.expand(net.n_slots, -1, -1) for mask in masks]
    coded = [layer for layer in net.linears if layer.codes is not None]
    counted = [mask for mask, layer in zip(masks, net.linears, strict=True) if layer.codes is not None] or everyones
    distance = mask_distance(everyones)
    result: dict[str, Any] = {
        "overall_sparsity": 1 - float(sum(m.sum() for m in counted)) / sum(m.numel() for m in counted),
        "pattern_entropy": None,
        "mask_hamming": float(off_diagonal(distance).mean()),
        "params": sum(_stored(layer.weight)[0] + _stored(layer.bias)[0] for layer in net.linears),
        "macs_per_act": sum(int(mask.sum(dtype=torch.float64)) for mask in everyones),
        "bytes": deployed_bytes(net),
        "layers": {name: 1 - float(mask.mean()) for name, mask in zip(layer_names(net), masks, strict=True)},
        "distance": distance.tolist(),
        "pattern_usage": None,
    }
    if coded:
        # Groups that padding leaves no choice say nothing about choices.
        codes = [c.codes[..., : c.patterns.free_groups(c.in_features)] for c in coded if c.codes is not None]
        usage = pattern_usage(codes, coded[0].patterns.n_patterns)
        never = [float((m.sum(0) == 0).sum()) for m in counted]
        result |= {
            "pattern_entropy": entropy_bits(usage),
            "pattern_usage": usage.tolist(),
            "dead_weight_frac": sum(never) / sum(m[0].numel() for m in counted),
        }
    return result


def inspect_run(run: Run) -> dict[str, Any]:
    """Everything ``k24 inspect`` prints of a run: as :func:`inspect_net`, with ``params`` counting all that is trained.

    Args:
        run: A run.
    """
    from k24.export import net_of

    trained = sum(p.numel() for p in run.learner.net.parameters() if p.requires_grad) - run.learner.sharing.idle()
    return inspect_net(net_of(run.learner.net)) | {"params": trained}


def plot_inspection(found: dict[str, Any], path: Path, title: str) -> None:
    """Draws the mask distances between agents, pattern usage and sparsity by layer, side by side.

    Args:
        found: From :func:`inspect_net`.
        path: PNG to write.
        title: Above the pictures.
    """
    plt = _pyplot()
    panels = 3 if found["pattern_usage"] else 2
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 4.2), constrained_layout=True)
    _matrix(axes[0], torch.tensor(found["distance"]))
    names = list(found["layers"])
    axes[-1].barh(range(len(names)), [found["layers"][n] for n in names], color="#4c72b0")
    axes[-1].set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1), xlabel="share of weights dropped", title="sparsity by layer")
    axes[-1].invert_yaxis()
    if found["pattern_usage"]:
        usage = found["pattern_usage"]
        axes[1].bar(range(len(usage)), usage, color="#55a868")
        axes[1].axhline(1 / len(usage), color="#888888", linestyle="--", linewidth=1, label="uniform")
        axes[1].set(xlabel="pattern", ylabel="share of groups", title=f"pattern usage ({found['pattern_entropy']:.2f} bits)")
        if len(usage) <= 12:
            axes[1].set_xticks(range(len(usage)))
        axes[1].legend(frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def _matrix(axis: Any, values: Tensor) -> None:
    top = max(0.5, float(values.max()))
    axis.imshow(values.numpy(), cmap="viridis", vmin=0, vmax=top)
    n = len(values)
    if n <= 12:
        for i in range(n):
            for j in range(n):
                axis.text(
                    j,
                    i,
                    f"{values[i, j]:.2f}",
                    ha="center",
                    va="center",
                    color="white" if values[i, j] < 0.6 * top else "black",
                    fontsize=8,
                )
        axis.set(xticks=range(n), yticks=range(n))
    axis.set(title="mask distance between agents\n(0 same, 0.5 independent)", xlabel="agent", ylabel="agent")


def plot_curve(points: Sequence[tuple[int, float]], path: Path, title: str, levels: dict[str, float] | None = None) -> None:
    """Draws a learning curve.

    Args:
        points: (environment steps, return).
        path: PNG to write.
        title: Above the picture.
        levels: Named horizontal lines, such as the return of a random policy.
    """
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.2), constrained_layout=True)
    axis.plot([s for s, _ in points], [r for _, r in points], color="#4c72b0", linewidth=2, label="evaluation, deployed masks")
    for name, value in (levels or {}).items():
        axis.axhline(value, color="#888888", linestyle="--", linewidth=1, label=name)
    axis.set(xlabel="environment steps", ylabel="return (sum over agents and steps)", title=title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")
    _pyplot().close(figure)
