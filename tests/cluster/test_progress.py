"""The progress bar says what a stage waits for: on a terminal in the bar, elsewhere as lines."""

from __future__ import annotations

import sys
import time

import pytest

from cluster import progress
from cluster.processor import Unit
from cluster.progress import Progress
from tests.cluster.test_pulse import manifest

UNITS = [Unit(f"{number:05d}", 10) for number in range(4)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.1)
    monkeypatch.setattr(progress, "REMIND_SECONDS", 0.05)


def said(capsys: pytest.CaptureFixture[str], text: str, times: int) -> str:
    """What was printed, once it holds ``text`` so often."""
    found = ""
    for _ in range(600):
        found += capsys.readouterr().err
        if found.count(text) >= times:
            return found
        time.sleep(0.05)
    pytest.fail(f"{text!r} was not said {times} times: {found!r}")


def test_a_stage_without_workers_says_so_again_and_again(capsys: pytest.CaptureFixture[str]):
    with Progress("protect", UNITS, []) as bar:
        bar.workers(0, 2)
        said(capsys, "protect: waiting for workers: 0 of 2, for 0 s; `ray status` says what the cluster lacks", 2)
        bar.workers(0, 3)
        said(capsys, "waiting for workers: 0 of 3", 1)
        bar.workers(1, 3)
        said(capsys, "protect: 1 of 3 workers are ready", 1)
        bar.committed(manifest("00000"), mine=True, idle=0.0)
        capsys.readouterr()
        time.sleep(0.3)
        assert "waiting" not in capsys.readouterr().err


def test_a_quick_start_says_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 1000.0)
    with Progress("protect", UNITS, []) as bar:
        bar.workers(0, 2)
        bar.workers(2, 2)
    text = capsys.readouterr().err
    assert "workers are ready" not in text
    assert "protect: waiting" not in text


def test_the_end_of_a_stage_ends_its_reminders(capsys: pytest.CaptureFixture[str]):
    with Progress("protect", UNITS, []) as bar:
        bar.workers(0, 2)
        said(capsys, "protect: waiting for workers", 1)
    time.sleep(0.2)
    capsys.readouterr()
    time.sleep(0.3)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_the_bar_says_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("protect", UNITS, ["00000"]) as bar:
        bar.workers(0, 2)
        time.sleep(0.3)
        text = capsys.readouterr().err
        assert "waiting for workers: 0 of 2]" in text
        assert "protect: waiting" not in text
        bar.workers(2, 2)
        bar.committed(manifest("00001"), mine=True, idle=0.0)
    text = capsys.readouterr().err
    assert text.rstrip().endswith("2/4 shards, 1 quarantined]")
