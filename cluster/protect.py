"""The stage that turns a data set into a protected one: decode, protect, encode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cluster.dataset import Dataset, Labels, ShardData
from cluster.lookahead import Batch, ahead_map, decoded
from cluster.picture import JPEG_QUALITY, encode
from cluster.processor import Processor, Unit
from cluster.shard import Rejected, Sample, ShardWriter, read_samples
from facemae.protection import create_protection


class ProtectProcessor(Processor[Unit]):
    """Protects every picture of a shard. The output carries key, label and the new pixels: no EXIF, no source, no original bytes.

    Args:
        input_url: the original data set.
        method: a registered protection.
        options: its options.
        batch_size: pictures handed to it at once; changes no byte of the output.

    Raises:
        ValueError: unknown method or options, or weights that do not load: found on the driver, before any worker starts.
    """

    def __init__(self, input_url: str, method: str, options: Mapping[str, Any], batch_size: int = 64) -> None:
        self._input_url, self._method, self._options, self._batch_size = input_url, method, dict(options), batch_size
        self._description = create_protection(method, **self._options).describe()

    def describe(self) -> dict[str, Any]:
        """The protection's own description and the encoder's settings."""
        return {"stage": "protect", "protection": self._description, "jpeg": {"quality": JPEG_QUALITY, "subsampling": "444"}}

    def open(self, threads: int) -> None:
        """Load the protection and start the codec threads."""
        self._input = Dataset(self._input_url)
        self._protection = create_protection(self._method, **self._options)
        self._pool, self._ahead = ThreadPoolExecutor(threads), threads + 1

    def fetch(self, unit: Unit) -> bytes:
        """The original shard."""
        return self._input.read(self._input.manifest(unit.name))

    def compute(self, unit: Unit, fetched: bytes) -> ShardData:
        """The protected shard: the same keys and labels in the same order."""
        writer, rejected = ShardWriter(), list[Rejected]()
        batches = decoded(read_samples(fetched) if fetched else (), self._batch_size, self._pool, self._ahead)
        protected = (self._protect(batch) for batch in batches)
        for samples, refused in ahead_map(self._pool, _encode_batch, protected, self._ahead):
            rejected += refused
            for sample in samples:
                writer.add(sample)
        payload = writer.finish() if writer.samples else None
        return ShardData(payload, writer.samples, Labels.of(writer.labels), rejected)

    def _protect(self, batch: Batch) -> tuple[Batch, np.ndarray]:
        if not batch.samples:
            return batch, batch.pictures
        return batch, self._protection.protect(batch.pictures, [sample.key for sample in batch.samples])


def _encode_batch(work: tuple[Batch, np.ndarray]) -> tuple[list[Sample], Sequence[Rejected]]:
    batch, pictures = work
    samples = [Sample(s.key, encode(picture), s.identity) for s, picture in zip(batch.samples, pictures, strict=True)]
    # a row of the ledger would otherwise carry the original's path into the protected set
    return samples, [Rejected(row.key, row.reason, row.error, row.num_bytes) for row in batch.rejected]
