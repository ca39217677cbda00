"""The kustomize tree: rendered files are what the settings render, and every build comes about."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kubernetes.nodes import PRESETS
from infra.kubernetes import render
from jobs.__main__ import JOBS
from tests.infra.kubernetes.check import check, definitions

TREE = render.REPOSITORY / render.FOLDER
COMPONENTS = ("irsa", "static-secret", "redis", "quota")
OUTSIDE = ("Secret/facemae-s3", "Secret/facemae-redis")
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed: nothing else builds kustomizations")
RENDERINGS = {str(rendering.path.relative_to(render.FOLDER)): rendering for rendering in render.renderings()}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(render.REPOSITORY)


def kustomize(folder: Path) -> list[dict[str, Any]]:
    built = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return list(yaml.safe_load_all(built.stdout))


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [thing for thing in objects if thing["kind"] == kind]


@pytest.mark.parametrize("file", RENDERINGS)
def test_what_is_committed_is_what_the_settings_render(file: str) -> None:
    assert (TREE / file).read_text(encoding="utf-8") == RENDERINGS[file].text(), "run `make manifests`"


def test_the_quick_start_prints_its_manifests() -> None:
    text = (render.REPOSITORY / render.PAGE).read_text(encoding="utf-8")
    assert render.page(text) == text, "run `make manifests`"
    assert RENDERINGS["overlays/cpu/rayjob.yaml"].command in text


def test_every_file_is_rendered_from_something() -> None:
    assert {path.stem for path in (TREE / "jobs").glob("*.yaml")} == set(render.JOBS)
    assert {path.stem for path in (TREE / "jobs/settings").glob("*.yaml")} == set(render.JOBS) <= set(JOBS)
    assert {path.name for path in (TREE / "overlays").iterdir()} == set(render.OVERLAYS) == set(PRESETS)


@needs_kubectl
@pytest.mark.parametrize("overlay", render.OVERLAYS)
def test_an_overlay_builds_with_components(overlay: str, tmp_path: Path) -> None:
    for components in ((), COMPONENTS, *((name,) for name in COMPONENTS if overlay == "cpu")):
        folder = tmp_path / "-".join(("with", *components))
        folder.mkdir()
        content = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [os.path.relpath(TREE / "overlays" / overlay, folder)],
            "components": [os.path.relpath(TREE / "components" / name, folder) for name in components],
            "images": [{"name": "registry.example.org/facemae", "newName": "registry.example.com/faces/facemae", "newTag": "0.2.0"}],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        objects = kustomize(folder)
        assert [str(problem) for problem in check(objects, OUTSIDE, crd=definitions())] == []
        [job] = of_kind(objects, "RayJob")
        text = yaml.safe_dump(job)
        assert text.count("image: registry.example.com/faces/facemae:0.2.0") == 3  # head, workers, submitter
        assert "registry.example.org" not in text
        assert ("facemae-s3" in text) == ("static-secret" in components)
        assert ("gcsFaultToleranceOptions" in text) == ("redis" in components)
        assert bool(of_kind(objects, "ResourceQuota")) == ("quota" in components)
        [account] = of_kind(objects, "ServiceAccount")
        assert ("eks.amazonaws.com/role-arn" in account["metadata"].get("annotations", {})) == ("irsa" in components)


@needs_kubectl
def test_the_namespace_enforces_what_the_pods_keep() -> None:
    [namespace] = of_kind(kustomize(TREE / "base"), "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
