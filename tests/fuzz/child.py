"""The process that runs cases, under a limit of memory and a clock for each: python -m tests.fuzz.child TARGET SEED START STOP PROGRESS.

Its last line of output is JSON. A case that kills it is the one whose number stands in PROGRESS.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import time
from collections import Counter

from cluster.picture import MAX_DECODE_BYTES

SECONDS = 5.0
"""A case that takes more CPU than this hangs; the kernel ends the process."""
PATIENCE = 30.0
"""A case that waits longer, for whatever it may be, hangs as well: the machine may be busy, so that this is not the same."""
MEMORY = MAX_DECODE_BYTES
"""What a case may allocate above what the process has when it starts: the bound that the readers state."""
MAX_FAILURES = 20


def main(target: str, seed: int, start: int, stop: int, progress: str) -> None:
    """Run the cases and print what came of them."""
    from tests.fuzz.targets import TARGETS, case_random

    module, colon, name = target.partition(":")
    run = getattr(importlib.import_module(module), name) if colon else TARGETS[target][0]
    run(case_random(seed, "warm-up", 0)) if not colon else None
    before = _limit_memory()
    outcomes, failures, slowest = Counter[str](), list[tuple[int, str]](), (0.0, start)
    for expired in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(expired, signal.SIG_DFL)
    with open(progress, "r+b", buffering=0) as file:
        for number in range(start, stop):
            os.pwrite(file.fileno(), number.to_bytes(8, "little"), 0)
            rng, began = case_random(seed, target, number), time.process_time()
            _set_clocks(SECONDS, PATIENCE)
            try:
                outcomes[run(rng)] += 1
            except Exception as error:  # every exception that is not the reader's own is what the fuzzer looks for
                outcomes["FAILED"] += 1
                failures.append((number, f"{type(error).__name__}: {error}"[:600]))
            _set_clocks(0, 0)
            slowest = max(slowest, (time.process_time() - began, number))
    peak = _peak()
    found = {"outcomes": outcomes, "failures": failures[:MAX_FAILURES], "slowest": slowest, "peak_rss": peak, "peak_growth": peak - before}
    print(json.dumps(found))


def _set_clocks(cpu: float, wall: float) -> None:
    """Start the clocks of a case, or stop them with zeros."""
    signal.setitimer(signal.ITIMER_PROF, cpu)
    signal.setitimer(signal.ITIMER_REAL, wall)


def _peak() -> int:
    """The most resident bytes of this process. getrusage would count those of the process that started it as well."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM:"))


def _limit_memory() -> int:
    """Limit the address space to what there is and MEMORY. Returns the resident bytes now."""
    with open("/proc/self/statm") as file:
        size, resident = (int(pages) * resource.getpagesize() for pages in file.read().split()[:2])
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return resident


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
