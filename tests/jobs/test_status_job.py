"""``facemae status`` beside a real run: while it works, when its driver was killed, and to its end; its words and exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

from cluster import attempt
from cluster.dataset import Dataset
from jobs import ingest, status
from tests.cluster.test_status import finish, killed, training, working

SOURCE = "synthetic:ids=6,images=10"
DRIVER = """
import os, signal, sys
import cluster.stage
from cluster.progress import Progress
from jobs.ingest import main

class Deadly(Progress):
    def committed(self, manifest, **facts):
        super().committed(manifest, **facts)
        if self._done == 3:
            os.kill(os.getpid(), signal.SIGKILL)

cluster.stage.Progress = Deadly
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "BEAT_SECONDS", 0.2)


@pytest.mark.s3
@pytest.mark.faults
def test_a_run_is_seen_from_its_store_alone(
    ray_session: None, s3_root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--source", SOURCE, "--output", s3_root, "--shard-size", "5", "--num-workers", "1"]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    assert subprocess.run([sys.executable, "-c", DRIVER, *arguments], env=environment, check=False).returncode == -9
    monkeypatch.setattr(attempt, "PATIENCE_SECONDS", 0.0)
    assert status.main([s3_root]) == 2
    shown = capsys.readouterr()
    assert f"{s3_root} (ingest): unfinished, the last attempt died" in shown.out
    committed = int(re.findall(r"^  shards   (\d+) of 12 \(", shown.out, re.MULTILINE)[0])
    assert 3 <= committed < 12  # the worker may have committed more before it learned of its driver's death
    assert f"  samples  {5 * committed} of 60 (" in shown.out
    assert shown.err.startswith(f"\nfacemae status: error: {s3_root} is unfinished: attempt 1 died; nobody is at work on it: run the same")
    monkeypatch.setattr(attempt, "PATIENCE_SECONDS", 20.0)

    codes = list[int]()
    watching = threading.Thread(target=lambda: codes.append(status.main([s3_root, "--watch", "--interval", "0.2"])))
    going_on = threading.Thread(target=ingest.main, args=(arguments,))
    going_on.start()
    while len(attempt.records(Dataset(s3_root).store)) < 2:
        time.sleep(0.05)
    watching.start()
    for thread in (going_on, watching):
        thread.join()
    assert codes == [0]
    seen = [line for line in capsys.readouterr().out.splitlines() if line.startswith(s3_root)]
    assert f"{s3_root} (ingest): running, " in seen[0]
    assert seen[-1] == f"{s3_root} (images): complete, 12 of 12 shards"
    assert status.main([s3_root, "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)["parts"]
    assert (part["state"], part["shards"], part["samples"], part["samples_total"]) == ("complete", 12, 60, 60)
    dead, ended = part["attempts"]
    assert (dead["state"], ended["state"]) == ("dead", "ended") or dead["state"] == "running"  # its record is young yet
    assert committed <= ended["tally"]["resumed"] <= 12 - ended["tally"]["own_shards"]
    assert (ended["tally"]["done"], ended["tally"]["shards"]) == (12, 12)


@pytest.mark.parametrize("arguments", [["/no/such/place"], [""], [__file__], ["--watch", "/no/such/place"]])
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert status.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("facemae status: error: ")
    assert len(error.splitlines()) == 1


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    root = str(tmp_path / "set")
    with working(root) as work:
        work.commit(0).beat()
        assert status.main([root]) == 0, "it runs"
        work.give_up(1)
        dataset = finish(root)
    assert status.main([root]) == 3
    assert status.main([root, "--watch"]) == 3
    dataset.describe({**dataset.description(), "released": False, "release": {"withheld": "too near"}})
    assert status.main([root]) == 4
    assert "release withheld: too near" in capsys.readouterr().err
    assert status.main([root, "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["withheld"] == "too near"
    (tmp_path / "set" / "dataset.json").write_text("{")
    assert status.main([root]) == 2
    assert "is damaged: " in capsys.readouterr().err
    monkeypatch.setattr(attempt, "PATIENCE_SECONDS", -1.0)
    killed(str(tmp_path / "dead"), 0)
    assert status.main([str(tmp_path / "dead"), "--watch", "--interval", "0.01"]) == 2


def test_a_folder_of_several_is_watched_a_while_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """A pipeline's next step may be about to begin."""
    with working(str(tmp_path / "original")) as work:
        work.commit(0)
        finish(str(tmp_path / "original"))
    training(tmp_path / "run", run=json.dumps({"steps": 8, "samples": 80, "weights": {}}))
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 5:
            with working(str(tmp_path / "protected")) as work:
                work.commit(0)
                finish(str(tmp_path / "protected"))

    monkeypatch.setattr(status.time, "sleep", sleep)
    assert status.main([str(tmp_path), "--watch", "--interval", "10", "--json"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(each["parts"]) for each in shown] == [2, 3]
    assert len(looks) == status.QUIET_SECONDS / 10


def test_a_terminal_is_drawn_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    with working(str(tmp_path)) as work:
        work.commit(0).beat()
        watch, screen = status.Watch(str(tmp_path)), status._Screen(False)
        screen.show(watch.look())
        screen.show(watch.look())
    first, again = capsys.readouterr().out.split("\x1b[", 1)
    assert max(map(len, first.splitlines())) < 40
    assert again.startswith(f"{len(first.splitlines())}F\x1b[J")
