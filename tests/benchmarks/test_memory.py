from __future__ import annotations

import subprocess
import sys
import time

import pytest

from benchmarks.memory import PeakMemory

psutil = pytest.importorskip("psutil")
MIB = 1 << 20
_HOLDER = (
    "import sys; held = bytearray(200 << 20); print(1, flush=True); sys.stdin.read(1); held = None; print(1, flush=True); sys.stdin.read(1)"
)


def test_the_peak_of_a_child_is_found_and_a_new_phase_forgets_it() -> None:
    with (
        PeakMemory() as memory,
        subprocess.Popen([sys.executable, "-c", _HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        child.stdin.write("x")
        child.stdin.flush()
        child.stdout.readline()  # the memory is free again, the peak stays
        first, name = memory.phase(), child.pid
        time.sleep(0.2)
        second = memory.phase()
        child.stdin.close()
    assert 200 * MIB < first.processes[name][1] < 260 * MIB
    assert second.processes[name][1] < 100 * MIB
    assert first.total >= first.largest[1] >= first.processes[name][1]
