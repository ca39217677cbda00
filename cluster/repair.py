"""The stage that repairs a protected set: what an attacker traces is protected again until none of them does, the rest is copied.

A unit is one shard of the protected set. Its exposed images, those that a measurement has at rank 1, go through the rounds together: a
round protects the original pictures that are still exposed with other masks, encodes them, looks at them with every attacker and searches
all originals. The first try that no attacker traces is kept. What is traced in every round goes to the quarantine.

Each picture's tries depend on it, its key and the measurement alone, so the output is the same on any number of workers. Choosing what
these attackers do not trace is a selection against these attackers: only an attacker that took no part says what it is worth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.adaptive import QueryMap
from cluster.dataset import Dataset, Labels, Manifest, ShardData
from cluster.embedded import read_shard
from cluster.embedding import Embeddings
from cluster.index import Gallery
from cluster.lookahead import Batch, ahead_map, codec_pool, decoded
from cluster.picture import decode, encode
from cluster.processor import Processor, Unit
from cluster.protect import REASON, discreet, load_protection
from cluster.recognizer_file import Recognizer
from cluster.secret import KeyMap
from cluster.shard import Rejected, Sample, ShardError, ShardWriter, read_samples
from facemae.leakage import similarity
from facemae.recognizer.onnx import OnnxRecognizer

BATCH_SIZE = 1024
"""Exposed images that go through the rounds together; changes no byte of the output."""


@dataclass(frozen=True)
class Attacker:
    """One attacker of the measurement, as a repair asks it. Travels to the workers.

    Attributes:
        recognizer: its network; what a worker asks is on its device.
        ranks: root of its ranks of the protected images.
        mates: root of its embeddings of the originals.
        gallery: these embeddings, to be searched.
        transform: of an adaptive attacker.
    """

    recognizer: Recognizer
    ranks: str
    mates: str
    gallery: Gallery
    transform: QueryMap | None = None

    def exposed(self, shard: str, rank: int) -> set[str]:
        """Keys of the protected images of a shard whose original the measurement has within ``rank``."""
        ranks = Dataset(self.ranks, ".parquet")
        manifest = ranks.committed(shard)
        if manifest is None or manifest.file is None:  # none of its images has a rank
            return set()
        rows = pq.read_table(pa.BufferReader(ranks.read(manifest)), columns=["key", "rank_image"])
        hits = pc.and_(pc.greater_equal(rows["rank_image"], 1), pc.less_equal(rows["rank_image"], rank))
        return set(rows.filter(hits)["key"].to_pylist())

    def mates_of(self, shard: str) -> Embeddings:
        """The embeddings of a shard of originals."""
        return read_shard(Dataset(self.mates, ".parquet"), shard, self.recognizer.dim)

    def traces(self, pictures: np.ndarray, identities: np.ndarray, mates: np.ndarray, rank: int) -> np.ndarray:
        """Which protected pictures have their original within ``rank``.

        Args:
            pictures: uint8 (N, 112, 112, 3), as they come out of their JPEGs.
            identities: int64 (N,).
            mates: float16 (N, D), the originals' embeddings; a row of NaN where there is none, which this attacker cannot trace.

        Returns:
            bool (N,).
        """
        assert isinstance(self.recognizer, OnnxRecognizer), "the worker's own, see RepairProcessor.open"
        vectors = self.recognizer.embed(pictures).astype(np.float16)
        if self.transform is not None:
            vectors = self.transform(vectors, identities)
        found = traced(self.gallery, vectors, similarity(vectors, mates), rank)
        return found & ~np.isnan(mates).any(axis=1)


def traced(gallery: Gallery, vectors: np.ndarray, mate_similarity: np.ndarray, rank: int) -> np.ndarray:
    """Whether fewer than ``rank`` gallery images are strictly more similar than the mate, bool (N,). A tie counts for the attacker, and so
    does what an approximate search misses."""
    return gallery.search(vectors, 0, mate_similarity[:, None]).nearer[:, 0] < rank


@dataclass(frozen=True)
class Repair:
    """What is repaired, from what, and against whom.

    Attributes:
        originals, protected: roots of the two sets.
        method, options: the protection, as ProtectProcessor takes them.
        skip: rounds of earlier repairs, whose masks were tried before.
        attackers: all of the measurement.
        rank: an image is exposed when an attacker ranks its original at most so.
        config: the new set's lineage configuration.
        rekey: where the protected set's keys were replaced, the place of the secret and its check.
        device: where the recognisers run.
    """

    originals: str
    protected: str
    method: str
    options: Mapping[str, Any]
    skip: int
    attackers: Sequence[Attacker]
    rank: int
    config: Mapping[str, Any]
    rekey: tuple[str, str] | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Fetched:
    """One shard: what was made of it, the keys that are exposed, and for these the originals and each attacker's embeddings of them."""

    manifest: Manifest
    data: bytes
    ledger: Sequence[Rejected]
    exposed: frozenset[str]
    original: bytes
    mates: Sequence[Embeddings]


class RepairProcessor(Processor[Unit]):
    """Copies what no attacker traces, byte for byte, and protects the rest again. See the module."""

    def __init__(self, repair: Repair) -> None:
        self._repair = repair

    def describe(self) -> dict[str, Any]:
        """The protected set's own configuration, with what this repair does."""
        return dict(self._repair.config)

    def open(self, threads: int) -> None:
        """Load the protection and the recognisers. Raises SecretError when this worker's secret is not the driver's."""
        repair = self._repair
        self._originals, self._protected = Dataset(repair.originals), Dataset(repair.protected)
        self._new_key: Callable[[str], str] = KeyMap(*repair.rekey) if repair.rekey else str
        self._rounds = load_protection(repair.method, repair.options).variants(repair.skip)
        self._attackers = [replace(each, recognizer=each.recognizer.on(repair.device, threads)) for each in repair.attackers]
        for attacker in self._attackers:
            if attacker.transform is not None:
                attacker.transform.open()
        self._pool, self._ahead = codec_pool(threads), threads + 1

    def fetch(self, unit: Unit) -> Fetched:
        """The protected shard, who is exposed in it, and where somebody is, the originals with their embeddings."""
        with discreet(unit, self._repair.rekey is not None):
            manifest = self._protected.manifest(unit.name)
            data, ledger = self._protected.read(manifest), self._protected.ledger(manifest)
            exposed = self._exposed(unit.name)
            if not exposed or not self._rounds:
                return Fetched(manifest, data, ledger, exposed, b"", ())
            original = self._originals.read(self._originals.manifest(unit.name))
            return Fetched(manifest, data, ledger, exposed, original, [each.mates_of(unit.name) for each in self._attackers])

    def compute(self, unit: Unit, fetched: Fetched) -> ShardData:
        """The repaired shard: the same keys and labels in the same order, but for the images that could not be protected."""
        with discreet(unit, self._repair.rekey is not None):
            fixed, rejected, rounds = self._fix(fetched)
        writer, copied, lost = ShardWriter(), 0, {row.key for row in rejected}
        for sample in read_samples(fetched.data, sources=False) if fetched.data else ():
            if not isinstance(sample, Sample):
                raise ShardError(f"{sample.key}: {sample.error}")
            if sample.key not in fetched.exposed:
                writer.add(sample)
                copied += 1
            elif sample.key in fixed:
                writer.add(Sample(sample.key, fixed[sample.key], sample.identity))
            elif sample.key not in lost:
                rejected.append(Rejected(sample.key, REASON, self._evidence(), 0))
        counts = {"exposed": len(fetched.exposed), "copied": copied, **{f"repaired_{n:02d}": rounds[n] for n in sorted(rounds)}}
        payload = writer.finish() if writer.samples else None
        rows = sorted([*fetched.ledger, *rejected], key=lambda row: row.key)
        return ShardData(payload, writer.samples, Labels.of(writer.labels), rows, counts, fetched.manifest.failure)

    def _exposed(self, shard: str) -> frozenset[str]:
        """Keys that any attacker has within the rank."""
        found = set[str]()
        for attacker in self._attackers:
            found |= attacker.exposed(shard, self._repair.rank)
        return frozenset(found)

    def _evidence(self) -> str:
        """Why an image is given up; the same words for every image, since they lie in a set that may be handed out."""
        tries = len(self._rounds)
        if not tries:
            return f"traced at rank {self._repair.rank} or better, and {self._repair.method} has nothing to vary"
        return f"traced at rank {self._repair.rank} or better, and again in each of {tries} tries with other random numbers"

    def _fix(self, fetched: Fetched) -> tuple[dict[str, bytes], list[Rejected], Counter[int]]:
        """New pictures by key of the protected set, rows for originals that no longer decode, and how many each round repaired."""
        fixed, rejected, rounds = dict[str, bytes](), list[Rejected](), Counter[int]()
        if not fetched.original:
            return fixed, rejected, rounds
        originals = [s for s in read_samples(fetched.original, sources=False) if self._new_key(s.key) in fetched.exposed]
        if len(originals) != len(fetched.exposed):
            raise ShardError(f"{len(fetched.exposed)} images of shard {fetched.manifest.shard} are exposed, {len(originals)} are originals")
        places = [{key: row for row, key in enumerate(mates.keys)} for mates in fetched.mates]
        for batch in decoded(originals, BATCH_SIZE, self._pool, 1):
            mates = [_rows(one, place, batch) for one, place in zip(fetched.mates, places, strict=True)]
            for sample, (number, image) in zip(batch.samples, self._try(batch, mates), strict=True):
                if number:
                    fixed[self._new_key(sample.key)] = image
                    rounds[number] += 1
            rejected += [Rejected(self._new_key(row.key), row.reason, "", 0) for row in batch.rejected]
        return fixed, rejected, rounds

    def _try(self, batch: Batch, mates: Sequence[np.ndarray]) -> list[tuple[int, bytes]]:
        """For each picture the round that no attacker traces, from 1, and its JPEG; 0 and nothing where every round is traced."""
        done = [(0, b"")] * len(batch.samples)
        keys = np.array([sample.key for sample in batch.samples], object)
        identities = np.array([sample.identity for sample in batch.samples], np.int64)
        left = np.arange(len(done))
        for number, protection in enumerate(self._rounds, 1):
            if not len(left):
                break
            pictures = protection.protect(batch.pictures[left], keys[left].tolist())
            images, seen = zip(*ahead_map(self._pool, _encode, pictures, self._ahead), strict=True)
            found = self._traced(np.stack(seen), identities[left], [rows[left] for rows in mates])
            for row in np.flatnonzero(~found):
                done[left[row]] = number, images[row]
            left = left[found]
        return done

    def _traced(self, pictures: np.ndarray, identities: np.ndarray, mates: Iterable[np.ndarray]) -> np.ndarray:
        """Which pictures any attacker traces, bool (N,); one that is traced is not shown to the next."""
        found = np.zeros(len(pictures), bool)
        for attacker, rows in zip(self._attackers, mates, strict=True):
            left = np.flatnonzero(~found)
            if len(left):
                found[left] = attacker.traces(pictures[left], identities[left], rows[left], self._repair.rank)
        return found


def _encode(picture: np.ndarray) -> tuple[bytes, np.ndarray]:
    """A picture's JPEG, and what it looks like then."""
    image = encode(picture)
    return image, decode(image)


def _rows(mates: Embeddings, places: Mapping[str, int], batch: Batch) -> np.ndarray:
    """The originals' embeddings, float16 (N, D), NaN where there is none."""
    rows = np.full((len(batch.samples), mates.vectors.shape[1]), np.nan, np.float16)
    for row, sample in enumerate(batch.samples):
        if sample.key in places:
            rows[row] = mates.vectors[places[sample.key]]
    return rows
