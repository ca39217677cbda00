"""Draws faces and a list of pairs of them, to verify recognisers on: `python -m benchmarks.synthetic_pairs --output test --seed 3`.

Writes OUTPUT/images/<person>/<image>.jpg and OUTPUT/pairs.csv: folds of disjoint people, as many pairs of one person as of two.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cluster.picture import encode
from facemae.synthetic import SyntheticFaces

IMAGES, FOLDS = 4, 10


def pairs(people: int, per_fold: int, seed: int) -> Iterator[str]:
    """Lines of image_a,image_b,same,fold; fold f has the people f, f + FOLDS, ..., and each pair once at the most."""
    rng = np.random.default_rng(seed)
    for fold in range(FOLDS):
        members, seen = np.arange(fold, people, FOLDS), set[tuple[int, ...]]()
        while len(seen) < per_fold:
            same = len(seen) % 2 == 0
            left, right = (int(rng.choice(members)),) * 2 if same else map(int, sorted(rng.choice(members, 2, replace=False)))
            images = sorted(map(int, rng.choice(IMAGES, 2, replace=False))) if same else list(map(int, rng.integers(IMAGES, size=2)))
            pair = (left, images[0], right, images[1])
            if pair not in seen:
                seen.add(pair)
                yield f"{left:05d}/{images[0]}.jpg,{right:05d}/{images[1]}.jpg,{int(same)},{fold}"


def write(folder: Path, people: int, per_fold: int, seed: int) -> None:
    """Images and list. Raises ValueError where a fold has too few people for that many pairs."""
    if people // FOLDS < 2 or per_fold // 2 > (people // FOLDS) * IMAGES:
        raise ValueError(f"{people} people are too few for {per_fold} pairs in each of {FOLDS} folds: give --people {2 * per_fold} or more")
    faces = SyntheticFaces(people, IMAGES, seed)
    for start in range(0, len(faces), 256):
        numbers = np.arange(start, min(start + 256, len(faces)))
        for number, picture in zip(numbers, faces.render(numbers), strict=True):
            path = folder / "images" / f"{number // IMAGES:05d}" / f"{number % IMAGES}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(picture))
    (folder / "pairs.csv").write_text("\n".join(["image_a,image_b,same,fold", *pairs(people, per_fold, seed), ""]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--pairs-per-fold", type=int, default=100)
    parser.add_argument("--seed", type=int, default=3)
    arguments = parser.parse_args()
    write(arguments.output, arguments.people, arguments.pairs_per_fold, arguments.seed)
    print(f"written: {arguments.output}/images and {arguments.output}/pairs.csv")


if __name__ == "__main__":
    main()
