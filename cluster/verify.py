"""Re-reads a data set from its bucket and says whether every image is accounted for, exactly once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pyarrow.parquet as pq

from cluster.dataset import Dataset, Labels, Manifest, index_of, totals
from cluster.shard import Rejected, Sample, ShardError, read_ledger, read_samples
from cluster.store import StoreError

THREADS = 4
"""Shards in memory at once."""


@dataclass
class Verification:
    """What was found. ``problems`` is empty when the data set keeps its promise."""

    url: str
    kind: str = "unfinished"
    totals: dict[str, int | None] = field(default_factory=dict)
    identities: int = 0
    problems: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when nothing is missing, doubled, damaged or stray."""
        return not self.problems and not self.strays


def verify(url: str, suffix: str = ".tar") -> Verification:
    """Read every object of the data set again and compare it with the manifests, the ledger and dataset.json.

    Memory holds a few shards, the set of keys' hashes (8 bytes a sample) and the labels.

    Raises:
        StoreError: the root cannot be read at all.
    """
    dataset = Dataset(url, suffix)
    found = Verification(dataset.url)
    manifests = dataset.manifests()
    found.totals = totals(manifests)
    seen: Counter[int] = Counter()
    labels: set[int] = set()
    with ThreadPoolExecutor(THREADS) as pool:
        for problems, keys, shard_labels in pool.map(lambda m: _check_shard(dataset, m), manifests):
            found.problems += problems
            seen.update(map(hash, keys))
            labels |= shard_labels
    found.identities = len(labels)
    doubled = sum(count > 1 for count in seen.values())
    if doubled:
        found.problems.append(f"{doubled} keys occur more than once")
    _check_description(dataset, found)
    _check_index(dataset, manifests, found)
    found.strays = list(_strays(dataset, manifests))
    return found


def _check_shard(dataset: Dataset, manifest: Manifest) -> tuple[list[str], list[str], set[int]]:
    """Problems, keys and labels of one shard."""
    where = f"shard {manifest.shard}"
    problems: list[str] = []
    keys: list[str] = []
    labels: set[int] = set()
    ledger: list[Rejected] = []
    try:
        if manifest.file is not None:
            for key, label in _rows(dataset.read(manifest), dataset.suffix):
                keys.append(key)
                labels.add(label)
        if manifest.ledger is not None:
            ledger = read_ledger(dataset.store.get(manifest.ledger))
    except (StoreError, ShardError, ValueError) as error:
        return [f"{where}: {error}"], keys, labels
    if len(keys) != manifest.samples:
        problems.append(f"{where}: {len(keys)} samples in the file, {manifest.samples} in the manifest")
    if Labels.of(labels) != manifest.identities:
        problems.append(f"{where}: the labels in the file are {Labels.of(labels)}, in the manifest {manifest.identities}")
    recorded = sum(row.num_samples for row in ledger)
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


def _check_description(dataset: Dataset, found: Verification) -> None:
    """dataset.json agrees with the manifests, and the input with the parent's output where the parent can be read."""
    try:
        content = dataset.description()
    except StoreError as error:
        found.problems.append(str(error))
        return
    found.kind = str(content.get("kind"))
    for name, value in found.totals.items():
        if content.get(name) != value:
            found.problems.append(f"dataset.json says {name} = {content.get(name)}, the manifests say {value}")
    parent = content.get("lineage", {}).get("parent")
    if parent is None or "url" not in parent:  # a set whose keys were replaced does not say where the originals are
        return
    try:
        expected = Dataset(parent["url"]).description()["samples"]
    except StoreError:
        return  # the parent is elsewhere or out of reach for this reader: its count was checked when the job ran
    if expected != found.totals["samples_in"]:
        found.problems.append(f"the parent {parent['url']} holds {expected} samples, {found.totals['samples_in']} came in here")


def _check_index(dataset: Dataset, manifests: list[Manifest], found: Verification) -> None:
    """index.json, by which other readers find the shards, lists what the manifests do."""
    try:
        if dataset.store.get("index.json") != index_of(manifests):
            found.problems.append("index.json does not list the shards of the manifests")
    except StoreError as error:
        found.problems.append(str(error))


def _strays(dataset: Dataset, manifests: list[Manifest]) -> Iterator[str]:
    """Objects below the root that no manifest names."""
    known: set[str | None] = {"dataset.json", "index.json"}
    for manifest in manifests:
        known |= {f"manifests/{manifest.shard}.json", manifest.file, manifest.ledger}
    for stored in dataset.store.list():
        if stored.key not in known and not stored.key.startswith("embeddings/"):
            yield stored.key
