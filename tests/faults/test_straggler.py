"""One worker that is twenty times slower than the others: near the end its shards are handed out again, and the first commit wins."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.dataset import Dataset, Labels, ShardData
from cluster.processor import Processor, Unit
from cluster.shard import Sample, ShardWriter
from cluster.stage import StageOptions, StageResult, run_stage
from tests.faults.check import snapshot
from tests.faults.report import Case

pytestmark = pytest.mark.faults

UNITS = [Unit(f"{number:05d}", 2) for number in range(48)]
SECONDS = 0.25


class Sleeper(Processor[Unit]):
    """Takes its time over every unit; the first worker that opens takes 20 times as long where ``folder`` is given."""

    def __init__(self, folder: str | None) -> None:
        self._folder, self._slow = folder, False

    def describe(self) -> dict[str, Any]:
        return {}

    def open(self, threads: int) -> None:
        if self._folder is not None:
            try:
                os.close(os.open(f"{self._folder}/taken", os.O_CREAT | os.O_EXCL))
                self._slow = True
            except FileExistsError:
                pass

    def fetch(self, unit: Unit) -> None:
        return None

    def compute(self, unit: Unit, fetched: None) -> ShardData:
        time.sleep(SECONDS * (20 if self._slow else 1))
        writer = ShardWriter()
        for number in range(2):
            writer.add(Sample(f"{unit.name}-{number}", unit.name.encode() * 20, number))
        return ShardData(writer.finish(), 2, Labels.of(writer.labels), counts={"slow": int(self._slow)})


def run(root: Path, folder: Path | None) -> StageResult:
    options = StageOptions(num_workers=4, cpus_per_worker=0)  # they sleep
    processor = Sleeper(str(folder) if folder else None)
    return run_stage(processor, UNITS, Dataset(str(root)), name="sleep", kind="images", options=options)


def test_a_straggler_costs_less_than_a_second_run(long: None, tmp_path: Path, ray_session: None, fault_case: Case):
    balanced = run(tmp_path / "balanced", None)
    (tmp_path / "folder").mkdir()
    held_up = run(tmp_path / "held-up", tmp_path / "folder")
    fault_case.note("worker 20 x slower")
    fault_case.figures |= {"seconds balanced": balanced.seconds, "seconds with the straggler": held_up.seconds}
    assert (tmp_path / "folder" / "taken").exists()
    slow = sum(manifest.counts["slow"] for manifest in Dataset(str(tmp_path / "held-up")).manifests())
    assert slow <= 1, "the others took its shards over"
    assert held_up.seconds < 2 * balanced.seconds
    fault_case.check(str(tmp_path / "held-up"), snapshot(str(tmp_path / "balanced")))
