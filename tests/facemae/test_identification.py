"""1:N identification against sorting every similarity, with ties, distractors and strangers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facemae.identification import Split, identify
from facemae.rank import UNDEFINED
from facemae.verification import VerificationError, unit_rows


def faces(seed: int, people: int = 40, images: int = 3, dim: int = 12, noise: float = 0.7) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    centers = np.repeat(random.standard_normal((people, dim)), images, 0)
    return unit_rows(centers + random.normal(0, noise, centers.shape)), np.repeat(np.arange(people), images)


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of half-precision rows, without rounding until the last step."""
    return (left.astype(np.float16).astype(np.float64) @ right.astype(np.float16).astype(np.float64).T).astype(np.float32)


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=25, deadline=None)
def test_ranks_and_rates_equal_brute_force(seed: int, ties: bool) -> None:
    vectors, labels = faces(seed)
    if ties:
        vectors = unit_rows(np.round(2 * vectors) + 0.25)  # few different values: many equal similarities
    split = Split.of(labels)
    gallery, probes = vectors[split.gallery], vectors[split.probes]
    distractors = unit_rows(np.random.default_rng(seed + 1).standard_normal((60, vectors.shape[1])))
    strangers, known = labels[split.probes] >= 35, labels[split.gallery] < 35
    found = identify(gallery[known], labels[split.gallery][known], probes, labels[split.probes], distractors)
    scores, others = cosines(probes, gallery[known]), cosines(probes, distractors)
    alone = []
    for number, label in enumerate(labels[split.probes]):
        if label >= 35:
            assert found.ranks[number] == UNDEFINED
            continue
        mate = scores[number, label]
        assert found.ranks[number] == np.sum(scores[number] >= mate) + np.sum(others[number] >= mate)
        alone.append(mate if np.sum(scores[number] >= mate) == 1 else -np.inf)
    highest = np.sort(np.append(cosines(distractors, gallery[known]).max(1), scores[strangers].max(1)))[::-1]
    np.testing.assert_array_equal(found.strangers, highest)
    written = found.to_json()
    assert written["rank1"] == np.mean(found.ranks[~strangers] == 1)
    assert written["rank5"] == np.mean(found.ranks[~strangers] <= 5)
    assert written["tpir_at_fpir"]["1e-1"] == np.mean(np.array(alone) > highest[len(highest) // 10])
    assert written["tpir_at_fpir"]["1e-2"] is None
    assert (written["gallery"], written["distractors"], written["probes"], written["probes_without_mate"]) == (35, 60, 70, 10)
    assert written["strangers"] == 70


def test_one_embedding_for_everybody_finds_nobody() -> None:
    same = np.tile(np.eye(1, 8, dtype=np.float32), (20, 1))
    found = identify(same[:10], np.arange(10), same[10:], np.arange(10), same[:3])
    assert found.ranks.tolist() == [13] * 10
    assert (found.rank(1), found.rank(5), found.to_json()["probes"]) == (0, 0, 10)


def test_distractors_only_make_it_harder() -> None:
    vectors, labels = faces(1)
    split = Split.of(labels)
    sides = vectors[split.gallery], labels[split.gallery], vectors[split.probes], labels[split.probes]
    without, among = (identify(*sides, rows) for rows in (vectors[:0], unit_rows(np.random.default_rng(0).standard_normal((500, 12)))))
    assert (among.ranks >= without.ranks).all()
    assert among.rank(1) < without.rank(1) < 1
    assert without.to_json()["tpir_at_fpir_absent"]["1e-1"] == "needs 10^1 strangers, there are 0"


def test_the_split_takes_the_first_image_and_knows_who_has_one_only() -> None:
    split = Split.of(np.array([5, 7, 5, 2, 5, 7, 9]))
    assert (split.gallery.tolist(), split.probes.tolist(), split.single.tolist()) == ([0, 1], [2, 4, 5], [3, 6])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_every_image_has_one_part(labels: list[int]) -> None:
    split = Split.of(np.array(labels))
    assert sorted(np.concatenate([split.gallery, split.probes, split.single]).tolist()) == list(range(len(labels)))
    assert {labels[i] for i in split.gallery} == {label for label in labels if labels.count(label) > 1}
    assert {labels[i] for i in split.single} == {label for label in labels if labels.count(label) == 1}


def test_what_cannot_be_searched_is_said() -> None:
    vectors, labels = np.eye(4, dtype=np.float32), np.arange(4)
    with pytest.raises(VerificationError, match="twice in the gallery"):
        identify(vectors, np.array([1, 2, 1, 3]), vectors, labels, vectors[:0])
    with pytest.raises(VerificationError, match="no probe's person"):
        identify(vectors, labels, vectors, labels + 4, vectors[:0])
    with pytest.raises(VerificationError, match="no probe's person"):
        identify(vectors[:0], labels[:0], vectors[:0], labels[:0], vectors)
    with pytest.raises(VerificationError, match="not finite"):
        identify(vectors, labels, np.full((4, 4), np.nan), labels, vectors[:0])
