"""Embedding shards written as `facemae embed` commits them, for benchmarks whose embeddings are made up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.attempt import Attempt
from cluster.dataset import Dataset, Labels, ShardData
from cluster.embedding import Embeddings, write_embeddings


def write_shards(url: str, shards: Sequence[np.ndarray]) -> Dataset:
    """Commit (N, dim) float16 shards, 20 rows a person, as a finished data set of embeddings."""
    dataset, first, manifests = Dataset(url, ".parquet"), 0, []
    for number, vectors in enumerate(shards):
        labels = (first + np.arange(len(vectors))) // 20
        rows = Embeddings([f"{first + row:09d}" for row in range(len(vectors))], labels, vectors)
        data = ShardData(write_embeddings(rows), len(rows), Labels.of(labels.tolist()))
        manifests.append(dataset.commit(f"{number:05d}", data, fingerprint="benchmark", attempt=Attempt("benchmark", 1), seconds={}))
        first += len(vectors)
    dataset.finish("embeddings", {"fingerprint": "benchmark"}, manifests)
    return dataset
