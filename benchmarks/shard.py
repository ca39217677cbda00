"""Reading a shard: our header walk beside tarfile and webdataset, the same bytes, one process, one thread.

python benchmarks/shard.py [--samples 5000] [--json FILE]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import webdataset

from cluster.shard import Sample, ShardWriter, read_samples


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    writer, image = ShardWriter(), os.urandom(5000)
    for number in range(arguments.samples):
        writer.add(Sample(f"{number:07d}", image, number))
    data = writer.finish()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        path.write_bytes(data)
        readers: dict[str, Callable[[], int]] = {
            "facemae read_samples": lambda: sum(1 for _ in read_samples(data)),
            "tarfile": lambda: _tarfile(data),
            "webdataset": lambda: sum(1 for _ in webdataset.WebDataset(str(path), shardshuffle=False)),
        }
        rates = {name: _rate(arguments.samples, read) for name, read in readers.items()}
    for name, rate in rates.items():
        print(f"{name:24} {rate:10.0f} samples/s   facemae is {rates['facemae read_samples'] / rate:5.1f} x")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rates, indent=1) + "\n")


def _tarfile(data: bytes) -> int:
    count = 0
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            file = archive.extractfile(member)
            count += file is not None and len(file.read()) > 0 and member.name.endswith(".cls")
    return count


def _rate(count: int, read: Callable[[], int]) -> float:
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        if read() != count:
            raise SystemExit("a reader lost samples")
        best = min(best, time.perf_counter() - started)
    return count / best


if __name__ == "__main__":
    main()
