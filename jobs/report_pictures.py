"""A few originals beside what the network saw of them and what it drew, as data: URIs."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain, zip_longest
from typing import Any

import numpy as np

from cluster.dataset import Dataset
from cluster.picture import SIZE, decode, encode
from cluster.ranks import read_ranks
from cluster.secret import key_map_of
from cluster.shard import Sample, ShardError, read_samples
from cluster.store import StoreError, join_url
from facemae.masking import random_mask
from facemae.rank import UNDEFINED
from jobs.report_data import Measurement
from jobs.report_steps import require_measured_state

SHARDS = 4
"""Shards that the pictures are taken from, where they suffice: a shard is read whole, and may be large."""
GREY = 128


@dataclass(frozen=True)
class Picture:
    """One sample as the page shows it: three data: URIs (``masked`` is None where the protection hides no patches), and what the worst
    attacker made of it."""

    key: str
    original: str
    masked: str | None
    protected: str
    outcome: str


def choose_pictures(measurement: Measurement, output: str, count: int, seed: int, rekey: str | None = None) -> list[Picture]:
    """Samples by turns from a few shards, in the order of a seeded hash, each shard's identities one by one first.

    Raises:
        SecretError: the protected set's keys were replaced, and ``rekey`` is not the place of the secret that did it.
        StoreError, ShardError, PictureError: one of the two image sets cannot be read, or is not the one that was measured.
    """
    originals, protected = (require_measured_state(found) for found in (measurement.original, measurement.protected))
    new_key = key_map_of(measurement.protected.config, rekey, measurement.protected.url) or str
    names = sorted(set(originals.names()) & set(protected.names()), key=lambda name: _order(seed, name))
    shards: list[list[Picture]] = []
    for name in names:
        if len(shards) >= SHARDS and sum(map(len, shards)) >= count:
            break
        ranks = _ranks(measurement, output, name)
        pairs = _pairs(_samples(originals, name), _samples(protected, name), new_key, count, seed)
        shards.append([_picture(before, after, measurement, ranks) for before, after in pairs])
    turns = chain.from_iterable(zip_longest(*shards))
    return [picture for picture in turns if picture is not None][:count]


def mask_picture(picture: np.ndarray, key: str, patch_size: int, mask_ratio: float, seed: int) -> np.ndarray:
    """What the network sees of a picture, uint8 (112, 112, 3): hidden patches are grey."""
    grid = SIZE // patch_size
    seen = np.zeros(grid * grid, bool)
    seen[random_mask([key], grid * grid, mask_ratio, seed)[0]] = True
    shown = seen.reshape(grid, grid).repeat(patch_size, 0).repeat(patch_size, 1)[..., None]
    return np.where(shown, picture, np.uint8(GREY))


def _pairs(
    originals: Sequence[Sample], protected: Sequence[Sample], new_key: Callable[[str], str], count: int, seed: int
) -> list[tuple[Sample, Sample]]:
    """Samples of one shard before and after."""
    before, after = {new_key(sample.key): sample for sample in originals}, {sample.key: sample for sample in protected}
    keys = sorted(before.keys() & after.keys(), key=lambda key: _order(seed, before[key].key))
    first = {before[key].identity: key for key in reversed(keys)}
    people = [key for key in keys if first[before[key].identity] == key]
    others = [key for key in keys if first[before[key].identity] != key]
    return [(before[key], after[key]) for key in (people + others)[:count]]


def _samples(dataset: Dataset, shard: str) -> list[Sample]:
    data = dataset.read(dataset.manifest(shard))
    return [item for item in read_samples(data) if isinstance(item, Sample)] if data else []


def _ranks(measurement: Measurement, output: str, shard: str) -> Mapping[str, int]:
    """The rank of each image of a shard by the worst attacker; empty when it cannot be read, which costs a caption alone."""
    ranks = Dataset(join_url(output, measurement.worst.leakage.ranks.removesuffix("/shards")), ".parquet")
    try:
        data = ranks.read(ranks.manifest(shard))
        if not data:
            return {}
        rows, _ = read_ranks(data)
    except (StoreError, ShardError):
        return {}
    return dict(zip(rows.key, rows.rank_image.tolist(), strict=True))


def _picture(before: Sample, after: Sample, measurement: Measurement, ranks: Mapping[str, int]) -> Picture:
    original = decode(before.image)
    masking = _masking(measurement.protected.protection)
    masked = _uri(encode(mask_picture(original, before.key, *masking))) if masking else None
    rank = ranks.get(after.key, UNDEFINED)
    told = {UNDEFINED: "", 1: "traced: nearest of all"}
    # encoded anew: an original's own bytes may carry EXIF, with the place where it was taken
    return Picture(after.key, _uri(encode(original)), masked, _uri(bytes(after.image)), told.get(rank, f"found at rank {rank:,}"))


def _masking(protection: Mapping[str, Any]) -> tuple[int, float, int] | None:
    """Patch size, mask ratio and seed of a protection that hides patches, from its own description."""
    found = re.search(rf"_patch(\d+)_{SIZE}$", str(protection.get("architecture")))
    if protection.get("method") not in ("facemae", "mae") or not found or not {"mask_ratio", "seed"} <= protection.keys():
        return None
    return int(found[1]), float(protection["mask_ratio"]), int(protection["seed"])


def _uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _order(seed: int, name: str) -> bytes:
    return sha256(f"{seed}/{name}".encode("utf-8", "surrogatepass")).digest()
