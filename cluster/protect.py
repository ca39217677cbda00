"""The stage that turns a data set into a protected one: decode, protect, encode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray

from cluster.dataset import Dataset, Labels, ShardData
from cluster.lookahead import Batch, ahead_map, codec_pool, decoded
from cluster.picture import JPEG_QUALITY, encode
from cluster.processor import Processor, Unit
from cluster.shard import Rejected, Sample, ShardWriter, read_samples
from facemae.protection import Protection, create_protection


def load_protection(method: str, options: Mapping[str, Any]) -> Protection:
    """The protection, its weights fetched to this machine.

    Raises:
        ValueError, FileNotFoundError, StoreError: unknown method or options, or weights that do not load.
    """
    if "weights" not in options:
        return create_protection(method, **options)
    from cluster.weights import local_weights  # a method without weights does not pay for torch

    with local_weights(options["weights"]) as folder:
        return create_protection(method, **{**options, "weights": folder})


def describe_protection(method: str, options: Mapping[str, Any], num_gpus: float = 0.0) -> dict[str, Any]:
    """What determines the output, told by the protection itself: on a GPU worker when the work will be done there, since the kind of
    device is part of it. Also finds wrong options and weights before any work starts. Raises what ``load_protection`` raises."""
    if not num_gpus:
        return load_protection(method, options).describe()
    describe = ray.remote(lambda: load_protection(method, options).describe())
    return ray.get(describe.options(num_gpus=num_gpus).remote())


class ProtectProcessor(Processor[Unit]):
    """Protects every picture of a shard. The output carries key, label and the new pixels: no EXIF, no source, no original bytes.

    Args:
        input_url: the original data set.
        method: a registered protection.
        options: its options; ``weights`` may be an s3:// URL, which every worker fetches for itself.
        description: see ``describe_protection``.
        batch_size: pictures handed to the protection at once; changes no byte of the output.
    """

    def __init__(
        self, input_url: str, method: str, options: Mapping[str, Any], description: Mapping[str, Any], batch_size: int = 64
    ) -> None:
        self._input_url, self._method, self._options, self._batch_size = input_url, method, dict(options), batch_size
        self._description = dict(description)

    def describe(self) -> dict[str, Any]:
        """The protection's own description and the encoder's settings."""
        return {"stage": "protect", "protection": self._description, "jpeg": {"quality": JPEG_QUALITY, "subsampling": "444"}}

    def open(self, threads: int) -> None:
        """Load the protection and start the codec threads."""
        self._input = Dataset(self._input_url)
        self._protection = load_protection(self._method, self._options)
        self._pool, self._ahead = codec_pool(threads), threads + 1

    def fetch(self, unit: Unit) -> bytes:
        """The original shard."""
        return self._input.read(self._input.manifest(unit.name))

    def compute(self, unit: Unit, fetched: bytes) -> ShardData:
        """The protected shard: the same keys and labels in the same order."""
        writer, rejected = ShardWriter(), list[Rejected]()
        batches = decoded(read_samples(fetched, sources=False) if fetched else (), self._batch_size, self._pool, self._ahead)
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
