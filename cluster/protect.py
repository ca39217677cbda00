"""The stage that turns a data set into a protected one: decode, protect, encode."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray

from cluster.dataset import Dataset, Labels, ShardData
from cluster.lookahead import Batch, ahead_map, codec_pool, decoded
from cluster.picture import JPEG_QUALITY, SIZE, encode
from cluster.processor import Processor, Unit
from cluster.secret import KeyMap, SecretError, SeedReference
from cluster.shard import Rejected, Sample, ShardError, ShardWriter, read_samples
from cluster.store import NotFound, StoreError
from cluster.task import answer_of
from facemae.protection import Protection, ShardProtection, create_protection
from facemae.protection.noise_source import SECRET_SEED

log = logging.getLogger(__name__)
REASON = "cannot-be-protected"
"""The ledger's word for a picture that a protection, or every round of a repair, fails on."""


def load_protection(method: str, options: Mapping[str, Any]) -> Protection:
    """The protection, its weights fetched to this machine.

    Raises:
        ValueError, FileNotFoundError, StoreError: unknown method or options, or weights that do not load.
        SecretError: the secret behind ``secret_seed`` is not here, or not the driver's.
    """
    reference = options.get("secret_seed")
    if isinstance(reference, SeedReference):
        seed = {name: value for name, value in options.items() if name != "secret_seed"} | {"seed": reference.read()}
        protection = load_protection(method, seed)
        if SECRET_SEED not in protection.describe():
            raise ValueError(f"--secret-seed: the seed of {method} is no secret, its lineage says it: give --seed")
        return protection
    if "weights" not in options:
        return create_protection(method, **options)
    from cluster.weights import local_weights  # a method without weights does not pay for torch

    with local_weights(options["weights"]) as folder:
        return create_protection(method, **{**options, "weights": folder})


def describe_protection(method: str, options: Mapping[str, Any], num_gpus: float = 0.0) -> dict[str, Any]:
    """What determines the output, told by the protection itself: on a GPU worker when the work will be done there, since the kind of
    device is part of it. Also finds wrong options and weights before any work starts. Raises what ``load_protection`` raises."""
    return describe_variants(method, options, num_gpus)[0]


def describe_variants(method: str, options: Mapping[str, Any], num_gpus: float = 0.0, skip: int = 0) -> list[dict[str, Any]]:
    """The same for the protection, and after it for its ``variants(skip)``, which a repair tries."""

    def describe() -> list[dict[str, Any]]:
        protection = load_protection(method, options)
        return [each.describe() for each in (protection, *protection.variants(skip))]

    return list(answer_of(ray.remote(describe).options(num_gpus=num_gpus).remote())) if num_gpus else describe()


class ProtectProcessor(Processor[Unit]):
    """Protects every picture of a shard. The output carries key, label and the new pixels: no EXIF, no source, no original bytes.

    Args:
        input_url: the original data set.
        method: a registered protection.
        options: its options; ``weights`` may be an s3:// URL, which every worker fetches for itself, and ``secret_seed`` a SeedReference
            in the place of ``seed``.
        description: see ``describe_protection``.
        batch_size: pictures handed to the protection at once; changes no byte of the output.
        rekey: where each worker finds the secret that replaces the keys for a release (see ``KeyMap``); None keeps the keys.

    Raises:
        SecretError: there is no usable secret behind ``rekey``.
    """

    def __init__(
        self,
        input_url: str,
        method: str,
        options: Mapping[str, Any],
        description: Mapping[str, Any],
        batch_size: int = 64,
        rekey: str | None = None,
    ) -> None:
        self._input_url, self._method, self._options, self._batch_size = input_url, method, dict(options), batch_size
        self._description, self._reference = dict(description), rekey
        self._rekey = KeyMap(rekey).describe() if rekey is not None else None

    def describe(self) -> dict[str, Any]:
        """The protection's own description, the encoder's settings, and how keys were replaced where they were."""
        found = {"stage": "protect", "protection": self._description, "jpeg": {"quality": JPEG_QUALITY, "subsampling": "444"}}
        return {**found, "rekey": self._rekey} if self._rekey else found

    def open(self, threads: int) -> None:
        """Load the protection and start the codec threads. Raises SecretError when this worker's secret is not the driver's."""
        self._input = Dataset(self._input_url)
        self._new_key = KeyMap(self._reference, self._rekey["check"]) if self._reference is not None and self._rekey else None
        self._protection = load_protection(self._method, self._options)
        self._pool, self._ahead = codec_pool(threads), threads + 1

    def fetch(self, unit: Unit) -> bytes:
        """The original shard."""
        with discreet(unit, self._reference is not None):
            return self._input.read(self._input.manifest(unit.name))

    def compute(self, unit: Unit, fetched: bytes) -> ShardData:
        """The protected shard: the same keys and labels in the same order; with new keys, in the order of these, which tells nothing."""
        writer, kept, rejected = ShardWriter(), list[Sample](), list[Rejected]()
        with discreet(unit, self._reference is not None):
            batches = decoded(read_samples(fetched, sources=False) if fetched else (), self._batch_size, self._pool, self._ahead)
            protected = self._protect_all(batches)
            for samples, refused in ahead_map(self._pool, _encode_batch, protected, self._ahead):
                kept += samples
                rejected += refused
            if self._new_key is not None:
                kept, rejected = rekeyed(self._new_key, kept, rejected)
            for sample in kept:
                writer.add(sample)
        payload = writer.finish() if writer.samples else None
        return ShardData(payload, writer.samples, Labels.of(writer.labels), rejected)

    def _protect_all(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, np.ndarray]]:
        """Batch by batch; a protection that must see the whole shard has all its pictures in memory at once."""
        if isinstance(self._protection, ShardProtection):
            return _protect_whole(self._protection, list(batches))
        return (self._protect(batch) for batch in batches)

    def _protect(self, batch: Batch) -> tuple[Batch, np.ndarray]:
        if not batch.samples:
            return batch, batch.pictures
        return batch, self._protection.protect(batch.pictures, [sample.key for sample in batch.samples])


def _protect_whole(protection: ShardProtection, batches: Sequence[Batch]) -> Iterator[tuple[Batch, np.ndarray]]:
    """The batches of one shard, protected together; what the protection leaves out becomes a row of the ledger."""
    samples = [sample for batch in batches for sample in batch.samples]
    pictures = np.concatenate([batch.pictures for batch in batches]) if batches else np.empty((0, SIZE, SIZE, 3), np.uint8)
    whole = protection.protect_shard(pictures, [s.key for s in samples], [s.identity for s in samples])
    start = 0
    for batch in batches:
        rows = range(start, start + len(batch.samples))
        start = rows.stop
        kept = [row for row in rows if row not in whole.left_out]
        lost = [Rejected(samples[row].key, REASON, whole.left_out[row], 0) for row in rows if row in whole.left_out]
        yield Batch([samples[row] for row in kept], pictures[kept], [*batch.rejected, *lost]), whole.pictures[kept]


def require_people(source: Dataset, description: Mapping[str, Any]) -> None:
    """Raise ValueError where a shard has fewer identities than a protection of whole shards needs, before any work starts."""
    needed = description.get("min_identities", 0)
    if not needed:
        return
    short = {m.shard: m.identities.count for m in source.manifests() if 0 < m.identities.count < needed}
    if short:
        listed = ", ".join(f"{shard} has {count}" for shard, count in list(short.items())[:5])
        raise ValueError(
            f"{description['method']} with k = {description['strength']} needs {needed} identities in every shard of {source.url}; "
            f"{len(short)} have fewer ({listed}{', ...' if len(short) > 5 else ''}): lower --strength, or ingest with a larger --shard-size"
        )


@contextmanager
def discreet(unit: Unit, rekeyed: bool) -> Iterator[None]:
    """With new keys, keep an error's text from the manifest and ledger that it may end in: it may name the original."""
    try:
        yield
    except Exception as error:
        if not rekeyed or (isinstance(error, StoreError) and not isinstance(error, NotFound)):
            raise  # an error of the store ends or delays the run, and is told to the driver alone
        log.warning("shard %s: %s: %s", unit.name, type(error).__name__, error)
        raise ShardError(f"{type(error).__name__} in shard {unit.name} of the original; the worker's log tells more") from None


def _encode_batch(work: tuple[Batch, np.ndarray]) -> tuple[list[Sample], Sequence[Rejected]]:
    batch, pictures = work
    samples = [Sample(s.key, encode(picture), s.identity) for s, picture in zip(batch.samples, pictures, strict=True)]
    # a row of the ledger would otherwise carry the original's path into the protected set
    return samples, [Rejected(row.key, row.reason, row.error, row.num_bytes) for row in batch.rejected]


def rekeyed(new_key: KeyMap, samples: Sequence[Sample], rejected: Sequence[Rejected]) -> tuple[list[Sample], list[Rejected]]:
    """Samples and ledger rows under new keys, each in the order of these. A row keeps its reason alone: the size in bytes and the error
    of a picture could be looked up among the originals."""
    samples = [Sample(new_key(s.key), s.image, s.identity) for s in samples]
    rows = [Rejected(new_key(row.key), row.reason, "", 0) for row in rejected]
    return sorted(samples, key=lambda s: s.key), sorted(rows, key=lambda row: row.key)


def require_same_keys(source: Dataset, output: Dataset, reference: str) -> None:
    """Compare the keys of the first shard that an earlier run committed with those that the secret gives; nothing where there is none.

    Raises:
        SecretError: the earlier run replaced keys with another secret, or not at all.
    """
    new_key = KeyMap(reference)
    for name in output.names():
        made = {item.key for item in read_samples(output.read(output.manifest(name)) or _EMPTY_TAR)}
        if not made:
            continue
        given = (item.key for item in read_samples(source.read(source.manifest(name)), sources=False))
        if made.isdisjoint(map(new_key, given)):
            raise SecretError(
                f"{output.url} was begun with another secret than {reference} (the keys of its shard {name} are not those that it gives): "
                "give the secret it was begun with, or choose another output"
            )
        return


_EMPTY_TAR = ShardWriter().finish()
