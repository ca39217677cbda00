"""The stand-in for CFP-FP: yaw from landmarks of heads turned by a known angle, and pairs that keep people apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.profile_pairs import NOSE_DEPTH, NUM_FOLDS, Detector, Face, choose, yaws
from cluster.picture import decode

TEMPLATE = [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
HEAD = np.array([[-1, 0, 0], [1, 0, 0], [0, 1, NOSE_DEPTH], [-0.8, 2, 0.1], [0.8, 2, 0.1]])
"""x to the right, y down, z to the camera, in half distances between the pupils."""


@given(st.floats(-75, 75), st.floats(-40, 40), st.floats(1, 50))
def test_the_yaw_of_a_turned_head(yaw: float, roll: float, scale: float) -> None:
    t, r = np.radians([yaw, roll])
    turned = HEAD @ np.array([[np.cos(t), 0, np.sin(t)], [0, 1, 0], [-np.sin(t), 0, np.cos(t)]]).T
    flat = turned[:, :2] @ np.array([[np.cos(r), -np.sin(r)], [np.sin(r), np.cos(r)]])
    seen = flat * scale + 30
    # roll moves the nose along the line of the eyes by nothing, as it turns that line too
    assert yaws(seen[None])[0] == pytest.approx(yaw, abs=1e-6)


def faces(seed: int, people: int) -> dict[str, list[Face]]:
    random = np.random.default_rng(seed)
    return {f"p{i:02d}": [Face(f"p{i:02d}/{j}.jpg", random.normal(0, 20)) for j in range(random.integers(0, 9))] for i in range(people)}


@given(st.integers(0, 1000), st.integers(1, 60), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_pairs_are_what_they_say(seed: int, num_people: int, per_person: int) -> None:
    people = faces(seed, num_people)
    pairs = choose(people, 15, 25, per_person, seed)
    assert pairs == choose(people, 15, 25, per_person, seed)
    person = {pair: (pair.frontal.name.split("/")[0], pair.turned.name.split("/")[0]) for pair in pairs}
    assert all((one == other) == pair.same for pair, (one, other) in person.items())
    assert all(abs(pair.frontal.yaw) <= 15 and abs(pair.turned.yaw) >= 25 for pair in pairs)
    assert sum(pair.same for pair in pairs) * 2 == len(pairs)
    folds = [{name for pair in pairs if pair.fold == fold for name in person[pair]} for fold in range(NUM_FOLDS)]
    assert sum(map(len, folds)) == len(set().union(*folds)), "no person is in two folds"
    for name, images in people.items():
        mine = [pair.turned for pair in pairs if pair.same and person[pair][1] == name]
        assert len(mine) <= per_person
        rest = [abs(face.yaw) for face in images if face not in mine]
        if len(mine) == per_person:
            assert min(abs(face.yaw) for face in mine) >= max(rest, default=0), "the most turned ones first"


@pytest.mark.faces
def test_landmarks_lie_where_the_faces_were_aligned_to(shared: Path) -> None:
    names = sorted((shared / "faces" / "lfw").glob("*/0001.jpg"))[:24]
    detector, pictures = Detector(shared / "models" / "yunet_n_dynamic.onnx"), np.stack([decode(name.read_bytes()) for name in names])
    points, scores = detector.landmarks(pictures)
    assert scores.min() > 0.8
    np.testing.assert_allclose(np.median(points, 0), TEMPLATE, atol=5)
    mirrored, _ = detector.landmarks(pictures[:, :, ::-1])
    assert np.corrcoef(yaws(points), -yaws(mirrored))[0, 1] > 0.85
    assert np.median(np.abs(yaws(points) + yaws(mirrored))) < 8
