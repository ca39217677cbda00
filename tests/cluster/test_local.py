"""What a folder adds to the contract of a store: crashes, full disks, odd files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.local import LocalStore
from cluster.store import NO_FILE, AlreadyExists, NotFound, StoredObject, StoreError, require_conditional_put


def files_below(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("if_absent", [False, True])
@pytest.mark.parametrize("call", ["fsync", "link-or-replace"])
def test_a_write_that_fails_leaves_the_old_object_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, if_absent: bool, call: str
):
    store = LocalStore(tmp_path)
    store.put("kept", b"old")

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ["fsync"] if call == "fsync" else ["link", "replace"]:
        monkeypatch.setattr(os, name, fail)
    for key in ("new/a", "new/b") if if_absent else ("kept", "new/a"):
        with pytest.raises(StoreError, match="No space left") as caught:
            store.put(key, b"never", if_absent=if_absent)
        assert caught.value.fatal
        assert key in str(caught.value)
    assert files_below(tmp_path) == ["kept"]
    assert store.get("kept") == b"old"


@pytest.mark.faults
@pytest.mark.parametrize("named", [False, True])
def test_a_process_killed_in_the_middle_of_a_write_shows_nothing(tmp_path: Path, named: bool):
    script = f"""
import os, signal
from cluster import local as store
if {named}:
    del os.O_TMPFILE  # another system
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
store.LocalStore({str(tmp_path)!r}).put("shards/a.tar", b"half")
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    store = LocalStore(tmp_path)
    left = files_below(tmp_path)
    assert len(left) == named
    assert [each.key for each in store.unfinished()] == [f"shards/{name}" for name in left]
    assert list(store.list()) == list(store.list("shards/")) == []
    with pytest.raises(NotFound):
        store.get("shards/a.tar")
    store.put("shards/a.tar", b"whole", if_absent=True)
    assert [stored.key for stored in store.list()] == ["shards/a.tar"]
    for each in store.unfinished():
        store.discard(each)
    assert files_below(tmp_path) == ["a.tar"]


def test_readers_never_see_half_an_object(tmp_path: Path):
    store, stop = LocalStore(tmp_path), threading.Event()
    values = [bytes([i]) * 300_000 for i in range(4)]
    store.put("a", values[0])

    def write() -> None:
        while not stop.is_set():
            for value in values:
                store.put("a", value)

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(write)
        try:
            for _ in range(200):
                assert store.get("a") in values
                assert [stored.key for stored in store.list()] == ["a"]
        finally:
            stop.set()
        done.result()


def test_permission_is_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StoreError, match="Permission denied") as caught:
        LocalStore(tmp_path).put("a", b"1")
    assert caught.value.fatal


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_root_that_is_a_file_is_no_commit_conflict(tmp_path: Path, below: str):
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(StoreError, match="is a file") as caught:
        require_conditional_put(LocalStore(f"{tmp_path}/file{below}"))
    assert caught.value.fatal
    assert not isinstance(caught.value, AlreadyExists | NotFound)


def test_a_dangling_link_is_listed_so_that_its_reader_learns_of_it(tmp_path: Path):
    (tmp_path / "a.jpg").write_bytes(b"1")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "gone")
    store = LocalStore(tmp_path)
    assert list(store.list()) == [StoredObject("a.jpg", 1), StoredObject("b.jpg", NO_FILE)]
    with pytest.raises(NotFound):
        store.get("b.jpg")


def test_a_file_that_may_not_be_read_costs_its_reader_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.jpg").write_bytes(b"1")

    def refuse(*_args: object, **_kwargs: object) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(NotFound, match=r"a\.jpg cannot be read: Permission denied"):
        LocalStore(tmp_path).get("a.jpg")


def test_links_that_lead_in_circles_lead_nowhere(tmp_path: Path):
    (tmp_path / "people" / "one").mkdir(parents=True)
    (tmp_path / "people" / "one" / "a.jpg").write_bytes(b"1")
    for number in range(3):
        (tmp_path / "people" / f"back{number}").symlink_to(tmp_path)
        (tmp_path / "people" / "one" / f"up{number}").symlink_to(tmp_path / "people")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "people" / "one")
    assert [stored.key for stored in LocalStore(tmp_path).list()] == ["elsewhere/a.jpg", "people/one/a.jpg"]


def test_a_file_deleted_while_listing_is_passed_over(tmp_path: Path):
    store = LocalStore(tmp_path)
    for key in "abc":
        store.put(key, b"1")
    listing = store.list()
    next(listing)
    store.delete("b")
    assert [stored.key for stored in listing] == ["c"]


name = st.text(st.sampled_from("ab-./0é"), min_size=1, max_size=3).filter(lambda part: "/" not in part and part.strip("."))


@given(st.lists(st.lists(name, min_size=1, max_size=3).map("/".join), max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_folder_lists_as_s3_does(tmp_path_factory: pytest.TempPathFactory, keys: list[str]):
    kept: set[str] = set()
    for key in keys:  # no file that another key needs as a folder
        if not any(key == other or key.startswith(other + "/") or other.startswith(key + "/") for other in kept):
            kept.add(key)
    store = LocalStore(tmp_path_factory.mktemp("list"))
    for key in kept:
        store.put(key, b"")
    assert [stored.key for stored in store.list()] == sorted(kept, key=str.encode)
    for prefix in {key[: len(key) // 2 + 1] for key in kept}:
        assert [stored.key for stored in store.list(prefix)] == sorted((k for k in kept if k.startswith(prefix)), key=str.encode)
