"""Where every image went and how long it took: the accounting of all data sets behind a measurement, from their manifests."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cluster.accounting import totals
from cluster.dataset import IO_THREADS, Dataset, Manifest
from cluster.shard import ShardError, read_ledger
from cluster.store import NotFound, StoreError, join_url, open_store
from jobs.report_data import ImageSet, Measurement, Search

UNREADABLE = (StoreError, ShardError, ValueError)


@dataclass(frozen=True)
class Step:
    """One data set on the way, and the work that made it.

    Attributes:
        name: what was done.
        url: where its result is.
        samples_in, samples, quarantined, shards: the accounting; None where nothing is known.
        given: what the step before it gave out; None where it is the first, or unknown.
        failed: shards that were given up.
        reasons: samples in quarantine by reason.
        seconds: fetch, compute and publish, summed over all shards and workers.
        fingerprint: of the configuration and input.
        note: why something is missing here, and what would help.
    """

    name: str
    url: str
    samples_in: int | None = None
    samples: int | None = None
    quarantined: int | None = None
    shards: int | None = None
    given: int | None = None
    failed: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    note: str = ""

    @property
    def adds_up(self) -> bool:
        """Took in what was given, in = out + quarantined, and the ledger holds a reason for each that was left out."""
        if self.note or self.samples_in is None or self.samples is None:
            return False
        took_all = self.given in (None, self.samples_in)
        return took_all and self.quarantined == sum(self.reasons.values()) and self.samples_in == self.samples + self.quarantined

    @property
    def rate(self) -> float | None:
        """Images a second of compute, by one worker."""
        compute = self.seconds.get("compute", 0.0)
        return self.samples_in / compute if self.samples_in and compute else None


def gather_steps(measurement: Measurement, output: str) -> list[Step]:
    """Every step from ingest to the searches, in their order. What cannot be read becomes a note; its numbers come from leakage.json."""
    sets = {"original": measurement.original, "protected": measurement.protected}
    steps = [_image_step(name, sets[role]) for name, role in (("ingest", "original"), ("protect", "protected"))]
    for attacker in measurement.attackers:
        name = attacker.recognizer.name
        if attacker.adaptive:  # its other searches, and the embeddings, are the plain attacker's
            steps.append(_search_step(f"search protected → original, {attacker.name}", output, attacker.leakage))
            continue
        for role, image_set in sets.items():
            steps.append(_step(f"embed {role}, {name}", join_url(image_set.url, "embeddings", name)))
        searches = {"protected → original": attacker.leakage, "original → original": attacker.reference}
        for title, search in {**searches, "protected → protected": attacker.utility}.items():
            steps.append(_search_step(f"search {title}, {name}", output, search))
    return steps


def require_measured_state(image_set: ImageSet) -> Dataset:
    """The image set, still the one that was measured.

    Raises:
        StoreError: it cannot be read, or was made anew since.
    """
    dataset = Dataset(image_set.url)
    if dataset.description()["lineage"].get("fingerprint") != image_set.fingerprint:
        raise StoreError(f"{image_set.url} was made anew since it was measured: run `facemae leakage` again", fatal=True)
    return dataset


def read_training(root: str, protected: ImageSet) -> dict[str, Any]:
    """The run.json of the training whose weights made the protected set.

    Raises:
        StoreError: there is no finished training at ``root``, or its weights are others.
    """
    store = open_store(root)
    try:
        content = json.loads(store.get("run.json"))
        sha256 = content["weights"]["sha256"]
    except NotFound:
        raise StoreError(f"{store.url} holds no run.json: --weights takes the output of a finished facemae train", fatal=True) from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{store.url}/run.json is no record of a training ({error!r}): train again", fatal=True) from None
    expected = protected.protection.get("weights_sha256")
    if sha256 != expected:
        raise StoreError(
            f"{store.url} gave weights {sha256}, the protected set was made with {expected}: give its own training", fatal=True
        )
    return {"url": store.url, **content}


def _image_step(name: str, image_set: ImageSet) -> Step:
    try:
        require_measured_state(image_set)
    except UNREADABLE as error:
        return _known(name, image_set.url, image_set.samples, image_set.quarantined, image_set.shards, str(error))
    return _step(name, image_set.url, ".tar")


def _search_step(name: str, output: str, search: Search) -> Step:
    found = _step(name, join_url(output, search.ranks.removesuffix("/shards")))
    if found.fingerprint == search.fingerprint:
        return found
    note = found.note or f"{found.url} was made anew since leakage.json was written"
    return Step(name, found.url, samples=search.queries, fingerprint=search.fingerprint, note=note)


def _known(name: str, url: str, samples: int, quarantined: int, shards: int, note: str) -> Step:
    return Step(name, url, samples + quarantined, samples, quarantined, shards, note=note)


def _step(name: str, url: str, suffix: str = ".parquet") -> Step:
    dataset = Dataset(url, suffix)
    try:
        lineage = dataset.description()["lineage"]
        manifests = dataset.manifests()
        reasons = _reasons(dataset, manifests)
    except UNREADABLE as error:
        return Step(name, url, note=str(error))
    whole = totals(manifests)
    seconds: Counter[str] = Counter()
    for manifest in manifests:
        seconds.update(manifest.seconds)
    failed = sum(manifest.failure is not None for manifest in manifests)
    given = (lineage.get("parent") or {}).get("samples")
    fingerprint = lineage.get("fingerprint", "")
    counts = (whole["samples_in"], whole["samples"], whole["quarantined"], whole["shards"])
    return Step(name, url, *counts, given, failed, reasons, dict(seconds), fingerprint)


def _reasons(dataset: Dataset, manifests: Sequence[Manifest]) -> dict[str, int]:
    """Samples in quarantine by reason, most frequent first. Keys, errors and sources stay where they are."""

    def read(manifest: Manifest) -> Counter[str]:
        counts: Counter[str] = Counter()
        for row in read_ledger(dataset.store.get(str(manifest.ledger))):
            counts[row.reason] += row.num_samples
        return counts

    found: Counter[str] = Counter()
    with ThreadPoolExecutor(IO_THREADS) as pool:
        for counts in pool.map(read, (manifest for manifest in manifests if manifest.ledger is not None)):
            found.update(counts)
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def reasons_of(steps: Sequence[Step]) -> Iterator[tuple[str, str, int]]:
    """Rows (step, reason, samples) of all quarantines."""
    for step in steps:
        for reason, count in step.reasons.items():
            yield step.name, reason, count
