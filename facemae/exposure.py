"""The most exposed images: those traced at rank 1 that are most similar to their originals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

MOST_EXPOSED = 20


class Exposed(NamedTuple):
    """One image of rank 1, with its similarity to its original."""

    key: str
    identity: int
    similarity: float


@dataclass(frozen=True)
class Exposure:
    """The images of rank 1 of the highest mate similarity, at most 20, equal ones by key. Additive.

    A margin over the nearest other image would tell more, but the similarity of the nearest image is that of the mate itself at rank 1.
    """

    rows: tuple[Exposed, ...] = ()

    @classmethod
    def of(cls, keys: Sequence[str], identities: np.ndarray, ranks: np.ndarray, mate_similarity: np.ndarray) -> Exposure:
        """From sample keys, labels (N,), ranks (N,), and similarities to the mates (N,), NaN where there is none."""
        traced = np.flatnonzero(ranks == 1)
        return cls._top(Exposed(keys[row], int(identities[row]), float(mate_similarity[row])) for row in traced.tolist())

    @classmethod
    def merge(cls, parts: Iterable[Exposure]) -> Exposure:
        """The most exposed of all parts."""
        return cls._top(row for part in parts for row in part.rows)

    @classmethod
    def _top(cls, rows: Iterable[Exposed]) -> Exposure:
        return cls(tuple(sorted(rows, key=lambda row: (-row.similarity, row.key, row.identity))[:MOST_EXPOSED]))

    def to_json(self) -> list[dict[str, Any]]:
        """Key, identity and similarity of each, the most similar first."""
        return [row._asdict() for row in self.rows]
