"""The tally of an attempt: what it counts, what it keeps to itself, and what an older or later version makes of it."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest

from cluster import attempt
from cluster.attempt import Record, attempting, is_alive, records
from cluster.dataset import Labels, Manifest
from cluster.local import LocalStore
from cluster.processor import Unit
from cluster.pulse import NAMES, Pulse, Tally
from cluster.store import Store, open_store

UNITS = [Unit(f"{number:05d}", 10) for number in range(6)]
OLD = {"run": "abc", "attempt": 1, "fingerprint": "f", "state": "running", "beat": 7, "started": "2026-01-01T00:00:00Z"}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def manifest(shard: str, samples: int = 9, quarantined: int = 1, failure: str | None = None) -> Manifest:
    return Manifest(shard, None, None, 0, samples + quarantined, samples, quarantined, Labels(), "f", "run", 1, failure=failure)


def tally(pulse: Pulse) -> Tally:
    found = Tally.of(json.loads(json.dumps(pulse.tally())))
    assert found is not None
    return found


def test_it_counts_what_the_driver_tells():
    clock = Clock()
    pulse = Pulse("protect", UNITS, ["00000"], clock)
    clock.now += 30
    assert (tally(pulse).waiting, tally(pulse).samples_per_second) == (30, None)
    pulse.workers(0, 2)
    pulse.workers(1, 2)
    for shard in ("00001", "00002"):
        clock.now += 5
        pulse.committed(manifest(shard), mine=True, idle=0.0)
    pulse.committed(manifest("00003"), mine=False, idle=0.0)
    pulse.handed_out_again("00004", "node", "a secret /home/me/key")
    pulse.given_up("00004", ["a secret /home/me/key"])
    pulse.committed(manifest("00004", 0, 10, "a secret"), mine=True, idle=0.0)
    found = tally(pulse)
    assert (found.stage, found.shards, found.samples, found.resumed, found.done) == ("protect", 6, 60, 1, 5)
    assert (found.own_shards, found.own_samples, found.own_quarantined) == (3, 18, 12)
    assert (found.own_given_up, found.given_up, found.retries) == (1, ("00004",), 1)
    assert (found.workers_ready, found.workers_wanted, found.waiting, found.seconds) == (1, 2, None, 40)
    assert found.samples_per_second == 3.0  # 30 samples in the 10 s since there was a worker: its start does not count
    assert "secret" not in json.dumps(pulse.tally())
    clock.now += 5
    pulse.workers(0, 2)
    clock.now += 7
    assert tally(pulse).waiting == 7


def test_a_source_that_does_not_say_how_much_it_holds_has_no_total():
    assert tally(Pulse("ingest", [Unit("00000", 0)], [])).samples is None


def test_names_of_shards_are_bounded():
    pulse = Pulse("ingest", UNITS, [])
    for number in range(2 * NAMES):
        pulse.given_up(f"{number:05d}", [])
    assert (len(tally(pulse).given_up), tally(pulse).own_given_up) == (NAMES, 2 * NAMES)


@pytest.mark.parametrize("content", [None, {}, {"stage": "x"}, {"steps": 3}, 7])
def test_what_is_no_tally_is_none(content: Any):
    assert Tally.of(content) is None


# --- in the attempt's record ---


@pytest.fixture
def store(any_root: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(attempt, "BEAT_SECONDS", 0.1)
    return open_store(any_root)


def test_every_beat_carries_it_and_the_last_word_too(store: Store):
    pulse = Pulse("protect", UNITS, [])
    with contextlib.suppress(OSError), attempting(store, "f", tally=pulse.tally):
        before = records(store)[1].beat
        pulse.committed(manifest("00001"), mine=True, idle=0.0)
        for _ in range(600):
            record = records(store)[1]
            if record.beat > before + 1:
                break
            time.sleep(0.05)
        assert is_alive(store, record)
        carried = Tally.of(record.tally)
        assert carried is not None
        assert (carried.stage, carried.shards, carried.own_shards, carried.own_samples) == ("protect", 6, 1, 9)
        pulse.committed(manifest("00002"), mine=True, idle=0.0)
        raise OSError("at /home/me")
    ended = records(store)[1]
    assert (ended.state, ended.error) == ("failed", "OSError")
    assert ended.tally is not None
    assert ended.tally["own_shards"] == 2
    assert not is_alive(store, ended)
    assert "/home/me" not in store.get("attempts/00001.json").decode()


def test_records_of_other_versions_are_read(store: Store):
    store.put("attempts/00001.json", json.dumps(OLD).encode())
    store.put("attempts/00002.json", json.dumps({**OLD, "attempt": 2, "state": "ended", "colour": "blue"}).encode())
    store.put("attempts/00003.json", b'{"run": 1')
    store.put("attempts/00004.json", b"[]")
    found = records(store)
    assert found[1] == Record("abc", 1, "f", "running", 7, "2026-01-01T00:00:00Z", "", None)
    assert [found[number].state for number in sorted(found)] == ["running", "ended", "damaged", "damaged"]


def test_the_stores_clock_tells_the_dead_at_once(store: Store, monkeypatch: pytest.MonkeyPatch):
    store.put("attempts/00001.json", json.dumps(OLD).encode())
    record = records(store)[1]
    monkeypatch.setattr(attempt, "living", lambda *_, **__: pytest.fail("watched, though the store has a clock"))
    assert is_alive(store, record)
    monkeypatch.setattr(type(store), "age", lambda *_: 21.0)
    assert not is_alive(store, record)


def test_a_store_without_a_clock_is_watched_for_a_beat(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attempt, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(LocalStore, "age", lambda *_: None)
    store = LocalStore(tmp_path)
    store.put("attempts/00001.json", json.dumps(OLD).encode())
    assert not is_alive(store, records(store)[1], 0.3)
    with attempting(store, "f"):
        assert is_alive(store, records(store)[2], 30.0)
