"""Wait for the driver that runs here to end: ``python -m cluster.driver_end --grace SECONDS``, the preStop hook of the head's pod.

When a run is stopped on Kubernetes, KubeRay has Ray send the driver SIGTERM and deletes the pods right after. The head must outlast the
driver, which takes no new work, waits until its workers have handed back theirs, and needs the head for that. Without a driver (the run
has ended) this ends at once. Exit codes: 0 no driver runs, 1 the grace is over and one does.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

POLL_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.driver_end", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--grace", type=float, default=60.0, help="seconds to wait at most (60)")
    deadline = time.monotonic() + parser.parse_args(arguments).grace
    while drivers():
        if time.monotonic() >= deadline:
            print("cluster.driver_end: the grace is over and the driver still runs; what it has not committed will be done again")
            return 1
        time.sleep(POLL_SECONDS)
    return 0


def drivers(proc: Path = Path("/proc")) -> list[int]:
    """Process ids of the jobs of ours that run on this machine: ``facemae JOB --config FILE``."""
    found = []
    for file in proc.glob("[0-9]*/cmdline"):
        try:
            command = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has ended since
        ours = any(Path(word).name == "facemae" for word in command[:2]) or command[1:3] == ["-m", "jobs"]
        if ours and "--config" in command and int(file.parent.name) != os.getpid():
            found.append(int(file.parent.name))
    return sorted(found)


if __name__ == "__main__":
    sys.exit(main())
