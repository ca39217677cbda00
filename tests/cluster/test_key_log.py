"""The log of keys: what it says of a run that is whole, and that it tells every way in which one is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from cluster.key_log import KeyLog, check_key_log
from cluster.order import Plan
from cluster.store import Store, open_store

PLAN = Plan((("00000", 20), ("00001", 21), ("00002", 19)), batch_size=16, images_per_identity=2, lanes=4)
KEYS = {f"{shard} {place}/é" for shard, count in PLAN.shards for place in range(count)}  # foreign keys may hold anything


def consumed(lanes: Sequence[int], step: int) -> list[str]:
    """What a rank with these lanes consumes in a step, from 1."""
    segments = (segment for lane in lanes for segment in PLAN.segments(lane, step - 1))
    return [f"{each.shard} {place}/é" for each in segments for place in range(each.start, each.stop)]


def log(store: Store, first: int, last: int, world_size: int = 1, changes: Mapping[str, str] | None = None) -> None:
    """What all ranks write who go on from step ``first`` and publish a checkpoint after ``last``."""
    for rank in range(world_size):
        part = KeyLog(store, first, rank, world_size)
        for step in range(first + 1, last + 1):
            keys = [(changes or {}).get(key, key) for key in consumed(PLAN.lanes_of(rank, world_size), step)]
            part.add(step, (step - 1) // PLAN.steps_per_epoch, keys)
        part.publish()


def test_restarts_on_other_numbers_of_workers_add_up(any_root: str):
    store = open_store(any_root)
    log(store, 0, 3)
    log(store, 3, 6, world_size=2)
    log(store, 3, 6, world_size=2)  # the same steps again: the same files
    log(store, 3, 5)
    log(store, 5, 10, world_size=4)
    assert len(list(store.list("keys/"))) == 1 + 2 + 1 + 4
    for keys in (None, KEYS):
        found = check_key_log(store, 8, 60, keys)
        assert not found.problems
        assert (found.steps, found.samples, found.epochs, found.repeated) == (8, 120, 2, 3)
    assert check_key_log(store, 10, 60).samples == PLAN.samples_before(10)


def test_a_part_that_a_rank_did_not_write_does_not_count(tmp_path: Path):
    store = open_store(tmp_path)
    log(store, 0, 4, world_size=2)
    first = min(stored.key for stored in store.list("keys/"))
    store.delete(first)
    assert check_key_log(store, 4, 60).problems == ["4 of 4 steps were not logged, the first is 1"]
    log(store, 0, 4)
    assert not check_key_log(store, 4, 60).problems


def test_nothing_is_written_when_nothing_was_added(tmp_path: Path):
    part = KeyLog(open_store(tmp_path), 0, 0, 1)
    part.publish()
    part.add(1, 0, ["a"])
    part.publish()
    part.publish()
    assert len(list((tmp_path / "keys").iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"00001 3/é": "00001 4/é"}, "epoch 1: 1 of 60 keys came more than once"),
        ({"00001 3/é": "00001 99/é"}, "epoch 1: 1 keys that are not the data set's"),
    ],
)
def test_a_key_twice_or_of_nowhere_is_found(tmp_path: Path, changes: dict[str, str], problem: str):
    store = open_store(tmp_path)
    log(store, 0, 4)
    log(store, 4, 8, changes=changes)
    assert problem in check_key_log(store, 8, 60).problems
    assert problem in check_key_log(store, 8, 60, KEYS).problems


def test_a_step_that_is_missing_or_was_done_again_with_other_keys_is_found(tmp_path: Path):
    store = open_store(tmp_path)
    log(store, 0, 2)
    log(store, 3, 8)
    assert "1 of 8 steps were not logged, the first is 3" in check_key_log(store, 8, 60).problems
    log(store, 2, 3)
    assert not check_key_log(store, 8, 60).problems
    for key in consumed([0], 6)[:1]:
        log(store, 4, 6, world_size=2, changes={key: "another"})
    found = check_key_log(store, 8, 60)
    assert found.problems == ["keys/00000005-00000006-*of2: step 6 was done again with other keys"]


def test_other_keys_in_the_same_steps_stand_beside_the_first(tmp_path: Path):
    store = open_store(tmp_path)
    log(store, 0, 4)
    log(store, 0, 4, changes={consumed([0], 1)[0]: "another"})
    assert any("logged more than once with different keys" in problem for problem in check_key_log(store, 4, 60).problems)


def test_damaged_and_foreign_files_are_named(tmp_path: Path):
    store = open_store(tmp_path)
    log(store, 0, 4)
    path = next((tmp_path / "keys").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / "keys" / "notes.txt").write_text("")
    problems = check_key_log(store, 4, 60).problems
    assert "keys/notes.txt is no part of a log of keys" in problems
    assert any("damaged or cut short" in problem for problem in problems)
