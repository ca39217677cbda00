from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.kubernetes import api, driver_log
from tests.cluster.kubernetes.api_server import Cluster, serving, write_kubeconfig


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster that KUBECONFIG leads to; pauses are short."""
    monkeypatch.setattr(api, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(driver_log, "POLL_SECONDS", 0.02)
    with serving() as (found, url):
        write_kubeconfig(tmp_path / "kubeconfig", url)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield found
