"""Looking at a trained run's masks: numbers for the terminal, pictures for the eye."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k24.evaluate import Run
from k24.nets import AgentNet, Weights
from k24.sparse.layers import MaskedLinear
from k24.sparse.metrics import entropy_bits, mask_distance, mask_metrics, off_diagonal, pattern_agreement, pattern_usage


def layer_names(net: AgentNet) -> list[str]:
    """Names of the net's layers, in order."""
    return list(net.layers)


def multiply_adds(weights: Weights, agents: int) -> int:
    """Multiply-adds of one joint action: every non-zero weight of every agent, once."""
    return sum(round(float((w.weight != 0).float().flatten(1).sum(1).mean())) * agents for w in weights)


def deployed_bytes(net: AgentNet, weights: Weights) -> int:
    """Bytes a deployment in float32 needs.

    A masked layer: the shared weight once and one packed code per group and slot. Any other: as many sets of values as slots that differ.
    """
    total = 0
    for layer, made in zip(net.layers.values(), weights, strict=True):
        total += 4 * made.bias.numel()
        if isinstance(layer, MaskedLinear):
            total += 4 * layer.weight.numel() + -(-layer.codes.numel() * layer.patterns.code_bits // 8)
        else:
            total += 4 * made.weight.numel()
    return total


@torch.no_grad()
def inspect_run(run: Run) -> dict[str, Any]:
    """Everything ``k24 inspect`` prints.

    Args:
        run: A run.

    Returns:
        ``overall_sparsity``, ``pattern_entropy`` (bits of the chosen patterns' usage; None without masks),
        ``mask_hamming``, ``params``, ``macs_per_act``, ``bytes``; and for the tables ``layers`` (name, sparsity per
        layer), ``distance`` (``[A, A]``), ``pattern_usage``, ``similarity``.
    """
    net = run.learner.net
    agents = net.n_agents
    weights = net.snapshot("deploy")
    kept = [(w.weight != 0).float().expand(agents, -1, -1) for w in weights]
    masked = [layer for layer in net.layers.values() if isinstance(layer, MaskedLinear)]
    result: dict[str, Any] = {
        "overall_sparsity": 1 - float(sum(k.sum() for k in kept)) / sum(k.numel() for k in kept),
        "pattern_entropy": None,
        "mask_hamming": float(off_diagonal(mask_distance(kept)).mean()),
        "params": sum(p.numel() for p in net.parameters()),
        "macs_per_act": multiply_adds(weights, agents),
        "bytes": deployed_bytes(net, weights),
        "layers": {name: 1 - float(k.mean()) for name, k in zip(layer_names(net), kept, strict=True)},
        "distance": mask_distance(kept).tolist(),
        "pattern_usage": None,
        "similarity": None,
    }
    if masked:
        codes = [layer.best_codes()[..., : layer.free_groups] for layer in masked]
        usage = pattern_usage(codes, masked[0].patterns.n_patterns)
        metrics, _ = mask_metrics(masked)
        result |= {
            "overall_sparsity": metrics["overall_sparsity"],
            "pattern_entropy": entropy_bits(usage),
            "pattern_usage": usage.tolist(),
            "similarity": pattern_agreement(codes).tolist(),
            "dead_weight_frac": metrics["dead_weight_frac"],
            "pattern": str(masked[0].patterns),
            "temperature": masked[0].temperature,
        }
    return result


def plot_inspection(found: dict[str, Any], path: Path, title: str) -> None:
    """Draws the mask distances between agents, pattern usage and sparsity by layer, side by side.

    Args:
        found: From :func:`inspect_run`.
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
