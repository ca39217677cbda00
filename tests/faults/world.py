"""Where the fault cases happen: an S3 server, a proxy before it, a Ray cluster of three nodes, a messy input and its undisturbed run."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cluster.picture import encode
from cluster.seaweedfs import Endpoint
from facemae.synthetic import SyntheticFaces
from tests.faults.check import Snapshot, snapshot
from tests.faults.nodes import Cluster, nodes
from tests.faults.policy import NoFaults, Policy
from tests.faults.proxy import FaultProxy, Injected
from tests.faults.servers import client

BUCKET = "tests"
SHARDS, SAMPLES = 40, 12
MANY = "50"
"""--max-failures where workers are killed on purpose: three kills of the same shard are no evidence against it here."""


@dataclass
class World:
    """All that a case needs. Jobs reach the store through the proxy; checks go straight to the server."""

    endpoint: Endpoint
    proxy: FaultProxy
    cluster: Cluster
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    outputs: int = 0

    @cached_property
    def original(self) -> str:
        """The ingested data set, made without faults."""
        root = f"s3://{BUCKET}/original"
        self.must("ingest", self.ingest(root))
        return root

    def ingest(self, output: str) -> list[str]:
        """Arguments of the ingest of the messy tars."""
        return ["--source", f"s3://{BUCKET}/tars/*.tar", "--output", output, "--max-failures", MANY]

    def protect(self, output: str, *more: str) -> list[str]:
        """Arguments of the protection of the ingested set."""
        return ["--input", self.original, "--output", output, "--method", "none", "--max-failures", MANY, *more]

    def new_root(self) -> str:
        """An output of its own."""
        self.outputs += 1
        return f"s3://{BUCKET}/output-{self.outputs}"

    def undisturbed(self, job: str) -> Snapshot:
        """What the job makes of its input when nothing happens."""
        if job not in self.snapshots:
            root = self.original
            if job != "ingest":
                root = f"s3://{BUCKET}/undisturbed-{job}"
                self.must(job, self.arguments(job, root))
            self.snapshots[job] = snapshot(root)
        return self.snapshots[job]

    def arguments(self, job: str, output: str) -> list[str]:
        """Arguments of ``job`` into ``output``."""
        return self.ingest(output) if job == "ingest" else self.protect(output)

    @contextlib.contextmanager
    def faults(self, policy: Policy) -> Iterator[list[Injected]]:
        """Put a policy into the proxy for the block; the list holds what it did once the block has ended."""
        before, happened = len(self.proxy.injected), list[Injected]()
        self.proxy.policy = policy
        try:
            yield happened
        finally:
            self.proxy.policy = NoFaults()
            happened += self.proxy.injected[before:]

    def must(self, job: str, arguments: Sequence[str], timeout: float = 240) -> subprocess.Popen[bytes]:
        """Run a job to its end, which must be a good one."""
        process = self.cluster.run_job(job, arguments)
        self.await_end(process, 0, timeout)
        return process

    def await_end(self, process: subprocess.Popen[bytes], status: int, timeout: float = 240) -> None:
        """Wait for a job, and require its exit status."""
        found = process.wait(timeout)
        assert found == status, f"exit status {found}, {status} expected:\n{self.cluster.log_of(process)[-4000:]}"

    def manifests(self, root: str) -> int:
        """How many shards are committed below a root, asked of the server itself."""
        prefix = root.removeprefix(f"s3://{BUCKET}/") + "/manifests/"
        s3: Any = client(self.endpoint)
        return s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["KeyCount"]

    def await_manifests(self, root: str, number: int, process: subprocess.Popen[bytes]) -> None:
        """Return when a running job has committed so many shards."""
        _await(lambda: self.manifests(root) >= number or process.poll() is not None)
        assert process.poll() is None, self.cluster.log_of(process)[-4000:]

    def puts(self, root: str) -> int:
        """How many times a data shard was written below a root."""
        prefix = f"{root.removeprefix('s3://')}/shards/"
        return sum(each.method == "PUT" and each.key.startswith(prefix) and each.status == 200 for each in self.proxy.requests)


def _await(condition: Callable[[], bool], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


@contextlib.contextmanager
def world(endpoint: Endpoint, num_cpus: Sequence[int] = (0, 1, 1)) -> Iterator[World]:
    """A world around a running S3 server with a bucket."""
    write_tars(endpoint)
    with FaultProxy(endpoint.url, seed=0) as proxy:
        environment = {**dataclasses.replace(endpoint, url=proxy.url).environment, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        with nodes(num_cpus, environment) as cluster:
            yield World(endpoint, proxy, cluster)


def write_tars(endpoint: Endpoint) -> None:
    """Tars of drawn faces, a few of which cannot be used, straight to the server."""
    s3: Any = client(endpoint)
    faces, rng = SyntheticFaces(SHARDS, SAMPLES), random.Random(0)
    for shard in range(SHARDS):
        pictures = faces.render(range(shard * SAMPLES, (shard + 1) * SAMPLES))
        members: dict[str, bytes] = {}
        for number, picture in enumerate(pictures):
            jpeg = encode(picture)
            members[f"{number:03d}.jpg"] = jpeg[: len(jpeg) // 2] if rng.random() < 0.05 else jpeg
            if rng.random() > 0.05:
                members[f"{number:03d}.cls"] = b"%d" % shard
        s3.put_object(Bucket=BUCKET, Key=f"tars/{shard:03d}.tar", Body=_tar(members))


def _tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()
