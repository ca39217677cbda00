"""The verification of a training run, and each thing that it must find."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.checkpoint import Checkpoint, Checkpoints
from cluster.store import Store, StoreError, open_store
from cluster.verify_training import holds_training, verify_training
from tests.cluster.test_key_log import KEYS, PLAN, log
from tests.training import initial


def write_run(root: Path, finished: bool = True) -> Store:
    """What a training of 8 steps leaves, checkpoints after 4 and 8."""
    store = open_store(root)
    for step in (4, 8):
        log(store, step - 4, step, world_size=2)
        facts = {"samples": PLAN.samples_before(step), "parent": {"samples": 60}}
        Checkpoints(store).save(Checkpoint(step, facts, {"weight/a": torch.full((9,), float(step))}))
    if finished:
        sha256 = initial().save_pretrained(root / "weights")
        content = {"steps": 8, "samples": 120, "weights": {"sha256": sha256}, "parent": {"samples": 60}}
        store.put("run.json", json.dumps(content).encode())
    return store


@pytest.mark.parametrize("finished", [True, False])
def test_a_whole_run_adds_up(tmp_path: Path, finished: bool):
    write_run(tmp_path, finished)
    assert holds_training(str(tmp_path))
    found = verify_training(str(tmp_path), KEYS)
    assert found.ok, found.problems
    assert (found.finished, found.steps, found.checkpoints, found.strays) == (finished, 8, [4, 8], [])
    assert found.keys is not None
    assert (found.keys.samples, found.keys.epochs) == (120, 2)
    assert "no sample repeated, none skipped" in "\n".join(found.lines())


def test_without_a_log_of_keys_it_says_so(tmp_path: Path):
    store = write_run(tmp_path)
    for stored in list(store.list("keys/")):
        store.delete(stored.key)
    found = verify_training(str(tmp_path))
    assert found.ok
    assert found.keys is None
    assert "no log of keys" in "\n".join(found.lines())


def test_data_of_a_dead_attempt_is_a_stray_and_no_problem(tmp_path: Path):
    store = write_run(tmp_path)
    store.put("checkpoints/00000009-0123456789ab.safetensors", b"")
    found = verify_training(str(tmp_path))
    assert found.ok
    assert found.strays == ["checkpoints/00000009-0123456789ab.safetensors"]
    assert "STRAY" in "\n".join(found.lines())


def shorten(store: Store, prefix: str) -> None:
    key = next(stored.key for stored in store.list(prefix))
    store.put(key, store.get(key)[:-1])


def remove(store: Store, prefix: str) -> None:
    store.delete(next(stored.key for stored in store.list(prefix)))


def claim(store: Store, changes: dict[str, object]) -> None:
    store.put("run.json", json.dumps({**json.loads(store.get("run.json")), **changes}).encode())


@pytest.mark.parametrize(
    ("break_it", "problem"),
    [
        (lambda store: shorten(store, "weights/model.safetensors"), "run.json says"),
        (lambda store: remove(store, "weights/model.safetensors"), "does not exist"),
        (lambda store: store.put("weights/config.json", b'{"sha'), "weights: "),
        (lambda store: claim(store, {"weights": {"sha256": "0"}}), "run.json says 0"),
        (lambda store: store.put("run.json", b'{"schema"'), "run.json is cut short"),
        (lambda store: shorten(store, "checkpoints/00000004-"), "checkpoint 4: .*damaged or cut short"),
        (lambda store: remove(store, "checkpoints/00000008-"), "checkpoint 8: .*does not exist"),
        (lambda store: shorten(store, "keys/"), "damaged or cut short"),
        (lambda store: remove(store, "keys/"), "4 of 8 steps were not logged"),
        (lambda store: claim(store, {"samples": 119}), "the log holds 120 samples of 8 steps, the run says 119"),
    ],
)
def test_what_is_missing_or_damaged_is_found(tmp_path: Path, break_it: Callable[[Store], None], problem: str):
    store = write_run(tmp_path)
    break_it(store)
    found = verify_training(str(tmp_path))
    assert not found.ok
    assert any(re.search(problem, each) for each in found.problems), found.problems


def test_a_folder_without_a_training_is_refused(tmp_path: Path):
    assert not holds_training(str(tmp_path))
    with pytest.raises(StoreError, match="holds no training"):
        verify_training(str(tmp_path))
