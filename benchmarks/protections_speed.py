"""Images per second of processor time of every protection that needs no trained weights, on one core, at 112 x 112, on drawn faces."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from benchmarks.machine import machine
from facemae.protection import PROTECTIONS, ShardProtection, create_protection
from facemae.synthetic import SyntheticFaces

WEIGHTED = ("facemae", "mae")


def images_per_second(method: str, pictures: np.ndarray, keys: list[str], identities: list[int]) -> float:
    """The better of two runs over all the pictures as one batch, at the default strength."""
    protection = create_protection(method)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        if isinstance(protection, ShardProtection):
            protection.protect_shard(pictures, keys, identities)
        else:
            protection.protect(pictures, keys)
        seconds.append(time.process_time() - start)
    return len(pictures) / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    faces = SyntheticFaces(-(-arguments.images // 10), 10)
    rows = np.arange(arguments.images)
    pictures, identities = faces.render(rows), faces.identities(rows).tolist()
    keys = [f"{row:07d}" for row in rows]
    found = {method: round(images_per_second(method, pictures, keys, identities)) for method in PROTECTIONS if method not in WEIGHTED}
    for method, rate in found.items():
        print(f"{method:12} {rate:>9,} images/s")
    if arguments.json:
        record = {"images": arguments.images, "images_per_second": found, "machine": machine()}
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
