"""Which index a gallery gets: from its size, the memory of an actor and the recall asked for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

EXACT_IMAGES = 1 << 18
"""Up to this many images every query is compared with every image: exact, and nothing to build (our measurement: docs/leakage.md)."""
BYTES_PER_ACTOR = 4 << 30
"""What one actor holds of embeddings or codes, unless it is told otherwise."""
PART_BYTES = 64 << 20
MIN_PARTS, MAX_PARTS = 16, 4096
FULL_CODES = ("Flat", "SQfp16")
"""Codes that hold an embedding whole: it is stored in half precision."""


@dataclass(frozen=True)
class Choice:
    """An index.

    Attributes:
        factory: FAISS's name for it: "Flat", "IVF2048,SQfp16", "IVF65536,PQ64".
        num_cells: cells of the coarse quantiser; 0 where every query is compared with every image.
        num_parts: parts that are stored and handed to actors.
        num_actors: that hold them.
        bytes_per_image: what an actor keeps in memory of one.
        why: one line for people.
    """

    factory: str
    num_cells: int
    num_parts: int
    num_actors: int
    bytes_per_image: int
    why: str

    @property
    def exact(self) -> bool:
        """Whether every query is compared with every image."""
        return self.num_cells == 0

    @property
    def coded(self) -> bool:
        """Whether actors hold codes that stand for the embeddings."""
        return not self.exact and self.factory.split(",")[1] not in FULL_CODES


def choose(
    num_images: int, dim: int, *, factory: str = "auto", num_actors: int = 0, num_nodes: int = 1, actor_bytes: int = BYTES_PER_ACTOR
) -> Choice:
    """The index for a gallery.

    Args:
        num_images, dim: of the gallery.
        factory: "auto", or a FAISS factory string: "Flat", or "IVF<cells>,<codes>".
        num_actors: 0 takes one a node, and as many as it needs for none to hold more than ``actor_bytes``.
        num_nodes: of the cluster.
        actor_bytes: memory of an actor for embeddings.

    Raises:
        ValueError: a factory string that is neither "Flat" nor an IVF, that FAISS makes nothing of, or of more cells than images.
    """
    named = factory != "auto"
    if not named:
        factory = "Flat" if num_images <= EXACT_IMAGES else f"IVF{num_cells_for(num_images)},SQfp16"
        if num_actors and num_images * dim * 2 > num_actors * actor_bytes and factory != "Flat":
            factory = f"IVF{num_cells_for(num_images)},PQ{dim // 8}"
    num_cells, codes = _parse(factory)
    if num_cells > max(num_images // 4, 1):
        raise ValueError(f"{factory} has {num_cells} cells for {num_images} images: take at most {max(num_images // 4, 1)}, or Flat")
    if named and num_cells and codes not in FULL_CODES:
        from cluster.coded import empty_index  # FAISS: only where it decides

        empty_index(factory, dim)
    size = dim * 2 if codes in FULL_CODES else _code_bytes(codes, dim)
    total = num_images * (size + 12)
    actors = num_actors or max(1, num_nodes, -(-total // actor_bytes))
    parts = 0 if not num_cells else min(max(MIN_PARTS, actors, -(-num_images * dim * 2 // PART_BYTES)), MAX_PARTS, num_cells)
    why = f"{factory}{'' if named else ' (chosen)'}: {num_images:,} images x {dim}, {total / 2**30:.2f} GiB on {actors} actors"
    why += ", every query against every image" if not num_cells else f", {num_cells} cells in {parts} parts"
    return Choice(factory, num_cells, parts, min(actors, parts) if parts else actors, size + 12, why)


def num_cells_for(num_images: int) -> int:
    """Cells of an index of N images, the power of two from 4 sqrt(N) up: so many that a query scans a small part of the images, and so few
    that finding its cells costs no more than that (benchmarks/index.py)."""
    return 1 << max(8, math.ceil(math.log2(4 * num_images**0.5)))


def _parse(factory: str) -> tuple[int, str]:
    if factory in FULL_CODES:
        return 0, factory
    match = re.fullmatch(r"IVF(\d+),(\w+)", factory)
    if match is None or int(match[1]) < 2:
        raise ValueError(
            f"index {factory!r}: give auto, Flat, or IVF<cells>,<codes> as FAISS writes them, e.g. IVF1024,SQfp16 or IVF4096,PQ64"
        )
    return int(match[1]), match[2]


def _code_bytes(codes: str, dim: int) -> int:
    if match := re.fullmatch(r"PQ(\d+)(?:x(\d+))?\w*", codes):
        return -(-int(match[1]) * int(match[2] or 8) // 8)
    if match := re.fullmatch(r"SQ(\d+)", codes):
        return -(-dim * int(match[1]) // 8)
    return dim * 2
