"""The servers that the cases break: a SeaweedFS that comes back as it was, and a Ceph that works as S3."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.faults.servers import ceph, client, seaweedfs_to_break

pytestmark = [pytest.mark.faults, pytest.mark.s3]


def test_a_killed_server_comes_back_with_its_keys_and_data(long: None, tmp_path: Path):
    with seaweedfs_to_break(tmp_path) as server:
        s3 = client(server.endpoint)
        s3.create_bucket(Bucket="bucket")
        for i in range(50):
            s3.put_object(Bucket="bucket", Key=f"{i:02}", Body=b"%d" % i * 10_000)
        server.kill()
        with pytest.raises(BotoCoreError):
            s3.get_object(Bucket="bucket", Key="00")
        assert server.restart() < 30
        assert [entry["Key"] for entry in s3.list_objects_v2(Bucket="bucket")["Contents"]] == [f"{i:02}" for i in range(50)]
        assert all(s3.get_object(Bucket="bucket", Key=f"{i:02}")["Body"].read() == b"%d" % i * 10_000 for i in range(50))
        server.kill()  # the block ends whatever state it is in


def test_a_server_held_still_answers_when_released(long: None, tmp_path: Path):
    with seaweedfs_to_break(tmp_path) as server:
        s3, hasty = client(server.endpoint), client(server.endpoint, read_timeout=1)
        s3.create_bucket(Bucket="bucket")
        server.hold()
        started = time.monotonic()
        with pytest.raises(BotoCoreError, match="timeout"):
            hasty.put_object(Bucket="bucket", Key="a", Body=b"a")
        assert time.monotonic() - started > 0.9
        server.release()
        s3.put_object(Bucket="bucket", Key="c", Body=b"c")
        assert s3.get_object(Bucket="bucket", Key="c")["Body"].read() == b"c"
        server.hold()
    assert server.endpoint.process.poll() is not None


def test_ceph_serves_a_user_and_a_bucket(long: None, tmp_path: Path):
    with ceph(tmp_path / "ceph", bucket="bucket") as endpoint:
        s3 = client(endpoint)
        s3.put_object(Bucket="bucket", Key="a/b", Body=bytes(100_000), IfNoneMatch="*")
        with pytest.raises(ClientError, match="PreconditionFailed"):
            s3.put_object(Bucket="bucket", Key="a/b", Body=b"other", IfNoneMatch="*")
        assert s3.get_object(Bucket="bucket", Key="a/b")["Body"].read() == bytes(100_000)
    assert endpoint.process.poll() is not None
    with pytest.raises(BotoCoreError):
        s3.list_objects_v2(Bucket="bucket")


def test_without_ceph_its_tests_skip_and_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="apt-get install radosgw"), ceph(tmp_path):
        pass
