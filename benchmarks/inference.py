"""The tables of docs/kernels.md: runs ``k24 bench inference`` over the grids named there and writes JSON and Markdown.

python benchmarks/inference.py --out benchmarks/results/my-machine          # all grids, some ten minutes on an idle machine
python benchmarks/inference.py --out benchmarks/results/my-machine --table  # the Markdown again, from the JSON
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

GRIDS = {
    "one layer, 1 row per agent": "--op layer --hidden 256 512 1024 --agents 3 8 --envs 1",
    "one layer, 8 rows per agent": "--op layer --hidden 256 512 1024 --agents 3 8 --envs 8",
    "one layer, 32 to 1024 rows per agent": "--op layer --hidden 256 512 1024 --agents 3 8 --envs 32 128 1024",
    "acting step, masked GRU": "--op policy --hidden 64 128 256 --agents 3 8 --envs 1 8 32",
    "acting step, AVX2": "--op policy --hidden 64 128 256 --agents 3 8 --envs 1 8 32",
    "one layer, weights in bfloat16": "--op layer --hidden 256 1024 --agents 8 --envs 1 8 128 --dtype bf16",
}
RIVALS = ("eager", "torch", "onnx", "twin")
COLUMNS = ("eager", "torch, bound", "ONNX Runtime", "dense twin")


def run(name: str, options: str) -> dict:
    """One grid in a process of its own; its last line is JSON."""
    isa = {"K24_ISA": "avx2"} if "AVX2" in name else {}
    command = [sys.executable, "-m", "k24", "bench", "inference", "--compile", "off", *options.split()]
    done = subprocess.run(command, env=os_environ() | isa, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"command": f"k24 bench inference --compile off {options}", **isa}


def os_environ() -> dict[str, str]:
    """One thread, before any library reads it."""
    import os

    return dict(os.environ) | {"OMP_NUM_THREADS": "1"}


def table(results: dict[str, dict]) -> str:
    """Markdown: medians of each grid, then every case."""
    lines = [f"| grid | cases | over {' | over '.join(COLUMNS)} | slowest case against its best rival |", "|---" * 7 + "|"]
    for name, result in results.items():
        rows = result["rows"]
        over = [f"{statistics.median(row[f'over_{rival}'] for row in rows):.2f}x" for rival in RIVALS]
        worst = min(min(row[f"over_{rival}"] for rival in RIVALS) for row in rows)
        lines.append(f"| {name} | {len(rows)} | {' | '.join(over)} | {worst:.2f}x |")
    for name, result in results.items():
        isa = f"K24_ISA={result['K24_ISA']} " if "K24_ISA" in result else ""
        lines += ["", f"### {name}", "", f"`{isa}{result['command']}`", ""]
        lines += [
            "| H | agents | rows | µs | ± | "
            + " | ".join(f"{c}, µs" for c in COLUMNS)
            + " | "
            + " | ".join(f"over {c}" for c in COLUMNS)
            + " |"
        ]
        lines.append("|---:" * 13 + "|")
        for row in result["rows"]:
            times = [f"{row['us']:.1f}", f"{row['us_iqr']:.1f}", *(f"{row[f'{rival}_us']:.1f}" for rival in RIVALS)]
            ratios = [f"{row[f'over_{rival}']:.2f}" for rival in RIVALS]
            lines.append("| " + " | ".join([str(row["hidden"]), str(row["agents"]), str(row["envs"]), *times, *ratios]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where to write, without suffix")
    parser.add_argument("--table", action="store_true", help="write the Markdown from the JSON that is there")
    parser.add_argument("--grid", action="append", choices=GRIDS, help="only this grid; what is there of the others stays")
    options = parser.parse_args()
    file = options.out.with_suffix(".json")
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name, sizes in {} if options.table else {name: GRIDS[name] for name in options.grid or GRIDS}.items():
        print(name, flush=True)
        results[name] = run(name, sizes)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1), encoding="utf-8")
    results = {name: results[name] for name in GRIDS if name in results}
    machine = json.dumps(next(iter(results.values()))["machine"], ensure_ascii=False)
    options.out.with_suffix(".md").write_text(f"Machine: `{machine}`\n\n{table(results)}\n", encoding="utf-8")
    print(table(results).split("\n\n")[0])


if __name__ == "__main__":
    main()
