"""Measures how fast one core draws synthetic faces: `python benchmarks/synthetic.py --output rate.json`.

Drawing uses numpy's element-wise operations only, which run on the calling thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np

from facemae.synthetic import SyntheticFaces


def measure(images: int, repeats: int) -> dict[str, object]:
    """Renders images in shuffled order `repeats` times; the rates are of the median and of the best run."""
    faces = SyntheticFaces(num_identities=images, images_per_identity=20)
    wanted = np.random.default_rng(0).permutation(len(faces))[:images]
    faces.render(wanted[:64])  # first calls fill the noise tables
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        faces.render(wanted)
        seconds.append(time.perf_counter() - start)
    return {
        "images": images,
        "repeats": repeats,
        "size": faces.size,
        "images_per_second_median": round(images / float(np.median(seconds)), 1),
        "images_per_second_best": round(images / min(seconds), 1),
        "numpy": np.__version__,
        "machine": platform.machine(),
    }


def main() -> None:
    """Prints one table line and writes the same numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    result = measure(options.images, options.repeats)
    print("| images | size | images/s median | images/s best |")
    print("| {images} | {size} | {images_per_second_median} | {images_per_second_best} |".format(**result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
