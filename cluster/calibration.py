"""How many cells a query probes: about the fewest with which what is asked is answered as by an exact search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import ray

from cluster.embedded import places, take
from cluster.embedding import Embeddings
from cluster.index import Gallery
from cluster.processor import Unit
from cluster.task import answer_of

if TYPE_CHECKING:
    from cluster.leakage import LeakageProcessor

QUERIES = 512
"""By which the number of probed cells of a search is chosen."""
SHARDS = 8
"""From at least so many shards, where there are as many."""


@dataclass(frozen=True)
class Question:
    """What is asked of a gallery.

    Attributes:
        vectors: (Q, dim) unit rows.
        thresholds: float32 (Q, T): whether any image is nearer than each; None asks for the similarity of the nearest image.
        known: int64 (Q, T), so many of the nearer images do not count, such as the query's own.
    """

    vectors: np.ndarray
    thresholds: np.ndarray | None = None
    known: np.ndarray | int = 0

    def answer(self, gallery: Gallery, exact: bool = False) -> np.ndarray:
        """(Q, T), or (Q, 1) without thresholds."""
        found = gallery.search(self.vectors, 1, self.thresholds, exact)
        return found.scores if self.thresholds is None else found.nearer > self.known


def calibrate(gallery: Gallery, question: Question, recall: float | None = None) -> float:
    """Choose ``gallery.num_probes``: about the smallest number of cells with which the share ``recall`` of the queries (default: the
    gallery's) is answered as by an exact search.

    Returns:
        The share at the number chosen.
    """
    gallery.load()
    num_cells, wanted = gallery.choice.num_cells, gallery.recall if recall is None else recall
    if not num_cells:
        return 1.0
    truth = question.answer(gallery, exact=True)

    def share_at(num_probes: int) -> float:
        gallery.num_probes = num_probes
        return float((question.answer(gallery) == truth).all(axis=1).mean())

    low, high, share = 0, 1, share_at(1)
    while share < wanted and high < num_cells:
        low, high = high, min(2 * high, num_cells)
        share = share_at(high)
    while high - low > max(1, high // 8):
        middle = (low + high) // 2
        found = share_at(middle)
        low, high, share = (middle, high, share) if found < wanted else (low, middle, found)
    gallery.num_probes = high
    return share


def calibrate_search(processor: LeakageProcessor, gallery: Gallery, units: list[Unit], seed: int) -> float:
    """The same by some queries of a leakage search, in a task: no embedding comes to this process. The question is whether each mate has
    rank 1. Returns the share."""
    found = ray.remote(_calibrate_here).options(num_cpus=0).remote(processor, gallery, units, seed)
    gallery.num_probes, share = answer_of(found)
    return float(share)


def _calibrate_here(processor: LeakageProcessor, gallery: Gallery, units: list[Unit], seed: int) -> tuple[int, float]:
    """The number of cells, and the share."""
    processor.open(1)
    share = calibrate(gallery, _question(processor, gallery, units, seed))
    return gallery.num_probes, share


def _question(processor: LeakageProcessor, gallery: Gallery, units: list[Unit], seed: int) -> Question:
    """Of queries from random shards."""
    parts, left = list[tuple[np.ndarray, np.ndarray, np.ndarray]](), QUERIES
    for place in np.random.default_rng(seed).permutation(len(units)):
        unit = units[int(place)]
        embedded, originals = processor.fetch(unit)
        found = places(embedded, originals, unit.name, processor.new_key)
        rows = take(embedded, found >= 0)
        count = min(left, max(1, QUERIES // SHARDS), len(rows))
        some = Embeddings(rows.keys[:count], rows.identities[:count], rows.vectors[:count])
        some, mates = processor.mapped(some, unit.name), found[found >= 0][:count]
        image, identity, _ = processor.mates(some, originals, mates, gallery.start(unit.name))
        parts.append((some.vectors, np.stack([image, identity], 1), known_nearer(image, identity)))
        left -= count
        if left <= 0:
            break
    vectors, thresholds, known = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Question(vectors, thresholds, known)


def known_nearer(image: np.ndarray, identity: np.ndarray) -> np.ndarray:
    """How many of the images nearer than each mate do not count, int64 (N, 2): the source image takes no part in the search for the person,
    seen or not seen. ``image``, ``identity``: float32 (N,), similarities of the mates."""
    return np.stack([np.zeros(len(image), np.int64), (image > identity).astype(np.int64)], 1)
