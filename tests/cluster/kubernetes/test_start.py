"""A real head, started with the parameters of the manifest as KubeRay starts it: the probes pass, and the command arrives."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.kubernetes.nodes import PRESETS
from cluster.kubernetes.ray_job import entrypoint, manifests
from tests.cluster.kubernetes.test_ray_job import LAUNCH

SECONDS = 400
RUNNABLE = dataclasses.replace(LAUNCH, nodes=PRESETS["cpu"], arguments=("--folder", "a b'c", "--title", 'say "no"; *'))


@dataclasses.dataclass
class Head:
    """A running head, with what stands for the manifest's ports here."""

    container: dict[str, Any]
    ports: dict[str, int]
    env: dict[str, str]

    def probe(self, name: str) -> int:
        """Run a probe's command as the kubelet does; it has no token."""
        command = [sys.executable, *self.container[name]["exec"]["command"][1:]]
        here = [part.replace(":52365/", f":{self.ports['agent']}/").replace(":8265/", f":{self.ports['dashboard']}/") for part in command]
        env = {key: value for key, value in self.env.items() if not key.startswith("RAY_AUTH")}
        return subprocess.run(here, env=env, capture_output=True, timeout=120).returncode


def free_ports(names: tuple[str, ...]) -> dict[str, int]:
    sockets = {name: socket.socket() for name in names}
    for each in sockets.values():
        each.bind(("127.0.0.1", 0))
    found = {name: each.getsockname()[1] for name, each in sockets.items()}
    for each in sockets.values():
        each.close()
    return found


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    group = manifests(RUNNABLE)[1]["spec"]["rayClusterSpec"]["headGroupSpec"]
    ports = free_ports(("gcs", "dashboard", "agent", "metrics", "client"))
    folder = Path(tempfile.mkdtemp(prefix="head", dir="/tmp"))  # Ray's sockets need a short path
    elsewhere = {"metrics-export-port": ports["metrics"], "dashboard-host": "127.0.0.1", "object-store-memory": 100_000_000}
    elsewhere |= {"object-spilling-directory": str(folder / "spill"), "port": ports["gcs"], "dashboard-port": ports["dashboard"]}
    elsewhere |= {"dashboard-agent-listen-port": ports["agent"], "ray-client-server-port": ports["client"], "temp-dir": str(folder / "t")}
    parameters = {**group["rayStartParams"], **elsewhere}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    env = {**os.environ, **token, "RAY_raylet_start_wait_time_s": str(SECONDS), "RAY_USAGE_STATS_ENABLED": "0"}
    env.pop("RAY_ADDRESS", None)
    program = [shutil.which("ray", path=f"{Path(sys.executable).parent}:{env['PATH']}") or "ray", "start", "--head", "--block"]
    process = subprocess.Popen(
        [*program, *(f"--{name}={value}" for name, value in parameters.items())],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield Head(group["template"]["spec"]["containers"][0], ports, env)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.nodes
@pytest.mark.timeout(SECONDS + 300)
def test_the_probes_pass_and_the_command_arrives(head: Head) -> None:
    until = time.monotonic() + SECONDS
    while head.probe("readinessProbe"):
        assert time.monotonic() < until, "the head did not get ready"
        time.sleep(1)
    assert head.probe("livenessProbe") == 0

    command = entrypoint(RUNNABLE).replace("facemae", f"{sys.executable} -c 'import sys; print(sys.argv)'", 1)
    ray = shutil.which("ray", path=f"{Path(sys.executable).parent}:{head.env['PATH']}") or "ray"
    address = f"http://127.0.0.1:{head.ports['dashboard']}"
    submit = f"{ray} job submit --address {address} --submission-id faces -- {command} ;"  # as KubeRay's submitter does
    done = subprocess.run(["bash", "-c", submit], env=head.env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(["-c", "pipeline", "--config", "/etc/facemae/job.yaml", *RUNNABLE.arguments]) in done.stdout

    refused = subprocess.run([ray, "job", "list", "--address", address], env={**head.env, "RAY_AUTH_TOKEN": "0" * 32}, capture_output=True)
    assert refused.returncode != 0, "the token was not asked for"
