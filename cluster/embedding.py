"""One shard of embeddings: parquet with key, identity and a unit vector in half precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.shard import ShardError


@dataclass(frozen=True)
class Embeddings:
    """Rows of one shard, in the shard's order.

    Attributes:
        keys: N sample keys.
        identities: int64 (N,).
        vectors: float16 (N, dim), rows of unit length up to rounding (a cosine is off by less than 1e-3).
    """

    keys: Sequence[str]
    identities: np.ndarray
    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)


def write_embeddings(rows: Embeddings) -> bytes:
    """The rows as parquet; equal rows give equal bytes."""
    dim = rows.vectors.shape[1]
    flat = pa.array(np.ascontiguousarray(rows.vectors, np.float16).reshape(-1))
    table = pa.table(
        {
            "key": pa.array(list(rows.keys), pa.string()),
            "identity": pa.array(rows.identities, pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, dim),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False)  # random mantissas do not compress
    return sink.getvalue().to_pybytes()


def read_embeddings(data: bytes) -> Embeddings:
    """The inverse of write_embeddings.

    Raises:
        ShardError: the bytes are no such table.
    """
    try:
        table = pq.read_table(pa.BufferReader(data)).combine_chunks()
        column = table["embedding"].combine_chunks()
        vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
        return Embeddings(table["key"].to_pylist(), table["identity"].to_numpy(), vectors)
    except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError) as error:
        raise ShardError(f"no embeddings table: {error}") from None
