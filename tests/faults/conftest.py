"""Fixtures of the fault cases. ``make faults`` runs them at full length; ``make test`` runs a short selection."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.servers import Server, ceph, seaweedfs_to_break
from tests.faults.world import BUCKET, World, world


@pytest.fixture(scope="module")
def broken_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A SeaweedFS of the fault cases' own, which they may kill."""
    with seaweedfs_to_break(tmp_path_factory.mktemp("seaweedfs-faults")) as server:
        server.endpoint.create_bucket(BUCKET)
        yield server


@pytest.fixture(scope="module")
def seaweed_world(broken_server: Server) -> Iterator[World]:
    """The world around SeaweedFS."""
    with world(broken_server.endpoint) as made:
        yield made


@pytest.fixture(scope="module")
def ceph_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The world around Ceph's RADOS gateway, where that is installed."""
    with ceph(tmp_path_factory.mktemp("ceph"), BUCKET) as endpoint, world(endpoint) as made:
        yield made


@pytest.fixture
def here(seaweed_world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """SeaweedFS' world, and this process's boto3 led straight to its server."""
    return _led(seaweed_world, monkeypatch)


@pytest.fixture
def second(ceph_world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Ceph's world, likewise."""
    return _led(ceph_world, monkeypatch)


@pytest.fixture(params=["seaweedfs", "ceph"])
def either(request: pytest.FixtureRequest) -> World:
    """Both worlds, one after the other; Ceph's only at full length."""
    if request.param == "seaweedfs":
        return request.getfixturevalue("here")
    request.getfixturevalue("long")
    return request.getfixturevalue("second")


def _led(made: World, monkeypatch: pytest.MonkeyPatch) -> World:
    for name, value in made.endpoint.environment.items():
        monkeypatch.setenv(name, value)
    return made
