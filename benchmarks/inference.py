"""The tables of docs/kernels.md: runs ``k24 bench inference`` over the grids named there and writes JSON and Markdown.

python benchmarks/inference.py --out benchmarks/results/my-machine          # all grids, some ten minutes on an idle machine
python benchmarks/inference.py --out benchmarks/results/my-machine --table  # the Markdown again, from the JSON
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

LAYER, POLICY = "--op layer --hidden 256 512 1024 --agents 3 8", "--op policy --hidden 64 128 256 --agents 3 8 --envs 1 8 32"
# Options, and what is set in the environment.
GRIDS: dict[str, tuple[str, dict[str, str]]] = {
    "one layer, 1 row per agent": (f"{LAYER} --envs 1", {}),
    "one layer, 8 rows per agent": (f"{LAYER} --envs 8", {}),
    "one layer, 32 to 1024 rows per agent": (f"{LAYER} --envs 32 128 1024", {}),
    "acting step": (POLICY, {}),
    "acting step, two threads": (f"{POLICY} --threads 2", {"OMP_NUM_THREADS": "2"}),
    "acting step, AVX2": (POLICY, {"K24_ISA": "avx2"}),
    "own masks everywhere": (f"{POLICY} --own-masks all", {}),
    "own masks everywhere, two threads": (f"{POLICY} --own-masks all --threads 2", {"OMP_NUM_THREADS": "2"}),
    "own masks everywhere, AVX2": (f"{POLICY} --own-masks all", {"K24_ISA": "avx2"}),
    "one layer, weights in bfloat16": ("--op layer --hidden 256 1024 --agents 8 --envs 1 8 128 --dtype bf16", {}),
}
RIVALS = {
    "eager": "eager",
    "torch": "torch, bound",
    "onnx": "ONNX Runtime",
    "twin": "dense twin",
    "shared": "one for all",
    "single": "one thread",
}


def run(options: str, environment: dict[str, str]) -> dict:
    """One grid in a process of its own; its last line is JSON."""
    inherited = {name: value for name, value in os.environ.items() if name != "K24_ISA"}
    command = [sys.executable, "-m", "k24", "bench", "inference", "--compile", "off", *options.split()]
    done = subprocess.run(command, env=inherited | {"OMP_NUM_THREADS": "1"} | environment, stdout=subprocess.PIPE, text=True, check=True)
    shown = " ".join([*(f"{name}={value}" for name, value in environment.items()), "k24 bench inference --compile off", options])
    return json.loads(done.stdout.splitlines()[-1]) | {"command": shown}


def ratio(values: list[float | None]) -> str:
    """The median of those that there are."""
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.2f}x" if known else "–"


def number(value: float | None, digits: int) -> str:
    """A dash for what was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"


def summary(results: dict[str, dict]) -> str:
    """Markdown: medians of each grid."""
    lines = [f"| grid | cases | over {' | over '.join(RIVALS.values())} | slowest case over the dense twin |"]
    lines.append("|---" * (len(RIVALS) + 3) + "|")
    for name, result in results.items():
        rows = result["rows"]
        twins = [row["over_twin"] for row in rows if row["over_twin"] is not None]
        over = [ratio([row.get(f"over_{rival}") for row in rows]) for rival in RIVALS]
        lines.append(f"| {name} | {len(rows)} | {' | '.join(over)} | {f'{min(twins):.2f}x' if twins else '–'} |")
    return "\n".join(lines)


def details(results: dict[str, dict]) -> str:
    """Markdown: every case."""
    lines = []
    for name, result in results.items():
        machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items() if value is not None)
        lines += ["", f"## {name}", "", f"`{result['command']}`", "", machine, ""]
        names = RIVALS.values()
        lines.append(f"| H | agents | rows | µs | ± | {', µs | '.join(names)}, µs | over {' | over '.join(names)} |")
        lines.append("|---:" * (2 * len(RIVALS) + 5) + "|")
        for row in result["rows"]:
            sizes = [str(row[size]) for size in ("hidden", "agents", "envs")]
            times = [number(row.get(key), 1) for key in ("us", "us_iqr", *(f"{rival}_us" for rival in RIVALS))]
            lines.append("| " + " | ".join([*sizes, *times, *(number(row.get(f"over_{rival}"), 2) for rival in RIVALS)]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where to write, without suffix")
    parser.add_argument("--table", action="store_true", help="write the Markdown from the JSON that is there")
    parser.add_argument(
        "--grid", action="append", choices=GRIDS, help="only this grid; what is there of the others stays, under its own commit"
    )
    options = parser.parse_args()
    file = options.out.with_suffix(".json")
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in [] if options.table else options.grid or GRIDS:
        print(name, flush=True)
        results[name] = run(*GRIDS[name])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1), encoding="utf-8")
    results = {name: results[name] for name in GRIDS if name in results}
    options.out.with_suffix(".md").write_text(f"# Inference\n\n{summary(results)}\n{details(results)}\n", encoding="utf-8")
    print(summary(results))


if __name__ == "__main__":
    main()
