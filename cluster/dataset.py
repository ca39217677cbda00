"""The layout of a data set in object storage, and its commit protocol.

    <root>/dataset.json                    what it is; written last: the data set is complete
    <root>/index.json                      the tars and their counts, as ``wids`` and other WebDataset readers take them
    <root>/shards/00042-<sha256[:12]>.tar  immutable, named by its content
    <root>/manifests/00042.json            the commit: a shard counts when its manifest exists
    <root>/quarantine/00042-<sha256[:12]>.parquet   what was left out of the shard, with the reason
    <root>/attempts/00001.json             who worked on it, and whether they still do (cluster/attempt.py)
    <root>/embeddings/<recogniser>/        a data set of the same layout whose shards are parquet

A manifest is written by one conditional PUT, so of any number of live attempts exactly one commits a shard. The data is there before
its manifest and never changes after it. For every shard and for the whole, samples in = samples out + quarantined.

A data object may be deleted only while a manifest of its shard exists that does not name it: manifests are never written twice, so none
can come to name it later. That is what makes both a loser's tidying up and ``facemae verify --clean`` safe at any moment.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import pydantic

from cluster.accounting import index_of, json_bytes, totals
from cluster.attempt import Attempt
from cluster.release import carried
from cluster.shard import Rejected, ShardError, read_ledger, sha256_hex, write_ledger
from cluster.store import AlreadyExists, NotFound, Store, StoreError, join_url, open_store

SCHEMA = 2
IO_THREADS = 16
MANIFEST_THREADS = 32
"""Manifests are small: their reading is the store's latency, many times over."""


class NotADataset(StoreError):
    """There is no dataset.json: the data set is unfinished, or none."""


@dataclass(frozen=True)
class Labels:
    """The identities of one shard: how many, the smallest and the largest label. All zero and -1 where there is none."""

    count: int = 0
    first: int = -1
    last: int = -1

    @classmethod
    def of(cls, labels: Iterable[int]) -> Labels:
        """Summarise labels, repeated or not."""
        distinct = set(labels)
        return cls(len(distinct), min(distinct), max(distinct)) if distinct else cls()


@dataclass(frozen=True)
class Manifest:
    """The commit of one shard.

    Attributes:
        shard: its name, five or more digits.
        file: key of its data below the root, or None when nothing of the shard could be used.
        samples_in, samples, quarantined: samples_in == samples + quarantined.
        fingerprint: sha256 of the configuration and input that made it.
        run, attempt: the run, and the number of the one try of it that committed the shard.
        seconds: time by step, for the report; not part of any identity.
        failure: why a poison shard was given up, else None.
        ledger, ledger_sha256: key of its quarantine rows below the root and their digest, or None when there are none.
    """

    shard: str
    file: str | None
    sha256: str | None
    num_bytes: int
    samples_in: int
    samples: int
    quarantined: int
    identities: Labels
    fingerprint: str
    run: str
    attempt: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    failure: str | None = None
    ledger: str | None = None
    ledger_sha256: str | None = None

    def to_bytes(self) -> bytes:
        """The manifest as the JSON that is stored."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """The inverse. Raises StoreError naming ``where`` for anything that is no manifest of this version."""
        try:
            return _manifest_type().validate_json(data, strict=True)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first["loc"] else first["msg"]
            remedy = "delete it and dataset.json, and run its job again: only this shard is made anew"
            raise StoreError(f"{where} is not a manifest of schema {SCHEMA} ({reason}): {remedy}", fatal=True) from None


@cache
def _manifest_type() -> pydantic.TypeAdapter[Manifest]:
    return pydantic.TypeAdapter(Manifest)


@dataclass(frozen=True)
class ShardData:
    """What a processor made of one shard, not yet committed."""

    payload: bytes | None
    samples: int
    identities: Labels
    rejected: Sequence[Rejected] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    failure: str | None = None


class Dataset:
    """A data set at ``url``; ``suffix`` is the extension of its shards (``.tar``, or ``.parquet`` for embeddings)."""

    def __init__(self, url: str, suffix: str = ".tar") -> None:
        self.store: Store = open_store(url)
        self.url = self.store.url
        self.suffix = suffix

    def embeddings(self, recognizer: str) -> Dataset:
        """The data set of this one's embeddings by the named recogniser."""
        return Dataset(join_url(self.url, "embeddings", recognizer), ".parquet")

    def names(self) -> list[str]:
        """Names of the committed shards, by one listing."""
        keys = (stored.key for stored in self.store.list("manifests/"))
        names = (key.removeprefix("manifests/").removesuffix(".json") for key in keys if key.endswith(".json"))
        return sorted(names, key=lambda name: (len(name), name))  # 100000 comes after 99999

    def manifest(self, shard: str) -> Manifest:
        """The manifest of a committed shard. Raises NotFound."""
        key = f"manifests/{shard}.json"
        return Manifest.from_bytes(self.store.get(key), join_url(self.url, key))

    def committed(self, shard: str) -> Manifest | None:
        """The manifest of a shard, or None where no attempt has committed it."""
        try:
            return self.manifest(shard)
        except NotFound:
            return None

    def manifests(self, shards: Sequence[str] | None = None) -> list[Manifest]:
        """Many manifests, read in parallel, in the order of their names."""
        with ThreadPoolExecutor(MANIFEST_THREADS) as pool:
            return list(pool.map(self.manifest, self.names() if shards is None else shards))

    def read(self, manifest: Manifest) -> bytes:
        """A shard's bytes, checked against its manifest. Raises ShardError when they differ, NotFound when there are none."""
        if manifest.file is None:
            return b""
        for _ in range(2):  # a second look, before damage on the way is taken for damage
            data = self.store.get(manifest.file)
            if len(data) == manifest.num_bytes and sha256_hex(data) == manifest.sha256:
                return data
        raise ShardError(
            f"{self.url}/{manifest.file} is not what its manifest says ({len(data)} bytes, {manifest.num_bytes} expected): "
            f"the object was changed or damaged. Delete manifests/{manifest.shard}.json and the object, and run its job again."
        )

    def ledger(self, manifest: Manifest) -> list[Rejected]:
        """A shard's quarantine rows, checked against its manifest. Raises ShardError when they differ, NotFound when they are gone."""
        if manifest.ledger is None:
            return []
        data = self.store.get(manifest.ledger)
        if sha256_hex(data) != manifest.ledger_sha256:
            raise ShardError(f"{self.url}/{manifest.ledger} is not what its manifest says: the object was changed or damaged")
        return read_ledger(data)

    def commit(self, shard: str, data: ShardData, *, fingerprint: str, attempt: Attempt, seconds: Mapping[str, float]) -> Manifest:
        """Publish a shard: data, then ledger, then the manifest by conditional PUT.

        Returns:
            The manifest that counts: ours, or that of another attempt that was first (whose bytes ours must not outlive).
        """
        file = digest = None
        started = time.perf_counter()
        if data.payload is not None:
            digest = sha256_hex(data.payload)
            file = f"shards/{shard}-{digest[:12]}{self.suffix}"
            self.store.put(file, data.payload, sha256=digest)
        ledger, ledger_digest = self._put_ledger(shard, data.rejected) if data.rejected else (None, None)
        quarantined = sum(row.num_samples for row in data.rejected)
        manifest = Manifest(
            shard=shard,
            file=file,
            sha256=digest,
            num_bytes=len(data.payload or b""),
            samples_in=data.samples + quarantined,
            samples=data.samples,
            quarantined=quarantined,
            identities=data.identities,
            fingerprint=fingerprint,
            run=attempt.run,
            attempt=attempt.number,
            seconds={step: round(value, 4) for step, value in {**seconds, "publish": time.perf_counter() - started}.items()},
            counts=dict(data.counts),
            failure=data.failure,
            ledger=ledger,
            ledger_sha256=ledger_digest,
        )
        return self.publish(manifest)

    def _put_ledger(self, shard: str, rows: Sequence[Rejected]) -> tuple[str, str]:
        """Write a ledger. Returns its key and sha256. Like a tar it is named by its content, so two attempts never meet in one object."""
        data = write_ledger(rows)
        digest = sha256_hex(data)
        key = f"quarantine/{shard}-{digest[:12]}.parquet"
        self.store.put(key, data, sha256=digest)
        return key, digest

    def publish(self, manifest: Manifest) -> Manifest:
        """Write a manifest unless there is one; a loser deletes of its tar and ledger what the winner's are not. Returns the manifest that
        counts."""
        try:
            self.store.put(f"manifests/{manifest.shard}.json", manifest.to_bytes(), if_absent=True)
            return manifest
        except AlreadyExists:
            winner = self.manifest(manifest.shard)  # perhaps our own, when only the answer to the PUT was lost
            for key in {manifest.file, manifest.ledger} - {winner.file, winner.ledger}:
                if key is not None:
                    self.store.delete(key)
            return winner

    def finish(self, kind: str, lineage: Mapping[str, Any], manifests: Sequence[Manifest]) -> dict[str, Any]:
        """Write index.json and then dataset.json from the manifests. Returns the latter's content, which holds no time or attempt:
        the same work gives the same dataset.json. A release that was granted to these very shards stays."""
        index = index_of(manifests)
        self.store.put("index.json", index)
        description = {"schema": SCHEMA, "kind": kind, **totals(manifests), "lineage": dict(lineage)}
        return self.describe({**description, **carried(self.store, description, index)})

    def describe(self, description: Mapping[str, Any]) -> dict[str, Any]:
        """Write dataset.json. Returns its content."""
        self.store.put("dataset.json", json_bytes(description))
        return dict(description)

    def description(self) -> dict[str, Any]:
        """The content of dataset.json.

        Raises:
            NotADataset: there is none.
            StoreError: it is damaged or of another schema.
        """
        where = f"{self.url}/dataset.json"
        try:
            content = json.loads(self.store.get("dataset.json"))
        except NotFound:
            begun = len(self.names())
            state = f"is unfinished, {begun} shards are committed: let its job end, or run it again" if begun else "holds no data set"
            raise NotADataset(f"{self.url} {state} (no dataset.json)", fatal=True) from None
        except ValueError as error:
            raise StoreError(f"{where} is damaged ({error}): run the job that writes it again", fatal=True) from None
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            schema = content.get("schema") if isinstance(content, dict) else None
            raise StoreError(f"{where} has schema {schema}, this version reads {SCHEMA}", fatal=True)
        wrong = [name for name in ("samples_in", "samples", "quarantined", "shards") if type(content.get(name)) is not int]
        wrong += [] if isinstance(content.get("lineage"), dict) else ["lineage"]
        if wrong:
            raise StoreError(f"{where} is damaged ({wrong[0]} is {content.get(wrong[0])!r}): run the job that writes it again", fatal=True)
        return content


def fingerprint(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON-able configuration, keys sorted."""
    return sha256_hex(json.dumps(content, sort_keys=True, default=str).encode())
