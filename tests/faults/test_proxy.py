"""The proxy's faults as a plain client sees them, and its silence where no fault is asked for."""

from __future__ import annotations

import io
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import boto3
import psutil
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from cluster.seaweedfs import Endpoint
from tests.faults.policy import FLAKY, FirstOf, KillAt, Kind, Random, Request, owner, shard_of
from tests.faults.proxy import FaultProxy
from tests.faults.wire import Head

pytestmark = [pytest.mark.faults, pytest.mark.s3]

SIZE = 300_001


def client_of(endpoint: Endpoint, url: str) -> Any:
    """boto3 without retries, so that every fault is seen."""
    options = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1})
    keys = {"aws_access_key_id": endpoint.access_key, "aws_secret_access_key": endpoint.secret_key, "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=url, config=options, **keys)


@pytest.fixture
def proxy(s3_server: Endpoint) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.url, seed=7) as running:
        yield running


@pytest.fixture
def s3(s3_server: Endpoint, proxy: FaultProxy) -> Any:
    return client_of(s3_server, proxy.url)


@pytest.fixture
def direct(s3_server: Endpoint) -> Any:
    return client_of(s3_server, s3_server.url)


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    return f"proxy/{re.sub('[^a-z0-9]+', '-', request.node.name.lower())}"


BODY = random.Random(0).randbytes(SIZE)


def put(s3: Any, key: str, body: Any = BODY, **options: Any) -> None:
    s3.put_object(Bucket="tests", Key=key, Body=body, **options)


def get(s3: Any, key: str) -> bytes:
    return s3.get_object(Bucket="tests", Key=key)["Body"].read()


def signed_get(s3: Any, key: str) -> bytes:
    """A GET as it goes over the wire, for a client that counts bytes itself."""
    url = urlsplit(s3.generate_presigned_url("get_object", {"Bucket": "tests", "Key": key}))
    return f"GET {url.path}?{url.query} HTTP/1.1\r\nHost: {url.netloc}\r\n\r\n".encode()


def port_of(proxy: FaultProxy) -> int:
    return int(proxy.url.rpartition(":")[2])


def read_to_the_end(port: int, request: bytes) -> tuple[bytes, type[Exception] | None]:
    """Every byte that comes, and the error that ended it."""
    received = io.BytesIO()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request)
        try:
            while piece := connection.recv(7919):
                received.write(piece)
        except ConnectionError as error:
            return received.getvalue(), type(error)
    return received.getvalue(), None


def test_200_random_objects_pass_unchanged_in_both_directions(s3: Any, direct: Any, proxy: FaultProxy, key: str):
    rng = random.Random(1)
    bodies = {f"{key}/{i:03} %+ä": rng.randbytes(rng.choice([0, 1, 511, 65_536, 65_537, rng.randrange(300_000)])) for i in range(200)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda item: put(s3, *item), bodies.items()))
        assert list(pool.map(lambda name: get(s3, name), bodies)) == list(bodies.values())
        assert list(pool.map(lambda name: get(direct, name), bodies)) == list(bodies.values())
    assert proxy.injected == []
    passed = {(record.method, record.key): record for record in proxy.requests}
    assert len(proxy.requests) == 400
    for name, body in bodies.items():
        assert passed["PUT", f"tests/{name}"].bytes_up == passed["GET", f"tests/{name}"].bytes_down == len(body)


def test_every_kind_of_request_passes(s3: Any, direct: Any, key: str):
    put(s3, f"{key}/a", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        put(s3, f"{key}/a", IfNoneMatch="*")
    head = s3.head_object(Bucket="tests", Key=f"{key}/a")
    assert head["ContentLength"] == SIZE
    with pytest.raises(ClientError) as unchanged:
        s3.get_object(Bucket="tests", Key=f"{key}/a", IfNoneMatch=head["ETag"])
    assert unchanged.value.response["ResponseMetadata"]["HTTPStatusCode"] == 304
    assert s3.get_object(Bucket="tests", Key=f"{key}/a", Range="bytes=5-9")["Body"].read() == BODY[5:10]
    with pytest.raises(ClientError, match="NoSuchKey"):
        get(s3, f"{key}/none")
    listed = s3.list_objects_v2(Bucket="tests", Prefix=f"{key}/")["Contents"]
    assert [entry["Key"] for entry in listed] == [f"{key}/a"]
    s3.delete_object(Bucket="tests", Key=f"{key}/a")  # 204
    upload = s3.create_multipart_upload(Bucket="tests", Key=f"{key}/parts")["UploadId"]
    part = {"Bucket": "tests", "Key": f"{key}/parts", "UploadId": upload}
    parts = [{"PartNumber": 1, "ETag": s3.upload_part(**part, PartNumber=1, Body=BODY)["ETag"]}]
    s3.complete_multipart_upload(**part, MultipartUpload={"Parts": parts})
    assert get(direct, f"{key}/parts") == BODY


@pytest.mark.parametrize("length", [0, 10, 200_000])
def test_bodies_in_chunks_pass_byte_for_byte(length: int):
    """HTTP chunks with extensions and trailers, as aws-chunked bodies of unknown length come; the server shows what reached it."""
    body = b"".join(b"%x;x=1\r\n%b\r\n" % (len(part), part) for part in (BODY[:length][i : i + 999] for i in range(0, length, 999)))
    body += b"0\r\nx-amz-checksum-crc32: AAAAAA==\r\n\r\n"
    request = b"PUT /b/k HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nContent-Encoding: aws-chunked\r\n\r\n" + body
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + body
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def serve() -> bytes:
            connection, _ = listener.accept()
            with connection:
                received = connection.recv(len(request), socket.MSG_WAITALL)
                connection.sendall(answer)
                return received

        served = pool.submit(serve)
        with FaultProxy(f"http://127.0.0.1:{listener.getsockname()[1]}") as proxy:
            assert read_to_the_end(port_of(proxy), request) == (answer, None)
        assert served.result() == request
        assert (proxy.requests[0].bytes_up, proxy.requests[0].bytes_down) == (len(body), len(body))


def test_a_client_that_waits_for_100_continue_gets_it(s3: Any, proxy: FaultProxy, key: str):
    """botocore sends Expect with every PUT of a body; without the server's 100 it would wait a second before each."""
    heads: list[bool] = []
    s3.meta.events.register("before-send.s3.PutObject", lambda request, **_: heads.append(b"100-continue" in str(request.headers).encode()))
    seconds = []
    for i in range(5):
        started = time.monotonic()
        put(s3, f"{key}/{i}")
        seconds.append(time.monotonic() - started)
    assert heads == [True] * 5
    assert min(seconds) < 1, "each one waited"


@pytest.mark.parametrize(("kind", "status", "code"), [(Kind.ERROR_500, 500, "InternalError"), (Kind.SLOW_DOWN, 503, "SlowDown")])
def test_an_error_in_place_of_the_server(s3: Any, direct: Any, proxy: FaultProxy, key: str, kind: Kind, status: int, code: str):
    proxy.policy = Random(1.0, [kind], limit=2)
    for call in (put, lambda s3, key: s3.head_object(Bucket="tests", Key=key)):
        with pytest.raises(ClientError) as caught:
            call(s3, key)
        assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
        assert caught.value.response["Error"]["Code"] in (code, str(status))  # a HEAD has no body to tell
    with pytest.raises(ClientError, match="NoSuchKey"):
        get(direct, key)
    put(s3, key)
    assert get(s3, key) == BODY
    assert [fault.kind for fault in proxy.injected] == [kind, kind]
    assert [record.status for record in proxy.requests][:2] == [None, None]


def test_an_error_leaves_the_connection_fit_for_the_next_request(s3: Any, direct: Any, proxy: FaultProxy, key: str):
    """A client that does not wait for 100 Continue has sent its body already: it must not be taken for a request."""
    put(direct, key)
    proxy.policy = Random(1.0, [Kind.ERROR_500], limit=1)
    target = urlsplit(proxy.url)
    refused = f"PUT /tests/{key} HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Length: {SIZE}\r\n\r\n".encode() + BODY
    following = signed_get(s3, key).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    received, _ = read_to_the_end(port_of(proxy), refused + following)
    assert received.startswith(b"HTTP/1.1 500 ")
    assert received.endswith(BODY)
    assert [record.status for record in proxy.requests] == [None, 200]


@pytest.mark.parametrize("kind", [Kind.LOST_500, Kind.LOST_503])
def test_an_answer_lost_after_the_server_did_it(s3: Any, direct: Any, proxy: FaultProxy, key: str, kind: Kind):
    proxy.policy = Random(1.0, [kind], limit=1)
    with pytest.raises(ClientError, match=r"InternalError|SlowDown"):
        put(s3, key)
    assert get(direct, key) == BODY
    assert proxy.requests[0].status == 200
    assert proxy.requests[0].bytes_up == SIZE


@pytest.mark.parametrize(("kind", "done"), [(Kind.RESET_BEFORE, False), (Kind.RESET_WITHIN, False), (Kind.RESET_AFTER, True)])
def test_a_put_whose_connection_is_reset(s3: Any, direct: Any, proxy: FaultProxy, key: str, kind: Kind, done: bool):
    proxy.policy = Random(1.0, [kind], limit=1)
    with pytest.raises(BotoCoreError, match="Connection"):
        put(s3, key)
    assert [fault.kind for fault in proxy.injected] == [kind]
    if done:
        assert get(direct, key) == BODY
    else:
        with pytest.raises(ClientError, match="NoSuchKey"):
            get(direct, key)
    assert proxy.requests[0].bytes_up == {Kind.RESET_BEFORE: 0, Kind.RESET_WITHIN: proxy.injected[0].offset, Kind.RESET_AFTER: SIZE}[kind]
    put(s3, key)
    assert get(s3, key) == BODY


@pytest.mark.parametrize(("kind", "end"), [(Kind.RESET_WITHIN, ConnectionResetError), (Kind.SHORT, None)])
def test_a_get_is_cut_at_the_very_byte(s3: Any, direct: Any, proxy: FaultProxy, key: str, kind: Kind, end: type[Exception] | None):
    put(direct, key)
    proxy.policy = Random(1.0, [kind])
    offsets = []
    for _ in range(10):
        received, error = read_to_the_end(port_of(proxy), signed_get(s3, key))
        head, _, body = received.partition(b"\r\n\r\n")
        offset = proxy.injected[-1].offset
        assert offset is not None
        offsets.append(offset)
        assert error is end
        assert f"content-length: {SIZE}".encode() in head.lower()
        assert body == BODY[: offsets[-1]]
    assert len(set(offsets)) == 10, "the offset is random"
    assert min(offsets) < SIZE / 2 < max(offsets)
    with pytest.raises(BotoCoreError):
        get(s3, key)


def test_a_byte_flipped_on_the_way_down(s3: Any, direct: Any, proxy: FaultProxy, key: str):
    put(direct, key)
    proxy.policy = Random(1.0, [Kind.FLIP])
    received, error = read_to_the_end_of_body(port_of(proxy), signed_get(s3, key))
    assert error is None
    assert differing_bits(received) == {proxy.injected[0].offset: 1}


def test_a_byte_flipped_on_the_way_up(s3_server: Endpoint, direct: Any, proxy: FaultProxy, key: str):
    """The server refuses a body that does not fit its checksum; it keeps one that came without, and that is how the flip is seen."""
    proxy.policy = Random(1.0, [Kind.FLIP], methods=["PUT"])
    with pytest.raises(ClientError, match=r"Digest|SHA256|Mismatch"):
        put(client_of(s3_server, proxy.url), key)
    target = urlsplit(client_of(s3_server, proxy.url).generate_presigned_url("put_object", {"Bucket": "tests", "Key": key}))
    head = f"PUT {target.path}?{target.query} HTTP/1.1\r\nHost: {target.netloc}\r\nContent-Length: {SIZE}\r\nConnection: close\r\n\r\n"
    answer, _ = read_to_the_end(target.port, head.encode() + BODY)
    assert b" 200 " in answer[:20]
    assert differing_bits(get(direct, key)) == {proxy.injected[-1].offset: 1}


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_slow_body_takes_its_time_and_is_whole(s3: Any, direct: Any, proxy: FaultProxy, key: str, method: str):
    put(direct, key)
    proxy.policy = Random(1.0, [Kind.SLOW], methods=[method], seconds=1.0)
    started = time.monotonic()
    if method == "PUT":
        put(s3, key)
    assert get(s3, key) == BODY
    assert time.monotonic() - started > 0.9
    assert [(fault.kind, fault.method) for fault in proxy.injected] == [(Kind.SLOW, method)]


CHILD = """
import os, sys, time, boto3
from botocore.config import Config
s3 = boto3.client("s3", config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}))
s3.put_object(Bucket="tests", Key=sys.argv[1], Body=os.urandom(300_001))
s3.get_object(Bucket="tests", Key=sys.argv[1])["Body"].read()
"""


@pytest.fixture
def child(s3_server: Endpoint, proxy: FaultProxy) -> Callable[[str], int]:
    """Runs a process that PUTs an object and reads it back; returns its exit status."""
    environment = replace(s3_server, url=proxy.url).environment

    def run(key: str) -> int:
        return subprocess.run([sys.executable, "-c", CHILD, key], env=environment, stderr=subprocess.DEVNULL, timeout=60).returncode

    return run


@pytest.mark.parametrize("phase", ["put", "before", "after", "get"])
def test_the_client_is_killed_at_its_phase(child: Callable[[str], int], direct: Any, proxy: FaultProxy, key: str, phase: str):
    proxy.policy = KillAt(phase, keys=key, victims=re.escape(sys.executable))
    assert child(key) == -9
    (fault,) = proxy.injected
    assert (fault.method, fault.key) == ("GET" if phase == "get" else "PUT", f"tests/{key}")
    assert fault.pid
    assert not psutil.pid_exists(fault.pid)
    last = proxy.requests[-1]
    if phase in ("put", "get"):
        assert fault.offset == (last.bytes_up if phase == "put" else last.bytes_down)
    if phase in ("put", "before"):
        assert last.status is None
        with pytest.raises(ClientError, match="NoSuchKey"):
            get(direct, key)
    else:
        assert len(get(direct, key)) == SIZE


def test_nobody_is_killed_whom_the_filter_does_not_admit(child: Callable[[str], int], proxy: FaultProxy, key: str):
    proxy.policy = FirstOf(KillAt("put", keys=key), KillAt("before", keys=key), KillAt("after", keys=key), KillAt("get", keys=key))
    assert child(key) == 0
    assert proxy.injected == []


def test_a_shard_costs_no_more_kills_than_allowed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.faults.policy.owner", lambda ports: psutil.Process())
    monkeypatch.setattr("tests.faults.policy.title", lambda process: "ray::Worker.run")
    policy = KillAt("put", per_key_limit=2, limit=5)
    rng = random.Random(0)
    kills = [
        shard for shard in ["00001", "00002", "00003"] for _ in range(4)
        if policy.decide(Request("PUT", f"b/x/shards/{shard}-0123456789ab.tar", "", (1, 2), 10), rng)
    ]  # fmt: skip
    assert kills == ["00001", "00001", "00002", "00002", "00003"]
    assert policy.decide(Request("GET", "b/x/shards/00009-0123456789ab.tar", "", (1, 2), 10), rng) is None
    assert policy.decide(Request("PUT", "b/x/manifests/00009.json", "", (1, 2), 10), rng) is None


def test_the_same_seed_meets_the_same_request_with_the_same_fault(s3_server: Endpoint, direct: Any, key: str):
    put(direct, key)

    def fates(seed: int) -> list[tuple[Kind, int | None]]:
        with FaultProxy(s3_server.url, Random(0.5, FLAKY, methods=["GET"], seconds=0.01), seed) as proxy:
            s3 = client_of(s3_server, proxy.url)
            for _ in range(30):
                read_to_the_end_of_body(port_of(proxy), signed_get(s3, key))
        return [(fault.kind, fault.offset) for fault in proxy.injected]

    first = fates(3)
    assert 5 < len(first) < 25
    assert fates(3) == first
    assert fates(4) != first


def test_the_proxy_outlives_its_server(s3: Any, proxy: FaultProxy, s3_server: Endpoint, key: str):
    """A request that meets no server fails at once, and the next one finds the server again."""
    put(s3, key)
    proxy._upstream, upstream = ("127.0.0.1", 1), proxy._upstream
    with pytest.raises(BotoCoreError):
        get(client_of(s3_server, proxy.url), key)
    proxy._upstream = upstream
    assert get(s3, key) == BODY


def test_names_of_shards_and_owners_of_ports():
    assert shard_of("b/root/shards/00042-0123456789ab.tar") == shard_of("b/root/manifests/00042.json") == "00042"
    assert shard_of("b/root/dataset.json") == "b/root/dataset.json"
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as connection:
        ports = connection.getsockname()[1], listener.getsockname()[1]
        assert owner(ports) == psutil.Process()
        assert owner((ports[0], ports[0])) is None
    assert Head(b"", ("HTTP/1.1", "204"), {"content-length": "5"}).body_length("GET") == 0


def test_random_refuses_to_kill():
    with pytest.raises(ValueError, match="KillAt"):
        Random(0.1, [Kind.KILL_AFTER])


def read_to_the_end_of_body(port: int, request: bytes) -> tuple[bytes, type[Exception] | None]:
    """The body of one answer whose server closes when asked to."""
    received, error = read_to_the_end(port, request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    return received.partition(b"\r\n\r\n")[2], error


def differing_bits(received: bytes) -> dict[int, int]:
    """Number of bits that differ from BODY, by offset."""
    assert len(received) == SIZE
    return {i: (a ^ b).bit_count() for i, (a, b) in enumerate(zip(received, BODY, strict=True)) if a != b}
