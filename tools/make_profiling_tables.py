"""Fill the tables of docs/profiling.md from what benchmarks/profile_kernels.py measured last.

python tools/make_profiling_tables.py           write the page
python tools/make_profiling_tables.py --check   only say whether it is current
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "profiling.md"
RESULTS = ROOT / "benchmarks" / "results"
PATTERN = "*-profile-kernels.json"

MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
SECTOR_BYTES = 32
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
SECTORS = "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_{}.ratio"
CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_{}.sum"

Facts = dict[str, Any]
Counters = dict[str, float | None]
Column = tuple[str, str, str, Callable[[float, float], float]]
"""Heading, metric, format, and what is made of a value and of the bytes that must be moved."""


def _column(heading: str, metric: str, shown: str = ".1f", *, divisor: float = 1.0) -> Column:
    return heading, metric, shown, lambda value, _: value / divisor


MEMORY: tuple[Column, ...] = (
    _column("µs alone", "gpu__time_duration.sum", ".2f", divisor=1000),
    _column("DRAM read MB", "dram__bytes_read.sum", ".2f", divisor=1e6),
    _column("written MB", "dram__bytes_write.sum", ".2f", divisor=1e6),
    _column("DRAM %", "dram__throughput.avg.pct_of_peak_sustained_elapsed"),
    _column("L2 read MB", "lts__t_sectors_op_read.sum", ".2f", divisor=1e6 / SECTOR_BYTES),
    _column("L2 hit %", "lts__t_sector_hit_rate.pct"),
    _column("L1 hit %", "l1tex__t_sector_hit_rate.pct"),
    _column("sectors a load", SECTORS.format("ld")),
    _column("sectors a store", SECTORS.format("st")),
)

WARPS: tuple[Column, ...] = (
    _column("registers", "launch__registers_per_thread", ".0f"),
    _column("warps active %", "sm__warps_active.avg.pct_of_peak_sustained_active"),
    _column("issue slots %", "smsp__issue_active.avg.pct_of_peak_sustained_active"),
    ("instructions a kB", "smsp__inst_executed.sum", ".1f", lambda value, nbytes: value / nbytes * 1000),
    _column("long scoreboard", STALL.format("long_scoreboard")),
    _column("short scoreboard", STALL.format("short_scoreboard")),
    _column("barrier", STALL.format("barrier")),
    _column("LG throttle", STALL.format("lg_throttle")),
    _column("conflicts: loads", CONFLICTS.format("ld"), ",.0f"),
    _column("stores", CONFLICTS.format("st"), ",.0f"),
)


def results() -> Path | None:
    """The newest file, by its name; None if nothing was measured yet."""
    return max(RESULTS.glob(PATTERN), default=None)


def document(page: str, facts: Facts, source: str) -> str:
    """The page with all figures filled in.

    Args:
        page: its text, with places marked `<!-- figures: NAME -->`: `where`, or an example of the program
            with one of `-times`, `-memory` and `-warps`.
        facts: the JSON file.
        source: the name of that file.
    """

    def figures(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        return f"{begin}{_figures(name, facts, source)}\n{end}"

    return MARKED.sub(figures, page)


def _figures(name: str, facts: Facts, source: str) -> str:
    if name == "where":
        return _where(facts, source)
    example, _, kind = name.rpartition("-")
    versions = [v for v in facts["results"] if v["name"].partition("/")[0] == example]
    if not versions:
        raise SystemExit(f"{source} has no {example}: run all versions")
    if kind == "times":
        return _times(versions)
    return _counters(versions, {"memory": MEMORY, "warps": WARPS}[kind])


def _where(facts: Facts, source: str) -> str:
    profiler = f"Nsight Compute {facts['ncu']}" if facts["ncu"] else "not counted"
    return (
        f"{facts['chip']}, which reads {facts['read_bytes_per_s'] / 1e9:,.0f} GB/s; {profiler}; commit "
        f"{facts['commit']}; [`{source}`](../benchmarks/results/{source})."
    )


def _times(versions: Sequence[Facts]) -> str:
    times = {version["name"]: version["us"] for version in versions}
    head = ["version", "change", "µs", "floor µs", "against", "predicted", "measured"]
    lines = []
    for v in versions:
        before = v["against"]
        ratio = f"{v['us'] / times[before]:.2f}" if before else ""
        predicted = f"{v['predicted']:.2f}" if before else ""
        against = f"`{_label(before)}`" if before else ""
        lines.append(
            [
                f"`{_label(v['name'])}`", v["change"], f"{v['us']:.2f}", f"{v['floor_us']:.2f}", against,
                predicted, ratio,
            ]
        )  # fmt: skip
    return _table(head, lines)


def _counters(versions: Sequence[Facts], columns: Sequence[Column]) -> str:
    lines = []
    for version in versions:
        for kernel in version["kernels"]:
            cells = [_cell(kernel["counters"], column, version["bytes"]) for column in columns]
            lines.append([f"`{_label(version['name'])}`", f"`{kernel['name']}`", *cells])
    return _table(["version", "kernel", *(column[0] for column in columns)], lines)


def _cell(counters: Counters, column: Column, nbytes: float) -> str:
    _, metric, shown, made = column
    value = counters.get(metric)
    return "-" if value is None else format(made(value, nbytes), shown)


def _label(name: str) -> str:
    return name.partition("/")[2]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---" if name in ("version", "change", "against", "kernel") else "---:" for name in head]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def main(arguments: Sequence[str]) -> int:
    """Write the page, or with `--check` say whether it is current; the exit code."""
    path = results()
    if path is None:
        print(f"nothing measured yet: no benchmarks/results/{PATTERN}")
        return 1
    page = PAGE.read_text(encoding="utf-8")
    text = document(page, json.loads(path.read_text(encoding="utf-8")), path.name)
    if arguments == ["--check"]:
        print("docs/profiling.md is current" if text == page else "docs/profiling.md is stale")
        return int(text != page)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
