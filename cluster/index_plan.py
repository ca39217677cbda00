"""What the actors of an index are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What every actor of an index is made of.

    Small, so that Ray hands it on by itself: an actor that is started again needs no object of a node that may be gone.

    Attributes:
        url: the embeddings (searched shard by shard, each against every query), or the index built from them.
        dim: length of the embeddings.
        cells: whether it is an index.
        codes: where rows are held as codes, the key below ``url`` of a trained FAISS index (cluster.coded), and its sha256.
    """

    url: str
    dim: int
    cells: bool = False
    codes: tuple[str, str] | None = None
