"""`make image-check`: the Dockerfile's builder run without a container engine, in a clean environment. It downloads gigabytes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.infra.dockerfile import read

ROOT = Path(__file__).parents[2]
DOCKERFILE = read(ROOT / "infra" / "image" / "Dockerfile")
DISTRIBUTIONS = "from importlib.metadata import distributions as d; print(*{x.metadata['Name'].lower() for x in d()})"
IMPORT_ALL = """
import importlib, pkgutil, facemae, cluster, jobs
for package in (facemae, cluster, jobs):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        module.name.endswith("__main__") or importlib.import_module(module.name)
"""


@pytest.mark.scale
@pytest.mark.timeout(3600)
def test_the_builder_s_steps_in_a_clean_environment(tmp_path: Path) -> None:
    """What its RUN steps make, but for apt's packages, imports, runs and trains without any build tool."""
    prefix, build = tmp_path / "facemae", tmp_path / "build"
    python = os.environ.get("FACEMAE_IMAGE_PYTHON", sys.executable)
    values = {"PREFIX": str(prefix), "PYTHON": python}
    _build(build, values)
    size = sum(path.lstat().st_size for path in prefix.rglob("*"))
    print(f"{prefix}: {size / 2**20:.0f} MiB installed")
    tools = _without_tools(tmp_path)
    clean = {"PATH": f"{prefix}/bin:{tools}", "HOME": str(tmp_path), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(command, env=clean, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    names = run(
        "python", "-c", "from importlib.metadata import distributions as d; print(*{x.metadata['Name'].lower() for x in d()})"
    ).split()
    assert not {"ninja", "pip", "pytest", "mypy", "ruff", "hypothesis"} & set(names)
    assert run("facemae", "--help")
    run("python", "-c", IMPORT_ALL)
    run("facemae", "ingest", "--source", "synthetic:ids=4,images=4", "--output", "set", "--shard-size", "8", "--num-workers", "1")
    small = ["--backbone", "compact-8", "--dim", "32", "--samples", "16", "--batch-size", "8", "--num-workers", "1"]
    run("facemae", "pretrain", "--data", "set", "--output", "run", *small)
    assert (tmp_path / "run" / "weights" / "recognizer.onnx").exists()


def _build(folder: Path, values: Mapping[str, str]) -> None:
    """Run the builder's steps: COPY into ``folder``, and every RUN but apt's there."""
    folder.mkdir()
    for each in DOCKERFILE:
        if each.stage != "builder" or each.name not in ("COPY", "RUN") or "apt-get" in each.value:
            continue
        if each.name == "RUN":
            done = subprocess.run(["bash", "-o", "pipefail", "-c", each.value], cwd=folder, env={**os.environ, **values}, text=True)
            assert done.returncode == 0, each.value
            continue
        *sources, target = each.words
        for source in sources:
            goal = folder / target / Path(source).name if target.endswith("/") else folder / target
            goal.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-r", str(ROOT / source), str(goal)], check=True)


def _without_tools(folder: Path) -> Path:
    """A folder of programs to be the rest of PATH: a shell's, and no compiler."""
    found = folder / "programs"
    found.mkdir()
    for name in ("bash", "sh", "env", "uname", "cat", "ls", "ps", "grep", "nproc"):
        real = subprocess.run(["which", name], capture_output=True, text=True).stdout.strip()
        if real:
            (found / name).symlink_to(real)
    return found
