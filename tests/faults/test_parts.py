"""Shards that are too large for one PUT go up in parts, and count through their manifest alone: on SeaweedFS and on Ceph, which ignores
If-None-Match where an upload in parts is completed and gives no ETag there."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from cluster.attempt import Attempt
from cluster.dataset import Dataset
from cluster.seaweedfs import Endpoint
from cluster.verify import clean, verify
from tests.faults.policy import KillAt
from tests.faults.proxy import FaultProxy
from tests.faults.report import Case
from tests.faults.servers import Server, ceph, seaweedfs_to_break

pytestmark = [pytest.mark.faults, pytest.mark.s3]

ROOT = "s3://tests/large"
SCRIPT = """
from cluster import s3
s3.SINGLE_PUT_BYTES, s3.PART_BYTES = 6 << 20, 5 << 20  # S3's least
from tests.faults.test_parts import commit
commit()
"""


def payload() -> bytes:
    return random.Random(0).randbytes((17 << 20) + 5)


def commit() -> None:
    """Commit one large shard; runs in a process of its own."""
    from cluster.dataset import Labels, ShardData
    from cluster.shard import Sample, ShardWriter

    writer = ShardWriter()
    writer.add(Sample("a", payload(), 1))
    data = ShardData(writer.finish(), 1, Labels.of([1]))
    Dataset(ROOT).commit("00000", data, fingerprint="f", attempt=Attempt("run", 1), seconds={})


@pytest.fixture(params=["seaweedfs", "ceph"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("server")
    running: AbstractContextManager[Endpoint | Server]
    if request.param == "ceph":
        request.getfixturevalue("long")
        running = ceph(folder, "tests")
    else:
        running = seaweedfs_to_break(folder)
    with running as found:
        endpoint = found if isinstance(found, Endpoint) else found.endpoint
        if request.param == "seaweedfs":
            endpoint.create_bucket("tests")
        for name, value in endpoint.environment.items():
            monkeypatch.setenv(name, value)
        yield endpoint


def test_a_process_killed_in_a_large_upload(server: Endpoint, kills: int, fault_case: Case):
    fault_case.seed = 3
    with FaultProxy(server.url, KillAt("put", keys="/shards/", victims=".*python", per_key_limit=100, limit=kills), seed=3) as proxy:
        environment = {**os.environ, **dataclasses.replace(server, url=proxy.url).environment}
        killed = 0
        while (status := subprocess.run([sys.executable, "-c", SCRIPT], env=environment, timeout=60).returncode) == -9:
            assert Dataset(ROOT).names() == []
            killed += 1
        assert status == 0
        assert killed >= kills / 4  # a process dies once, however many of its parts were to be cut
        fault_case.injected(proxy.injected)
    dataset = Dataset(ROOT)
    dataset.finish("images", {"fingerprint": "f", "parent": None}, dataset.manifests())
    found = verify(ROOT)
    assert found.problems == found.strays == []
    assert {each.key for each in found.unfinished} == {dataset.manifests()[0].file}
    assert 0 < len(found.unfinished) <= killed
    fault_case.figures["unfinished uploads"] = len(clean(ROOT))
    assert verify(ROOT).ok
    assert payload() in dataset.read(dataset.manifests()[0])
