"""Collects what every fault case did and found, into one table at the end of the run and, with ``--faults-report FILE``, into JSON.

A pytest plugin. A case writes into the ``fault_case`` fixture:

    fault_case.seed = 7
    fault_case.injected(proxy.injected)      # or .killed([...]), or .note("server killed")
    fault_case.check(root, undisturbed)
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.check import Snapshot, Tally, compare

_COLUMNS = ("objects", "samples", "lost", "doubled", "torn", "changed", "strays", "wrong")
_PROPERTY = "fault case"


@dataclass
class Case:
    """One test's faults and what the check found after them.

    Attributes:
        name: of the test.
        seed: of all that was random in it.
        faults: how often, by kind.
        kills: processes killed -9.
        figures: whatever else was measured, by name (shards done again, seconds).
        result: passed or failed.
    """

    name: str
    seed: int | None = None
    faults: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0
    result: str = "failed"

    def injected(self, faults: Iterable[Any]) -> None:
        """Add what a proxy did (``proxy.injected``)."""
        for fault in faults:
            self.note(str(fault.kind), killed=fault.pid is not None)

    def killed(self, victims: Iterable[Any], what: str) -> None:
        """Add processes that were killed otherwise, e.g. a Killer's report; ``what`` they were."""
        for _ in victims:
            self.note(f"kill {what}", killed=True)

    def note(self, what: str, *, killed: bool = False) -> None:
        """Add one fault of any other kind."""
        self.faults[what] += 1
        self.kills += killed

    def check(self, root: str, undisturbed: Snapshot) -> Tally:
        """``check.assert_same``, whose counts are added to the report even when it fails."""
        tally = compare(root, undisturbed)
        for name, value in tally.numbers().items():
            setattr(self.tally, name, getattr(self.tally, name) + value)
        self.tally.problems += tally.problems
        tally.require()
        return tally

    def row(self) -> dict[str, Any]:
        """The case as plain values."""
        faults = dict(sorted(self.faults.items()))
        own = {"case": self.name, "seed": self.seed, "faults": faults, "kills": self.kills, "figures": self.figures}
        return {**own, **self.tally.numbers(), "problems": self.tally.problems, "seconds": round(self.seconds, 1), "result": self.result}


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The cases and their sum as a Markdown table."""
    rows = list(rows)
    lines = [
        "| case | seed | faults | kills | " + " | ".join(_COLUMNS) + " | s | result |",
        "| --- | --- | --- | --- |" + " --- |" * (len(_COLUMNS) + 2),
    ]
    for row in rows:
        faults = ", ".join(f"{count} {kind}" for kind, count in row["faults"].items())
        cells = [row["case"], row["seed"], faults, row["kills"], *(row[name] for name in _COLUMNS), row["seconds"], row["result"]]
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    sums = [sum(row[name] for row in rows) for name in ("kills", *_COLUMNS)]
    num_faults = sum(sum(row["faults"].values()) for row in rows)
    passed = sum(row["result"] == "passed" for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    lines.append(f"| {len(rows)} cases | | {num_faults} | " + " | ".join(map(str, sums)) + f" | {seconds:.0f} | {passed} passed |")
    return "\n".join(lines)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-report", metavar="FILE", help="write what the fault cases did and found to FILE as JSON")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Hand the case's row on with the test's report, which reaches the summary from other processes (pytest-xdist) too."""
    report = yield
    case = getattr(item, "funcargs", {}).get("fault_case")
    if case is not None and (report.when == "call" or (report.when == "setup" and report.failed)):
        case.result, case.seconds = report.outcome, report.duration
        report.user_properties.append((_PROPERTY, case.row()))
    return report


@pytest.fixture
def fault_case(request: pytest.FixtureRequest) -> Case:
    """The line of the report that belongs to this test."""
    return Case(request.node.nodeid.rpartition("/")[2])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [pair for report in reports for pair in getattr(report, "user_properties", ())]
    rows = sorted((value for name, value in properties if name == _PROPERTY), key=lambda row: row["case"])
    if rows:
        terminalreporter.section("faults")
        terminalreporter.write_line(table(rows))
    if (file := config.getoption("--faults-report")) is not None:
        Path(file).write_text(json.dumps({**_circumstances(config), "cases": rows}, indent=1) + "\n")


def _circumstances(config: pytest.Config) -> dict[str, Any]:
    """What was run, of which commit, when and on what."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=config.rootpath, capture_output=True, text=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{os.cpu_count()} cores, {memory:.0f} GB, {platform.system()} {platform.machine()}, Python {platform.python_version()}"
    command = " ".join(["pytest", *config.invocation_params.args])
    return {"command": command, "commit": git.stdout.strip() or None, "date": time.strftime("%F"), "machine": machine}
