"""k-same averaging (Newton, Sweeney and Malin, TKDE 2005, doi 10.1109/TKDE.2005.32): k faces become one, their average.

The paper has one picture of each person. With several, the groups here are of pictures of *different* people, since an average of one
person's pictures protects nobody (our reading). Then groups can run out: of a person with more pictures than there are groups, some fit in
none. They are left out; to put two of them in one group would let that person weigh more than 1/k in the average.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from facemae.protection.blocks import block_means
from facemae.protection.deterministic import DeterministicProtection
from facemae.protection.dial import Dial
from facemae.protection.protocol import GREY, ProtectedShard, check_batch

REDUCTION = 8
"""Pictures are compared by the means of blocks of this many pixels (our reading of the paper's pixel and eigenface distances: both
compare low frequencies)."""
MAX_K = 1000


class KSameProtection(DeterministicProtection):
    """Replaces every picture by the average of a group of k pictures of k different people of the same shard.

    The first picture by key that is left takes the nearest picture of each of the k - 1 nearest other people; again with what is left;
    the last group takes the rest, up to 2k - 1 pictures. A person who has a picture left for every group that is still to come is taken
    at once, since otherwise a later group would lack people. All arithmetic is in whole numbers: the same bytes on every machine.

    The unit is one shard: k holds within it, and who knows that a person is in the shard knows the group to be one of its groups. Who a
    picture was made of is known no better than 1 in k from the picture alone; labels that go with it say what they say.

    Args:
        strength: k, a whole number from 2 to 1000.

    Raises:
        ValueError: the strength is out of range.
    """

    name = "k_same"
    dial = Dial("k, the people in an average", 2, MAX_K, 5, whole=True)

    def describe(self) -> dict[str, Any]:
        """Returns method and strength, and that the unit is a shard; see `ShardProtection`."""
        return {**super().describe(), "unit": "shard", "min_identities": self.strength}

    def protect(self, pictures: np.ndarray, keys: Sequence[str]) -> np.ndarray:
        """Refuses: a batch says neither who is in it nor who else is in the shard.

        Raises:
            ValueError: always.
        """
        raise ValueError("k_same averages over a whole shard of known identities: call protect_shard")

    def protect_shard(self, pictures: np.ndarray, keys: Sequence[str], identities: Sequence[int]) -> ProtectedShard:
        """Averages the pictures of a shard in groups; see `ShardProtection.protect_shard`.

        Raises:
            ValueError: wrong form or numbers, or fewer than k identities.
        """
        check_batch(pictures, keys)
        if len(identities) != len(pictures):
            raise ValueError(f"{len(pictures)} pictures with {len(identities)} identities: give one for each picture")
        if not len(pictures):
            return ProtectedShard(pictures.copy(), {})
        k = int(self.strength)
        people, counts = np.unique(np.asarray(identities), return_inverse=True, return_counts=True)[1:]
        if len(counts) < k:
            raise ValueError(
                f"k_same with k = {k} needs {k} identities in a shard, this one has {len(counts)}: "
                "lower --strength, or ingest with a larger --shard-size"
            )
        num_groups = most_groups(counts, k)
        rows = _first_of_each(people, keys, num_groups)
        averages = np.full_like(pictures, GREY)
        features = block_means(pictures[rows], REDUCTION).reshape(len(rows), -1).astype(np.float64)
        for group in _groups(features, people[rows], k, num_groups):
            total = pictures[rows[group]].sum(axis=0, dtype=np.int64)
            averages[rows[group]] = (2 * total + len(group)) // (2 * len(group))
        why = f"its person has more images in the shard than there are groups of {k} people"
        return ProtectedShard(averages, {int(row): why for row in np.setdiff1d(np.arange(len(pictures)), rows)})


def most_groups(counts: np.ndarray, k: int) -> int:
    """The most groups of k different people, when nobody is twice in a group.

    G groups take at most min(count, G) pictures of a person, and need k G. At this G the fewest pictures are left out.

    Args:
        counts: int (P,): pictures of each of P >= k people.
        k: people in a group, at least.
    """
    low, high = 1, int(counts.sum()) // k
    while low < high:  # pictures that fit less those needed: concave in G, 0 at G = 0, so the Gs that do form one run from 1 on
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(counts, middle).sum() >= k * middle else (low, middle - 1)
    return low


def _first_of_each(people: np.ndarray, keys: Sequence[str], limit: int) -> np.ndarray:
    """Rows in the order of their keys, at most the first `limit` of each person."""
    order = np.array(sorted(range(len(keys)), key=lambda row: keys[row]))
    by_person = order[np.argsort(people[order], kind="stable")]
    starts = np.searchsorted(people[by_person], people[by_person])  # where each person's rows begin
    kept = by_person[np.arange(len(by_person)) - starts < limit]
    return order[np.isin(order, kept)]


def _groups(features: np.ndarray, people: np.ndarray, k: int, num_groups: int) -> Iterator[np.ndarray]:
    """Rows of each group, nearest first: `num_groups` groups of k to 2k - 1 different people that take every row.

    Before a group, with G still to come, G k <= rows < (G + 1) k and nobody has more than G rows. So there are k people
    at least, and it holds again after a group that has everybody with G rows in it, and k people in all if those are fewer.

    Args:
        features: float64 (N, D) of whole numbers; sums of their products stay exact.
        people: int (N,) from 0; nobody more than `num_groups` times.
        k: people in a group, at least.
        num_groups: floor(N / k).
    """
    lengths = np.einsum("nd,nd->n", features, features)
    left = np.arange(len(features))
    for to_come in range(num_groups, 0, -1):
        distances = (lengths - 2 * (features @ features[left[0]]))[left]  # squared, less a constant
        nearest = left[np.argsort(distances, kind="stable")]
        candidates = nearest[np.sort(np.unique(people[nearest], return_index=True)[1])]  # each person's nearest, nearest first
        needed = np.bincount(people[left])[people[candidates]] == to_come
        needed[candidates == left[0]] = True
        others = candidates[~needed][: max(0, k - int(needed.sum()))]
        group = np.concatenate([candidates[needed], others])
        yield group
        left = np.setdiff1d(left, group)
