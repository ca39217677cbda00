"""The release record in dataset.json: granted on the evidence of a measurement, and bound to the very shards that were measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.shard import sha256_hex
from cluster.store import NotFound, Store, StoreError

if TYPE_CHECKING:
    from cluster.dataset import Dataset


@dataclass(frozen=True)
class Evidence:
    """What a release rests on.

    Attributes:
        bounds: for each limit: mate, limit, upper, attacker, queries (facemae.release.Decision.to_json).
        url, sha256: of the leakage.json that says so.
        fingerprint, samples: of the set that was measured, as leakage.json has them.
        attackers: who attacked: name, whether it adapted, what it finds among the originals.
    """

    bounds: Sequence[Mapping[str, Any]]
    url: str
    sha256: str
    fingerprint: str
    samples: int
    attackers: Sequence[Mapping[str, Any]] = ()


def grant(dataset: Dataset, evidence: Evidence) -> None:
    """Mark a protected set as released, with the evidence. dataset.json holds no time, so the same evidence writes the same bytes.

    A set whose keys were replaced does not say where the measurement lies, which is no concern of whoever gets the set.

    Raises:
        StoreError: the set is another than the one measured, is unfinished, has shards of another size than they were committed with, or
            cannot be written.
    """
    content = dataset.description()
    now = content["lineage"].get("fingerprint"), content["samples"]
    if now != (evidence.fingerprint, evidence.samples):
        raise StoreError(
            f"{dataset.url} is no longer the set that was measured ({now[1]} images, fingerprint {now[0]}; measured: {evidence.samples} "
            f"images, {evidence.fingerprint}): it is not released. Run `facemae leakage` again",
            fatal=True,
        )
    _require_sizes(dataset)
    rekeyed = content["lineage"].get("config", {}).get("rekey")
    measured = {"sha256": evidence.sha256} if rekeyed else {"url": evidence.url, "sha256": evidence.sha256}
    record: dict[str, Any] = {
        "bounds": [dict(bound) for bound in evidence.bounds],
        "measured": measured,
        "fingerprint": evidence.fingerprint,
    }
    record["attackers"] = [dict(attacker) for attacker in evidence.attackers]
    _record(dataset, content, True, record)


def revoke(dataset: Dataset, reason: str) -> None:
    """Mark a set as not released, and say why. Raises StoreError when it is unfinished or cannot be written."""
    _record(dataset, dataset.description(), False, {"withheld": reason})


def _require_sizes(dataset: Dataset) -> None:
    """Raise StoreError when a shard is gone or was put over by one of another size: embeddings made before would still be measured. What a
    shard of the same size holds, only reading it all can tell: that is `facemae verify`."""
    held = {stored.key: stored.size for stored in dataset.store.list("shards/")}
    for manifest in dataset.manifests():
        if manifest.file is not None and held.get(manifest.file) != manifest.num_bytes:
            raise StoreError(
                f"{dataset.url}/{manifest.file} has {held.get(manifest.file, 'no')} bytes, {manifest.num_bytes} were committed: the set is "
                f"not released. Run `facemae verify {dataset.url}`, protect again what is damaged, delete its embeddings, measure again",
                fatal=True,
            )


def _record(dataset: Dataset, content: Mapping[str, Any], released: bool, record: Mapping[str, Any]) -> None:
    index = sha256_hex(dataset.store.get("index.json"))
    dataset.describe({**content, "released": released, "release": {**record, "index_sha256": index}})


def carried(store: Store, description: Mapping[str, Any], index: bytes) -> dict[str, Any]:
    """The release fields of the dataset.json that is there, where it describes this same set with this same index.json; otherwise the set
    is not released."""
    try:
        before = json.loads(store.get("dataset.json"))
    except (NotFound, ValueError):  # none, or damaged: nothing to keep
        return {"released": False}
    same = isinstance(before, dict) and json.loads(json.dumps(description)).items() <= before.items()
    if not same or problem(before, index) or "release" not in before:
        return {"released": False}
    return {name: before[name] for name in ("released", "release")}


def problem(content: Mapping[str, Any], index: bytes) -> str | None:
    """Why the release fields of a dataset.json cannot stand beside this index.json; None when they can."""
    release = content.get("release")
    if release is None and not content.get("released"):
        return None
    if not isinstance(release, dict) or not isinstance(content.get("released"), bool):
        return "dataset.json says released, without the evidence of a measurement"
    if release.get("index_sha256") != sha256_hex(index):
        return "dataset.json's release is of other shards than these: the set was changed after it was measured"
    return None
