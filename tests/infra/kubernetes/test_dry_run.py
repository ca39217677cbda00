"""`facemae submit ... --dry-run`: what it prints can be applied as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.kubernetes.nodes import PRESETS
from jobs.submit import main
from tests.infra.kubernetes.check import check, definitions, load

FOLDER = Path(__file__).parents[3] / "infra" / "kubernetes"
SETTINGS = sorted((FOLDER / "jobs" / "settings").glob("*.yaml"))
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


def dry_run(capsys: pytest.CaptureFixture[str], job: str, config: Path, *flags: str) -> str:
    capsys.readouterr()
    assert main([job, "--config", str(config), "--to", "kubernetes", "--image", IMAGE, "--dry-run", *flags]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("config", SETTINGS, ids=lambda config: config.stem)
def test_every_job_can_be_applied(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects = load(dry_run(capsys, config.stem, config, "--preset", "gpu"))
    assert [thing["kind"] for thing in objects] == ["ConfigMap", "RayJob"]
    assert check(objects, ["ServiceAccount/facemae"], crd=definitions()) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_applied_with_every_flag(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    objects = load(dry_run(capsys, "pipeline", FOLDER / "overlays" / preset / "job.yaml", "--preset", preset, *FLAGS))
    assert check(objects, NAMED, crd=definitions()) == []
    for name in NAMED:  # and nothing that a flag names is forgotten
        assert check(objects, NAMED - {name}) != [], name
