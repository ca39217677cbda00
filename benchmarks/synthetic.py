"""Measures how fast one core draws synthetic faces: `python benchmarks/synthetic.py --output rate.json`.

Drawing uses numpy's element-wise operations only, which run on the calling thread.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np

from facemae.synthetic import SyntheticFaces


def measure(images: int, repeats: int) -> dict[str, object]:
    """Renders images in shuffled order `repeats` times; rates are medians over the runs.

    The rate per CPU second is what one core does; the rate per second of wall clock is lower where other work shares it.
    """
    faces = SyntheticFaces(num_identities=images, images_per_identity=20)
    wanted = np.random.default_rng(0).permutation(len(faces))[:images]
    faces.render(wanted[:64])  # the first call fills the noise tables
    runs = []
    for _ in range(repeats):
        start = time.perf_counter(), time.process_time()
        faces.render(wanted)
        runs.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    wall, cpu = np.median(runs, axis=0)
    return {
        "images": images,
        "repeats": repeats,
        "size": faces.size,
        "images_per_second": round(images / float(wall), 1),
        "images_per_cpu_second": round(images / float(cpu), 1),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    """Prints one table line and writes the same numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    result = measure(options.images, options.repeats)
    print("| images | size | images/s | images/CPU second |")
    print("| {images} | {size} | {images_per_second} | {images_per_cpu_second} |".format(**result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
