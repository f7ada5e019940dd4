"""What every sharing scheme costs: a Markdown table of one net, made by each of them and not trained.

    python examples/scheme_costs.py
    python examples/scheme_costs.py --agents 8 --hidden 128

Counts depend on sizes alone, with two exceptions. Kaleidoscope's thresholds mask more as it learns. SePS chooses how many
networks there are by what it sees before training; it stands here with as many as agents, and with two. The last line is JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
import tyro

from k24.export import net_of
from k24.inspection import inspect_net
from k24.nets import AgentNet
from k24.sharing import SCHEMES, SePSConfig, SharingConfig, make_sharing


@dataclass(frozen=True)
class Options:
    """Options."""

    agents: int = 3
    """Agents."""
    obs: int = 18
    """Features of an observation."""
    hidden: int = 64
    """Hidden units."""
    actions: int = 5
    """Actions."""


def cost(name: str, options: Options, config: SharingConfig | None = None) -> dict[str, int]:
    """What ``k24 inspect`` counts of a run: values trained, bytes deployed, multiply-adds of a joint action."""
    torch.manual_seed(0)
    sharing = make_sharing(name, options.agents, config)
    net = AgentNet(options.obs, options.actions, options.hidden, options.agents, sharing)
    found = inspect_net(net_of(net))
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad) - sharing.idle()
    return {"params": trained, "bytes": found["bytes"], "macs_per_act": found["macs_per_act"]}


def main() -> None:
    """Prints the table."""
    options = tyro.cli(Options, description=__doc__)
    rows = {name if name != "seps" else f"seps, {options.agents} clusters": cost(name, options) for name in SCHEMES}
    rows["seps, 2 clusters"] = cost("seps", options, SharingConfig(seps=SePSConfig(clusters=2)))
    print("| scheme | trained parameters | deployed bytes | multiply-adds of a joint action |\n|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['params']:,} | {row['bytes']:,} | {row['macs_per_act']:,} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
