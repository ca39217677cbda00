"""What S3 adds to the contract of a store: digests sent, kept and compared; large objects in parts; which errors may pass."""

from __future__ import annotations

import base64
import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import s3
from cluster.s3 import AccessDenied, DamagedTransfer, S3Store, _client_error
from cluster.seaweedfs import Endpoint
from cluster.store import AlreadyExists, NotFound, Store, StoreError, open_store, require_conditional_put

pytestmark = pytest.mark.s3

MIB = 1 << 20


@pytest.fixture
def store(s3_root: str) -> S3Store:
    return S3Store(s3_root)


def answers(store: S3Store, operation: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what the server's answers to an operation say."""
    store._client.meta.events.register(f"after-call.s3.{operation}", lambda parsed, **_: change(parsed))


def requests(store: S3Store) -> list[tuple[str, dict[str, Any]]]:
    """Every request from now on: operation and headers."""
    found: list[tuple[str, dict[str, Any]]] = []
    store._client.meta.events.register("before-call.s3", lambda model, params, **_: found.append((model.name, params["headers"])))
    return found


@pytest.mark.parametrize("size", [0, 10, MIB, MIB + 1])
def test_a_put_sends_and_keeps_its_digest(store: S3Store, size: int):
    data, sent = os.urandom(size), requests(store)
    store.put("a", data)
    (name, headers), digest = sent[0], hashlib.sha256(data)
    assert name == "PutObject"
    assert headers["x-amz-checksum-sha256"] == base64.b64encode(digest.digest()).decode()
    assert ("Content-MD5" in headers) == (size <= MIB)
    held = store._client.head_object(Bucket=store.bucket, Key=store._full("a"), ChecksumMode="ENABLED")
    assert held["Metadata"] == {"sha256": digest.hexdigest()}
    assert held["ChecksumSHA256"] == headers["x-amz-checksum-sha256"]


def wrong_sha(parsed: dict[str, Any]) -> None:
    parsed["ChecksumSHA256"] = base64.b64encode(bytes(32)).decode()


def wrong_tag(parsed: dict[str, Any]) -> None:
    parsed.pop("ChecksumSHA256", None)  # a server that keeps none, as Ceph RGW
    parsed["ETag"] = '"' + "0" * 32 + '"'


@pytest.mark.parametrize("change", [wrong_sha, wrong_tag])
def test_a_server_that_holds_other_bytes_is_found_out(store: S3Store, change: Callable[[dict[str, Any]], None]):
    answers(store, "PutObject", change)
    sent = requests(store)
    with pytest.raises(DamagedTransfer, match="not stored as it was sent"):
        store.put("a", b"x" * (2 * MIB))
    assert len(sent) == s3.TRIES


def test_an_etag_that_is_no_md5_is_not_compared(store: S3Store):
    def encrypted(parsed: dict[str, Any]) -> None:
        wrong_tag(parsed)
        parsed["ServerSideEncryption"] = "aws:kms"

    answers(store, "PutObject", encrypted)
    store.put("a", b"x")


def test_an_etag_alone_is_enough(store: S3Store):
    answers(store, "PutObject", lambda parsed: parsed.pop("ChecksumSHA256", None))
    store.put("a", b"x" * 100)
    assert store.get("a") == b"x" * 100


def test_a_small_object_that_was_changed_behind_our_back_is_refused(store: S3Store):
    store.put("a", b"one")
    metadata = {"sha256": hashlib.sha256(b"one").hexdigest()}
    store._client.put_object(Bucket=store.bucket, Key=store._full("a"), Body=b"two", Metadata=metadata)
    with pytest.raises(DamagedTransfer, match="did not arrive as it was written"):
        store.get("a")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "SINGLE_PUT_BYTES", 6 * MIB)
    monkeypatch.setattr(s3, "PART_BYTES", 5 * MIB)  # S3's least


def test_a_large_object_goes_up_in_parts(store: S3Store, small_parts: None):
    data, sent = os.urandom(12 * MIB + 7), requests(store)
    store.put("a", data)
    names = [name for name, _ in sent]
    assert (names[0], names.count("UploadPart"), names[-2:]) == ("CreateMultipartUpload", 3, ["CompleteMultipartUpload", "HeadObject"])
    assert store.get("a") == data
    assert list(store.unfinished()) == []
    with pytest.raises(StoreError, match="too many for a conditional PUT"):
        store.put("b", data, if_absent=True)


def test_an_upload_that_fails_in_the_middle_is_taken_back(store: S3Store, small_parts: None):
    answers(store, "UploadPart", wrong_sha)
    with pytest.raises(DamagedTransfer):
        store.put("a", os.urandom(12 * MIB))
    assert list(store.unfinished()) == []
    with pytest.raises(NotFound):
        store.get("a")


def test_uploads_of_the_dead_are_found_and_discarded(store: S3Store):
    store._client.create_multipart_upload(Bucket=store.bucket, Key=store._full("shards/a.tar"))
    store._client.create_multipart_upload(Bucket=store.bucket, Key="elsewhere")
    (left,) = store.unfinished()
    assert left.key == "shards/a.tar"
    store.discard(left)
    store.discard(left)
    assert list(store.unfinished()) == []


def answer(code: str, status: int) -> dict[str, Any]:
    return {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("code", "status", "kind", "fatal"),
    [
        ("NoSuchKey", 404, NotFound, False),
        ("404", 404, NotFound, False),
        ("InvalidRange", 416, NotFound, False),
        ("PreconditionFailed", 412, AlreadyExists, False),
        ("BadDigest", 400, DamagedTransfer, False),
        ("SlowDown", 503, StoreError, False),
        ("InternalError", 500, StoreError, False),
        ("RequestTimeout", 400, StoreError, False),
        ("ConditionalRequestConflict", 409, StoreError, False),
        ("TooManyRequests", 429, StoreError, False),
        ("NoSuchUpload", 404, StoreError, False),
        ("AccessDenied", 403, AccessDenied, True),
        ("NoSuchBucket", 404, StoreError, True),
        ("EntityTooLarge", 400, StoreError, True),
        ("MethodNotAllowed", 405, StoreError, True),
        ("PermanentRedirect", 301, StoreError, True),
    ],
)
def test_which_answers_may_pass(code: str, status: int, kind: type[StoreError], fatal: bool):
    error = _client_error("s3://b/k", answer(code, status))
    assert (type(error), error.fatal) == (kind, fatal)
    assert "s3://b/k" in str(error)


def test_a_range_past_the_end_costs_its_reader_alone(store: S3Store):
    store.put("a", b"0123456789")
    for start, stop in ((5, 20), (50, 60)):
        with pytest.raises(NotFound, match="bytes"):
            store.get_range("a", start, stop)


# --- wrong settings ---


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


def test_an_unknown_access_key_is_fatal(s3_root: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with pytest.raises(StoreError, match="check") as caught:
        open_store(s3_root).put("a", b"1")
    assert caught.value.fatal


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


@pytest.mark.timeout(120)
def test_a_closed_port_is_reported_and_may_be_tried_again(s3_root: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{_closed_port()}")
    with pytest.raises(StoreError, match="AWS_ENDPOINT_URL") as caught:
        open_store(s3_root).get("a")
    assert not caught.value.fatal  # a server that is restarted comes back
    assert not isinstance(caught.value, NotFound)


def test_no_credentials_says_what_to_set(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID") as caught:
        open_store(s3_root).get("a")
    assert caught.value.fatal


@pytest.mark.parametrize(("name", "value"), [("AWS_ENDPOINT_URL", "localhost:8333"), ("AWS_PROFILE", "no-such-profile")])
def test_settings_that_boto3_rejects_are_store_errors(s3_root: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=value) as caught:
        open_store(s3_root)
    assert caught.value.fatal
