"""Attempts: numbered without collision, one run, alive while they beat."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster import attempt
from cluster.attempt import Attempt, attempting, living
from cluster.store import StoreError, open_store


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attempt, "BEAT_SECONDS", 0.1)


def test_attempts_of_a_run_count_up(any_root: str):
    store = open_store(any_root)
    with attempting(store, "f") as first:
        pass
    with attempting(store, "f") as second:
        pass
    assert (first.number, second.number) == (1, 2)
    assert first.run == second.run
    states = [json.loads(store.get(stored.key))["state"] for stored in store.list(attempt.FOLDER)]
    assert states == ["ended", "ended"]


def test_attempts_that_begin_at_once_get_a_number_each(any_root: str):
    barrier = threading.Barrier(8)

    def begin(_: int) -> Attempt:
        barrier.wait()
        with attempting(open_store(any_root), "f") as mine:
            return mine

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(begin, range(8)))
    assert sorted(each.number for each in found) == list(range(1, 9))
    assert len({each.run for each in found}) == 1


def test_an_attempt_is_alive_until_it_ends(any_root: str):
    store = open_store(any_root)
    assert living(store, 0.4) == []
    told: list[str] = []
    with attempting(store, "f") as mine:
        assert living(store, 5.0, told.append) == [mine.number]
    assert "heartbeat" in told[0]
    assert living(store, 1e6) == []  # it said that it ended: nothing to watch


def test_a_failed_attempt_says_so(any_root: str):
    store = open_store(any_root)
    with pytest.raises(ValueError, match="x"), attempting(store, "f"):
        raise ValueError("x")
    (record,) = store.list(attempt.FOLDER)
    assert json.loads(store.get(record.key))["state"] == "failed"


@pytest.mark.faults
def test_a_killed_attempt_is_taken_for_dead(tmp_path):
    script = f"""
import os, signal
from cluster.attempt import attempting
from cluster.store import open_store
with attempting(open_store({str(tmp_path)!r}), "f"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    store = open_store(str(tmp_path))
    (record,) = store.list(attempt.FOLDER)
    assert json.loads(store.get(record.key))["state"] == "running"
    assert living(store, 0.5) == []
    with attempting(store, "f") as mine:
        assert mine.number == 2
        assert living(store, 5.0) == [2]


def test_a_damaged_record_and_a_strangers_file_are_in_nobodys_way(any_root: str):
    store = open_store(any_root)
    store.put("attempts/00001.json", b"")
    store.put("attempts/notes.txt", b"hello")
    assert living(store) == []
    with attempting(store, "f") as mine:
        assert mine.number == 2


def test_of_two_different_jobs_at_once_the_later_one_goes(any_root: str):
    """Else each would commit some shards, and neither could end."""
    store = open_store(any_root)
    with attempting(store, "these settings"):
        with pytest.raises(StoreError, match="attempt 1 with other input or settings is at work"), attempting(store, "others"):
            pass
        with attempting(store, "these settings"):  # the same work may be done by any number
            pass
    with attempting(store, "others") as later:
        assert later.number == 4


def test_of_two_different_jobs_that_begin_together_one_goes_on(any_root: str):
    barrier, outcomes = threading.Barrier(2), list[str]()

    def work(fingerprint: str) -> None:
        barrier.wait()
        try:
            with attempting(open_store(any_root), fingerprint):
                time.sleep(2)
            outcomes.append("done")
        except StoreError:
            outcomes.append("refused")

    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["done", "refused"]
