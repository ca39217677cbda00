"""k-same against brute force, and what it promises of any shard."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from facemae.protection.k_same import KSameProtection, most_groups
from facemae.protection.protocol import ShardProtection
from facemae.synthetic import SyntheticFaces


def reduced(picture: np.ndarray) -> list[int]:
    """Means of blocks of 8 pixels by loops."""
    return [
        math.floor(picture[top : top + 8, left : left + 8, color].astype(int).mean() + 0.5)
        for top in range(0, picture.shape[0], 8)
        for left in range(0, picture.shape[1], 8)
        for color in range(3)
    ]


def groups_of(protected: np.ndarray, left_out: set[int]) -> list[list[int]]:
    """Rows that show one and the same picture."""
    found = defaultdict(list)
    for row, picture in enumerate(protected):
        if row not in left_out:
            found[picture.tobytes()].append(row)
    return list(found.values())


def newton(pictures: np.ndarray, k: int) -> dict[int, set[int]]:
    """The paper's algorithm for one picture of each person: each row's group."""
    vectors, left, groups = [reduced(picture) for picture in pictures], list(range(len(pictures))), {}
    while left:
        first = left[0]
        nearest = sorted(left, key=lambda row: (sum((a - b) ** 2 for a, b in zip(vectors[row], vectors[first], strict=True)), row))
        group = nearest if len(left) < 2 * k else nearest[:k]
        groups.update({row: set(group) for row in group})
        left = [row for row in left if row not in group]
    return groups


@pytest.mark.parametrize("k", [2, 3, 7, 10, 20])
def test_one_picture_of_each_of_twenty_people_is_the_paper_s_algorithm(k: int) -> None:
    pictures = SyntheticFaces(20, 1, seed=3).render(np.arange(20))
    found = KSameProtection(k).protect_shard(pictures, [f"{row:02d}" for row in range(20)], list(range(20)))
    assert found.left_out == {}
    expected = newton(pictures, k)
    assert {len(group) for group in expected.values()} <= set(range(k, 2 * k))
    for row, group in expected.items():
        average = np.mean([pictures[other].astype(float) for other in sorted(group)], axis=0)
        np.testing.assert_array_equal(found.pictures[row], np.floor(average + 0.5 + 1e-9))


SHARDS = st.lists(st.integers(1, 7), min_size=2, max_size=9)


def shard_of(counts: list[int], seed: int) -> tuple[np.ndarray, list[str], list[int]]:
    """Noise pictures, keys in no order, and labels, shuffled."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(counts)) * 11, counts))
    pictures = random.integers(0, 256, (len(labels), 8, 16, 3), dtype=np.uint8)
    return pictures, [f"{number:04d}" for number in random.permutation(len(labels))], labels.tolist()


@given(SHARDS, st.integers(2, 6), st.integers(0, 10))
@settings(max_examples=150, deadline=None)
def test_every_average_is_of_k_different_people_and_as_few_as_can_be_are_left_out(counts: list[int], k: int, seed: int) -> None:
    assume(len(counts) >= k)
    pictures, keys, labels = shard_of(counts, seed)
    found = KSameProtection(k).protect_shard(pictures, keys, labels)
    groups = groups_of(found.pictures, set(found.left_out))
    for group in groups:
        assert k <= len(group) < 2 * k
        assert len({labels[row] for row in group}) == len(group)
        exact = pictures[group].astype(int).sum(axis=0)
        np.testing.assert_array_equal(found.pictures[group[0]], (2 * exact + len(group)) // (2 * len(group)))
    fewest = min(sum(counts) - sum(min(c, g) for c in counts) for g in range(1, sum(counts) + 1) if sum(min(c, g) for c in counts) >= g * k)
    assert len(found.left_out) == fewest
    assert {(found.pictures[row] == 128).all() for row in found.left_out} <= {True}


@given(SHARDS, st.integers(2, 4), st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_shard_does_not_matter(counts: list[int], k: int, seed: int) -> None:
    assume(len(counts) >= k)
    pictures, keys, labels = shard_of(counts, seed)
    found = KSameProtection(k).protect_shard(pictures, keys, labels)
    order = np.random.default_rng(seed + 1).permutation(len(keys))
    again = KSameProtection(k).protect_shard(pictures[order], [keys[row] for row in order], [labels[row] for row in order])
    np.testing.assert_array_equal(again.pictures, found.pictures[order])
    assert {int(order[row]) for row in again.left_out} == set(found.left_out)


@given(SHARDS, st.integers(2, 6))
@settings(max_examples=100, deadline=None)
def test_the_number_of_groups_equals_brute_force(counts: list[int], k: int) -> None:
    assume(len(counts) >= k)
    possible = [g for g in range(1, sum(counts) + 1) if sum(min(c, g) for c in counts) >= g * k]
    assert most_groups(np.array(counts), k) == max(possible)


def test_a_person_with_too_many_pictures_loses_the_last_by_key() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    found = KSameProtection(2).protect_shard(pictures, list("abcdefghi"), [5, 5, 5, 5, 5, 5, 1, 2, 3])
    assert set(found.left_out) == {3, 4, 5}
    assert set(found.left_out.values()) == {"its person has more images in the shard than there are groups of 2 people"}
    groups = groups_of(found.pictures, {3, 4, 5})
    assert Counter(len(group) for group in groups) == {2: 3}
    assert all(len({0, 1, 2} & set(group)) == 1 for group in groups)


def test_fewer_than_k_people_are_refused_with_the_remedy() -> None:
    pictures = np.zeros((6, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"k = 4 needs 4 identities in a shard, this one has 3: lower --strength, or ingest with a larger"):
        KSameProtection(4).protect_shard(pictures, list("abcdef"), [0, 0, 1, 1, 2, 2])
    with pytest.raises(ValueError, match="6 pictures with 5 identities"):
        KSameProtection(2).protect_shard(pictures, list("abcdef"), [0, 1, 2, 3, 4])
    with pytest.raises(ValueError, match="call protect_shard"):
        KSameProtection(2).protect(pictures, list("abcdef"))


def test_an_empty_shard_and_equal_pictures() -> None:
    protection = KSameProtection(2)
    assert isinstance(protection, ShardProtection)
    assert protection.protect_shard(np.zeros((0, 8, 8, 3), np.uint8), [], []).pictures.shape == (0, 8, 8, 3)
    same = np.full((5, 8, 8, 3), 9, np.uint8)  # every distance is a tie
    np.testing.assert_array_equal(protection.protect_shard(same, list("abcde"), [0, 1, 2, 3, 4]).pictures, same)


def test_larger_groups_change_the_pictures_more() -> None:
    pictures, labels = SyntheticFaces(24, 2, seed=1).render(np.arange(48)), [row // 2 for row in range(48)]
    keys = [f"{row:02d}" for row in range(48)]
    changes = [
        np.abs(KSameProtection(k).protect_shard(pictures, keys, labels).pictures.astype(int) - pictures).mean() for k in (2, 4, 8, 16, 24)
    ]
    assert all(small < large for small, large in itertools.pairwise(changes)), changes
