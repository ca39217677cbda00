"""``facemae submit`` and ``facemae cancel`` against a real Ray head, its dashboard guarded by a token, and a real S3 server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.dataset import Dataset
from cluster.seaweedfs import Endpoint
from cluster.verify import verify
from tests.faults.nodes import Cluster, nodes

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(900)]
IMPATIENT = (
    "import functools, sys, jobs.submit as s; s.Follower = functools.partial(s.Follower, patience=10.0); sys.exit(s.main(sys.argv[2:]))"
)


@pytest.fixture(scope="module")
def cluster(s3_server: Endpoint) -> Iterator[Cluster]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a submitted job runs `python`
    with nodes((2,), {**s3_server.environment, "PATH": path}, dashboard=True) as found:
        yield found


def start(cluster: Cluster, *arguments: str, program: tuple[str, ...] = ("-m", "jobs"), **environment: str) -> subprocess.Popen[str]:
    """A command of ours on this machine, with the cluster's token; both outputs in one."""
    env = {**cluster.environment, **environment}
    return subprocess.Popen([sys.executable, *program, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    shown, _ = process.communicate(timeout=400)
    return process.returncode, shown


def job(folder: Path, **fields: object) -> str:
    file = folder / "job.yaml"
    file.write_text(yaml.safe_dump(fields))
    return str(file)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What a process has printed, up to the line that holds a text."""
    shown = ""
    assert process.stdout is not None
    for line in process.stdout:
        shown += line
        if text in line:
            return shown
    raise AssertionError(shown)


def test_a_job_runs_over_http_from_its_file_to_its_data_set(cluster: Cluster, s3_root: str, tmp_path: Path) -> None:
    file = job(tmp_path, source="synthetic:ids=6,images=10", output=s3_root, shard_size=20)
    code, shown = finish(start(cluster, "submit", "ingest", "--config", file, "--to", cluster.dashboard, "--name", "first"))
    assert code == 0, shown
    assert "60 images in = 60 out + 0 quarantined" in shown
    assert f"output:  {s3_root}" in shown
    assert shown.rstrip().splitlines()[-1].startswith(f"next:    facemae embed --input {s3_root}")
    assert verify(s3_root).ok
    assert Dataset(s3_root).description()["samples"] == 60

    code, shown = finish(start(cluster, "submit", "ingest", "--config", file, "--to", cluster.dashboard, "--name", "first"))
    assert code == 2
    assert "a job first was there before" in shown
    code, shown = finish(start(cluster, "cancel", "first", "--to", cluster.dashboard))
    assert (code, "had already succeeded" in shown) == (0, True), shown
    code, shown = finish(start(cluster, "cancel", "second", "--to", cluster.dashboard))
    assert (code, "no job second there" in shown) == (2, True), shown


def test_a_job_that_is_wrong_says_why_and_exits_as_here(cluster: Cluster, s3_root: str, tmp_path: Path) -> None:
    file = job(tmp_path, input=f"{s3_root}/nothing", output=f"{s3_root}/safe", method="blur")
    code, shown = finish(start(cluster, "submit", "protect", "--config", file, "--to", cluster.client))  # by Ray's client server
    assert code == 2, shown
    assert "holds no data set" in shown
    assert "again" not in shown.splitlines()[-3]


def test_a_running_job_is_stopped_and_goes_on_when_submitted_again(cluster: Cluster, s3_root: str, tmp_path: Path) -> None:
    file = job(tmp_path, source="synthetic:ids=2000,images=10", output=s3_root, shard_size=20)
    follower = start(cluster, "submit", "ingest", "--config", file, "--to", cluster.dashboard, "--name", "long")
    read_until(follower, "/1000 shards")
    code, shown = finish(start(cluster, "cancel", "long", "--to", cluster.dashboard))
    assert (code, "long is stopped" in shown) == (0, True), shown
    code, shown = finish(follower)
    assert (code, "long was stopped" in shown) == (143, True), shown
    assert "stopped as asked: all work in hand was committed" in shown
    assert 0 < len(Dataset(s3_root).names()) < 1000


def test_a_job_that_waits_for_its_first_worker_is_stopped(cluster: Cluster, s3_root: str, tmp_path: Path) -> None:
    file = job(tmp_path, source="synthetic:ids=4,images=4", output=s3_root, cpus_per_worker=8, num_workers=1)
    follower = start(cluster, "submit", "ingest", "--config", file, "--to", cluster.dashboard, "--name", "waits")
    read_until(follower, "waiting for workers")
    code, shown = finish(start(cluster, "cancel", "waits", "--to", cluster.dashboard, "--wait-minutes", "5"))
    assert (code, "waits is stopped" in shown) == (0, True), shown
    assert finish(follower)[0] == 143


def test_another_token_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    file = job(tmp_path, images=1e6)
    code, shown = finish(start(cluster, "submit", "plan", "--config", file, "--to", cluster.dashboard, RAY_AUTH_TOKEN="f" * 64))
    assert code == 2
    assert "Ray's token is not that cluster's" in shown
    assert "f" * 64 not in shown


def test_a_head_that_dies_is_no_success(s3_server: Endpoint, s3_root: str, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with nodes((2,), {**s3_server.environment, "PATH": path}, dashboard=True) as doomed:
        file = job(tmp_path, source="synthetic:ids=2000,images=10", output=s3_root, shard_size=20)
        follower = start(doomed, "submit", "ingest", "--config", file, "--to", doomed.dashboard, program=("-c", IMPATIENT))
        read_until(follower, "/1000 shards")
        doomed.nodes[0].kill()
        began = time.monotonic()
        code, shown = finish(follower)
    assert code == 2, shown
    assert "is out of sight" in shown
    assert f"next:    facemae status {s3_root}" in shown
    assert "succeeded" not in shown
    assert time.monotonic() - began >= 9, "given up before its patience ended"
