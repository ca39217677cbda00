"""Both stores keep one contract, and fail with the reason and the remedy."""

from __future__ import annotations

import errno
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.local import LocalStore
from cluster.s3 import S3Store
from cluster.seaweedfs import Endpoint
from cluster.store import (
    NO_FILE,
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


# --- S3: what goes wrong there ---


def all_operations(store: Store) -> list:
    return [
        lambda: store.get("a"),
        lambda: store.get_range("a", 0, 1),
        lambda: store.put("a", b"1"),
        lambda: store.put("a", b"1", if_absent=True),
        lambda: list(store.list()),
        lambda: store.size("a"),
        lambda: store.delete("a"),
        lambda: require_conditional_put(store),
    ]


@pytest.mark.s3
def test_a_wrong_secret_is_fatal_and_never_printed(s3_root: str, monkeypatch: pytest.MonkeyPatch):
    open_store(s3_root).put("a", b"1")
    secret = "wrong-secret-0123456789abcdef"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    for operation in all_operations(open_store(s3_root)):
        with pytest.raises(StoreError, match="check") as caught:
            operation()
        assert caught.value.fatal
        assert not isinstance(caught.value, NotFound)
        assert secret not in f"{caught.value!r}{caught.value.__cause__!r}"
    with pytest.raises(StoreError, match="AWS_SECRET_ACCESS_KEY"):
        open_store(s3_root).get("a")


@pytest.mark.s3
def test_an_unknown_access_key_is_fatal(s3_root: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StoreError, match="check") as caught:
        open_store(s3_root).put("a", b"1")
    assert caught.value.fatal


@pytest.mark.s3
def test_a_missing_bucket_is_fatal_and_named(s3_server: Endpoint):
    store = open_store("s3://no-such-bucket/p")
    for operation in (lambda: list(store.list()), lambda: store.put("a", b"1"), lambda: require_conditional_put(store)):
        with pytest.raises(StoreError, match=r"no-such-bucket.*create it") as caught:
            operation()
        assert caught.value.fatal


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.s3
def test_a_closed_port_is_reported_in_seconds_and_may_be_tried_again(s3_root: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{_closed_port()}")
    started = time.monotonic()
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL") as caught:
        open_store(s3_root).get("a")
    assert time.monotonic() - started < 30
    assert not caught.value.fatal  # a server that is restarted comes back
    assert not isinstance(caught.value, NotFound)


@pytest.mark.s3
def test_no_credentials_says_what_to_set(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID") as caught:
        open_store(s3_root).get("a")
    assert caught.value.fatal


@pytest.mark.s3
@pytest.mark.parametrize(("name", "value"), [("AWS_ENDPOINT_URL", "localhost:8333"), ("AWS_PROFILE", "no-such-profile")])
def test_settings_that_boto3_rejects_are_store_errors(s3_root: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=value) as caught:
        open_store(s3_root)
    assert caught.value.fatal


# --- a local folder: crashes, full disks, odd files ---


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
