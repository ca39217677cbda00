"""A job handed over HTTP to a cluster of several nodes, its data in S3: ``facemae submit`` from its package to the last shard."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.dataset import Dataset
from cluster.seaweedfs import Endpoint
from cluster.verify import verify
from tests.faults.nodes import nodes

pytestmark = [pytest.mark.nodes, pytest.mark.s3, pytest.mark.timeout(900)]

JOB = """
source: synthetic:ids=20,images=20
output: {root}
shard_size: 20
"""


def test_a_job_submitted_over_http_runs_on_the_nodes_against_s3(
    s3_server: Endpoint, s3_root: str, tmp_path: Path, note: Callable[[str], None]
):
    (tmp_path / "job.yaml").write_text(JOB.format(root=s3_root))
    with nodes([0, 1, 1], s3_server.environment, dashboard=True) as cluster:
        assert cluster.http is not None
        command = [sys.executable, "-m", "jobs", "submit", "ingest", "--config", str(tmp_path / "job.yaml"), "--to", cluster.http]
        done = subprocess.run([*command, "--name", "first"], env=cluster.environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        twice = subprocess.run([*command, "--name", "first"], env=cluster.environment, capture_output=True, text=True, timeout=600)
        assert twice.returncode == 2, "a name is taken once"
        secret = s3_server.secret_key
        assert secret not in done.stdout + done.stderr + twice.stderr
    assert verify(s3_root).ok
    manifests = Dataset(s3_root).manifests()
    assert sum(manifest.samples for manifest in manifests) == 400
    note(f"{len(manifests)} shards in SeaweedFS")
