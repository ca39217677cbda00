"""Made-up embeddings as data sets: galleries with queries that were held out, and whole sets written by workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.attempt import Attempt
from cluster.dataset import Dataset, Labels, ShardData
from cluster.embedded import EmbeddedSet
from cluster.embedding import Embeddings, write_embeddings
from cluster.processor import Processor, Unit
from cluster.stage import run_stage
from facemae.synthetic_embeddings import SyntheticEmbeddings

IMAGES_EACH = 20
WITHIN = 0.42
"""Mean cosine of two images of a person, which says how hard the search is: of 200,000 images in 2,048 cells, 99 % of the nearest take a
fifth of all cells at 0.46 and a third at 0.42. 18,260 real faces took a quarter."""
SHARD_PEOPLE = 500


@dataclass(frozen=True)
class HeldOut:
    """A gallery and queries.

    Attributes:
        gallery: shards, float16 (n, D) unit rows, IMAGES_EACH rows a person.
        queries: float16 (Q, D) unit rows.
    """

    gallery: Sequence[np.ndarray]
    queries: np.ndarray

    @classmethod
    def make(cls, images: int, queries: int, dim: int, within: float, seed: int = 0) -> HeldOut:
        """About ``images`` images (a whole number of people), and ``queries`` further ones of people spread over all of them. The smaller
        ``within``, the mean cosine of two images of a person, the more cells a query's nearest may be in."""
        people = -(-images // IMAGES_EACH)
        spare = -(-queries // people)
        source = SyntheticEmbeddings(people, IMAGES_EACH + spare, dim, within=within, shard_identities=SHARD_PEOPLE, seed=seed)
        gallery, held = list[np.ndarray](), list[np.ndarray]()
        for number in range(source.num_shards):
            rows = source.shard(number).originals.reshape(-1, IMAGES_EACH + spare, dim)
            gallery.append(rows[:, :IMAGES_EACH].reshape(-1, dim))
            held.append(rows[:, IMAGES_EACH:].reshape(-1, dim))
        chosen = np.random.default_rng(seed).permutation(people * spare)[:queries]
        return cls(gallery, np.concatenate(held)[chosen])


def write_shards(url: str, shards: Sequence[np.ndarray]) -> Dataset:
    """Commit shards of embeddings as `facemae embed` does, as a finished data set; IMAGES_EACH rows a person."""
    dataset, first, manifests = Dataset(url, ".parquet"), 0, []
    for number, vectors in enumerate(shards):
        labels = (first + np.arange(len(vectors))) // IMAGES_EACH
        rows = Embeddings([f"{first + row:09d}" for row in range(len(vectors))], labels, vectors)
        data = ShardData(write_embeddings(rows), len(rows), Labels.of(labels.tolist()))
        manifests.append(dataset.commit(f"{number:05d}", data, fingerprint="benchmark", attempt=Attempt("benchmark", 1), seconds={}))
        first += len(vectors)
    dataset.finish("embeddings", {"fingerprint": "benchmark"}, manifests)
    return dataset


class SyntheticProcessor(Processor[Unit]):
    """Makes shards of embeddings up. ``role``: "originals" or "protected"."""

    def __init__(self, source: SyntheticEmbeddings, role: str) -> None:
        self._source, self._role = source, role

    def describe(self) -> dict[str, Any]:
        """The set, as though a recogniser had made it."""
        recognizer = {"name": "synthetic", "sha256": "0" * 64, "dim": self._source.dim, "mean": [0.5] * 3, "std": [0.5] * 3}
        return {"stage": "embed", "recognizer": recognizer, "source": asdict(self._source), "role": self._role}

    def fetch(self, unit: Unit) -> None:
        """Nothing: the shard's name says all."""

    def compute(self, unit: Unit, fetched: None) -> ShardData:
        """The shard."""
        shard = self._source.shard(int(unit.name))
        keys = [f"{unit.name}{row:06d}" for row in range(len(shard))]
        rows = Embeddings(keys, shard.identities, getattr(shard, self._role))
        return ShardData(write_embeddings(rows), len(rows), Labels.of(shard.identities.tolist()))


def synthetic_set(folder: Path, source: SyntheticEmbeddings, role: str, shards: Sequence[int]) -> EmbeddedSet:
    """Some shards of one side of a made-up set, written by Ray workers. Ray must be connected."""
    dataset, processor = Dataset(str(folder), ".parquet"), SyntheticProcessor(source, role)
    units = [Unit(f"{number:05d}", source.images * source.shard_identities) for number in shards]
    content = run_stage(processor, units, dataset, name=role, kind="embeddings").description
    return EmbeddedSet(dataset, processor.describe()["recognizer"], content["lineage"]["fingerprint"], content["samples"])
