"""``facemae demo``: the whole pipeline on synthetic faces, with its own S3 server and Ray, on this machine alone."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from cluster.seaweedfs import seaweedfs
from jobs.command import Config, from_mapping, main_of
from jobs.pipeline import PipelineConfig
from jobs.pipeline import run as run_pipeline

BUCKET = "facemae-demo"


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """Show everything once: starts an S3 server (SeaweedFS) and Ray on loopback at free ports, draws synthetic faces, trains two small
    recognisers and FaceMAE, protects people FaceMAE has never seen, attacks them, writes a report, and stops what it started.

    Writes: FOLDER (recognisers, leakage tables, report.html). The buckets live in a temporary folder and go away with it.
    The pictures are drawn, the networks tiny, the training short: this shows the path, it measures no protection of real faces.
    """

    folder: str = "facemae-demo"
    """Where the results go."""


def run(config: DemoConfig) -> dict[str, Any]:
    """Run the demo."""
    started = time.perf_counter()
    content = yaml.safe_load(resources.files("jobs").joinpath("demo.yaml").read_text())
    pipeline = from_mapping(PipelineConfig, {**content, "folder": config.folder}, where="demo.yaml", complete=True)
    _start_afresh(Path(config.folder))
    os.environ.pop("RAY_ADDRESS", None)  # the demo brings its own Ray
    with tempfile.TemporaryDirectory(prefix="facemae-demo-") as temporary, seaweedfs(Path(temporary)) as endpoint:
        os.environ.update(endpoint.environment)
        endpoint.create_bucket(BUCKET)
        print(f"S3 server: {endpoint.url} (SeaweedFS, data in a temporary folder)")
        result = run_pipeline(pipeline)
    page = Path(config.folder) / "leakage" / "report.html"
    print(f"\ndone in {time.perf_counter() - started:.0f} s; the S3 server and Ray are stopped")
    print(f"open the report: {page.absolute()}")
    return {**result, "next": "the same on your faces: docs/pipeline.md, or facemae pipeline --help"}


def _start_afresh(folder: Path) -> None:
    """Replace what an earlier demo wrote: its data sets went with their server, so nothing could be resumed from them.

    Raises:
        ValueError: the folder holds something that no demo made.
    """
    mark = folder / ".facemae-demo"
    if mark.exists():
        shutil.rmtree(folder)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and was not made by a demo: choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(DemoConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
