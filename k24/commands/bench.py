"""``k24 bench``: tables of speed, and the same as JSON in the last line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from k24.commands.options import parse, peek
from k24.commands.train import Interrupted, refuse_options_of_others
from k24.errors import RunError, unknown_name

if TYPE_CHECKING:
    from rich.table import Table

# Columns that a pipe or a file gets, where a terminal has its own width.
WIDTH = 140


def bench_command(arguments: list[str]) -> None:
    """Runs ``k24 bench``.

    Args:
        arguments: Which benchmark, and its options.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = ["usage: k24 bench KIND [options]", "", *(f"  {name:<10} {text}" for name, (_, text) in KINDS.items())]
        print("\n".join([*lines, "", "'k24 bench KIND --help' tells the options."]))
        return
    if arguments[0] not in KINDS:
        raise unknown_name("benchmark", arguments[0], KINDS)
    KINDS[arguments[0]][0](arguments[1:])


def _train(arguments: list[str]) -> None:
    from k24.bench import bench_train, header, machine, train_options
    from k24.learners import LEARNERS

    start = train_options(peek(arguments, "--algo") or "qmix")
    refuse_options_of_others(start.algo, {algo: type(train_options(algo)) for algo in LEARNERS}, arguments)
    text = f"{type(start).__doc__} Each --algo has options of its own: these are those of {start.algo}."
    options: Any = parse(type(start), arguments, "bench train", start, text)
    print(header(machine(), options.threads))
    what = {
        "update_ms": f"one update, {options.algo}-{options.sharing}",
        "dense_ms": "same, one dense net",
        "stepwise_ms": "same, dense, step by step",
        "one_critic_ms": "same, one dense critic",
        "all_rows_ms": "same, every critic on every row",
        "two_networks_ms": "same, two critics, a network each",
    }
    found = bench_train(
        options, lambda name, median, spread: print(f"{what[name]:<40} {median:8.2f} ms  (middle half within {spread:.2f})")
    )
    print(f"memory grown by the update {found['update_mb']:.0f} MB; fast and plain path differ by {found['max_rel_err']:.1e}")
    if "critics" in found:
        print(
            f"an update of {found['critics']} critics takes {found['over_one_critic']:.2f} times as long as of one; on every row "
            f"{found['all_rows_over_one_critic']:.2f}, and two networks {found['two_networks_over_one_critic']:.2f} times"
        )
    if "types_act_us" in found:
        print(
            f"rows that choose among {options.unit_types} slots: update {found['types_update_ms']:.1f} ms, "
            f"{found['types_update_over_agents']:.2f} times one slot per agent; acting in {options.envs} environments "
            f"{found['types_act_us']:.0f} µs, {found['types_act_over_agents']:.2f} times"
        )
    loops = {
        "env_steps_per_s": f"{options.algo}-{options.sharing}",
        "env_steps_per_s_rare": "one update per 1664 steps",
        "dense_env_steps_per_s": "one dense net",
        "two_networks_env_steps_per_s": "two critics, a network each",
    }
    if whole := [f"{found[name]:,} env steps/s ({label})" for name, label in loops.items() if name in found]:
        print(f"whole loop on {options.task}: {', '.join(whole)}")
    print(json.dumps(found))


def _inference(arguments: list[str]) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from k24.bench import BenchInference, header, machine, measure, plan, summary
    from k24.bench.inference import FEW_CASES, RIVALS

    text = "Time single layers and whole acting steps beside dense torch, torch.compile, ONNX Runtime and our own dense kernel."
    options = parse(BenchInference, arguments, "bench inference", description=text)
    cases = plan(options)
    compiled = options.compile == "on" or (options.compile == "auto" and len(cases) <= FEW_CASES and options.device == "cpu")
    where = machine(options.device)
    print(header(where, options.threads))
    if options.device == "cpu" and (where["load"] or 0) + options.threads > where["cores"] + 0.5:
        print("the cores are busy with something else: times will scatter, and with several threads mean little")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, disable=not sys.stderr.isatty(), console=Console(stderr=True), transient=True)
    rows: list[dict[str, Any]] = []
    stopped = False
    with bar:
        task = bar.add_task("", total=len(cases))
        try:
            for case in cases:
                bar.update(task, description=str(case))
                rows.append(measure(case, options, compiled))
                bar.advance(task)
        except KeyboardInterrupt:
            stopped = True
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_type = [row for row in rows if row["dtype"] == dtype]
        console.print(table(of_type, f"µs per call, {dtype}"))
        if cold := [row | row["cold"] for row in of_type if "cold" in row]:
            console.print(table(cold, f"µs per call, {dtype}, nothing in the cache"))
    for line in [*_groups(summary(rows), RIVALS), *_notes(rows)]:
        print(line)
    print(json.dumps({"rows": rows, "machine": where, "threads": options.threads}))
    if stopped:
        raise Interrupted(f"stopped after {len(rows)} of {len(cases)} cases")
    wrong = [row["error"] for row in rows if row["error"] is not None]
    if wrong:
        raise RunError(f"{len(wrong)} of {len(rows)} cases are wrong; {wrong[0]}")


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """Rows of ``bench inference`` for people.

    Args:
        rows: At least one, of :func:`k24.bench.measure`.
        title: Above it.
    """
    from rich.table import Table
    from rich.text import Text

    from k24.bench.inference import RIVALS

    made = Table(title=title, title_justify="left")
    rivals = [name for name in RIVALS if name != "single" and any(row[f"{name}_us"] is not None for row in rows)]
    for name in ("op", "H", "A", "B", "ours", "±", *rivals, *(f"/{name}" for name in rivals), "error"):
        made.add_column(name, justify="left" if name == "op" else "right", no_wrap=True)

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"

    def ratio(value: float | None) -> Text:
        return Text("-") if value is None else Text(f"{value:.2f}x", style="green" if value >= 1 else "red")

    for row in rows:
        error = "wrong" if row["error"] is not None else f"{row['max_abs_err']:.0e}"
        made.add_row(
            *(str(row[name]) for name in ("op", "hidden", "agents", "envs")),
            *(number(row[name]) for name in ("us", "us_iqr", *(f"{rival}_us" for rival in rivals))),
            *(ratio(row[f"over_{rival}"]) for rival in rivals),
            error,
        )
    return made


def _groups(groups: list[dict[str, Any]], rivals: tuple[str, ...]) -> list[str]:
    """Median speed-ups, and how often ours was not the fastest."""
    lines = []
    for group in groups:
        over = [f"{group[f'over_{name}']:.2f}x over {name}" for name in rivals if group[f"over_{name}"]]
        lost = f"; a rival was faster in {group['slower']}" if group["slower"] else ""
        cases = f"{group['cases']} case{'s' if group['cases'] > 1 else ''}"
        lines.append(f"{group['op']}, {group['envs']} rows per agent: {', '.join(over) or 'nothing to compare with'} ({cases}{lost})")
    return lines


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """What ran and what did not, each thing once."""
    ours = ", ".join(dict.fromkeys(row["backend"] for row in rows))
    what = "twin is our dense kernel, shared one dense net for all agents, /name how many times faster ours is"
    lines = [f"ours is the backend {ours}; {what}; times are medians, ± the interquartile range"] if rows else []
    return lines + [f"{name}: {note}" for name, note in dict.fromkeys((n, t) for row in rows for n, t in row["notes"].items())]


def _env(arguments: list[str]) -> None:
    from k24.bench import BenchEnv, bench_env, header, machine

    options = parse(BenchEnv, arguments, "bench env", description="Time environment steps with a net acting, beside the raw simulator.")
    print(header(machine(), options.threads))
    found = bench_env(options)
    who = f"a {options.sharing} net of {options.hidden} acting"
    print(f"{options.task}, {options.envs} environments, {options.workers} worker processes")
    print(f"  {'with ' + who:<36} {found['env_steps_per_s']:>10,} env steps/s")
    print(f"  {'with random actions':<36} {found['random_steps_per_s']:>10,}")
    if found["raw_steps_per_s"] is not None:
        print(f"  {'raw simulator, random actions':<36} {found['raw_steps_per_s']:>10,}   {found['over_raw']:.2f} times as long as that")
    print(json.dumps(found))


KINDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "inference": (_inference, "layers and acting steps beside dense torch, ONNX Runtime and our own dense kernel"),
    "env": (_env, "environment steps with a net acting, beside the raw simulator"),
    "train": (_train, "one whole update beside dense nets unrolled step by step, or critics of other kinds, and whole training loops"),
}
