"""Verification against a plain re-implementation, loop by loop, and against scikit-learn's ROC: to the last digit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.picture import decode
from facemae.pairs import PairList, read_pairs
from facemae.recognizer.onnx import OnnxRecognizer
from facemae.verification import Roc, VerificationError, cross_validate, file_folds, squared_distances, unit_rows, verify

MEAN_STD: dict[str, Any] = {
    "mobilefacenet_ms1m": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "edgeface_xxs": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
}


def embeddings(seed: int, people: int = 30, images: int = 6, dim: int = 16) -> tuple[np.ndarray, PairList]:
    """Noisy copies of random centres, and pairs of them in an order of their own."""
    random = np.random.default_rng(seed)
    centers = np.repeat(random.standard_normal((people, dim)), images, 0)
    vectors = unit_rows((centers + random.normal(0, 0.8, centers.shape)).astype(np.float32))
    left, right = random.integers(0, len(vectors), (2, 600))
    right[::2] = left[::2] // images * images + random.integers(0, images, 300)
    same = left // images == right // images
    return vectors, PairList([str(i) for i in range(len(vectors))], left, right, same)


def plain(vectors: np.ndarray, pairs: PairList, fold: np.ndarray) -> dict[str, Any]:
    """The protocol as a reader of the papers would write it down: no vectors, no sorting, no searching."""
    distances = [
        float(((vectors[a].astype(np.float64) - vectors[b].astype(np.float64)) ** 2).sum())
        for a, b in zip(pairs.left, pairs.right, strict=True)
    ]
    thresholds = [step * 0.01 for step in range(400)]

    def accuracy(chosen: list[int], threshold: float) -> float:
        return sum((distances[i] < threshold) == bool(pairs.same[i]) for i in chosen) / len(chosen)

    accuracies, found = [], []
    for name in sorted(set(fold.tolist())):
        inside = [i for i in range(len(distances)) if fold[i] == name]
        outside = [i for i in range(len(distances)) if fold[i] != name]
        scores = [accuracy(outside, threshold) for threshold in thresholds]
        best = thresholds[scores.index(max(scores))]
        accuracies.append(accuracy(inside, best))
        found.append(best)
    genuine = [d for d, same in zip(distances, pairs.same, strict=True) if same]
    impostor = [d for d, same in zip(distances, pairs.same, strict=True) if not same]

    def tar(far: float) -> float:
        allowed = [t for t in [*distances, 9.0] if sum(d < t for d in impostor) / len(impostor) <= far]
        return max(sum(d < t for d in genuine) / len(genuine) for t in allowed)

    area = sum((a < b) + 0.5 * (a == b) for a in genuine for b in impostor) / (len(genuine) * len(impostor))
    mean = sum(accuracies) / len(accuracies)
    std = (sum((value - mean) ** 2 for value in accuracies) / len(accuracies)) ** 0.5
    return {"accuracies": accuracies, "thresholds": found, "mean": mean, "std": std, "tar": [tar(0.1), tar(0.01)], "auc": area}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_equals_a_plain_implementation(seed: int) -> None:
    vectors, pairs = embeddings(seed)
    fold = file_folds(len(pairs))
    expected = plain(vectors, pairs, fold)
    found = verify(squared_distances(vectors, pairs.left, pairs.right), pairs.same)
    assert found.folds is not None
    assert found.folds.accuracy.tolist() == expected["accuracies"]
    assert found.folds.threshold.tolist() == expected["thresholds"]
    written = found.to_json()
    assert written["accuracy"] == pytest.approx(expected["mean"], abs=1e-15)
    assert written["std"] == pytest.approx(expected["std"], abs=1e-15)
    assert [written["tar_at_far"][far] for far in ("1e-1", "1e-2")] == expected["tar"]
    assert written["auc"] == pytest.approx(expected["auc"], abs=1e-13)
    assert 0.6 < written["accuracy"] < 0.99, "a case where something is to be seen"


@pytest.mark.parametrize("decimals", [1, 3, 12])
def test_the_roc_is_scikit_learns(decimals: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is a development dependency")
    vectors, pairs = embeddings(3)
    distances = np.round(squared_distances(vectors, pairs.left, pairs.right), decimals)  # with one decimal nearly everything ties
    far, tar, _ = metrics.roc_curve(pairs.same, -distances, drop_intermediate=False)
    found = Roc.of(distances, pairs.same)
    ours = found.points()
    np.testing.assert_array_equal(ours[0], far)
    np.testing.assert_array_equal(ours[1], tar)
    assert found.auc == metrics.auc(far, tar)
    assert found.auc == pytest.approx(metrics.roc_auc_score(pairs.same, -distances), abs=1e-15)
    for exponent in (1, 2):
        assert found.tar(exponent) == tar[far <= 10.0**-exponent].max()


@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=60))
@settings(max_examples=60, deadline=None)
def test_what_holds_for_any_distances(cells: list[tuple[int, bool]]) -> None:
    distances, same = np.array([d / 4 for d, _ in cells]), np.array([value for _, value in cells])
    if same.all() or not same.any():
        with pytest.raises(VerificationError, match="no threshold can be judged"):
            Roc.of(distances, same)
        return
    found = Roc.of(distances, same)
    far, tar = found.points()
    assert (np.diff(far) >= 0).all()
    assert (np.diff(tar) >= 0).all()
    assert (far[-1], tar[-1]) == (1, 1)
    mirrored = Roc.of(3 - distances, same)
    assert found.auc + mirrored.auc == pytest.approx(1)
    assert 0 <= found.eer <= 1
    for mistakes in range(len(found.impostor) + 1):  # the best threshold that is within the limit, by trying all
        limits = [t for t in np.append(distances, 9) if np.sum(found.impostor < t) <= mistakes]
        assert found.accepted(mistakes) == max(np.sum(found.genuine < t) for t in limits)
    scaled = Roc.of(distances * 0.5, same)
    assert (scaled.auc, scaled.eer) == (found.auc, found.eer), "only the order counts"


@given(st.integers(10, 500), st.integers(2, 10))
def test_folds_are_those_of_scikit_learns_kfold(pairs: int, folds: int) -> None:
    expected = np.concatenate([np.full(len(part), number) for number, part in enumerate(np.array_split(np.arange(pairs), folds))])
    assert file_folds(pairs, folds).tolist() == expected.tolist()


def test_a_perfect_recogniser_and_one_that_knows_nothing() -> None:
    same = np.arange(100) % 2 == 0
    perfect = verify(np.where(same, 0.5, 1.5), same).to_json()
    assert (perfect["accuracy"], perfect["std"], perfect["auc"], perfect["eer"], perfect["tar_at_far"]["1e-1"]) == (1, 0, 1, 0, 1)
    assert perfect["threshold"] == pytest.approx(0.51), "the lowest of the best"
    constant = verify(np.ones(100), same).to_json()
    assert (constant["auc"], constant["tar_at_far"]["1e-1"]) == (0.5, 0)


def test_the_std_is_the_populations() -> None:
    same = np.arange(40) % 2 == 0
    distances = np.where(same, 0.5, 1.5)
    distances[:2] = distances[1::-1]  # one fold's genuine and impostor swapped
    found = cross_validate(distances, same, np.repeat(np.arange(4), 10))
    assert found.accuracy.tolist() == [0.8, 1, 1, 1]
    assert found.std == pytest.approx(0.2 * (3 / 16) ** 0.5)


def test_a_rate_that_the_pairs_cannot_show_has_a_reason() -> None:
    same = np.arange(400) % 2 == 0
    written = verify(np.where(same, 0.5, 1.5), same).to_json()
    assert [far for far, value in written["tar_at_far"].items() if value is None] == ["1e-3", "1e-4", "1e-5", "1e-6"]
    assert written["tar_at_far_absent"]["1e-3"] == "needs 10^3 impostor pairs, there are 200"


def test_the_sketch_lies_on_the_curve() -> None:
    vectors, pairs = embeddings(4)
    found = Roc.of(squared_distances(vectors, pairs.left, pairs.right), pairs.same)
    sketch, (far, tar) = found.sketch(), found.points()
    assert len(sketch["far"]) < 40
    assert sketch["far"] == sorted(set(sketch["far"]))
    assert (sketch["far"][0], sketch["far"][-1], sketch["tar"][-1]) == (1 / len(found.impostor), 1, 1)
    for x, y in zip(sketch["far"], sketch["tar"], strict=True):
        assert y == tar[far <= x].max()


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(VerificationError, match="9 pairs cannot be cut into 10 folds"):
        file_folds(9)
    same = np.arange(20) % 2 == 0
    with pytest.raises(VerificationError, match="two folds are needed"):
        verify(np.ones(20), same, np.zeros(20, np.int64))
    with pytest.raises(VerificationError, match="one person"):
        verify(np.ones(20), np.ones(20, bool))
    for broken in (np.nan, np.inf):
        with pytest.raises(VerificationError, match="1 distances are not finite"):
            verify(np.append(np.ones(19), broken), same)
        with pytest.raises(VerificationError, match="1 of 3 embeddings are zero or not finite, the first is number 1"):
            unit_rows(np.array([[1.0, 0], [broken, 0], [1, 1]]))
    with pytest.raises(VerificationError, match="number 0"):
        unit_rows(np.zeros((2, 4)))


def distances_on_lfw(shared: Path, name: str, folds: int) -> tuple[np.ndarray, PairList]:
    """Without flip, of the first folds of LFW."""
    root = shared / "faces" / "lfw"
    listed = {path.relative_to(root).as_posix() for path in root.glob("*/*.jpg")}
    pairs = read_pairs((shared / "faces" / "meta" / "lfw_pairs.txt").read_text(), "lfw", listed)
    assert pairs.fold is not None
    pairs = pairs.chosen(pairs.fold < folds)
    used, places = np.unique([pairs.left, pairs.right], return_inverse=True)
    recognizer = OnnxRecognizer.load(shared / "models" / f"{name}.onnx", **MEAN_STD[name], threads=2)
    vectors = recognizer.embed(np.stack([decode((root / pairs.images[i]).read_bytes()) for i in used]))
    return squared_distances(vectors, *places.reshape(2, -1)), pairs


@pytest.mark.faces
def test_a_fold_of_lfw(shared: Path) -> None:
    distances, pairs = distances_on_lfw(shared, "edgeface_xxs", 1)
    assert len(pairs) == 600
    best = max(np.mean((distances < threshold) == pairs.same) for threshold in np.arange(0, 4, 0.01))
    assert best > 0.99
    assert 1 - distances[pairs.same].mean() / 2 == pytest.approx(0.637, abs=0.02)
    assert 1 - distances[~pairs.same].mean() / 2 == pytest.approx(0.011, abs=0.02)


@pytest.mark.faces
@pytest.mark.parametrize(
    ("name", "accuracy", "tar", "cosines"),
    [("mobilefacenet_ms1m", 99.37, 98.70, (0.663, 0.010)), ("edgeface_xxs", 99.60, 99.10, (0.637, 0.011))],
)
def test_lfw_as_the_recognisers_readme_has_it(
    shared: Path, long: None, name: str, accuracy: float, tar: float, cosines: tuple[float, float]
) -> None:
    """Its figures are the same embeddings' by a convention of its own: *fewer* than FAR x I impostor pairs accepted (2 of 3,000 at 1e-3, we
    take 3), and another grid of thresholds, which moves the accuracy by up to 8 of 6,000 pairs."""
    distances, pairs = distances_on_lfw(shared, name, 10)
    found = verify(distances, pairs.same, pairs.fold)
    assert [1 - distances[kind].mean() / 2 for kind in (pairs.same, ~pairs.same)] == pytest.approx(cosines, abs=5e-4)
    assert 100 * found.roc.accepted(2) / 3000 == pytest.approx(tar, abs=5e-3)
    assert 100 * found.to_json()["accuracy"] == pytest.approx(accuracy, abs=0.14)
    assert 100 * found.to_json()["tar_at_far"]["1e-3"] == pytest.approx(tar, abs=0.14)
