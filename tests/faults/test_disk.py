"""A disk that runs full ends the job with the reason and the remedy; with room again the same command completes the set."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.check import snapshot
from tests.faults.report import Case

pytestmark = pytest.mark.faults


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    """A file system of its own, or a skip where mounting is not allowed."""
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def ingest(root: Path) -> subprocess.CompletedProcess[str]:
    source = ["--source", "synthetic:ids=20,images=10", "--shard-size", "20"]
    command = [sys.executable, "-m", "jobs", "ingest", *source, "--output", str(root), "--num-workers", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_a_full_disk(long: None, tmp_path: Path, fault_case: Case):
    assert ingest(tmp_path / "undisturbed").returncode == 0
    with small_disk(tmp_path / "disk", "500k"):
        root = tmp_path / "disk" / "set"
        failed = ingest(root)
        fault_case.note("disk full")
        assert failed.returncode == 2
        assert "No space left on device: free some space and run the same command again" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert 0 < len(list((root / "manifests").iterdir())) < 10
        subprocess.run(["mount", "-o", "remount,size=50m", str(tmp_path / "disk")], check=True)
        completed = ingest(root)
        assert completed.returncode == 0, completed.stderr
        assert "resumed" in completed.stdout
        fault_case.check(str(root), snapshot(str(tmp_path / "undisturbed")))
