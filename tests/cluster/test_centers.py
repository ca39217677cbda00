"""Class centres in checkpoints: whatever ranges wrote them, whatever ranges read them."""

from __future__ import annotations

import tempfile
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import centers
from cluster.centers import check_parts, load_rows, save_rows
from cluster.checkpoint import Checkpoint, CheckpointError, Checkpoints
from cluster.store import Store, open_store
from cluster.verify_training import verify_training

WEIGHT = torch.arange(60.0).view(20, 3)


def save(store: Store, cuts: list[int]) -> list[dict[str, object]]:
    """What the ranks that hold these ranges write."""
    parts = [save_rows(store, 7, a, {"weight": WEIGHT[a:b], "momentum": -WEIGHT[a:b]}) for a, b in pairwise(cuts)]
    return [part for each in reversed(parts) for part in each]  # the order in which ranks answer does not matter


def ranges(sizes: list[int]) -> list[int]:
    return [0, *sorted(size % 20 for size in sizes), 20]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 99), max_size=5), st.lists(st.integers(0, 99), max_size=5), st.integers(1, 9))
def test_any_ranges_read_what_any_others_wrote(writers: list[int], readers: list[int], rows: int):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(centers, "ROWS", rows)
        parts = save(open_store(folder), ranges(writers))
        assert max(int(str(part["stop"])) - int(str(part["start"])) for part in parts) <= rows
        found = torch.full((20, 3), torch.nan)
        for start, stop in pairwise(ranges(readers)):
            for first, tables in load_rows(open_store(folder), parts, start, stop):
                found[first : first + len(tables["weight"])] = tables["weight"]
                torch.testing.assert_close(tables["momentum"], -tables["weight"], rtol=0, atol=0)
        torch.testing.assert_close(found, WEIGHT, rtol=0, atol=0)


def test_missing_and_damaged_rows_are_named(tmp_path):
    store = open_store(tmp_path)
    parts = save(store, [0, 8, 20])
    with pytest.raises(CheckpointError, match=r"no class centres 0 to 20: delete this checkpoint's JSON"):
        list(load_rows(store, parts[:1], 0, 20))
    assert [first for first, _ in load_rows(store, parts, 9, 20)] == [9]  # the other file is not asked for
    file = tmp_path / str(parts[0]["file"])
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(CheckpointError, match=r"-centers-8-20-.* is damaged"):
        list(load_rows(store, parts, 9, 20))
    with pytest.raises(CheckpointError, match="damaged"):
        check_parts(store, parts)


def test_a_checkpoint_without_a_part_is_passed_over_and_parts_go_with_their_checkpoint(tmp_path):
    store, checkpoints = open_store(tmp_path), Checkpoints(open_store(tmp_path), keep=2)
    for step in (1, 2, 3):
        parts = save_rows(store, step, 0, {"weight": WEIGHT + step})
        checkpoints.save(Checkpoint(step, {"parts": parts}, {"weight/x": torch.zeros(1)}))
    assert {path.name.partition("-")[0] for path in (tmp_path / "checkpoints").glob("*-centers-*")} == {"00000002", "00000003"}
    assert verify_training(str(tmp_path)).strays == []
    (part,) = (tmp_path / "checkpoints").glob("00000003-centers-*")
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 2
    part.write_bytes(whole[:-1] + b"\1")
    assert any("damaged" in problem for problem in verify_training(str(tmp_path)).problems)
