"""The full-output search as a stage: every image of one set is looked for among all images of another, by one recogniser.

A unit is one shard of query embeddings; its result is a shard of ranks, committed like any other, so a search resumes and accounts for
every query. Three searches of the same kind make a measurement: protected -> original (the leakage), original -> original (what the
recogniser can do at best) and protected -> protected (whether the protected set still tells people apart).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from cluster.dataset import Dataset, Labels, ShardData
from cluster.embedding import Embeddings, read_embeddings
from cluster.index import Gallery, GalleryError, require_unit_rows
from cluster.processor import Processor, Unit
from cluster.secret import KeyMap
from cluster.shard import Rejected, ShardError
from cluster.stage import StageOptions, StageResult, run_stage
from cluster.store import NotFound, StoreError
from facemae.curve import Curve
from facemae.exposure import Exposure
from facemae.leakage import Leakage, similarity
from facemae.linking import add_histograms, histogram
from facemae.rank import ranks

PAIRS_PER_IMAGE = 8
"""Genuine and impostor pairs drawn for each image, for the histograms."""
SUMMARY_THREADS = 8


@dataclass(frozen=True)
class Ranks:
    """One shard of a search's result, a row a query. See facemae.rank for UNDEFINED ranks.

    Attributes:
        key: sample keys.
        identity: int64 labels.
        rank_image: int64, the rank of the query's own source image; UNDEFINED where the search leaves it out.
        rank_identity: int64, the rank of the best other image of the same identity, the source image left out.
        others: int64, how many other images of the identity the gallery holds.
        mate_similarity, identity_similarity: float32, to those two mates; NaN where there is none.
        top_similarity: float32, to the most similar gallery image (the query's own left out where the search does).
    """

    key: Sequence[str]
    identity: np.ndarray
    rank_image: np.ndarray
    rank_identity: np.ndarray
    others: np.ndarray
    mate_similarity: np.ndarray
    identity_similarity: np.ndarray
    top_similarity: np.ndarray

    def __len__(self) -> int:
        return len(self.key)

    def leakage(self, histograms: Mapping[str, np.ndarray], num_gallery: int) -> Leakage:
        """What this shard adds to the summary."""
        image = Curve.of(self.rank_image, self.identity, num_gallery)
        identity = Curve.of(self.rank_identity, self.identity, num_gallery, self.others)
        return Leakage(image, identity, histograms, Exposure.of(self.key, self.identity, self.rank_image, self.mate_similarity))


def write_ranks(rows: Ranks, histograms: Mapping[str, np.ndarray]) -> bytes:
    """The rows as parquet, the histograms as JSON in its schema's metadata; equal input gives equal bytes."""
    content = json.dumps({name: histograms[name].tolist() for name in sorted(histograms)})
    table = pa.table({item.name: pa.array(getattr(rows, item.name)) for item in fields(Ranks)})
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({"histograms": content}), sink)
    return sink.getvalue().to_pybytes()


def read_ranks(data: bytes) -> tuple[Ranks, dict[str, np.ndarray]]:
    """The inverse of write_ranks. Raises ShardError for bytes that are no such table."""
    try:
        table = pq.read_table(pa.BufferReader(data))
        columns = {item.name: table[item.name] for item in fields(Ranks)}
        histograms = json.loads(table.schema.metadata[b"histograms"])
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise ShardError(f"no table of ranks: {error}") from None
    arrays = {name: column.to_pylist() if name == "key" else column.to_numpy() for name, column in columns.items()}
    return Ranks(**arrays), {name: np.array(counts, np.int64) for name, counts in histograms.items()}


@dataclass(frozen=True)
class EmbeddedSet:
    """The finished embeddings of one image set by one recogniser.

    Attributes:
        dataset: the data set of embedding shards.
        recognizer: its description: name, sha256, dim, mean, std.
        fingerprint: of the run that made it.
        samples: number of embeddings.
    """

    dataset: Dataset
    recognizer: Mapping[str, Any]
    fingerprint: str
    samples: int

    @classmethod
    def open(cls, root: str, recognizer: str) -> EmbeddedSet:
        """The embeddings of the image set at ``root`` by the recogniser of that name.

        Raises:
            GalleryError: there are none, they are unfinished, or they are of another state of the image set.
        """
        images = Dataset(root)
        embeddings = images.embeddings(recognizer)
        try:
            content = embeddings.description()
        except StoreError as error:
            raise GalleryError(f"{error}: run `facemae embed --input {root} --recognizer {recognizer}.onnx` first") from None
        lineage = content["lineage"]
        made_of = (lineage.get("parent") or {}).get("fingerprint")
        if made_of != images.description()["lineage"].get("fingerprint"):
            raise GalleryError(f"{embeddings.url} was made from another state of {root}: delete it and run `facemae embed` again")
        return cls(embeddings, lineage["config"]["recognizer"], lineage["fingerprint"], content["samples"])

    def lineage(self) -> dict[str, Any]:
        """The set as the parent of what is made of it."""
        return {"url": self.dataset.url, "fingerprint": self.fingerprint, "samples": self.samples}


def require_same_recognizer(queries: EmbeddedSet, gallery: EmbeddedSet) -> None:
    """Raise GalleryError unless both sets were embedded by the same network with the same normalisation."""
    for field in ("sha256", "dim", "mean", "std"):
        here, there = queries.recognizer[field], gallery.recognizer[field]
        if here != there:
            raise GalleryError(
                f"{queries.dataset.url} and {gallery.dataset.url} are of different recognisers ({field} {here} and {there}): "
                "delete one of them and embed both sets with the same file"
            )


class LeakageProcessor(Processor[Unit]):
    """Ranks of one shard of queries in a gallery.

    Args:
        queries: the embedded set that is searched for.
        gallery_set: the embedded set that is searched, and ``gallery`` its actors.
        seed: of the random pairs in the histograms.
        rekey: where the queries' keys were replaced, the place of the secret and its check; the gallery holds the keys they came from.
    """

    def __init__(
        self, queries: EmbeddedSet, gallery_set: EmbeddedSet, gallery: Gallery, seed: int = 0, rekey: tuple[str, str] | None = None
    ) -> None:
        self._rekey = rekey
        self._urls = queries.dataset.url, gallery_set.dataset.url
        self._gallery, self._seed, self._dim = gallery, seed, int(gallery_set.recognizer["dim"])
        self._leaves_out_own = queries.fingerprint == gallery_set.fingerprint and self._urls[0] == self._urls[1]
        self._config = {
            "stage": "leakage",
            "search": "exact",
            "recognizer": dict(gallery_set.recognizer),
            "gallery": {"fingerprint": gallery_set.fingerprint, "samples": gallery_set.samples},
            "leaves_out_own": self._leaves_out_own,
            "pairs_per_image": PAIRS_PER_IMAGE,
            "seed": seed,
        }

    def describe(self) -> dict[str, Any]:
        """The gallery, the recogniser and the search's settings."""
        return self._config

    def open(self, threads: int) -> None:
        """Open both sets of embeddings. Raises SecretError when this worker's secret is not the one that replaced the keys."""
        self._new_key = KeyMap(*self._rekey) if self._rekey else None
        self._queries, self._originals = (Dataset(url, ".parquet") for url in self._urls)

    def fetch(self, unit: Unit) -> tuple[Embeddings, Embeddings]:
        """The shard of queries, and the gallery's shard of the same name, where their mates are."""
        queries = _embeddings(self._queries, unit.name)
        return queries, queries if self._leaves_out_own else _embeddings(self._originals, unit.name)

    def compute(self, unit: Unit, fetched: tuple[Embeddings, Embeddings]) -> ShardData:
        """The shard of ranks; a query whose original has no embedding goes to the ledger."""
        all_queries, originals = fetched
        places = _places(all_queries, originals, unit.name, self._new_key)
        rejected = [
            Rejected(key, "no-mate", "its original has no embedding: see the quarantine of the gallery's embeddings", 0)
            for key, place in zip(all_queries.keys, places, strict=True)
            if place < 0
        ]
        queries, places = _take(all_queries, places >= 0), places[places >= 0]
        if not len(queries):
            return ShardData(None, 0, Labels(), rejected)
        require_unit_rows(queries.vectors, self._dim, f"{self._urls[0]}, shard {unit.name}")
        rows = self._search(queries, originals, places, self._gallery.start(unit.name))
        payload = write_ranks(rows, self._histograms(unit.name, queries, originals, places))
        return ShardData(payload, len(queries), Labels.of(queries.identities.tolist()), rejected)

    def _search(self, queries: Embeddings, originals: Embeddings, places: np.ndarray, start: int) -> Ranks:
        """Ask the gallery. A mate's own similarity is always known exactly, so a rank is a count of the more similar ones."""
        own, vectors = start + places, ray.put(queries.vectors)
        scores, ids = self._gallery.search(vectors, len(self._gallery))
        others, best = self._gallery.same_identity(vectors, queries.identities, own)
        without_own = np.where(ids == own[:, None], np.float32(-np.inf), scores)
        mate = similarity(queries.vectors, originals.vectors[places])
        if self._leaves_out_own:
            scores, mate = without_own, np.full_like(mate, np.nan)
        by_image, by_identity = (ranks(np.sum(s > m[:, None], axis=1), m) for s, m in ((scores, mate), (without_own, best)))
        return Ranks(queries.keys, queries.identities, by_image, by_identity, others, mate, best, scores.max(axis=1))

    def _histograms(self, shard: str, queries: Embeddings, originals: Embeddings, places: np.ndarray) -> dict[str, np.ndarray]:
        """Similarities of the mates (across two sets), of images of one identity, and of random images of two."""
        names = ("genuine", "impostor") if self._leaves_out_own else ("mate", "genuine", "impostor")
        parts = [{name: histogram(np.empty(0)) for name in names}]
        if not self._leaves_out_own:
            parts.append({"mate": histogram(similarity(queries.vectors, originals.vectors[places]))})
        seed = np.frombuffer(hashlib.sha256(f"{self._seed}/{shard}".encode()).digest(), np.uint32)
        rng = np.random.default_rng(seed)
        order = np.argsort(originals.identities, kind="stable")
        position = np.argsort(order)[places]
        for step in range(1, PAIRS_PER_IMAGE + 1):  # each image with the next ones of its identity, and with random ones
            following = order[np.minimum(position + step, len(order) - 1)]
            genuine = (position + step < len(order)) & (originals.identities[following] == queries.identities)
            random = rng.integers(len(originals), size=len(queries))
            impostor = originals.identities[random] != queries.identities
            for name, kept, partner in (("genuine", genuine, following), ("impostor", impostor, random)):
                parts.append({name: histogram(similarity(queries.vectors[kept], originals.vectors[partner[kept]]))})
        return add_histograms(parts)


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
    if {unit.name for unit in units} - set(output.names()):
        gallery.load()  # before any worker starts, so that a bad gallery is one clear error, and not at all when nothing is left to do
    processor = LeakageProcessor(queries, gallery_set, gallery, seed=seed, rekey=rekey)
    return run_stage(processor, units, output, name=name, kind="ranks", parent=queries.lineage(), options=options)


def summarise(output: Dataset) -> Leakage:
    """What all shards of ranks together say; memory holds a few shards and 24 bytes an identity and shard.

    Raises:
        GalleryError: no query could be measured.
        ShardError: a shard is damaged.
    """

    num_gallery = int(output.description()["lineage"]["config"]["gallery"]["samples"])

    def read(shard: str) -> Leakage | None:
        manifest = output.manifest(shard)
        return None if manifest.file is None else Ranks.leakage(*read_ranks(output.read(manifest)), num_gallery)

    with ThreadPoolExecutor(SUMMARY_THREADS) as pool:
        parts = [part for part in pool.map(read, output.names()) if part is not None]
    if not parts:
        raise GalleryError(f"{output.url}: no query was measured, every one is in the quarantine ledger with its reason")
    return Leakage.merge(parts)


def _embeddings(dataset: Dataset, shard: str) -> Embeddings:
    try:
        manifest = dataset.manifest(shard)
    except NotFound:
        raise GalleryError(f"{dataset.url} has no shard {shard}: are these two sets of the same origin? Run `facemae embed`") from None
    if manifest.file is None:  # every one of its images is in the quarantine
        return Embeddings([], np.empty(0, np.int64), np.empty((0, 0), np.float16))
    return read_embeddings(dataset.read(manifest))


def _places(queries: Embeddings, originals: Embeddings, shard: str, new_key: KeyMap | None) -> np.ndarray:
    """The row of each query's original, int64 (N,), -1 where it has no embedding.

    Raises:
        GalleryError: the two shards are not of the same images.
    """
    rows = {key: row for row, key in enumerate(map(new_key, originals.keys) if new_key else originals.keys)}
    places = np.array([rows.get(key, -1) for key in queries.keys], np.int64)
    if len(queries) and len(originals) and (places < 0).all():
        raise GalleryError(
            f"shard {shard}: no key of the queries is in the gallery's shard of the same name (first: {queries.keys[0]!r}): the protected "
            "set is of other originals"
        )
    found = np.flatnonzero(places >= 0)
    wrong = found[originals.identities[places[found]] != queries.identities[found]]
    if len(wrong):
        raise GalleryError(f"shard {shard}: {queries.keys[wrong[0]]!r} has another identity in the gallery than among the queries")
    return places


def _take(rows: Embeddings, kept: np.ndarray) -> Embeddings:
    if kept.all():
        return rows
    keys = [key for key, keep in zip(rows.keys, kept, strict=True) if keep]
    return Embeddings(keys, rows.identities[kept], rows.vectors[kept])
