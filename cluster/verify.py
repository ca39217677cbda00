"""Re-reads a data set from its bucket and says whether every image is accounted for, exactly once; removes what dead attempts left."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cluster import attempt, release
from cluster.accounting import index_of, totals
from cluster.dataset import IO_THREADS, Dataset, Labels, Manifest
from cluster.shard import Sample, ShardError, read_samples
from cluster.store import PROBE, NotFound, StoreError, Unfinished

THREADS = 4
"""Shards in memory at once."""


@dataclass
class Verification:
    """What was found.

    Attributes:
        totals: the manifests added up; identities counted in the shards themselves.
        attempts: how many attempts committed shards.
        given_up: shards that are quarantined whole, with the reason.
        problems: what is missing, doubled, damaged or does not add up; empty when the data set keeps its promise.
        strays: keys of objects that no manifest names.
        unfinished: writes that were begun and never completed.
        notes: what could not be looked at, and what is of no use any more.
    """

    url: str
    kind: str = "unfinished"
    totals: dict[str, int | None] = field(default_factory=dict)
    identities: int = 0
    attempts: int = 0
    given_up: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    unfinished: list[Unfinished] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when nothing is missing, doubled, damaged or left over."""
        return not self.problems and not self.strays and not self.unfinished


def verify(url: str, suffix: str = ".tar") -> Verification:
    """Read every object of the data set again and compare it with the manifests, the ledger and dataset.json.

    Memory holds a few shards, the hashes of the keys (8 bytes a sample, twice that while they are sorted) and the distinct labels.

    Raises:
        StoreError: the root cannot be read at all.
    """
    dataset = Dataset(url, suffix)
    found = Verification(dataset.url)
    manifests = _manifests(dataset, found)
    found.totals = totals(manifests)
    found.attempts = len({(manifest.run, manifest.attempt) for manifest in manifests})
    found.given_up = {manifest.shard: manifest.failure for manifest in manifests if manifest.failure}
    seen = list[np.ndarray]()
    labels: set[int] = set()
    with ThreadPoolExecutor(THREADS) as pool:
        for problems, keys, shard_labels in pool.map(lambda m: _check_shard(dataset, m), manifests):
            found.problems += problems
            seen.append(np.fromiter(map(hash, keys), np.int64, len(keys)))
            labels |= shard_labels
    found.identities = len(labels)
    doubled = _doubled(np.concatenate([*seen, np.empty(0, np.int64)]))
    if doubled:
        found.problems.append(f"{doubled} keys occur more than once")
    content = _check_description(dataset, found)
    _check_index(dataset, manifests, content, found)
    found.notes += _index_notes(dataset, content)
    found.strays = list(_strays(dataset, manifests, embedded(dataset)))
    try:
        found.unfinished = _unfinished(dataset)
    except StoreError as error:  # no reader needs this permission for anything else
        if not error.fatal:
            raise
        found.notes.append("uploads that were never completed could not be listed with these credentials")
    return found


def _doubled(hashes: np.ndarray) -> int:
    """How many values of an int64 (N,) array occur more than once; sorts it in place."""
    hashes.sort()
    return len(np.unique(hashes[1:][hashes[1:] == hashes[:-1]]))


def clean(url: str, suffix: str = ".tar", announce: Callable[[str], None] = lambda _: None) -> list[str]:
    """Remove what dead attempts left in a data set: tars and ledgers of committed shards that their manifests do not name, probe objects,
    unfinished writes. Nothing else: an object of a shard that is not committed may still be, and other people's files are theirs.

    Returns:
        What was removed.

    Raises:
        StoreError: an attempt is alive, or the store cannot be written.
    """
    dataset = Dataset(url, suffix)
    alive = attempt.living(dataset.store, announce=announce)
    if alive:
        raise StoreError(f"attempt {alive[0]} is at work on {dataset.url}: wait for its end, or stop it, and clean then", fatal=True)
    known = _manifests(dataset, Verification(dataset.url))
    removed = [key for key in _strays(dataset, known, embedded(dataset)) if _is_leftover(dataset, key)]
    unfinished = _unfinished(dataset)
    for key in removed:
        dataset.store.delete(key)
    for each in unfinished:
        dataset.store.discard(each)
    return removed + [each.key for each in unfinished]


def _unfinished(dataset: Dataset) -> list[Unfinished]:
    return [each for each in dataset.store.unfinished() if not each.key.startswith("embeddings/")]


_INDEX_FILE = re.compile(r"quantizer\.safetensors|[\w-]+\.codes\.faiss")  # beside the parts of an index: cluster/index_build.py
_OURS = re.compile(r"(?:shards|quarantine)/(?P<shard>\d{5,})-[0-9a-f]{12}\.(?:tar|parquet)")


def _is_leftover(dataset: Dataset, stray: str) -> bool:
    """Whether no manifest can come to name the object: its shard is committed without it, and manifests are never written twice."""
    match = _OURS.fullmatch(stray)
    try:
        manifest = dataset.committed(match["shard"]) if match else None  # read now: it may be newer than the list of strays
    except StoreError:
        return False  # a damaged manifest: nobody knows what it named
    return stray.startswith(PROBE) or (manifest is not None and stray not in (manifest.file, manifest.ledger))


def _manifests(dataset: Dataset, found: Verification) -> list[Manifest]:
    """Every manifest that can be read; one that cannot is a problem."""

    def read(name: str) -> Manifest | str:
        try:
            return dataset.manifest(name)
        except StoreError as error:
            if error.fatal or isinstance(error, NotFound):
                return str(error)
            raise

    with ThreadPoolExecutor(IO_THREADS) as pool:
        read_all = list(pool.map(read, dataset.names()))
    found.problems += [each for each in read_all if isinstance(each, str)]
    return [each for each in read_all if isinstance(each, Manifest)]


def _check_shard(dataset: Dataset, manifest: Manifest) -> tuple[list[str], list[str], set[int]]:
    """Problems, keys and labels of one shard."""
    where = f"shard {manifest.shard}"
    problems: list[str] = []
    keys: list[str] = []
    labels: set[int] = set()
    recorded = 0
    try:
        if manifest.file is not None:
            for key, label in _rows(dataset.read(manifest), dataset.suffix):
                keys.append(key)
                labels.add(label)
        recorded = sum(row.num_samples for row in dataset.ledger(manifest))
    except (StoreError, ShardError, ValueError) as error:
        return [f"{where}: {error}"], keys, labels
    if len(keys) != manifest.samples:
        problems.append(f"{where}: {len(keys)} samples in the file, {manifest.samples} in the manifest")
    if Labels.of(labels) != manifest.identities:
        problems.append(f"{where}: the labels in the file are {Labels.of(labels)}, in the manifest {manifest.identities}")
    if recorded != manifest.quarantined:
        problems.append(f"{where}: {recorded} samples in the quarantine ledger, {manifest.quarantined} in the manifest")
    if manifest.samples_in != manifest.samples + manifest.quarantined:
        problems.append(f"{where}: {manifest.samples_in} in, {manifest.samples} out, {manifest.quarantined} quarantined do not add up")
    return problems, keys, labels


def _rows(data: bytes, suffix: str) -> Iterator[tuple[str, int]]:
    """Key and identity of every row of a shard."""
    if suffix == ".parquet":
        import pyarrow as pa

        table = pq.read_table(pa.BufferReader(data), columns=["key", "identity"])
        yield from zip(table["key"].to_pylist(), table["identity"].to_pylist(), strict=True)
        return
    for sample in read_samples(data):
        if not isinstance(sample, Sample):
            raise ShardError(f"{sample.key}: {sample.error}")
        yield sample.key, sample.identity


def _check_description(dataset: Dataset, found: Verification) -> dict[str, Any]:
    """dataset.json agrees with the manifests, and the input with the parent's output where the parent can be read. Returns its content,
    empty where there is none."""
    try:
        content = dataset.description()
    except StoreError as error:
        found.problems.append(str(error))
        return {}
    found.kind = str(content.get("kind"))
    for name, value in found.totals.items():
        if content.get(name) != value:
            found.problems.append(f"dataset.json says {name} = {content.get(name)}, the manifests say {value}")
    parent = content.get("lineage", {}).get("parent")
    if parent is None or "url" not in parent:  # a set whose keys were replaced does not say where the originals are
        return content
    try:
        expected = Dataset(parent["url"]).description()["samples"]
    except StoreError:
        return content  # the parent is elsewhere or out of reach for this reader: its count was checked when the job ran
    if expected != found.totals["samples_in"]:
        found.problems.append(f"the parent {parent['url']} holds {expected} samples, {found.totals['samples_in']} came in here")
    return content


def _check_index(dataset: Dataset, manifests: Sequence[Manifest], content: Mapping[str, Any], found: Verification) -> None:
    """index.json, by which other readers find the shards, lists what the manifests do; a release in dataset.json is of these."""
    try:
        index = dataset.store.get("index.json")
        if index != index_of(manifests):
            found.problems.append("index.json does not list the shards of the manifests")
        if wrong := release.problem(content, index):
            found.problems.append(wrong)
    except StoreError as error:
        found.problems.append(str(error))


_OF_AN_INDEX = re.compile(r"(?P<embeddings>.+)\.(?P<kind>index|cells)-[0-9a-f]{12}")  # see cluster/index_build.py


def _index_notes(dataset: Dataset, content: Mapping[str, Any]) -> list[str]:
    """What to do with an index that no search uses, or that is not complete, and with what its build left."""
    match = _OF_AN_INDEX.fullmatch(dataset.url.rstrip("/"))
    if match is None:
        return []
    embeddings = match["embeddings"]
    if match["kind"] == "cells":
        return [f"what the index of {embeddings} is built from: the search that builds it takes this away, or delete all of it"]
    if not content:
        return [f"an index of {embeddings} that is not complete: the search that began it goes on with it, or delete all of it"]
    try:
        now = Dataset(embeddings, ".parquet").description()["lineage"].get("fingerprint")
    except StoreError:
        now = None
    if now == content["lineage"].get("config", {}).get("embeddings"):
        return []
    return [f"an index of embeddings that are no longer at {embeddings}: no search uses it, delete all of it"]


def embedded(dataset: Dataset) -> list[str]:
    """Names of the recognisers whose embeddings were begun below the data set, and of their indices; each is a data set of its own."""
    begun = re.compile(r"embeddings/([^/]+)/(?:dataset\.json|quantizer\.safetensors|(?:manifests|attempts)/\d{5,}\.json)")
    return sorted({match[1] for stored in dataset.store.list("embeddings/") if (match := begun.fullmatch(stored.key))})


def _strays(dataset: Dataset, manifests: Sequence[Manifest], embeddings: Sequence[str]) -> Iterator[str]:
    """Objects below the root that no manifest names."""
    known: set[str | None] = {"dataset.json", "index.json", *(f"manifests/{name}.json" for name in dataset.names())}
    below = tuple(f"embeddings/{name}/" for name in embeddings)
    for manifest in manifests:
        known |= {manifest.file, manifest.ledger}
    for stored in dataset.store.list():
        ours = stored.key in known or attempt.is_record(stored.key) or _INDEX_FILE.fullmatch(stored.key)
        if not ours and not stored.key.startswith(below):
            yield stored.key
