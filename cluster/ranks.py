"""One shard of a search's result: the rank of every query, as parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.shard import ShardError


@dataclass(frozen=True)
class Ranks:
    """Queries, a row each. A rank is 1 + the number of gallery images that the search saw to be nearer than the mate: exact where the
    search was, else at most the true rank. UNDEFINED (-1) where there is no mate.

    Attributes:
        key: sample keys.
        identity: int64 labels.
        rank_image: int64, of the query's own source image; UNDEFINED where the search leaves it out.
        rank_identity: int64, of the most similar other image of the same identity, the source image left out.
        exact_image, exact_identity: int64, the same two by an exact search, for a random sample of the queries; 0 outside of it.
        others: int64, how many other images of the identity the gallery holds.
        mate_similarity, identity_similarity: float32, to those two mates; NaN where there is none.
        top_similarity: float32, to the most similar gallery image seen (the query's own left out where the search does).
        exact_top: float32, the same by the exact search; NaN outside of the sample.
    """

    key: Sequence[str]
    identity: np.ndarray
    rank_image: np.ndarray
    rank_identity: np.ndarray
    exact_image: np.ndarray
    exact_identity: np.ndarray
    others: np.ndarray
    mate_similarity: np.ndarray
    identity_similarity: np.ndarray
    top_similarity: np.ndarray
    exact_top: np.ndarray

    def __len__(self) -> int:
        return len(self.key)


def write_ranks(rows: Ranks, histograms: Mapping[str, np.ndarray]) -> bytes:
    """The rows as parquet, the histograms as JSON in its schema's metadata; equal input gives equal bytes."""
    content = json.dumps({name: histograms[name].tolist() for name in sorted(histograms)})
    table = pa.table({item.name: pa.array(getattr(rows, item.name)) for item in fields(Ranks)})
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"histograms": content}), sink)
    return sink.getvalue().to_pybytes()


def read_ranks(data: bytes) -> tuple[Ranks, dict[str, np.ndarray]]:
    """The inverse of write_ranks. Raises ShardError for bytes that are no such table."""
    try:
        table = pq.read_table(pa.BufferReader(data))
        columns = {item.name: table[item.name] for item in fields(Ranks)}
        histograms = json.loads(table.schema.metadata[b"histograms"])
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise ShardError(f"no table of ranks: {error}") from None
    arrays = {name: column.to_pylist() if name == "key" else column.to_numpy() for name, column in columns.items()}
    return Ranks(**arrays), {name: np.array(counts, np.int64) for name, counts in histograms.items()}
