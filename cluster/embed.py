"""The stage that embeds every picture of a data set with a recogniser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.dataset import Dataset, Labels, ShardData
from cluster.embedding import Embeddings, write_embeddings
from cluster.lookahead import codec_pool, decoded
from cluster.processor import Processor, Unit
from cluster.recognizer_file import open_recognizer
from cluster.shard import Rejected, Sample, read_samples


class EmbedProcessor(Processor[Unit]):
    """Unit embeddings of a shard's pictures, in the shard's order, as parquet.

    Args:
        input_url: the data set to embed.
        recognizer: an ONNX file on the driver, which travels to the workers by value, or in S3, where each of them reads it.
        mean, std: its normalisation of value/255, three numbers each; None takes them from the sidecar file.
        batch_size: pictures decoded at once; changes no byte of the output.
    """

    def __init__(
        self,
        input_url: str,
        recognizer: str,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: str = "cpu",
        batch_size: int = 64,
    ) -> None:
        self._input_url, self._batch_size = input_url, batch_size
        self._recognizer, self._device = open_recognizer(recognizer, mean, std), device

    @property
    def name(self) -> str:
        """The recogniser's name, which names the folder of its embeddings."""
        return self._recognizer.name

    def describe(self) -> dict[str, Any]:
        """The recogniser's description."""
        return {"stage": "embed", "recognizer": self._recognizer.describe(), "dtype": "float16"}

    def open(self, threads: int) -> None:
        """Load the recogniser."""
        self._input = Dataset(self._input_url)
        self._network = self._recognizer.on(self._device, threads)
        self._pool, self._ahead = codec_pool(threads), threads + 1

    def fetch(self, unit: Unit) -> bytes:
        """The shard of pictures."""
        return self._input.read(self._input.manifest(unit.name))

    def compute(self, unit: Unit, fetched: bytes) -> ShardData:
        """The shard of embeddings."""
        samples, vectors, rejected = list[Sample](), list[np.ndarray](), list[Rejected]()
        for batch in decoded(read_samples(fetched, sources=False) if fetched else (), self._batch_size, self._pool, self._ahead):
            rejected += batch.rejected
            if batch.samples:
                samples += batch.samples
                vectors.append(self._network.embed(batch.pictures).astype(np.float16))
        if not samples:
            return ShardData(None, 0, Labels(), rejected)
        identities = np.array([sample.identity for sample in samples], np.int64)
        rows = Embeddings([sample.key for sample in samples], identities, np.concatenate(vectors))
        return ShardData(write_embeddings(rows), len(samples), Labels.of(identities.tolist()), rejected)
