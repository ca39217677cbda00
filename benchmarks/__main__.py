"""``make bench``: every benchmark on synthetic input that it makes itself; tables on the screen, JSON in benchmarks/out."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch

import facemae.model  # noqa: F401  # registers the architectures

FOLDER = Path(__file__).parent


def main() -> None:
    """Run them one after another, so that none disturbs another."""
    out = FOLDER / "out"
    out.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        data, weights = f"{temporary}/data", f"{temporary}/weights"
        _run("-m", "jobs", "ingest", "--source", "synthetic:ids=500,images=20", "--output", data, "--shard-size", "1000")
        torch.manual_seed(0)
        timm.create_model("facemae_tiny_patch16_112").save_pretrained(weights)
        _run(str(FOLDER / "synthetic.py"), "--output", str(out / "synthetic.json"))
        _run(str(FOLDER / "shard.py"), "--json", str(out / "shard.json"))
        _run(str(FOLDER / "protect.py"), "--data", data, "--weights", weights, "--json", str(out / "protect.json"))
        _run(str(FOLDER / "commit.py"), "--data", data, "--rounds", "80", "--json", str(out / "commit.json"))
        _run(str(FOLDER / "commit.py"), "--data", data, "--weights", weights, "--rounds", "3", "--json", str(out / "commit_facemae.json"))
        _run("-m", "benchmarks.index", "--output", str(out))
        _run("-m", "benchmarks.traffic", "--output", str(out))
        _run("-m", "benchmarks.feed", "--data", data, "--output", str(out))
        _run("-m", "benchmarks.driver", "--output", str(out))
        _run("-m", "benchmarks.partial_fc", "--output", str(out))
        _run("-m", "benchmarks.status", "--output", str(out))
        _run("-m", "benchmarks.scale", "--images", "250000", "1000000", "--output", str(out))
    print(f"written: {out}")


def _run(*arguments: str) -> None:
    print(f"\n$ python {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, *arguments], check=True)


if __name__ == "__main__":
    main()
