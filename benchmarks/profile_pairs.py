"""Frontal-profile pairs from LFW's most turned faces: our stand-in for CFP-FP where CFP cannot be had.

    python -m benchmarks.profile_pairs --faces LFW --people lfw_identity_folds.csv --folds 9 10 --detector yunet.onnx --output pairs.csv

It is easier than CFP-FP: few faces in LFW are turned beyond 45 degrees, because a frontal-face detector chose them. The yaw of each aligned
face comes from the five landmarks of a YuNet detector: genuine pairs are a turned and a nearly frontal image of one person, the most
turned ones first, at most ``--per-person`` a person; for each there is an impostor pair of the same turned image and a nearly frontal one
of somebody else of the same fold. Only people of the given folds of the CSV (columns identity, fold) take part; they are dealt into ten
folds, so that no person is in two. The same files and seed give the same list, which ``facemae evaluate --pairs`` reads.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from cluster.picture import SIZE, decode

STRIDES = (8, 16, 32)
SIDE = 160
"""Faces are put into the middle of a black square of this side: the detector wants multiples of 32, and some air around a face."""
BATCH = 64
NOSE_DEPTH = 0.7
"""How far the tip of the nose lies before the pupils, in half distances between the pupils (our reading of a mean head: 22 of 32 mm)."""
NUM_FOLDS = 10
MIN_SCORE = 0.5


@dataclass(frozen=True)
class Face:
    """An image below the root of the faces, and its yaw in degrees, positive to the right of the picture."""

    name: str
    yaw: float


@dataclass(frozen=True)
class Pair:
    """A nearly frontal and a turned image."""

    frontal: Face
    turned: Face
    same: bool
    fold: int


class Detector:
    """YuNet (Wu et al., 2023): the landmarks of the surest face in each picture."""

    def __init__(self, file: str | Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]

    def landmarks(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The eye on the left of the picture, the other eye, nose, left and right corner of the mouth.

        Args:
            pictures: uint8 (N, 112, 112, 3) RGB.

        Returns:
            float32 (N, 5, 2), x and y in pixels, and the detector's score, float32 (N,) in [0, 1].
        """
        margin = (SIDE - SIZE) // 2
        padded = np.zeros((len(pictures), 3, SIDE, SIDE), np.float32)
        padded[:, :, margin : margin + SIZE, margin : margin + SIZE] = pictures[..., ::-1].transpose(0, 3, 1, 2)  # BGR
        found = dict(zip(self._outputs, self._session.run(None, {self._session.get_inputs()[0].name: padded}), strict=True))
        scores = [np.sqrt(found[f"cls_{stride}"] * found[f"obj_{stride}"])[..., 0] for stride in STRIDES]
        points = [(found[f"kps_{s}"].reshape(len(pictures), -1, 5, 2) + _grid(s)) * s - margin for s in STRIDES]
        every, best = np.concatenate(scores, 1), np.concatenate(scores, 1).argmax(1)
        rows = np.arange(len(pictures))
        return np.concatenate(points, 1)[rows, best], every[rows, best]


def _grid(stride: int) -> np.ndarray:
    """x and y of each cell, float32 (cells, 1, 2)."""
    y, x = np.divmod(np.arange((SIDE // stride) ** 2), SIDE // stride)
    return np.stack([x, y], -1)[:, None].astype(np.float32)


def yaws(landmarks: np.ndarray) -> np.ndarray:
    """Yaw in degrees from five landmarks (N, 5, 2), positive where the nose points to the right of the picture: float64 (N,).

    Of a head turned by t the eyes are 2 cos(t) apart and the nose is NOSE_DEPTH sin(t) off their middle, along the line of the eyes.
    """
    left, right, nose = (landmarks[:, i].astype(np.float64) for i in range(3))
    axis = right - left
    offset = ((nose - (left + right) / 2) * axis).sum(1) / np.maximum((axis**2).sum(1), 1e-9) * 2
    return np.degrees(np.arctan(offset / NOSE_DEPTH))


def estimate(root: Path, names: Sequence[str], detector: Detector) -> list[Face]:
    """The faces that the detector is sure of."""
    found = list[Face]()
    for start in range(0, len(names), BATCH):
        batch = names[start : start + BATCH]
        pictures = np.stack([decode((root / name).read_bytes()) for name in batch])
        points, scores = detector.landmarks(pictures)
        mirrored, _ = detector.landmarks(pictures[:, :, ::-1])
        angles = (yaws(points) - yaws(mirrored)) / 2  # the detector's grid is coarse for faces so small: half of its error goes
        found += [Face(name, float(yaw)) for name, yaw, score in zip(batch, angles, scores, strict=True) if score >= MIN_SCORE]
    return found


def choose(people: Mapping[str, Sequence[Face]], frontal: float, turned: float, per_person: int, seed: int) -> list[Pair]:
    """Pairs from the faces of each person.

    Args:
        frontal: largest absolute yaw, in degrees, of a nearly frontal face.
        turned: smallest absolute yaw of a turned one.
        per_person: most genuine pairs of one person.
        seed: of the folds, and of which frontal image a turned one meets.
    """
    random = np.random.default_rng(seed)
    straight = {person: [face for face in faces if abs(face.yaw) <= frontal] for person, faces in people.items()}
    sides = {person: sorted((f for f in people[person] if abs(f.yaw) >= turned), key=lambda f: (-abs(f.yaw), f.name)) for person in people}
    genuine = [person for person in sorted(people) if straight[person] and sides[person]]
    pairs = list[Pair]()
    for fold, members in enumerate(_dealt(genuine, random)):
        for person in members:
            others = [other for other in members if other != person]
            for face in sides[person][:per_person] if others else ():
                stranger = straight[others[random.integers(len(others))]]
                pairs.append(Pair(straight[person][random.integers(len(straight[person]))], face, True, fold))
                pairs.append(Pair(stranger[random.integers(len(stranger))], face, False, fold))
    return pairs


def _dealt(people: Sequence[str], random: np.random.Generator) -> list[list[str]]:
    """The people in ten folds of equal size, up to one."""
    order = random.permutation(len(people))
    return [[people[i] for i in order[fold::NUM_FOLDS]] for fold in range(NUM_FOLDS)]


def people_of(file: Path, folds: Sequence[int]) -> list[str]:
    """Identities of these folds of the CSV."""
    with file.open(newline="") as lines:
        return [row["identity"] for row in csv.DictReader(lines) if int(row["fold"]) in folds]


def main() -> None:
    """Estimate, choose, write the list, and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", required=True, type=Path, help="folder IDENTITY/IMAGE.jpg of aligned faces")
    parser.add_argument("--people", required=True, type=Path, help="CSV of identity,fold")
    parser.add_argument("--folds", required=True, type=int, nargs="+", help="folds of that CSV whose people take part")
    parser.add_argument("--detector", required=True, type=Path, help="YuNet as ONNX")
    parser.add_argument("--output", required=True, type=Path, help="pairs.csv: image_a,image_b,same,fold")
    parser.add_argument("--frontal", type=float, default=15.0, help="largest absolute yaw of a frontal face, degrees")
    parser.add_argument("--turned", type=float, default=25.0, help="smallest absolute yaw of a turned face, degrees")
    parser.add_argument("--per-person", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    detector, people, lost = Detector(given.detector), dict[str, list[Face]](), 0
    for person in people_of(given.people, given.folds):
        names = [f"{person}/{path.name}" for path in sorted((given.faces / person).glob("*.jpg"))]
        people[person] = estimate(given.faces, names, detector) if len(names) > 1 else []
        lost += len(names) - len(people[person]) if len(names) > 1 else 0
    pairs = choose(people, given.frontal, given.turned, given.per_person, given.seed)
    if not pairs:
        raise SystemExit("no person has a frontal and a turned image: give more folds, or a smaller --turned")
    with given.output.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["image_a", "image_b", "same", "fold"])
        rows.writerows([pair.frontal.name, pair.turned.name, int(pair.same), pair.fold] for pair in pairs)
    yaw = np.abs([pair.turned.yaw for pair in pairs])
    num_people = len({pair.turned.name.split("/")[0] for pair in pairs})
    print(f"{len(pairs) // 2} genuine and as many impostor pairs of {num_people} people; {lost} images without a sure face left out")
    print(f"yaw of the turned faces: median {np.median(yaw):.0f}, highest {yaw.max():.0f} degrees; written: {given.output}")


if __name__ == "__main__":
    main()
