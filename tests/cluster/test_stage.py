"""The scheduler under ordinary and bad conditions, on a real Ray with real processes that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cluster.attempt import Attempt
from cluster.dataset import Dataset, Labels, ShardData
from cluster.processor import Processor, Unit
from cluster.shard import Sample, ShardWriter
from cluster.stage import StageError, StageOptions, run_stage
from cluster.store import StoreError
from cluster.verify import verify
from cluster.worker import Worker

UNITS = [Unit(f"{number:05d}", 3) for number in range(6)]


class Maker(Processor[Unit]):
    """Makes three samples a unit; ``trouble`` happens to one unit, as often as a folder holds no mark of it yet."""

    def __init__(self, trouble: str = "", unit: str = "", folder: str = "", times: int = 1, seed: int = 0, pause: float = 0.0) -> None:
        self.trouble, self.unit, self.folder, self.times, self.seed, self.pause = trouble, unit, folder, times, seed, pause

    def describe(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def open(self, threads: int) -> None:
        if self.trouble == "no-weights":
            raise ValueError("the weights do not load")

    def fetch(self, unit: Unit) -> bytes:
        if unit.name == self.unit and self._again():
            if self.trouble == "storage":
                raise StoreError("503 SlowDown")
            if self.trouble == "credentials":
                raise StoreError("the secret key is wrong", fatal=True)
        return unit.name.encode()

    def compute(self, unit: Unit, fetched: bytes) -> ShardData:
        time.sleep(self.pause)
        if unit.name == self.unit and self.trouble in ("crash", "error", "slow") and self._again():
            if self.trouble == "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.trouble == "slow":
                time.sleep(1000 * self.pause)
            raise ValueError("a picture from hell")
        writer = ShardWriter()
        for number in range(3):
            writer.add(Sample(f"{unit.name}-{number}", b"%d %s" % (self.seed, fetched), number))
        return ShardData(writer.finish(), 3, Labels.of(writer.labels))

    def _again(self) -> bool:
        """Whether the trouble strikes once more; each stroke leaves a mark."""
        marks = Path(self.folder)
        if len(list(marks.iterdir())) >= self.times:
            return False
        (marks / f"{time.monotonic_ns()}").touch()
        return True


def _run(root: str, processor: Processor[Unit], units: list[Unit] = UNITS, **options: Any) -> Any:
    return run_stage(processor, units, Dataset(root), name="test", kind="images", options=StageOptions(num_workers=2, **options))


def _shards(root: str) -> dict[str, str | None]:
    return {manifest.shard: manifest.sha256 for manifest in Dataset(root).manifests()}


@pytest.fixture
def undisturbed(tmp_path: Path, ray_session: None) -> dict[str, str | None]:
    _run(str(tmp_path / "undisturbed"), Maker())
    return _shards(str(tmp_path / "undisturbed"))


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def test_every_unit_is_committed_once(any_root: str, ray_session: None) -> None:
    result = _run(any_root, Maker())
    assert (result.committed, result.resumed, result.samples) == (6, 0, 18)
    assert verify(any_root).ok


@pytest.mark.parametrize(("trouble", "times"), [("crash", 2), ("error", 2), ("storage", 2)])
def test_trouble_that_passes_leaves_no_trace(
    tmp_path: Path, marks: Path, undisturbed: dict[str, str | None], trouble: str, times: int
) -> None:
    root = str(tmp_path / "root")
    result = _run(root, Maker(trouble, "00002", str(marks), times))
    assert len(list(marks.iterdir())) == times, "the trouble must have happened"
    assert _shards(root) == undisturbed
    assert result.failed_shards == []
    assert verify(root).ok


@pytest.mark.parametrize(("trouble", "word"), [("crash", "died"), ("error", "a picture from hell")])
def test_a_poison_shard_is_quarantined_whole_and_alone(tmp_path: Path, marks: Path, ray_session: None, trouble: str, word: str) -> None:
    root = str(tmp_path / "root")
    result = _run(root, Maker(trouble, "00003", str(marks), times=10**6))
    assert list(result.failed_shards) == ["00003"]
    assert (result.description["samples_in"], result.description["samples"], result.description["quarantined"]) == (18, 15, 3)
    (row,) = Dataset(root).ledger(Dataset(root).manifest("00003"))
    assert row.reason == "failed-shard"
    assert word in row.error
    assert row.num_samples == 3
    assert verify(root).ok


def test_resume_does_only_what_is_missing(tmp_path: Path, undisturbed: dict[str, str | None]) -> None:
    root = str(tmp_path / "undisturbed")
    store = Dataset(root).store
    for name in ("00001", "00004"):
        store.delete(f"manifests/{name}.json")
    store.delete("dataset.json")
    result = _run(root, Maker())
    assert (result.committed, result.resumed) == (2, 4)
    assert _shards(root) == undisturbed
    assert verify(root).ok


def test_a_fatal_error_ends_the_run_at_once(tmp_path: Path, marks: Path, ray_session: None) -> None:
    with pytest.raises(StageError, match="secret key is wrong"):
        _run(str(tmp_path / "root"), Maker("credentials", "00000", str(marks)))


def test_weights_that_do_not_load_end_the_run(tmp_path: Path, ray_session: None) -> None:
    with pytest.raises(StageError, match="the weights do not load"):
        _run(str(tmp_path / "root"), Maker("no-weights"))


def test_other_settings_on_the_same_output_are_refused(tmp_path: Path, ray_session: None) -> None:
    root = str(tmp_path / "root")
    _run(root, Maker(seed=0))
    with pytest.raises(StageError, match="another run"):
        _run(root, Maker(seed=1))
    with pytest.raises(StageError, match="not of this input"):
        _run(root, Maker(seed=0), UNITS[:3])


@pytest.mark.faults
def test_sigterm_drains_and_the_next_run_completes(tmp_path: Path, undisturbed: dict[str, str | None]) -> None:
    root = str(tmp_path / "root")
    script = textwrap.dedent(f"""
        from cluster.session import session
        from cluster.stage import Interrupted
        from tests.cluster.test_stage import Maker, _run
        with session(num_cpus=2):
            try:
                _run({root!r}, Maker(pause=1.0), in_flight=1)
            except Interrupted as stopped:
                print("drained:", stopped, flush=True)
    """)
    job = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ, "RAY_ADDRESS": ""})
    deadline = time.monotonic() + 60
    while not (Path(root) / "manifests").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert "drained:" in output
    committed = set(_shards(root))
    assert 0 < len(committed) < len(UNITS)
    result = _run(root, Maker())
    assert result.resumed == len(committed)
    assert _shards(root) == undisturbed
    assert verify(root).ok


def test_attempts_are_numbered_and_a_worker_passes_over_what_is_committed(tmp_path: Path, ray_session: None) -> None:
    root = str(tmp_path / "root")
    _run(root, Maker(), UNITS)
    first = Dataset(root).manifests()
    assert {manifest.attempt for manifest in first} == {1}
    Dataset(root).store.delete("manifests/00002.json")
    _run(root, Maker())
    second = {manifest.shard: manifest for manifest in Dataset(root).manifests()}
    assert {shard: manifest.attempt for shard, manifest in second.items() if manifest.attempt != 1} == {"00002": 2}
    assert {manifest.run for manifest in second.values()} == {first[0].run}
    processor = Maker("error", "00001", str(tmp_path / "nothing"))  # would raise, were it asked
    worker = Worker(processor, root, ".tar", Attempt("run", 3), second["00001"].fingerprint, 1)
    worker._dataset = Dataset(root)
    assert worker.run(UNITS[1]).manifest == second["00001"]
    worker._fingerprint = "other"
    assert worker.run(UNITS[1]).fatal


def test_a_slow_worker_does_not_hold_the_stage_up(tmp_path: Path, marks: Path, undisturbed: dict[str, str | None]) -> None:
    """One shard hangs for longer than a test may take: another worker does it."""
    root = str(tmp_path / "root")
    result = _run(root, Maker("slow", "00000", str(marks), pause=1.0), in_flight=1)
    assert len(list(marks.iterdir())) == 1
    assert _shards(root) == undisturbed
    assert result.committed == 6
    assert verify(root).ok


def test_draining_finishes_what_computes_and_gives_back_the_rest(tmp_path: Path) -> None:
    worker = Worker(Maker(pause=0.5), str(tmp_path), ".tar", Attempt("run", 1), "f", 1)
    worker._dataset = Dataset(str(tmp_path))
    with ThreadPoolExecutor(3) as pool:
        outcomes = [pool.submit(worker.run, unit) for unit in UNITS[:3]]
        time.sleep(0.2)
        worker.drain()
        found = [outcome.result() for outcome in outcomes]
    assert sum(outcome.manifest is not None for outcome in found) == 1
    assert sum(outcome.drained for outcome in found) == 2
    assert worker.run(UNITS[4]).drained
    assert len(Dataset(str(tmp_path)).names()) == 1


def test_a_worker_says_how_long_its_device_waited(tmp_path: Path) -> None:
    worker = Worker(Maker(pause=0.05), str(tmp_path), ".tar", Attempt("run", 1), "f", 1)
    worker._dataset = Dataset(str(tmp_path))
    assert worker.run(UNITS[0]).idle < 10.0
    time.sleep(0.4)
    assert 0.4 <= worker.run(UNITS[1]).idle < 10.0
    assert worker.run(UNITS[1]).idle == 0.0, "nothing was computed"
