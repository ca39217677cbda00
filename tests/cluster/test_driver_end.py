from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster import driver_end

DRIVER = "import sys, time; print('up', flush=True); time.sleep(float(sys.argv[-1]))"


def _driver(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that looks like a job of ours."""
    program = folder / "facemae"
    program.write_text(DRIVER)
    command = [sys.executable, str(program), "protect", "--config", "/etc/facemae/job.yaml", str(seconds)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    started.stdout.readline()
    return started


def test_it_waits_for_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_end, "POLL_SECONDS", 0.05)
    known = driver_end.drivers
    with _driver(tmp_path, 60) as started:
        monkeypatch.setattr(driver_end, "drivers", lambda: [each for each in known() if each == started.pid])
        assert driver_end.main(["--grace", "0.2"]) == 1
        started.terminate()
    assert driver_end.main(["--grace", "0.2"]) == 0


@pytest.mark.parametrize(
    ("command", "ours"),
    [
        (["/usr/bin/python3", "/usr/local/bin/facemae", "pipeline", "--config", "/etc/facemae/job.yaml"], True),
        (["facemae", "protect", "--config", "job.yaml"], True),
        (["python", "-m", "jobs", "train", "--config", "job.yaml"], True),
        (["facemae", "status", "s3://bucket/root"], False),
        (["/bin/bash", "-c", "facemae protect --config job.yaml"], False),
        (["ray::JobSupervisor"], False),
        ([], False),
    ],
)
def test_which_processes_are_drivers(tmp_path: Path, command: list[str], ours: bool) -> None:
    (tmp_path / "4000000").mkdir()
    (tmp_path / "4000000" / "cmdline").write_bytes("\0".join([*command, ""]).encode())
    assert driver_end.drivers(tmp_path) == ([4000000] if ours else [])
