"""Both stores keep one contract, and fail with the reason and the remedy."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.s3 import S3Store
from cluster.seaweedfs import Endpoint
from cluster.store import (
    AlreadyExists,
    NotFound,
    Store,
    StoredObject,
    StoreError,
    Unfinished,
    join_url,
    open_store,
    read_url,
    require_conditional_put,
    split_url,
)


@pytest.fixture
def store(any_root: str) -> Store:
    return open_store(any_root)


# --- the contract, on a folder and on S3 ---


def test_an_object_comes_back_byte_for_byte(store: Store):
    data = os.urandom(100_000)
    for key, value in {"a": data, "deep/er/b.bin": b"", "with space/ü-漢.jpg": b"\0\r\n"}.items():
        store.put(key, value)
        assert store.get(key) == value
        assert store.size(key) == len(value)


def test_ranges_are_exclusive_at_the_end_and_never_short(store: Store):
    data = bytes(range(256))
    store.put("a", data)
    assert store.get_range("a", 0, 256) == data
    assert store.get_range("a", 3, 4) == b"\x03"
    assert store.get_range("a", 250, 256) == data[250:]
    for start, stop in [(250, 257), (256, 257), (1000, 1001)]:
        with pytest.raises(StoreError):
            store.get_range("a", start, stop)


def test_entries_are_those_directly_below(store: Store):
    for key in ("a", "deep/b", "deep/er/c", "deep.json"):
        store.put(key, b"")
    assert sorted(store.entries()) == ["a", "deep.json", "deep/"]
    assert sorted(store.entries("deep/")) == ["b", "er/"]
    assert list(store.entries("nowhere/")) == []


def test_an_objects_age_is_by_the_stores_own_clock(store: Store):
    store.put("a", b"")
    young = store.age("a")
    time.sleep(2.1)
    old = store.age("a")
    assert young is not None
    assert old is not None
    assert old >= max(2, young)  # S3's clock has whole seconds
    store.put("a", b"again")
    assert (store.age("a") or 0) < old
    with pytest.raises(NotFound):
        store.age("b")


def test_put_overwrites_and_delete_forgives(store: Store):
    store.put("a", b"long first value")
    store.put("a", b"2")
    assert (store.get("a"), store.size("a")) == (b"2", 1)
    store.delete("a")
    store.delete("a")
    store.delete("never/was")
    assert list(store.list()) == []


def test_a_missing_object_is_not_found_and_the_message_names_it(store: Store):
    for ask in (store.get, store.size, lambda key: store.get_range(key, 0, 1)):
        with pytest.raises(NotFound, match="no/where") as caught:
            ask("no/where")
        assert store.url in str(caught.value)
        assert not caught.value.fatal


def test_a_folder_is_no_object(store: Store):
    store.put("folder/a", b"1")
    with pytest.raises(NotFound):
        store.get("folder")
    store.delete("folder")
    assert store.get("folder/a") == b"1"


def test_listing_is_in_key_order_and_by_any_prefix(store: Store):
    keys = ["a/1", "a/10", "a/2", "a/b/2", "a0", "a1.tar", "B/1", "b/1", "é/1"]
    for key in reversed(keys):
        store.put(key, key.encode())
    expected = sorted(keys, key=str.encode)
    assert list(store.list()) == [StoredObject(key, len(key.encode())) for key in expected]
    for prefix in ["a", "a/", "a/1", "a/b", "a/b/", "b/", "é/", "none", "none/x", ""]:
        assert [stored.key for stored in store.list(prefix)] == [key for key in expected if key.startswith(prefix)]


def test_a_listing_is_longer_than_one_page_of_s3(store: Store):
    keys = [f"many/{i:04d}" for i in range(1101)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, b"x"), keys))
    assert [stored.key for stored in store.list("many/")] == keys


def test_one_of_sixteen_conditional_writers_wins(store: Store):
    barrier = threading.Barrier(16)

    def write(number: int) -> int | None:
        barrier.wait()
        try:
            store.put("commit", b"%d" % number, if_absent=True)
            return number
        except AlreadyExists:
            return None

    for _ in range(2):
        with ThreadPoolExecutor(16) as pool:
            winners = [number for number in pool.map(write, range(16)) if number is not None]
        assert len(winners) == 1
        assert store.get("commit") == b"%d" % winners[0]
        assert [stored.key for stored in store.list()] == ["commit"]
        store.delete("commit")


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "..", "/etc/passwd", "a/.."])
def test_keys_that_leave_the_store_are_refused(store: Store, key: str):
    for act in (store.get, store.size, store.delete, lambda k: store.put(k, b""), lambda k: store.get_range(k, 0, 1)):
        with pytest.raises(StoreError, match="outside") as caught:
            act(key)
        assert caught.value.fatal


def test_a_store_with_conditional_writes_passes_and_keeps_nothing(store: Store):
    require_conditional_put(store)
    assert list(store.list()) == []


class ForgetfulStore:
    """A real store behind a gateway that drops If-None-Match, as JuiceFS' and rclone's do."""

    def __init__(self, inner: Store) -> None:
        self._inner, self.url = inner, inner.url

    def put(self, key: str, data: bytes, *, if_absent: bool = False, sha256: str | None = None) -> None:
        self._inner.put(key, data)

    def get(self, key: str) -> bytes:
        return self._inner.get(key)

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        return self._inner.get_range(key, start, stop)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        return self._inner.list(prefix)

    def size(self, key: str) -> int:
        return self._inner.size(key)

    def entries(self, prefix: str = "") -> Iterator[str]:
        return self._inner.entries(prefix)

    def age(self, key: str) -> float | None:
        return self._inner.age(key)

    def delete(self, key: str) -> None:
        self._inner.delete(key)

    def unfinished(self) -> Iterator[Unfinished]:
        return self._inner.unfinished()

    def discard(self, unfinished: Unfinished) -> None:
        self._inner.discard(unfinished)


def test_a_store_that_ignores_if_none_match_is_refused(store: Store):
    with pytest.raises(StoreError, match="ignores If-None-Match") as caught:
        require_conditional_put(ForgetfulStore(store))
    assert caught.value.fatal
    assert store.url in str(caught.value)
    assert "SeaweedFS" in str(caught.value)  # a remedy
    assert list(store.list()) == []


# --- URLs and errors ---


def test_urls_open_the_right_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert open_store(str(tmp_path)).url == open_store(f"file://{tmp_path}").url == open_store(tmp_path).url == str(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert open_store("below").url == str(tmp_path / "below")  # absolute, so that lineage can name it
    for url in ("gs://bucket/x", "http://host/x", "s3://", "s3:///x"):
        with pytest.raises(StoreError) as caught:
            open_store(url)
        assert caught.value.fatal
        assert url in str(caught.value)


@pytest.mark.parametrize(
    ("url", "bucket", "full"),
    [
        ("s3://b", "b", "k"),
        ("s3://b/", "b", "k"),
        ("s3://b/p/q/", "b", "p/q/k"),
        ("s3://b/faces#1", "b", "faces#1/k"),
        ("s3://b/what?", "b", "what?/k"),
    ],
)
def test_an_s3_url_is_taken_literally(s3_server: Endpoint, url: str, bucket: str, full: str):
    store = S3Store(url)
    assert (store.bucket, store._full("k")) == (bucket, full)


def test_joining_and_splitting_urls():
    assert join_url("s3://b/p/", "x", "y") == "s3://b/p/x/y"
    assert split_url("s3://b/p/f.rec") == ("s3://b/p", "f.rec")
    assert split_url("f.rec") == (".", "f.rec")
    assert split_url("/f.rec") == ("/", "f.rec")
    assert split_url("/a/b/") == ("/a", "b")


def test_read_url_reads_one_object(any_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    open_store(any_root).put("a/b.bin", b"1")
    assert read_url(join_url(any_root, "a", "b.bin")) == b"1"
    with pytest.raises(NotFound):
        read_url(join_url(any_root, "a", "c.bin"))
    (tmp_path / "here").write_bytes(b"2")
    monkeypatch.chdir(tmp_path)
    assert read_url("here") == b"2"


@given(st.sampled_from([StoreError, NotFound, AlreadyExists]), st.text(), st.booleans())
@settings(max_examples=50)
def test_errors_survive_pickling(kind: type[StoreError], message: str, fatal: bool):
    error = pickle.loads(pickle.dumps(kind(message, fatal=fatal)))
    assert (type(error), str(error), error.fatal) == (kind, message, fatal)
