"""Runs a target's cases in child processes; one that dies names the case that killed it, and the others go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Report:
    """What came of one target's cases. ``failures`` are (case number, what happened); a case is made again from seed, target and number."""

    target: str
    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, 0)
    peak_rss: int = 0
    peak_growth: int = 0

    def add(self, other: Report) -> None:
        """Add the report of some more cases."""
        self.cases += other.cases
        self.outcomes += other.outcomes
        self.failures += other.failures
        self.slowest = max(self.slowest, other.slowest)
        self.peak_rss, self.peak_growth = max(self.peak_rss, other.peak_rss), max(self.peak_growth, other.peak_growth)


def fuzz(target: str, seed: int, start: int, stop: int, max_deaths: int = 5) -> Report:
    """Run cases ``start`` to ``stop`` of a target (a name of tests.fuzz.targets, or ``module:function``)."""
    report, pieces, deaths = Report(target), [(start, stop)], 0
    while pieces and deaths < max_deaths:
        first, last = pieces.pop(0)
        found = _child(target, seed, first, last)
        if isinstance(found, Report):
            report.add(found)
            continue
        killer = found[0]
        report.add(Report(target, 1, Counter({"DIED": 1}), [found]))
        deaths += 1
        pieces[:0] = [piece for piece in ((first, killer), (killer + 1, last)) if piece[0] < piece[1]]
    return report


def _child(target: str, seed: int, start: int, stop: int) -> Report | tuple[int, str]:
    """What one child reports, or the case that killed it and how."""
    with tempfile.NamedTemporaryFile() as progress:
        progress.write(start.to_bytes(8, "little"))
        progress.flush()
        command = [sys.executable, "-m", "tests.fuzz.child", target, str(seed), str(start), str(stop), progress.name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        killer = int.from_bytes(Path(progress.name).read_bytes(), "little")
    if done.returncode in (-signal.SIGPROF, -signal.SIGALRM):
        return killer, "hangs"
    if done.returncode:
        name = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit {done.returncode}"
        return killer, f"killed the process: {name} {done.stderr[-500:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    failures = [(number, text) for number, text in found["failures"]]
    return Report(
        target, stop - start, Counter(found["outcomes"]), failures, tuple(found["slowest"]), found["peak_rss"], found["peak_growth"]
    )
