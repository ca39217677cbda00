"""Nodes in network namespaces of their own, joined by a bridge: each has its own loopback and address, and its cable can be pulled."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.faults.nodes import Cluster, Node


class Namespaces(Cluster):
    """A cluster whose nodes see each other through a bridge alone."""

    prefix = "10.213.77."

    def __init__(self, folder: Path, size: int) -> None:
        self._ports = iter(range(21000, 30000))  # each namespace has all ports to itself
        self._tag = secrets.token_hex(2)
        self._bridge = f"fmb{self._tag}"
        self._size = 0
        super().__init__(folder, {})
        self._build(size)

    def enter(self, ip: str) -> list[str]:
        """Into the node's namespace."""
        return ["ip", "netns", "exec", self._name(ip)]

    def port(self, ip: str) -> int:
        """The next one."""
        return next(self._ports)

    def cut(self, node: Node) -> None:
        """Pull the node's cable: its processes live on, but nobody hears them."""
        _ip("link", "set", f"{self._name(node.ip)}b", "down")

    def close(self) -> None:
        """End the nodes and take the network away."""
        super().close()
        for number in range(1, self._size + 1):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", self._name(f"{self.prefix}{number}"))
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "delete", self._bridge)

    def _build(self, size: int) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("link", "set", self._bridge, "up")
        for number in range(1, size + 1):
            self._size, ip = number, f"{self.prefix}{number}"
            name = self._name(ip)
            _ip("netns", "add", name)
            _ip("link", "add", f"{name}b", "type", "veth", "peer", "name", f"{name}n")
            _ip("link", "set", f"{name}b", "master", self._bridge, "up")
            _ip("link", "set", f"{name}n", "netns", name)
            _ip("-n", name, "addr", "add", f"{ip}/24", "dev", f"{name}n")
            _ip("-n", name, "link", "set", f"{name}n", "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def _name(self, ip: str) -> str:
        return f"fm{self._tag}{ip.rpartition('.')[2]}"


@contextlib.contextmanager
def namespaces(num_cpus: Sequence[int]) -> Iterator[Namespaces]:
    """A cluster with one namespace per entry, the first of them the head's, until the block ends. Skips where the machine forbids it."""
    require_namespaces()
    folder = Path(tempfile.mkdtemp(prefix="fm-", dir="/tmp"))
    cluster = Namespaces(folder, len(num_cpus))
    try:
        for count in num_cpus:
            cluster.add(count)
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def require_namespaces() -> None:
    """Skip where the program or the right is missing, or the kernel has no bridge or veth."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` (apt-get install iproute2)")
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    name = f"fmt{secrets.token_hex(2)}"
    try:
        _ip("netns", "add", name)
        try:
            _ip("link", "add", name, "type", "bridge")
            _ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b")
        finally:
            for kind in (["netns", "delete", name], ["link", "delete", f"{name}a"], ["link", "delete", name]):
                with contextlib.suppress(subprocess.CalledProcessError):
                    _ip(*kind)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine allows no network namespaces with a bridge: {error.stderr.strip()}")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
