"""A real Ray cluster of several nodes on this machine, each a raylet with a loopback address of its own, to lose nodes from.

It keeps to itself: its own token, temporary folder and free ports, so that another Ray session may run beside it, in the same test
process too. The job under test is therefore a child process: ``cluster.run_job("protect", [...])``.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

START_SECONDS = 120
START_TRIES = 3
"""Ray gives a node that is slow to start up after 30 s, as on a machine that is busy otherwise."""
_PREFIX = "127.0.77."
_DETECTION = {
    # the death of a node is noticed after a second, not after half a minute: the tests wait for it
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "300",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_raylet_start_wait_time_s": str(START_SECONDS),  # on a machine with other things to do
}


@dataclass(frozen=True)
class Node:
    """One node: its address, and the ``ray start --block`` whose descendants are its raylet, agents and workers."""

    ip: str
    process: subprocess.Popen[bytes]

    def kill(self) -> list[int]:
        """Kill -9 of everything that runs on this node, as a power cut does. Returns the pids."""
        return kill_tree(self.process)


class Cluster:
    """The running nodes; ``nodes[0]`` is the head, where the cluster's memory is, and cannot be lost.

    Args:
        dashboard: serve Ray's dashboard, and with it the job API, at ``dashboard``.
    """

    prefix = _PREFIX

    def __init__(self, folder: Path, environment: Mapping[str, str], *, dashboard: bool = False) -> None:
        self.folder = folder
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.environment = {**inherited, **_DETECTION, **token, "RAY_DISABLE_IMPORT_WARNING": "1", **environment}
        self.nodes: list[Node] = []
        self._started = 0
        self._jobs: list[subprocess.Popen[bytes]] = []
        self._dashboard = dashboard
        self.ip = f"{self.prefix}1"
        self.address = f"{self.ip}:{self.port(self.ip)}"
        self.dashboard = f"http://{self.ip}:{self.port(self.ip)}"
        self.client = f"ray://{self.ip}:{self.port(self.ip)}"

    def add(self, num_cpus: int) -> Node:
        """Start one more node and return when the cluster knows it.

        Raises:
            RuntimeError: it did not start; the message holds the end of its log.
        """
        self._started += 1
        ip = f"{self.prefix}{self._started}"
        log = self.folder / f"node-{ip}.log"
        for _ in range(START_TRIES):
            with log.open("wb") as output:
                command = [*self.enter(ip), *self._command(ip, num_cpus)]
                process = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output, start_new_session=True)
            node = Node(ip, process)
            self.nodes.append(node)
            if _await_start(process, log):
                return node
            self.nodes.remove(node)
            node.kill()
        raise RuntimeError(f"the Ray node {ip} did not start:\n{log.read_text()[-3000:]}")

    def enter(self, ip: str) -> list[str]:
        """What comes before a command that is to run on a node."""
        return []

    def port(self, ip: str) -> int:
        """A free port of a node."""
        return _free_port(ip)

    def _command(self, ip: str, num_cpus: int) -> list[str]:
        if ip == self.ip:
            place = ["--head", f"--port={self.address.rpartition(':')[2]}", f"--temp-dir={self.folder}"]
            place.append(f"--ray-client-server-port={self.client.rpartition(':')[2]}")  # its default would meet another cluster's
            place += [f"--include-dashboard={str(self._dashboard).lower()}", f"--dashboard-host={ip}"]
            place += [f"--dashboard-port={self.dashboard.rpartition(':')[2]}"]
        else:
            place = [f"--address={self.address}"]
        # with these ports given, the raylet does not wait for its agents to say theirs
        told = ("dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export", "runtime-env-agent")
        options = ["--min-worker-port=0", "--max-worker-port=0", *(f"--{name}-port={self.port(ip)}" for name in told)]
        options += ["--object-store-memory=80000000", "--disable-usage-stats", f"--num-cpus={num_cpus}", f"--node-ip-address={ip}"]
        return [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *place, *options]

    def kill(self, node: Node) -> list[int]:
        """Lose a node. Returns the pids that were killed.

        Raises:
            ValueError: it is the head, without which there is no cluster.
        """
        if node is self.nodes[0]:
            raise ValueError("the head node cannot be killed: the cluster would be gone. Give it num_cpus=0 and kill another")
        self.nodes.remove(node)
        return node.kill()

    def run_job(self, job: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start ``facemae JOB ARGUMENTS`` on the cluster; its output goes to ``job-N.log`` (``log_of``). Killed at the end of the block."""
        return self.run(["-m", "jobs", job, *arguments, "--address", self.address], environment)

    def run(self, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start ``python ARGUMENTS`` on the head, likewise."""
        command = [*self.enter(self.ip), sys.executable, *arguments]
        with self._job_log(len(self._jobs)).open("wb") as output:
            process = subprocess.Popen(command, env={**self.environment, **(environment or {})}, stdout=output, stderr=output)
        self._jobs.append(process)
        return process

    def log_of(self, process: subprocess.Popen[bytes]) -> str:
        """What a job has printed so far."""
        return self._job_log(self._jobs.index(process)).read_text(errors="replace")

    def close(self) -> None:
        """Kill jobs and nodes; the head last."""
        for process in self._jobs:
            kill_tree(process)
        for node in reversed(self.nodes):
            node.kill()

    def _job_log(self, number: int) -> Path:
        return self.folder / f"job-{number}.log"


@contextlib.contextmanager
def nodes(
    num_cpus: Sequence[int] = (0, 1, 1), environment: Mapping[str, str] | None = None, *, dashboard: bool = False
) -> Iterator[Cluster]:
    """A cluster with one node per entry, the first of them the head, until the block ends; about 5 seconds a node.

    ``environment`` is added to that of all its processes, the jobs' and workers' included. With ``dashboard`` it takes submitted jobs.
    """
    folder = Path(tempfile.mkdtemp(prefix="fm-", dir="/tmp"))  # sockets live in it, and their paths must stay under 108 bytes
    cluster = Cluster(folder, environment or {}, dashboard=dashboard)
    try:
        for count in num_cpus:
            cluster.add(count)
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def _await_start(process: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait until a node says that it runs; False where it ended before or START_SECONDS are over."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if b"Ray runtime started" in log.read_bytes():
            return True
        time.sleep(0.1)
    return False


def kill_tree(process: subprocess.Popen[bytes]) -> list[int]:
    """Kill -9 of a process and all its descendants, and wait until they are gone. Returns the pids."""
    try:
        root = psutil.Process(process.pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:  # the parent first, so that it cannot clean up or start another
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=10)
    return [member.pid for member in family]


def _free_port(ip: str) -> int:
    with socket.create_server((ip, 0)) as probe:
        return int(probe.getsockname()[1])
