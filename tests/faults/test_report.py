"""The report says what the cases did, also of those that failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.faults

CASES = """
import pytest
from tests.faults.check import Snapshot
from tests.faults.exchange import Injected
from tests.faults.policy import Kind

def test_good(fault_case, tmp_path):
    fault_case.seed = 7
    fault_case.injected([Injected(0.0, Kind.SHORT, "GET", "k", 5), Injected(0.0, Kind.KILL_WITHIN, "PUT", "k", 5, 99)])
    fault_case.killed([1, 2], "raylet")

def test_bad(fault_case, tmp_path):
    (tmp_path / "stray").write_text("")
    fault_case.check(str(tmp_path), Snapshot({"a": {}}, {}))

@pytest.fixture
def untidy():
    yield
    raise OSError

def test_untidy(fault_case, untidy):
    pass

def test_other():
    pass
"""


@pytest.mark.parametrize("processes", [[], ["-n", "2"]], ids=["one process", "two processes"])
def test_a_table_and_a_file(tmp_path: Path, processes: list[str]):
    (tmp_path / "test_cases.py").write_text(CASES)
    plugins = ["-p", "tests.faults.report", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plugins, "--faults-report", "out.json", *processes, "."]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    report = json.loads((tmp_path / "out.json").read_text())
    bad, good, untidy = report["cases"]  # one row each, also where the tidying up fails
    assert (good["seed"], good["faults"], good["kills"]) == (7, {"kill raylet": 2, "kill-within": 1, "short-within": 1}, 3)
    assert (good["result"], bad["result"], untidy["result"]) == ("passed", "failed", "passed")
    assert (bad["lost"], bad["strays"], bad["torn"]) == (1, 1, 2)
    assert "lost: a" in bad["problems"]
    assert "| 3 cases | | 4 | 3 |" in done.stdout
    assert report["command"].startswith("pytest")
