"""The adaptive attacker on whole embedded sets: maps fitted in one Ray task on pairs of a random choice of shards, and applied by the
workers that search.

Embeddings go from the store to the task and nowhere else; the driver sees the maps, a few megabytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from cluster.dataset import Dataset
from cluster.embedded import EmbeddedSet, GalleryError, places, read_shard, require_same_recognizer, require_unit_rows, take
from cluster.lookahead import ahead_map
from cluster.secret import KeyMap
from cluster.shard import sha256_hex
from cluster.store import NotFound, read_url
from cluster.task import answer_of
from facemae.adaptive import AdaptiveError, AdaptiveMaps

MAX_PAIRS = 200_000
"""Pairs that a fit reads; at 512 dimensions they take 0.4 GB."""
READ_AHEAD = 2


class QueryMap:
    """The maps of an adaptive attacker as the workers of a search hold them: picklable, and loaded by each worker in ``open``.

    Args:
        url: where the bytes of ``fit_adaptive`` were stored, a file's path or s3://.
        sha256: of those bytes.
    """

    def __init__(self, url: str, sha256: str) -> None:
        self.url, self.sha256 = url, sha256
        self._maps: AdaptiveMaps | None = None

    def describe(self) -> dict[str, str]:
        """The digest of the maps."""
        return {"sha256": self.sha256}

    def open(self) -> None:
        """Load the maps. Raises GalleryError when there are none, or others than the sha256 says."""
        try:
            data = read_url(self.url)
            if sha256_hex(data) != self.sha256:
                raise AdaptiveError(f"it has sha256 {sha256_hex(data)}, {self.sha256} is expected")
            self._maps = AdaptiveMaps.from_bytes(data, self.url)
        except (NotFound, AdaptiveError) as error:
            raise GalleryError(f"the adaptive attacker's maps at {self.url} cannot be used ({error}): delete them and run again") from None

    def __call__(self, vectors: np.ndarray, identities: np.ndarray) -> np.ndarray:
        """Unit rows (N, D) of protected images and their labels (N,) -> float16 (N, D), unit rows, each by the map that has not seen its
        identity; a row's bytes depend on that row and its label alone. Raises GalleryError where they are of another recogniser."""
        if self._maps is None:
            raise RuntimeError("QueryMap.open was not called in this process")
        try:
            return self._maps.apply(vectors, identities)
        except AdaptiveError as error:
            raise GalleryError(f"the adaptive attacker's maps at {self.url}: {error}") from None


def fit_adaptive(
    protected: EmbeddedSet, originals: EmbeddedSet, seed: int = 0, max_pairs: int = MAX_PAIRS, rekey: tuple[str, str] | None = None
) -> tuple[bytes, dict[str, Any]]:
    """Fit an adaptive attacker to two embedded sets, in one Ray task. Ray must be connected.

    Args:
        protected, originals: the two sets; pairs are found by key, in shards of the same name.
        seed: of the shards that are read, of the halves, and of all that fit_maps draws.
        max_pairs: shards are read in a seeded random order until this many pairs are there.
        rekey: where the protected keys were replaced, the place of the secret and its check.

    Returns:
        The maps (``AdaptiveMaps.to_bytes``), the same for the same sets, seed and max_pairs on any cluster (one build of torch, one kind of
        processor); and what leakage.json says of them: seed, max_pairs, pairs, identities, shards read, sha256, and of each of the two
        maps what it was fitted on, its kind and the figures that chose it.

    Raises:
        GalleryError: the sets are of different recognisers or images, a shard is not what it should be (it is named), or the task died.
        SecretError: the task found no secret, or another one.
        StoreError: a shard cannot be read.
    """
    require_same_recognizer(protected, originals)
    if max_pairs < 1:
        raise GalleryError(f"max_pairs is {max_pairs}: give 1 or more")
    urls, dim = (protected.dataset.url, originals.dataset.url), int(originals.recognizer["dim"])
    try:
        maps, description = answer_of(ray.remote(_fit).options(num_cpus=1).remote(urls, dim, seed, max_pairs, rekey))
        return maps, description
    except RayTaskError:
        raise
    except RayError as error:
        raise GalleryError(f"the adaptive attacker's fit died ({error}): give it memory, or fewer pairs than {max_pairs}") from None


Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Protected and original unit rows, float16 (N, D), and labels, int64 (N,)."""


def _fit(urls: tuple[str, str], dim: int, seed: int, max_pairs: int, rekey: tuple[str, str] | None) -> tuple[bytes, dict[str, Any]]:
    """The task."""
    from facemae.adaptive_fit import fit_maps  # torch: a worker that only applies maps does without

    new_key = KeyMap(*rekey) if rekey else None
    parts, found = [_nothing(dim)], 0
    with closing(_pairs(urls, dim, seed, new_key)) as shards:
        while found < max_pairs and (part := next(shards, None)):
            parts.append((part[0][: max_pairs - found], part[1][: max_pairs - found], part[2][: max_pairs - found]))
            found += len(parts[-1][2])
    protected, originals, identities = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    counts = {"pairs": found, "identities": len(np.unique(identities)), "shards": len(parts) - 1}
    parts.clear()
    try:
        maps = fit_maps(protected, originals, identities, seed)
    except AdaptiveError as error:
        raise GalleryError(f"no adaptive attacker for {urls[0]}: {error}") from None
    data = maps.to_bytes()
    return data, {"seed": seed, "max_pairs": max_pairs, **counts, "sha256": sha256_hex(data), "maps": list(maps.fitted)}


def _pairs(urls: tuple[str, str], dim: int, seed: int, new_key: KeyMap | None) -> Generator[Rows, None, None]:
    """Shard for shard, in an order that depends on the seed and the names alone."""
    protected, originals = (Dataset(url, ".parquet") for url in urls)
    order = sorted(protected.names(), key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        yield from ahead_map(pool, lambda shard: _read(protected, originals, shard, dim, new_key), order, READ_AHEAD)


def _read(protected: Dataset, originals: Dataset, shard: str, dim: int, new_key: KeyMap | None) -> Rows:
    """The pairs of one shard. Raises GalleryError, naming it."""
    queries = read_shard(protected, shard)
    gallery = read_shard(originals, shard) if len(queries) else queries
    mates = places(queries, gallery, shard, new_key)
    queries, mates = take(queries, mates >= 0), mates[mates >= 0]
    if not len(mates):
        return _nothing(dim)
    found = gallery.vectors[mates]
    require_unit_rows(queries.vectors, dim, f"{protected.url}, shard {shard}")
    require_unit_rows(found, dim, f"{originals.url}, shard {shard}")
    return queries.vectors, found, queries.identities


def _nothing(dim: int) -> Rows:
    return np.empty((0, dim), np.float16), np.empty((0, dim), np.float16), np.empty(0, np.int64)
