"""S3 servers to break: a SeaweedFS that can be killed, started again and held still, and Ceph's RADOS gateway as the second kind."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from cluster.seaweedfs import Endpoint, seaweedfs

START_SECONDS = 60
_CEPH_PROGRAMS = ("ceph", "ceph-authtool", "ceph-mgr", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")


class Server:
    """A SeaweedFS server with its faults; ``endpoint`` stays true through a kill and a restart: same ports, keys and data."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._process = endpoint.process

    def kill(self) -> None:
        """Kill -9."""
        self._process.kill()
        self._process.wait()

    def restart(self) -> float:
        """Start again after ``kill``. Returns the seconds until it served again."""
        started = time.monotonic()
        environment = {**os.environ, "GOMEMLIMIT": "400MiB", "GOGC": "50"}
        self._process = subprocess.Popen(self._process.args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        await_buckets(self.endpoint, self._process)
        return time.monotonic() - started

    def hold(self) -> None:
        """SIGSTOP: connections stay, nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)

    def release(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End whatever state it is in."""
        if self._process.poll() is None:
            self.kill()


@contextlib.contextmanager
def seaweedfs_to_break(folder: Path) -> Iterator[Server]:
    """A SeaweedFS server of the test's own."""
    with seaweedfs(folder) as endpoint:
        server = Server(endpoint)
        try:
            yield server
        finally:
            server.close()


def client(endpoint: Endpoint, *, read_timeout: float = 10) -> Any:
    """A boto3 client for a server on this machine, which does not retry."""
    options = Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=read_timeout)
    keys = {"aws_access_key_id": endpoint.access_key, "aws_secret_access_key": endpoint.secret_key, "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=endpoint.url, config=options, **keys)


def await_buckets(endpoint: Endpoint, process: subprocess.Popen[bytes]) -> None:
    """Return when the server lists, writes and reads.

    Raises:
        RuntimeError: it ended, or did not serve within START_SECONDS.
    """
    s3, bucket = client(endpoint), f"ready-{secrets.token_hex(4)}"
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(BotoCoreError, ClientError):
            with contextlib.suppress(ClientError):  # made in an earlier round
                s3.create_bucket(Bucket=bucket)
            s3.put_object(Bucket=bucket, Key="a", Body=b"a")
            s3.delete_object(Bucket=bucket, Key="a")
            s3.delete_bucket(Bucket=bucket)
            return
        time.sleep(0.1)
    raise RuntimeError(f"{endpoint.url} did not serve within {START_SECONDS} s (exit status {process.poll()})")


@contextlib.contextmanager
def ceph(folder: Path, bucket: str = "tests") -> Iterator[Endpoint]:
    """Ceph on loopback - one monitor, manager, disk and RADOS gateway - with a user and a bucket, until the block ends; about 15 s.

    Skips the test where Ceph is not installed.
    """
    missing = [name for name in _CEPH_PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} (apt-get install radosgw ceph-mon ceph-osd ceph-mgr ceph-common)")
    node = _CephNode(folder)
    try:
        endpoint = node.start()
        client(endpoint).create_bucket(Bucket=bucket)
        yield endpoint
    finally:
        node.stop()


class _CephNode:
    """The daemons of a whole Ceph cluster in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._daemons = folder, list[subprocess.Popen[bytes]]()
        for name in ("mon", "mgr", "osd", "rgw"):
            (folder / name).mkdir(parents=True)
        self._monitor, self._gateway = _free_port(), _free_port()
        self._fsid = str(uuid.uuid4())
        (folder / "ceph.conf").write_text(self._configuration())

    def _configuration(self) -> str:
        folder = self._folder
        return f"""
[global]
fsid = {self._fsid}
mon host = v2:127.0.0.1:{self._monitor}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
auth allow insecure global id reclaim = false
keyring = {folder}/keyring
run dir = {folder}
admin socket =
log file = {folder}/$name.log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
[mon.a]
mon data = {folder}/mon
[mgr.x]
mgr data = {folder}/mgr
mgr initial modules =
[osd.0]
osd data = {folder}/osd
osd objectstore = bluestore
osd memory target = 939524096
bluestore block size = 8589934592
[client.rgw]
rgw data = {folder}/rgw
rgw frontends = beast endpoint=127.0.0.1:{self._gateway}
"""

    def start(self) -> Endpoint:
        """Make the cluster, start the daemons and add a user."""
        self._make_keys()
        monitors = f"--addv a v2:127.0.0.1:{self._monitor} --fsid {self._fsid} {self._folder}/monmap"
        self._run("monmaptool --create --clobber", monitors)
        self._run("ceph-mon --mkfs -i a", f"--monmap {self._folder}/monmap --keyring {self._folder}/keyring")
        self._daemon("ceph-mon -i a")
        disk = str(uuid.uuid4())
        self._run("ceph osd new", disk)
        self._run("ceph auth import", f"-i {self._folder}/keyring")
        self._run("ceph-osd -i 0 --mkfs", f"--osd-uuid {disk}")
        self._daemon("ceph-mgr -i x")
        self._daemon("ceph-osd -i 0")
        gateway = self._daemon("radosgw -n client.rgw")
        access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)
        self._run("radosgw-admin user create --uid=owner --display-name=owner", f"--access-key={access_key} --secret-key={secret_key}")
        endpoint = Endpoint(f"http://127.0.0.1:{self._gateway}", access_key, secret_key, gateway)
        await_buckets(endpoint, gateway)
        return endpoint

    def stop(self) -> None:
        """Kill all daemons."""
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()

    def _make_keys(self) -> None:
        rights = {
            "mon.": {"mon": "allow *"},
            "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
            "osd.0": {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"},
            "mgr.x": {"mon": "allow *", "osd": "allow *"},
            "client.rgw": {"mon": "allow rw", "osd": "allow rwx", "mgr": "allow rw"},
        }
        keyring = str(self._folder / "keyring")
        for i, (name, capabilities) in enumerate(rights.items()):
            options = [text for service, right in capabilities.items() for text in ("--cap", service, right)]
            create = ["--create-keyring"] if i == 0 else []
            self._call(["ceph-authtool", *create, keyring, "--gen-key", "-n", name, *options])

    def _run(self, command: str, arguments: str = "") -> None:
        self._call([*self._command(command), *arguments.split()])

    def _call(self, command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:4])} ...: {done.stderr[-2000:]}")

    def _daemon(self, command: str) -> subprocess.Popen[bytes]:
        with (self._folder / "output.log").open("ab") as log:
            daemon = subprocess.Popen([*self._command(command), "-f"], stdout=log, stderr=log)
        self._daemons.append(daemon)
        return daemon

    def _command(self, command: str) -> list[str]:
        program, *rest = command.split()
        configuration = [] if program == "monmaptool" else ["-c", str(self._folder / "ceph.conf")]
        return [program, *configuration, *rest]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
