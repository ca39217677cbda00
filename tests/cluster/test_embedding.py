"""Embedding shards come back, are the same bytes each time, and anything else is refused."""

from __future__ import annotations

import contextlib
import io
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.embedding import Embeddings, read_embeddings, write_embeddings
from cluster.shard import ShardError


def rows_of(count: int, dim: int = 16, seed: int = 0, dtype: type = np.float16) -> Embeddings:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return Embeddings([f"k/{i}é" for i in range(count)], rng.integers(0, 2**62, count), vectors.astype(dtype))


@given(st.integers(0, 40), st.integers(1, 600), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_rows_come_back(count: int, dim: int, seed: int):
    rows = rows_of(count, dim, seed)
    found = read_embeddings(write_embeddings(rows))
    assert list(found.keys) == list(rows.keys)
    assert (len(found), found.vectors.dtype, found.identities.dtype) == (count, np.float16, np.int64)
    assert np.array_equal(found.identities, rows.identities)
    assert found.vectors.shape == (count, dim)
    assert np.array_equal(found.vectors, rows.vectors)


def test_half_precision_keeps_cosines():
    rows = rows_of(50, 512, dtype=np.float32)
    found = read_embeddings(write_embeddings(rows)).vectors.astype(np.float32)
    assert np.abs(found @ found.T - rows.vectors @ rows.vectors.T).max() < 1e-3


def test_equal_rows_give_equal_bytes_whatever_their_layout():
    rows = rows_of(20)
    data = write_embeddings(rows)
    assert write_embeddings(rows) == data
    assert write_embeddings(Embeddings(tuple(rows.keys), rows.identities, np.asfortranarray(rows.vectors))) == data
    assert write_embeddings(Embeddings(rows.keys, rows.identities, rows.vectors.astype(np.float32))) == data
    wide = np.concatenate([rows.vectors, rows.vectors], axis=1)
    assert write_embeddings(Embeddings(rows.keys, rows.identities, wide[:, :16])) == data


def test_rows_that_do_not_match_are_not_written():
    rows = rows_of(5)
    for broken in (
        Embeddings(rows.keys[:4], rows.identities, rows.vectors),
        Embeddings(rows.keys, rows.identities[:4], rows.vectors),
        Embeddings(rows.keys, rows.identities, rows.vectors[:4]),
    ):
        with pytest.raises(ValueError, match=r"\d"):
            write_embeddings(broken)


def table(**columns: pa.Array) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


KEY, IDENTITY = pa.array(["a", "b"]), pa.array([1, 2])
VECTORS = pa.array([[1.0, 0.0], [0.0, 1.0]], pa.list_(pa.float16(), 2))

WRONG = {
    "empty": b"",
    "text": b"no parquet at all",
    "magic alone": b"PAR1PAR1",
    "no keys": table(identity=IDENTITY, embedding=VECTORS),
    "no vectors": table(key=KEY, identity=IDENTITY),
    "vectors of any length": table(key=KEY, identity=IDENTITY, embedding=pa.array([[1.0], [0.0, 1.0]])),
    "a missing vector": table(key=KEY, identity=IDENTITY, embedding=pa.array([[1.0, 0.0], None], pa.list_(pa.float16(), 2))),
    "numbers for vectors": table(key=KEY, identity=IDENTITY, embedding=pa.array([1.0, 2.0])),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_embeddings_table_is_a_shard_error(name: str):
    with pytest.raises(ShardError, match="no embeddings table"):
        read_embeddings(WRONG[name])


def test_damaged_bytes_raise_nothing_but_shard_error():
    good, rng = write_embeddings(rows_of(8)), random.Random(0)
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data) // 2, len(data))] = rng.randrange(256)
        with contextlib.suppress(ShardError):
            read_embeddings(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]))
