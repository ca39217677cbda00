"""The full-output leakage measurement: every query of one set searched in a gallery, ranks written as a shard-wise data set.

Protected -> original: the mate of a query is the image it was made from; beside it, the identity's other images. One set against itself
(reference and utility) leaves each query's own image out.

The mate's own similarity is always known exactly, because its embedding lies in the gallery's shard of the same name. Its rank is a count
of the nearer images; a search that does not see every image can only miss some of them, so its ranks are lower bounds and its CMC is an
upper bound, whatever its recall. An exact search of a random sample of the queries says how far above the truth it may be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cluster.adaptive import QueryMap
from cluster.calibration import calibrate_search, known_nearer
from cluster.dataset import Dataset, Labels, ShardData
from cluster.embedded import EmbeddedSet, GalleryError, places, read_shard, require_same_recognizer, require_unit_rows, take
from cluster.embedding import Embeddings
from cluster.index import Gallery
from cluster.processor import Processor, Unit
from cluster.ranks import Ranks, read_ranks, write_ranks
from cluster.secret import KeyMap
from cluster.shard import Rejected
from cluster.stage import StageOptions, StageResult, run_stage
from cluster.store import StoreError
from facemae.curve import Curve
from facemae.exposure import Exposure
from facemae.leakage import Leakage, similarity
from facemae.linking import add_histograms, histogram
from facemae.rank import ranks
from facemae.recall import NOT_SAMPLED, Sample, Tightness

PAIRS_PER_IMAGE = 8
"""Genuine and impostor pairs drawn for each image, for the histograms."""
SUMMARY_THREADS = 8
SAMPLE = 2000
"""Queries that are searched exactly besides, where the search is approximate."""
WIDER = 8
"""Where at most one in so many of a shard's queries has a mate at rank 1, these are looked at again in so many times as many cells. That
costs no more than the first look, and most of the queries that are at rank 1 for want of cells leave it."""


class LeakageProcessor(Processor[Unit]):
    """Ranks of one shard of queries in a gallery.

    Args:
        queries: the embedded set that is searched for.
        gallery_set: the embedded set that is searched, and ``gallery`` its actors.
        seed: of the random pairs in the histograms and of the exact sample.
        rekey: where the queries' keys were replaced, the place of the secret and its check; the gallery holds the keys they came from.
        query_map: of an adaptive attacker.
        sample: queries of the whole set to search exactly besides, where the search is approximate.
    """

    def __init__(
        self,
        queries: EmbeddedSet,
        gallery_set: EmbeddedSet,
        gallery: Gallery,
        seed: int = 0,
        rekey: tuple[str, str] | None = None,
        query_map: QueryMap | None = None,
        sample: int = SAMPLE,
    ) -> None:
        self._rekey, self._map = rekey, query_map
        self._urls = queries.dataset.url, gallery_set.dataset.url
        self._gallery, self._seed, self._dim = gallery, seed, int(gallery_set.recognizer["dim"])
        self._leaves_out_own = queries.fingerprint == gallery_set.fingerprint and self._urls[0] == self._urls[1]
        self._sampled_share = 0.0 if gallery.exact else min(1.0, sample / max(queries.samples, 1))
        self._config = {
            "stage": "leakage",
            "search": describe_search(gallery),
            "sampled_share": self._sampled_share,
            "recognizer": dict(gallery_set.recognizer),
            "gallery": {"fingerprint": gallery_set.fingerprint, "samples": gallery_set.samples},
            "adaptive": query_map.describe() if query_map else None,
            "leaves_out_own": self._leaves_out_own,
            "pairs_per_image": PAIRS_PER_IMAGE,
            "seed": seed,
        }

    def describe(self) -> dict[str, Any]:
        """The gallery, the recogniser and the search's settings."""
        return self._config

    def open(self, threads: int) -> None:
        """Open both sets of embeddings. Raises SecretError when this worker's secret is not the one that replaced the keys."""
        self.new_key = KeyMap(*self._rekey) if self._rekey else None
        self._queries, self._originals = (Dataset(url, ".parquet") for url in self._urls)
        if self._map is not None:
            self._map.open()

    def fetch(self, unit: Unit) -> tuple[Embeddings, Embeddings]:
        """The shard of queries, and the gallery's shard of the same name, where their mates are."""
        queries = read_shard(self._queries, unit.name)
        return queries, queries if self._leaves_out_own else read_shard(self._originals, unit.name)

    def compute(self, unit: Unit, fetched: tuple[Embeddings, Embeddings]) -> ShardData:
        """The shard of ranks; a query whose original has no embedding goes to the ledger."""
        all_queries, originals = fetched
        mates = places(all_queries, originals, unit.name, self.new_key)
        rejected = [
            Rejected(key, "no-mate", "its original has no embedding: see the quarantine of the gallery's embeddings", 0)
            for key, place in zip(all_queries.keys, mates, strict=True)
            if place < 0
        ]
        queries, mates = take(all_queries, mates >= 0), mates[mates >= 0]
        if not len(queries):
            return ShardData(None, 0, Labels(), rejected)
        queries = self.mapped(queries, unit.name)
        rows = self._search(queries, originals, mates, self._gallery.start(unit.name))
        payload = write_ranks(rows, self._histograms(unit.name, queries, originals, mates))
        return ShardData(payload, len(queries), Labels.of(queries.identities.tolist()), rejected)

    def mapped(self, queries: Embeddings, shard: str) -> Embeddings:
        """The queries as the attacker sees them. Raises GalleryError, naming the shard, for rows that are not of unit length."""
        require_unit_rows(queries.vectors, self._dim, f"{self._urls[0]}, shard {shard}")
        if self._map is None:
            return queries
        return Embeddings(queries.keys, queries.identities, self._map(queries.vectors, queries.identities))

    def mates(self, queries: Embeddings, originals: Embeddings, mates: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The queries' similarities to their own images, to their identities' most similar other ones, float32 (N,), and how many of these
        there are, int64 (N,). Always exact."""
        others, best = self._gallery.same_identity(queries.vectors, queries.identities, start + mates)
        return similarity(queries.vectors, originals.vectors[mates]), best, others

    def _search(self, queries: Embeddings, originals: Embeddings, mates: np.ndarray, start: int) -> Ranks:
        """Ask the gallery: for all approximately, where it has cells, and for a sample of them exactly besides."""
        image, identity, others = self.mates(queries, originals, mates, start)
        own = start + mates

        def ask(rows: np.ndarray, exact: bool = False, wider: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            thresholds = np.stack([image[rows], identity[rows]], 1)
            found = self._gallery.search(queries.vectors[rows], 2 if self._leaves_out_own else 1, thresholds, exact, wider)
            nearer = np.maximum(found.nearer[:, 1] - known_nearer(image[rows], identity[rows])[:, 1], 0)
            first = found.ids[:, 0] == own[rows] if self._leaves_out_own else np.zeros(len(rows), bool)
            top = np.where(first, found.scores[:, -1], found.scores[:, 0])
            mate = np.full_like(image[rows], np.nan) if self._leaves_out_own else image[rows]
            return ranks(found.nearer[:, 0], mate), ranks(nearer, identity[rows]), top

        chosen = self._sampled(queries.keys)
        exact_image, exact_identity = (np.full(len(queries), NOT_SAMPLED, np.int64) for _ in range(2))
        exact_top = np.full(len(queries), np.nan, np.float32)
        rank_image, rank_identity, top = ask(np.arange(len(queries)))
        first = np.flatnonzero((rank_image == 1) | (rank_identity == 1))
        if not self._gallery.exact and 0 < len(first) * WIDER <= len(queries):
            rank_image[first], rank_identity[first], top[first] = ask(first, wider=WIDER)
        if len(chosen):
            exact_image[chosen], exact_identity[chosen], exact_top[chosen] = ask(chosen, exact=True)
        mate = np.full_like(image, np.nan) if self._leaves_out_own else image
        return Ranks(
            queries.keys, queries.identities, rank_image, rank_identity, exact_image, exact_identity, others, mate, identity, top, exact_top
        )

    def _sampled(self, keys: Any) -> np.ndarray:
        """Rows of the queries that belong to the exact sample: a function of seed and key."""
        if not self._sampled_share:
            return np.empty(0, np.int64)
        digests = (hashlib.sha256(f"{self._seed}/exact/{key}".encode()).digest()[:8] for key in keys)
        values = np.array([int.from_bytes(digest, "little") for digest in digests], np.float64) / 2.0**64
        return np.flatnonzero(values < self._sampled_share)

    def _histograms(self, shard: str, queries: Embeddings, originals: Embeddings, mates: np.ndarray) -> dict[str, np.ndarray]:
        """Similarities of the mates (across two sets), of images of one identity, and of random images of two."""
        names = ("genuine", "impostor") if self._leaves_out_own else ("mate", "genuine", "impostor")
        parts = [{name: histogram(np.empty(0)) for name in names}]
        if not self._leaves_out_own:
            parts.append({"mate": histogram(similarity(queries.vectors, originals.vectors[mates]))})
        seed = np.frombuffer(hashlib.sha256(f"{self._seed}/{shard}".encode()).digest(), np.uint32)
        rng = np.random.default_rng(seed)
        order = np.argsort(originals.identities, kind="stable")
        position = np.argsort(order)[mates]
        for step in range(1, PAIRS_PER_IMAGE + 1):  # each image with the next ones of its identity, and with random ones
            following = order[np.minimum(position + step, len(order) - 1)]
            genuine = (position + step < len(order)) & (originals.identities[following] == queries.identities)
            random = rng.integers(len(originals), size=len(queries))
            impostor = originals.identities[random] != queries.identities
            for name, kept, partner in (("genuine", genuine, following), ("impostor", impostor, random)):
                parts.append({name: histogram(similarity(queries.vectors[kept], originals.vectors[partner[kept]]))})
        return add_histograms(parts)


def describe_search(gallery: Gallery) -> dict[str, Any] | str:
    """How a gallery is searched, for lineage and report."""
    if gallery.exact:
        return "exact"
    return {"index": gallery.choice.factory, "cells": gallery.choice.num_cells, "probes": gallery.num_probes, "wider": WIDER}


def run_search(
    queries: EmbeddedSet,
    gallery_set: EmbeddedSet,
    gallery: Gallery,
    output: Dataset,
    *,
    name: str,
    seed: int = 0,
    options: StageOptions | None = None,
    rekey: tuple[str, str] | None = None,
    query_map: QueryMap | None = None,
    say: Callable[[str], None] = print,
) -> StageResult:
    """Search every query of a set into ``output``, a data set of ranks (suffix .parquet). Resumable, like every stage.

    Raises:
        GalleryError: the sets do not belong together, or a shard is not what it should be.
        StageError, Interrupted, StoreError: as run_stage.
    """
    require_same_recognizer(queries, gallery_set)
    units = [Unit(manifest.shard, manifest.samples) for manifest in queries.dataset.manifests() if manifest.samples]
    for embedded, found in ((queries, sum(unit.num_samples for unit in units)), (gallery_set, len(gallery))):
        if found != embedded.samples:  # never a smaller gallery without a word: fewer images to find look like less leakage
            raise GalleryError(
                f"{embedded.dataset.url} has {found} of its {embedded.samples} embeddings left (expired, or deleted by hand): delete the "
                "rest of it and run `facemae embed` again"
            )

    def make() -> LeakageProcessor:
        return LeakageProcessor(queries, gallery_set, gallery, seed=seed, rekey=rekey, query_map=query_map)

    if {unit.name for unit in units} - set(output.names()):
        gallery.load()  # before any worker starts, so that a bad gallery is one clear error, and not at all when nothing is left to do
        if gallery.choice.num_cells:
            share = calibrate_search(make(), gallery, units, seed)
            cells = f"{gallery.num_probes} of {gallery.choice.num_cells} cells a query"
            say(f"{name}: {cells}; {100 * share:.1f} % of a sample answered as by exact search")
    elif gallery.choice.num_cells:
        gallery.num_probes = _probes(output, gallery.num_probes)
    return run_stage(make(), units, output, name=name, kind="ranks", parent=queries.lineage(), options=options)


def _probes(output: Dataset, default: int) -> int:
    """The number of cells that a complete search probed."""
    try:
        search = output.description()["lineage"]["config"]["search"]
    except StoreError:
        return default
    return int(search["probes"]) if isinstance(search, Mapping) else default


def summarise(output: Dataset) -> Leakage:
    """What all shards of ranks together say; memory holds a few shards and some bytes an identity and shard.

    Raises:
        GalleryError: no query could be measured.
        ShardError: a shard is damaged.
    """
    num_gallery = int(output.description()["lineage"]["config"]["gallery"]["samples"])

    def read(shard: str) -> Leakage | None:
        manifest = output.manifest(shard)
        return None if manifest.file is None else leakage_of(*read_ranks(output.read(manifest)), num_gallery)

    with ThreadPoolExecutor(SUMMARY_THREADS) as pool:
        parts = [part for part in pool.map(read, output.names()) if part is not None]
    if not parts:
        raise GalleryError(f"{output.url}: no query was measured, every one is in the quarantine ledger with its reason")
    return Leakage.merge(parts)


def leakage_of(rows: Ranks, histograms: Mapping[str, np.ndarray], num_gallery: int) -> Leakage:
    """What one shard adds to the summary."""
    image = Curve.of(rows.rank_image, rows.identity, num_gallery)
    identity = Curve.of(rows.rank_identity, rows.identity, num_gallery, rows.others)
    tight = Tightness.of(rows.rank_image, rows.exact_image), Tightness.of(rows.rank_identity, rows.exact_identity)
    sample = Sample.of(tight[0], tight[1], rows.top_similarity, rows.exact_top)
    return Leakage(image, identity, histograms, Exposure.of(rows.key, rows.identity, rows.rank_image, rows.mate_similarity), sample)
