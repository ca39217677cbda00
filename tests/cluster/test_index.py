"""The gallery against brute force: every similarity computed, every row sorted."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray

from cluster.attempt import Attempt
from cluster.calibration import Question, calibrate
from cluster.cell_rows import read_part
from cluster.dataset import Dataset, Labels, ShardData
from cluster.embedded import GalleryError, require_unit_rows
from cluster.embedding import Embeddings, write_embeddings
from cluster.index import Gallery, GalleryOptions
from cluster.index_plan import Plan
from cluster.index_shard import IndexShard
from cluster.seaweedfs import Endpoint
from cluster.store import open_store
from cluster.verify import verify

DIM = 48
SIZES = (700, 1, 350, 900, 20, 529)


def unit_rows(count: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write_set(
    root: Path | str, vectors: np.ndarray, identities: np.ndarray, sizes: tuple[int, ...] = SIZES, fingerprint: str = "f"
) -> Dataset:
    """Embedding shards 00000, 00001, ... of the given sizes; keys say the row's number."""
    dataset = Dataset(str(root), ".parquet")
    for number, (start, size) in enumerate(zip(np.cumsum((0, *sizes)), sizes, strict=False)):
        span = slice(int(start), int(start) + size)
        rows = Embeddings([f"k{row}" for row in range(span.start, span.stop)], identities[span], vectors[span])
        data = ShardData(write_embeddings(rows), size, Labels.of(rows.identities.tolist()))
        dataset.commit(f"{number:05d}", data, fingerprint="f", attempt=Attempt("run", 1), seconds={})
    dataset.finish("embeddings", {"fingerprint": fingerprint}, dataset.manifests())
    return dataset


def similarities(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    return (queries.astype(np.float64) @ gallery.astype(np.float64).T).astype(np.float32)


def brute_force(queries: np.ndarray, gallery: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = similarities(queries, gallery)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


@pytest.fixture(scope="module")
def gallery_set(ray_session: None, s3_server: Endpoint) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """2500 rows on S3, with exact duplicates in different shards, so that ties occur within and across actors."""
    vectors = unit_rows(sum(SIZES))
    vectors[2000:2040] = vectors[:40]
    vectors[1000:1020] = vectors[:20]
    identities = np.random.default_rng(1).integers(0, 300, len(vectors))
    return write_set(f"s3://tests/index-{os.getpid()}/embeddings/toy", vectors, identities), vectors, identities


class InThisProcess:
    """An actor's object asked as an actor is: many of them cost no processes."""

    def __init__(self, shard: IndexShard) -> None:
        self._shard = shard

    def __getattr__(self, method: str) -> Any:
        def ask(*arguments: Any) -> ray.ObjectRef:
            found = [ray.get(each) if isinstance(each, ray.ObjectRef) else each for each in arguments]
            return ray.put(getattr(self._shard, method)(*found))

        return SimpleNamespace(remote=ask)


def load_here(gallery: Gallery) -> Gallery:
    """Load a gallery's shards into this process."""
    plan, slots = gallery._parts()
    gallery._actors = [InThisProcess(IndexShard(plan, mine, 1)) for mine in slots]
    gallery._identities = ray.put([ray.get(actor.identities.remote()) for actor in gallery._actors])
    return gallery


@pytest.fixture(scope="module")
def galleries(ray_session: None, gallery_set: tuple[Dataset, np.ndarray, np.ndarray]) -> Iterator[list[Gallery]]:
    """The same set as one index of cells, held by 3 actors, and in this process by 1 and 7, and searched flat."""
    dataset = gallery_set[0]
    with Gallery(dataset, DIM, GalleryOptions("IVF16,SQfp16", num_actors=3)) as gallery:
        gallery.load()
        here = [load_here(Gallery(dataset, DIM, GalleryOptions("IVF16,SQfp16", num_actors=number))) for number in (1, 7)]
        yield [gallery, *here, load_here(Gallery(dataset, DIM, GalleryOptions("Flat", num_actors=4)))]


def test_search_equals_brute_force(galleries: list[Gallery], gallery_set: tuple[Dataset, np.ndarray, np.ndarray]) -> None:
    """An index all of whose cells are probed is exact too."""
    _, vectors, identities = gallery_set
    queries = np.concatenate([unit_rows(150, seed=5), vectors[:50]])  # the last ones tie with their duplicates
    own = np.concatenate([np.full(150, -1), np.arange(50)])
    labels = np.concatenate([np.arange(250, 400), identities[:50]])  # 300 and above have no image
    everything = similarities(queries, vectors)
    thresholds = np.stack([np.sort(everything, 1)[:, -4], everything[:, 17], np.full(200, np.nan, np.float32)], 1)
    expected_scores, expected_ids = brute_force(queries, vectors, 11)
    for gallery in galleries:
        assert gallery.exact
        found = gallery.search(queries, 11, thresholds)
        np.testing.assert_array_equal(found.ids, expected_ids)
        np.testing.assert_array_equal(found.scores, expected_scores)
        np.testing.assert_array_equal(found.nearer, (everything[:, :, None] > thresholds[:, None, :]).sum(axis=1))
        assert (found.scanned == len(vectors)).all()
        counts, best = gallery.same_identity(queries, labels, own)
        for query in range(len(queries)):
            others = [row for row in np.flatnonzero(identities == labels[query]) if row != own[query]]
            assert counts[query] == len(others)
            np.testing.assert_equal(best[query], max(everything[query, others], default=np.float32(np.nan)))
    assert [len(gallery._actors) for gallery in galleries] == [3, 1, 7, 4]


def test_cells_that_are_not_probed_are_all_that_is_missed(
    galleries: list[Gallery], gallery_set: tuple[Dataset, np.ndarray, np.ndarray]
) -> None:
    """Against brute force within the probed cells, which any number of actors gives; counts are never too high."""
    _, vectors, _ = gallery_set
    queries = np.concatenate([unit_rows(100, seed=5), vectors[:50]])
    everything = similarities(queries, vectors)
    thresholds = np.sort(everything, 1)[:, -20:-19]
    cells = galleries[0]._cells
    assert cells is not None
    seen = np.array([np.isin(cells.nearest(vectors, 1)[:, 0], mine) for mine in cells.nearest(queries, 4)])
    visible = np.where(seen, everything, np.float32(-np.inf))
    nearer = (visible > thresholds).sum(axis=1, keepdims=True)
    assert (nearer < (everything > thresholds).sum(axis=1, keepdims=True)).any(), "the example must be one in which something is missed"
    for gallery in galleries[:3]:
        gallery.num_probes = 4
        assert not gallery.exact
        found = gallery.search(queries, 5, thresholds)
        gallery.num_probes = 16
        np.testing.assert_array_equal(found.ids, np.argsort(-visible, axis=1, kind="stable")[:, :5])
        np.testing.assert_array_equal(found.nearer, nearer)
        np.testing.assert_array_equal(found.scanned, seen.sum(axis=1))


def test_calibration_reaches_its_recall(galleries: list[Gallery], gallery_set: tuple[Dataset, np.ndarray, np.ndarray]) -> None:
    _, vectors, _ = gallery_set
    queries = unit_rows(200, seed=8)
    nearest = similarities(queries, vectors).max(axis=1)
    probes, gallery = [], galleries[1]
    for recall in (0.5, 0.9, 1.0):
        share = calibrate(gallery, Question(queries), recall)
        assert share >= recall
        assert (gallery.search(queries, 1).scores[:, 0] == nearest).mean() == share
        probes.append(gallery.num_probes)
    assert probes == sorted(probes)
    assert probes[0] < 16
    assert calibrate(galleries[3], Question(queries)) == 1.0


def test_codes_propose_and_embeddings_decide(ray_session: None, gallery_set: tuple[Dataset, np.ndarray, np.ndarray]) -> None:
    dataset, vectors, _ = gallery_set
    queries = vectors[100:200]
    everything = similarities(queries, vectors)
    thresholds = np.sort(everything, 1)[:, -4:-3]
    with Gallery(dataset, DIM, GalleryOptions("IVF16,PQ12", num_actors=2)) as gallery:
        assert not gallery.exact
        found = gallery.search(queries, 3, thresholds)
        exact = gallery.search(queries, 3, thresholds, exact=True)
    assert (found.ids[:, 0] == np.arange(100, 200)).mean() > 0.9
    for column in range(3):
        here = found.ids[:, column]
        np.testing.assert_array_equal(found.scores[:, column], everything[np.arange(100), here])  # exact, whatever the codes
    assert (found.nearer <= exact.nearer).all()
    np.testing.assert_array_equal(exact.nearer, (everything > thresholds).sum(axis=1, keepdims=True))


def test_an_index_is_built_once_and_whole(galleries: list[Gallery], gallery_set: tuple[Dataset, np.ndarray, np.ndarray]) -> None:
    """Three galleries made one index, beside the embeddings; it verifies, and the intermediate set is gone."""
    dataset, vectors, identities = gallery_set
    root = dataset.url.removesuffix("/embeddings/toy")
    sets = {stored.key.split("/")[1] for stored in open_store(root).list("embeddings/")}
    assert len(sets) == 2
    index = Dataset(f"{root}/embeddings/{max(sets)}", ".parquet")
    assert verify(index.url, ".parquet").ok
    assert [stored.key for stored in index.store.list("attempts/")] == ["attempts/00001.json"]
    parts = [read_part(index, name, DIM) for name in index.names()]
    ids = np.concatenate([part.ids for part in parts])
    assert sorted(ids) == list(range(len(vectors)))
    np.testing.assert_array_equal(np.concatenate([part.rows.vectors for part in parts]), vectors[ids])
    np.testing.assert_array_equal(np.concatenate([part.rows.identities for part in parts]), identities[ids])
    assert [key for part in parts for key in part.rows.keys] == [f"k{row}" for row in ids]
    assert (np.diff(np.concatenate([part.cells for part in parts])) >= 0).all(), "parts are runs of cells"


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    index = write_set(tmp_path, unit_rows(10), np.arange(10), (10,))
    with pytest.raises(GalleryError, match=r"part 00000: no table of an index.*Delete this index"):
        IndexShard(Plan(index.url, DIM, cells=True), [("00000", 0)], 1).identities()


def test_float32_queries_and_small_galleries(ray_session: None, tmp_path: Path) -> None:
    vectors = unit_rows(5)
    dataset = write_set(tmp_path, vectors, np.arange(5), (2, 3))
    queries = unit_rows(7, seed=2).astype(np.float32)
    with Gallery(dataset, DIM, GalleryOptions(num_actors=9)) as gallery:
        found = gallery.search(queries, 8)
        assert gallery.search(queries[:0], 3).ids.shape == (0, 3)
        assert gallery.search(queries, 0).ids.shape == (7, 0)
    expected_scores, expected_ids = brute_force(queries, vectors, 5)
    np.testing.assert_array_equal(found.ids[:, :5], expected_ids)
    np.testing.assert_allclose(found.scores[:, :5], expected_scores, atol=1e-6)
    assert (found.ids[:, 5:] == -1).all()
    assert np.isneginf(found.scores[:, 5:]).all()
    for factory, message in (("IVF64,Flat", "64 cells for 5 images"), ("HNSW32", "'HNSW32': give auto, Flat, or IVF")):
        with pytest.raises(ValueError, match=message):
            Gallery(dataset, DIM, GalleryOptions(factory))


@pytest.mark.faults
def test_an_actor_killed_in_mid_search_changes_nothing(
    galleries: list[Gallery], gallery_set: tuple[Dataset, np.ndarray, np.ndarray]
) -> None:
    _, vectors, _ = gallery_set
    gallery, thresholds = galleries[0], np.full((len(vectors), 1), 0.1, np.float32)
    gallery.num_probes = 16
    before = gallery.search(vectors, 5, thresholds)
    pid = ray.get(gallery._actors[0].__ray_call__.remote(lambda self: os.getpid()))
    killer = threading.Timer(0.02, os.kill, (pid, signal.SIGKILL))
    killer.start()
    after = gallery.search(vectors, 5, thresholds)
    killer.join()
    again = gallery.search(vectors, 5, thresholds)
    assert ray.get(gallery._actors[0].__ray_call__.remote(lambda self: os.getpid())) != pid
    for found in (after, again):
        for name in ("scores", "ids", "nearer", "scanned"):
            np.testing.assert_array_equal(getattr(before, name), getattr(found, name))
    ray.kill(gallery._actors[1])
    with pytest.raises(GalleryError, match="gallery actor died"):
        gallery.search(vectors[:30], 5)


def test_a_gallery_never_takes_every_core(ray_session: None, gallery_set: tuple[Dataset, np.ndarray, np.ndarray]) -> None:
    with pytest.raises(GalleryError, match="2 gallery actors ask for 2 CPU of the cluster's 2, and the workers need one"):
        Gallery(gallery_set[0], DIM, GalleryOptions(num_actors=2, cpus_per_actor=1))
    with pytest.raises(GalleryError, match="1 gallery actors ask for 1 GPU"):
        Gallery(gallery_set[0], DIM, GalleryOptions(num_actors=1, gpus_per_actor=1))


def _zero(rows: np.ndarray) -> None:
    rows[3] = 0


def _nan(rows: np.ndarray) -> None:
    rows[3, 0] = np.nan


@pytest.mark.parametrize(("damage", "dim", "message"), [(_zero, DIM, "row 3"), (_nan, DIM, "row 3"), (np.copy, 64, "64 dimensions")])
def test_bad_embeddings_are_refused_by_name(tmp_path: Path, damage: Callable[[np.ndarray], Any], dim: int, message: str) -> None:
    vectors = unit_rows(10)
    damage(vectors)
    dataset = write_set(tmp_path, vectors, np.arange(10), (10,))
    file = re.escape(str(dataset.manifest("00000").file))
    with pytest.raises(GalleryError, match=f"{file}.*{message}"):
        IndexShard(Plan(dataset.url, dim), [("00000", 0)], 1).identities()


def test_damaged_missing_and_unknown_shards(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(GalleryError, match="facemae embed"):
        Gallery(Dataset(str(tmp_path / "nothing"), ".parquet"), DIM)
    dataset = write_set(tmp_path / "set", unit_rows(10), np.arange(10), (4, 6))
    manifest = dataset.manifest("00001")
    dataset.store.put(str(manifest.file), dataset.store.get(str(manifest.file))[:-7] + b"changed")
    with Gallery(dataset, DIM) as gallery:
        assert gallery.start("00001") == 4
        with pytest.raises(GalleryError, match="shard 00002"):
            gallery.start("00002")
        with pytest.raises(GalleryError, match=r"00001-.*is not what its manifest says") as caught:
            gallery.load()
    assert caught.value.fatal
    assert "Traceback" not in str(caught.value)


def test_unit_rows() -> None:
    require_unit_rows(unit_rows(1000, dim=512), 512, "here")
    require_unit_rows(unit_rows(0), DIM, "here")
    with pytest.raises(GalleryError, match="here: 2 embeddings"):
        require_unit_rows(np.array([[1, 0], [2, 0], [0, 0.9]], np.float16), 2, "here")
