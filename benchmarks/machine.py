"""Where and when a figure was measured: the part of every result that says what it is worth."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GiB, load at this moment, date, and the commit ("-dirty" with changes)."""
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "processor": _first("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30), 1),
        "load_average": round(os.getloadavg()[0], 2),
        "date": datetime.date.today().isoformat(),
        "commit": described.stdout.strip() or "unknown",
    }


def _first(file: str, name: str) -> str | None:
    """The value of the first line "name : value"."""
    for line in Path(file).read_text().splitlines() if Path(file).exists() else ():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return None
