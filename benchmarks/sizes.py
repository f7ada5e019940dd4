"""The table of bytes in README.md: policy files of untrained teams, which are as long as those of trained ones.

python benchmarks/sizes.py [--agents 3 8 64] [--hidden 128] [--no-index]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from k24.export import net_of
from k24.nets import AgentNet
from k24.policy import PolicySpec, save_policy
from k24.sharing import make_sharing

TASK, OBS, ACTIONS = "mpe/simple_spread", 18, 5
ROWS = {"k24": "K-2:4", "fups_id": "one dense network for all", "kaleidoscope": "Kaleidoscope", "nops": "a dense network each"}


def file_bytes(sharing: str, agents: int, hidden: int, index: bool | None) -> int:
    """Length of the policy file of a recurrent QMIX team, float32."""
    net = AgentNet(OBS, ACTIONS, hidden, agents, make_sharing(sharing, agents), index)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.safetensors"
        save_policy(path, net_of(net), PolicySpec(TASK, "qmix", sharing, 1_000_000, agents, OBS, ACTIONS, net.agent_id))
        return path.stat().st_size


def table(agents: list[int], hidden: int, index: bool | None = None) -> str:
    """Markdown. ``index``: whether inputs hold the agent's index; as each scheme has it when None."""
    lines = [f"| bytes of a file (hidden {hidden}, {OBS} observations, {ACTIONS} actions, float32) | "]
    lines[0] += " | ".join(f"{n} agents" for n in agents) + " |"
    lines.append("|---" * (1 + len(agents)) + "|")
    lines += [f"| {name} | {' | '.join(f'{file_bytes(scheme, n, hidden, index):,}' for n in agents)} |" for scheme, name in ROWS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=[3, 8, 64])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--no-index", action="store_true", help="no scheme appends the agent's index to its observation")
    arguments = parser.parse_args()
    print(table(arguments.agents, arguments.hidden, False if arguments.no_index else None))
