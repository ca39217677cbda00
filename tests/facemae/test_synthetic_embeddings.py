"""Synthetic embeddings: what was planted is found by brute force, and lies in the clustered interval."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from facemae.curve import Curve
from facemae.leakage import similarity
from facemae.rank import ranks
from facemae.synthetic_embeddings import SyntheticEmbeddings, SyntheticShard


def whole(data: SyntheticEmbeddings) -> SyntheticShard:
    parts = [data.shard(number) for number in range(data.num_shards)]
    return SyntheticShard(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("originals", "protected", "identities", "leaked"))
    )


def brute_force(rows: SyntheticShard) -> np.ndarray:
    """The true rank of each protected row's original, among all."""
    scores = rows.protected.astype(np.float32) @ rows.originals.astype(np.float32).T
    mate = np.diagonal(scores)
    return ranks(np.sum(scores > mate[:, None], axis=1), mate)


def test_each_shard_stands_for_itself() -> None:
    data = SyntheticEmbeddings(25, 3, 64, leak=0.4, correlation=0.2, shard_identities=10, seed=7)
    assert (data.num_shards, data.num_images) == (3, 75)
    last, first, again = data.shard(2), data.shard(0), data.shard(2)
    assert (len(first), len(last)) == (30, 15)
    for name in ("originals", "protected", "identities", "leaked"):
        np.testing.assert_array_equal(getattr(last, name), getattr(again, name))
    assert last.identities.tolist() == [label for label in range(20, 25) for _ in range(3)]
    assert not np.isin(first.originals, last.originals).all()
    assert not np.array_equal(SyntheticEmbeddings(25, 3, 64, seed=8).shard(0).originals, first.originals)
    for rows in (first.originals, first.protected):
        assert rows.dtype == np.float16
        np.testing.assert_allclose(np.linalg.norm(rows.astype(np.float64), axis=1), 1, atol=1e-3)


@pytest.mark.parametrize("within", [0.0, 0.2, 0.5])
def test_the_geometry_is_the_one_described(within: float) -> None:
    rows = whole(SyntheticEmbeddings(150, 4, 128, leak=0.5, within=within))
    scores = rows.originals.astype(np.float64) @ rows.originals.astype(np.float64).T
    same = (rows.identities[:, None] == rows.identities) & ~np.eye(len(rows), dtype=bool)
    assert scores[same].mean() == pytest.approx(within, abs=0.01)
    assert scores[rows.identities[:, None] != rows.identities].mean() == pytest.approx(0, abs=0.01)
    mate = similarity(rows.protected, rows.originals)
    np.testing.assert_allclose(mate[rows.leaked], 0.98, atol=2e-3)
    assert np.abs(mate[~rows.leaked]).max() < 0.6
    assert mate[~rows.leaked].mean() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("leak", [0.0, 0.03, 0.4, 1.0])
def test_a_planted_leak_is_found_by_brute_force(leak: float) -> None:
    rows = whole(SyntheticEmbeddings(600, 5, 64, leak=leak, correlation=0.3, shard_identities=250))
    found = brute_force(rows)
    assert (found[rows.leaked] == 1).all(), "every copy is nearest to its original"
    assert np.sum(found[~rows.leaked] == 1) < 8, "the chance of one is 1 in 3000"
    assert rows.leaked.mean() == pytest.approx(leak, abs=0.05)
    untraced = found[~rows.leaked]
    if len(untraced) > 1000:  # elsewhere every rank is as likely as any other
        assert np.quantile(untraced, [0.25, 0.5, 0.75]) == pytest.approx([750, 1500, 2250], rel=0.1)


def test_correlation_is_that_of_two_images_of_a_person() -> None:
    leaked = whole(SyntheticEmbeddings(4000, 4, 64, leak=0.2, correlation=0.4)).leaked.reshape(-1, 4)
    assert np.corrcoef(leaked[:, 0], leaked[:, 1])[0, 1] == pytest.approx(0.4, abs=0.05)
    assert leaked.mean() == pytest.approx(0.2, abs=0.02)


def covered(seeds: int, **options: Any) -> int:
    """Seeds whose clustered interval holds the CMC@1 that was planted."""
    count = 0
    for seed in range(seeds):
        data = SyntheticEmbeddings(400, 5, 64, seed=seed, **options)
        rows = whole(data)
        low, high = Curve.of(brute_force(rows), rows.identities, len(rows)).interval
        count += int(low[0] <= data.expected_cmc1 <= high[0])
    return count


@pytest.mark.parametrize(("leak", "correlation"), [(0.01, 0.3), (0.1, 0.3), (0.5, 0.0)])
def test_the_interval_recovers_the_planted_rate_in_93_of_100_seeds(leak: float, correlation: float) -> None:
    assert covered(100, leak=leak, correlation=correlation) >= 93


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dim": 32}, "dim is 32: give 64 or more"),
        ({"leak": 1.5}, "give 0 to 1"),
        ({"within": 0.9}, "within"),
        ({"images": 0}, "images is 0"),
    ],
)
def test_values_out_of_range(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SyntheticEmbeddings(**{"num_identities": 10, "images": 2, **options})


def test_a_shard_that_is_not() -> None:
    with pytest.raises(ValueError, match="numbered 0 to 0"):
        SyntheticEmbeddings(10, 2).shard(1)
