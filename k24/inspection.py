"""Looking at masks as they are deployed, of a run or of a policy file: numbers for the terminal, pictures for the eye.

A policy is looked at where nothing of the training stack is installed, so what belongs to a run is imported when one is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from k24.artifact import layer_names, stores_kept_alone
from k24.kernels import Linear, Net
from k24.sparse.metrics import entropy_bits, mask_distance, off_diagonal, pattern_usage

if TYPE_CHECKING:
    from k24.learners import Learner

# What a policy costs, of what is found by looking at it.
COSTS = ("macs_per_act", "params", "bytes")


def deployed_bytes(layers: Iterable[Linear]) -> int:
    """Bytes that a deployment of some layers needs.

    A masked layer: the shared weight once (under one mask for all slots, what it keeps) and one packed code per group and slot. Any other:
    what is stored of it, see :func:`_stored`. A policy file holds as much, but where slots have the same weights, or lack some of them:
    there it has a copy for each.
    """
    total = 0
    for layer in layers:
        (weights, bits), (biases, more_bits) = _stored_weights(layer), _stored(layer.bias)
        total += weights * layer.weight.element_size() + 4 * biases
        bits += more_bits if layer.codes is None else layer.codes.numel() * layer.patterns.code_bits
        total += -(-bits // 8)
    return total


def _stored_weights(layer: Linear) -> tuple[int, int]:
    """As :func:`_stored`, of a layer's weights: those that its one mask drops are of no use to anybody."""
    return (int(_kept(layer).sum()), 0) if stores_kept_alone(layer) else _stored(layer.weight)


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
def inspect_net(net: Net, n_agents: int | None = None) -> dict[str, Any]:
    """Everything ``k24 inspect`` prints of a policy.

    Args:
        net: A net.
        n_agents: Agents that act by it; as many as it has slots when None.

    Returns:
        ``overall_sparsity`` (of the masked layers where there are any), ``pattern_entropy`` (bits of the chosen patterns' usage; None
        without masks), ``mask_hamming`` (of the layers with a mask for each slot where there are any), ``params`` (values stored, masks
        aside), ``macs_per_act`` (multiply-adds of one joint action: every weight that an agent keeps, mean over slots where agents are not
        the slots), ``bytes``; and for the tables
        ``layers`` (name, sparsity per layer), ``distance`` (``[A, A]``), ``pattern_usage``.
    """
    masks = [_kept(layer) for layer in net.linears]
    coded = [layer for layer in net.linears if layer.codes is not None]
    # As in training, layers that are dense by design say nothing of how sparse masks are, nor what agents share of how far apart they are.
    # Where there are no patterns, masked layers are those that have weights of their own for each slot.
    with_masks = [layer.codes is not None or (not coded and len(mask) > 1) for mask, layer in zip(masks, net.linears, strict=True)]
    counted = [mask for mask, masked in zip(masks, with_masks, strict=True) if masked] or masks
    own = [mask for mask, masked in zip(masks, with_masks, strict=True) if masked and len(mask) > 1]
    # Layers that all slots share are looked at once: expanded, they would take as much memory as a network for each slot.
    distance = mask_distance(own) if own else torch.zeros(net.n_slots, net.n_slots)
    result: dict[str, Any] = {
        "overall_sparsity": 1 - float(sum(m.sum() for m in counted)) / sum(m.numel() for m in counted),
        "pattern_entropy": None,
        "mask_hamming": float(off_diagonal(distance).mean()),
        "params": sum(_stored_weights(layer)[0] + _stored(layer.bias)[0] for layer in net.linears),
        "macs_per_act": round(
            sum(int(m.sum(dtype=torch.float64)) * net.n_slots // len(m) for m in masks) * (n_agents or net.n_slots) / net.n_slots
        ),
        "bytes": deployed_bytes(net.linears),
        "layers": {name: 1 - float(mask.mean()) for name, mask in zip(layer_names(net), masks, strict=True)},
        "distance": distance.tolist(),
        "pattern_usage": None,
    }
    if coded:
        never = [float((m.sum(0) == 0).sum()) for m in counted]
        result["dead_weight_frac"] = sum(never) / sum(m[0].numel() for m in counted)
        # Groups that padding leaves no choice say nothing about choices; nor does a code without its N:M.
        codes = [c.codes[..., : c.patterns.free_groups(c.in_features)] for c in coded if c.codes is not None]
        if len({layer.patterns for layer in coded}) == 1 and any(c.numel() for c in codes):
            usage = pattern_usage(codes, coded[0].patterns.n_patterns)
            result |= {"pattern_entropy": entropy_bits(usage), "pattern_usage": usage.tolist()}
    return result


def inspect_learner(learner: Learner) -> dict[str, Any]:
    """Everything ``k24 inspect`` prints of a run: as :func:`inspect_net`, with ``params`` counting all that is trained.

    Args:
        learner: That of the run.
    """
    from k24.export import net_of

    retired = {id(p) for p in learner.sharing.retired()}
    trained = sum(p.numel() for p in learner.net.parameters() if p.requires_grad or id(p) in retired) - learner.sharing.idle()
    return inspect_net(net_of(learner.net), learner.spec.n_agents) | {"params": trained}


def costs_of(learner: Learner) -> dict[str, int]:
    """Of that, what its policy costs: the numbers in :data:`COSTS`."""
    found = inspect_learner(learner)
    return {name: int(found[name]) for name in COSTS}


def plot_inspection(found: dict[str, Any], path: Path, title: str) -> None:
    """Draws the mask distances between agents, pattern usage and sparsity by layer, side by side.

    Args:
        found: From :func:`inspect_net`.
        path: PNG to write.
        title: Above the pictures.
    """
    plt = _pyplot()
    usage = found["pattern_usage"]
    figure, axes = plt.subplot_mosaic(
        [["distance", "usage"], ["distance", "sparsity"]] if usage else [["distance", "sparsity"]],
        figsize=(9.6, 4.9),
        width_ratios=[1.3, 1],
        constrained_layout=True,
    )
    _matrix(axes["distance"], torch.tensor(found["distance"]))
    names = list(found["layers"])
    axes["sparsity"].barh(range(len(names)), [found["layers"][n] for n in names], color="#0072B2")
    axes["sparsity"].set(
        yticks=range(len(names)), yticklabels=names, xlim=(0, 1), xlabel="share of weights dropped", title="sparsity by layer"
    )
    axes["sparsity"].invert_yaxis()
    if usage:
        axis = axes["usage"]
        axis.bar(range(len(usage)), usage, color="#009E73")
        axis.axhline(1 / len(usage), color="#444444", linestyle="--", linewidth=1)
        axis.annotate(
            "uniform",
            (len(usage) - 0.45, 1 / len(usage)),
            xytext=(0, 2),
            textcoords="offset points",
            ha="right",
            color="#444444",
            fontsize=9,
        )
        axis.set(xlabel="pattern", ylabel="share of groups", title=f"pattern usage ({found['pattern_entropy']:.2f} bits)")
        axis.set_ylim(0, 1.25 * max(*usage, 1 / len(usage)))
        if len(usage) <= 12:
            axis.set_xticks(range(len(usage)))
    figure.suptitle(title, parse_math=False)
    _save(figure, path)


def chain(distance: Tensor) -> list[int]:
    """An order in which neighbours are alike: from agent 0 on, always the nearest one that is left.

    Args:
        distance: Between agents, ``[A, A]``.
    """
    order = [0]
    while len(order) < len(distance):
        order.append(min(set(range(len(distance))) - set(order), key=lambda k: float(distance[order[-1], k])))
    return order


def _matrix(axis: Any, values: Tensor) -> None:
    """Distances between agents, each beside the nearest one that is left, so that alike ones make blocks."""
    n, order = len(values), chain(values)
    shown = values[order][:, order]
    others = shown[~torch.eye(n, dtype=torch.bool)]
    low, high = (float(others.min()), float(others.max())) if n > 1 else (0.0, 1.0)
    # A range of its own, since all distances may be near 0.5; no narrower than what chance alone would spread.
    middle, reach = (low + high) / 2, max((high - low) / 2, 0.02)
    axis.imshow(
        shown.masked_fill(torch.eye(n, dtype=torch.bool), float("nan")).numpy(), cmap="viridis", vmin=middle - reach, vmax=middle + reach
    )
    if n <= 12:
        for i in range(n):
            for j in range(n):
                if i != j:
                    dark = float(shown[i, j]) < middle + 0.2 * reach
                    axis.text(j, i, f"{shown[i, j]:.2f}", ha="center", va="center", color="white" if dark else "black", fontsize=9)
        axis.set(xticks=range(n), yticks=range(n), xticklabels=order, yticklabels=order)
    else:
        axis.set(xticks=[], yticks=[])
    axis.set(title="mask distance between agents\n(0 same, 0.5 independent)", xlabel="agent, beside the nearest one left", ylabel="agent")


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
    axis.plot([s for s, _ in points], [r for _, r in points], color="#0072B2", linewidth=2, label="evaluation, deployed masks")
    for name, value in (levels or {}).items():
        axis.axhline(value, color="#888888", linestyle="--", linewidth=1, label=name)
    axis.set(xlabel="environment steps", ylabel="return (sum over agents and steps)")
    axis.set_title(title, parse_math=False)
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
