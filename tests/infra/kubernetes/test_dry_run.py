"""`facemae submit ... --dry-run` with every flag: what it prints can be applied as it is.

What it prints for each job and preset without flags is committed (tests/infra/test_kubernetes.py) and checked (test_overlays.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.kubernetes.nodes import PRESETS
from jobs.submit import main
from tests.infra.kubernetes.check import check, definitions, load

FOLDER = Path(__file__).parents[3] / "infra" / "kubernetes"
IMAGE = "registry.example.org/facemae:0.1.0"
FLAGS = [
    *("--namespace", "faces", "--secret", "s3-access", "facemae-seed", "--pull-secret", "registry", "--service-account", "runs"),
    *("--retries", "0", "--deadline-hours", "1.5", "--keep-minutes", "0", "--gcs-redis", "redis:6379", "--gcs-redis-secret", "redis"),
    *("--priority-class", "batch", "--env", "AWS_REGION", "eu-central-1", "--s3-endpoint", "https://s3.example.org", "--pods", "2"),
    *("--node-selector", "topology.kubernetes.io/zone", "eu-central-1a"),
]
NAMED = {
    *("Secret/s3-access", "Secret/facemae-seed", "Secret/registry", "Secret/redis", "ServiceAccount/runs", "PriorityClass/batch"),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_applied_with_every_flag(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(FOLDER / "overlays" / preset / "job.yaml")
    assert main(["pipeline", "--config", config, "--to", "kubernetes", "--image", IMAGE, "--preset", preset, *FLAGS, "--dry-run"]) == 0
    objects = load(capsys.readouterr().out)
    assert [thing["kind"] for thing in objects] == ["ConfigMap", "RayJob"]
    assert check(objects, NAMED, crd=definitions()) == []
    for name in NAMED:  # and nothing that a flag names is forgotten
        assert check(objects, NAMED - {name}) != [], name
