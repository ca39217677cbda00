"""What a stage and a training record. That it reaches a real Prometheus through a real Ray is tests/infra/test_monitoring.py."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from cluster import metrics
from cluster.attempt import Attempt
from cluster.dataset import Labels, Manifest
from cluster.metrics import LABELS, METRICS, StageMetrics, TrainingMetrics

SECONDS = {"fetch": 0.5, "compute": 2.0, "publish": 0.25}
SHARD = Manifest("00042", "shards/00042-0.tar", "0", 1000, 10, 8, 2, Labels(), "f", "run", 3, SECONDS)


class Board:
    """Stands where Ray's metrics stand: the sum of what was added, or the last value, by name and own label."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], float] = defaultdict(float)
        self.told: dict[str, int] = defaultdict(int)
        self.labels: set[tuple[str, ...]] = set()
        self.broken = False

    def instrument(self, name: str) -> Any:
        board = self

        class Instrument:
            def inc(self, value: float, tags: Mapping[str, str]) -> None:
                self.set(board.values[name, self._own(tags)] + value, tags)

            observe = inc

            def _record(self, value: float, tags: Mapping[str, str]) -> None:
                self.inc(value, tags)

            def set(self, value: float, tags: Mapping[str, str]) -> None:
                if board.broken:
                    raise RuntimeError("no metrics here")
                assert set(tags) == set(METRICS[name].labels)
                board.labels.add(tuple(tags[label] for label in LABELS))
                board.told[name] += 1
                board.values[name, self._own(tags)] = value

            def _own(self, tags: Mapping[str, str]) -> str:
                return tags.get(METRICS[name].label, "")

        return Instrument()


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    board = Board()
    monkeypatch.setattr(metrics, "_instrument", board.instrument)
    return board


def test_a_stage_counts_what_is_its_own_and_knows_what_is_left(board: Board) -> None:
    with StageMetrics("protect", Attempt("run", 3), 5) as stage:
        assert all(value == 0 for (name, _), value in board.values.items() if METRICS[name].kind == "counter")
        stage.workers(1, 2)
        stage.committed(SHARD, mine=True, idle=1.5)
        stage.committed(replace(SHARD, attempt=2), mine=False, idle=0.0)
        stage.handed_out_again("00001", "storage", "503")
        stage.handed_out_again("00001", "node", "gone")
        stage.worker_lost("node", with_node=True)
        stage.given_up("00001", ["a", "b"])
    expected = {
        ("facemae_shards", ""): 1, ("facemae_images", ""): 8, ("facemae_bytes", ""): 1000, ("facemae_quarantined", ""): 2,
        ("facemae_device_idle_seconds", ""): 1.5, ("facemae_device_busy_seconds", ""): 2.0, ("facemae_shards_left", ""): 3,
        ("facemae_retries", "storage"): 1, ("facemae_retries", "node"): 1, ("facemae_retries", "charged"): 0,
        ("facemae_worker_losses", "node"): 1, ("facemae_worker_losses", "process"): 0, ("facemae_shards_given_up", ""): 1,
        ("facemae_workers_ready", ""): 1, ("facemae_workers_wanted", ""): 2,
        ("facemae_step_seconds", "fetch"): 0.5, ("facemae_step_seconds", "publish"): 0.25,
    }  # fmt: skip
    assert {key: board.values[key] for key in expected} == expected
    assert board.labels == {("protect", "run", "3")}
    assert time.time() - board.values["facemae_last_progress_time_seconds", ""] < 60


def test_no_label_grows_with_the_data_set(board: Board) -> None:
    with StageMetrics("protect", Attempt("run", 1), 1000) as stage:
        for number in range(1000):
            stage.committed(replace(SHARD, shard=f"{number:05d}"), mine=True, idle=0.1)
            stage.handed_out_again(f"{number:05d}", "charged", f"error {number}")
    assert len(board.values) < 40
    assert board.values["facemae_shards_left", ""] == 0


def test_gauges_are_told_again_until_the_stage_ends(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "REFRESH_SECONDS", 0.01)
    with StageMetrics("protect", Attempt("run", 1), 7):
        deadline = time.monotonic() + 30
        while board.told["facemae_shards_left"] < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert board.told["facemae_shards_left"] >= 5
    told = board.told["facemae_shards_left"]
    time.sleep(0.1)
    assert board.told["facemae_shards_left"] == told
    assert board.values["facemae_shards_left", ""] == 7


def test_metrics_that_fail_cost_a_line_and_not_the_stage(board: Board, caplog: pytest.LogCaptureFixture) -> None:
    board.broken = True
    with StageMetrics("protect", Attempt("run", 1), 7) as stage:
        for _ in range(10):
            stage.committed(SHARD, mine=True, idle=1.0)
            stage.worker_lost("node", with_node=False)
    assert [record.message for record in caplog.records] == ["metrics are not recorded: RuntimeError: no metrics here"]


def test_a_training_counts_images_once_also_after_a_restart(board: Board) -> None:
    def progress(step: int, first: int = 0) -> dict[str, Any]:
        return {"step": step, "samples": 8 * step, "first_sample": first, "metrics": {"loss": 1.0 / (step + 1), "lr": 0.1}}

    with TrainingMetrics("train", Attempt("abc", 2), 100) as training:
        training.report({})
        for step in (2, 2, 4, 6, 4, 6, 8):  # the workers were killed after step 6 and went on from a checkpoint of step 4
            training.report(progress(step))
    assert board.values["facemae_images", ""] == 8 * (8 + 2), "two steps were done twice"
    assert board.values["facemae_training_step", ""] == 8
    assert board.values["facemae_training_steps", ""] == 100
    assert board.values["facemae_training_loss", "loss"] == pytest.approx(1 / 9)
    assert board.labels == {("train", "abc", "2")}
    with TrainingMetrics("train", Attempt("abc", 2), 100) as training:
        training.report(progress(10, first=80))
    with TrainingMetrics("train", None, 100):
        assert ("train", "", "") in board.labels
    assert board.values["facemae_images", ""] == 8 * 10, "what an earlier run did is not counted"
