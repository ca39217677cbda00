"""python -m tests.fuzz --cases 100000 --seed 0 [--json FILE]: the table, and the JSON of it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tests.fuzz.child import MEMORY, SECONDS
from tests.fuzz.runner import Report, fuzz
from tests.fuzz.targets import TARGETS

PIECE = 20_000
"""Cases of one child: a leak over more would not be found, and less is lost where one dies."""


def run(cases: int, seed: int) -> list[Report]:
    """Every target's share of the cases."""
    reports = []
    for target, (_, percent) in TARGETS.items():
        whole, number = Report(target), max(1, cases * percent // 100)
        for start in range(0, number, PIECE):
            whole.add(fuzz(target, seed, start, min(start + PIECE, number)))
        reports.append(whole)
        print(row(whole), flush=True)
    return reports


def row(report: Report) -> str:
    """One line of the table."""
    outcomes = ", ".join(f"{count} {name}" for name, count in report.outcomes.most_common())
    peak = f"peak {report.peak_rss >> 20} MiB (+{report.peak_growth >> 20})"
    seconds, number = report.slowest
    return f"{report.target:11} {report.cases:6} cases  slowest {seconds:6.3f} s (case {number:5})  {peak:20}  {outcomes}"


def main() -> int:
    """Parse, run, print. Returns 1 when anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    started = time.perf_counter()
    print(f"limits of a case: {SECONDS:.0f} s of CPU, {MEMORY >> 20} MiB above what the process has at its start; seed {arguments.seed}")
    reports = run(arguments.cases, arguments.seed)
    total, failed = sum(report.cases for report in reports), [(r.target, *failure) for r in reports for failure in r.failures]
    print(f"{total} cases in {time.perf_counter() - started:.0f} s, {len(failed)} failed")
    for target, number, text in failed:
        print(f"seed {arguments.seed}, {target}, case {number}: {text}")
    if arguments.json:
        content = {"seed": arguments.seed, "cases": total, "targets": [vars(report) for report in reports]}
        Path(arguments.json).write_text(json.dumps(content, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
