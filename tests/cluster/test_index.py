"""The gallery against brute force: every similarity computed, every row sorted."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.attempt import Attempt
from cluster.dataset import Dataset, Labels, ShardData
from cluster.embedding import Embeddings, write_embeddings
from cluster.index import Gallery, GalleryError, GalleryOptions, GalleryShard, require_unit_rows

DIM = 48
SIZES = (700, 1, 350, 900, 20, 529)


def unit_rows(count: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write_set(root: Path, vectors: np.ndarray, identities: np.ndarray, sizes: tuple[int, ...] = SIZES) -> Dataset:
    """Embedding shards 00000, 00001, ... of the given sizes; keys say the row's number."""
    dataset = Dataset(str(root), ".parquet")
    for number, (start, size) in enumerate(zip(np.cumsum((0, *sizes)), sizes, strict=False)):
        span = slice(int(start), int(start) + size)
        rows = Embeddings([f"k{row}" for row in range(span.start, span.stop)], identities[span], vectors[span])
        data = ShardData(write_embeddings(rows), size, Labels.of(rows.identities.tolist()))
        dataset.commit(f"{number:05d}", data, fingerprint="f", attempt=Attempt("run", 1), seconds={})
    return dataset


def brute_force(queries: np.ndarray, gallery: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = (queries.astype(np.float64) @ gallery.astype(np.float64).T).astype(np.float32)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


@pytest.fixture(scope="module")
def gallery_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """2500 rows with exact duplicates in different shards, so that ties occur within and across actors."""
    vectors = unit_rows(sum(SIZES))
    vectors[2000:2040] = vectors[:40]
    vectors[1000:1020] = vectors[:20]
    identities = np.random.default_rng(1).integers(0, 300, len(vectors))
    return write_set(tmp_path_factory.mktemp("gallery"), vectors, identities), vectors, identities


@pytest.mark.parametrize("num_actors", [1, 2, 3])
def test_search_equals_brute_force(ray_session: None, gallery_set: tuple[Dataset, np.ndarray, np.ndarray], num_actors: int) -> None:
    dataset, vectors, identities = gallery_set
    queries = np.concatenate([unit_rows(150, seed=5), vectors[:50]])  # the last ones tie with their duplicates
    own = np.concatenate([np.full(150, -1), np.arange(50)])
    labels = np.concatenate([np.arange(250, 400), identities[:50]])  # 300 and above have no image
    with Gallery(dataset, DIM, GalleryOptions(num_actors=num_actors)) as gallery:
        assert len(gallery) == len(vectors)
        scores, ids = gallery.search(queries, 11)
        counts, best = gallery.same_identity(queries, labels, own)
        keys, found_labels = gallery.lookup(ids[:, 0])
    expected_scores, expected_ids = brute_force(queries, vectors, 11)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)
    assert keys == [f"k{row}" for row in expected_ids[:, 0]]
    np.testing.assert_array_equal(found_labels, identities[expected_ids[:, 0]])
    everything = (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
    for query in range(len(queries)):
        others = [row for row in np.flatnonzero(identities == labels[query]) if row != own[query]]
        assert counts[query] == len(others)
        np.testing.assert_equal(best[query], max(everything[query, others], default=np.float32(np.nan)))


def test_float32_queries_and_small_galleries(ray_session: None, tmp_path: Path) -> None:
    vectors = unit_rows(5)
    dataset = write_set(tmp_path, vectors, np.arange(5), (2, 3))
    queries = unit_rows(7, seed=2).astype(np.float32)
    with Gallery(dataset, DIM, GalleryOptions(num_actors=9)) as gallery:
        scores, ids = gallery.search(queries, 8)
        assert gallery.search(queries[:0], 3)[0].shape == (0, 3)
    expected_scores, expected_ids = brute_force(queries, vectors, 5)
    np.testing.assert_array_equal(ids[:, :5], expected_ids)
    np.testing.assert_allclose(scores[:, :5], expected_scores, atol=1e-6)
    assert (ids[:, 5:] == -1).all()
    assert np.isneginf(scores[:, 5:]).all()


def one_shard(root: Path, vectors: np.ndarray) -> GalleryShard:
    """The actor's class without Ray."""
    dataset = write_set(root, vectors, np.zeros(len(vectors), np.int64), (len(vectors),))
    return GalleryShard(dataset.url, [("00000", 0)], vectors.shape[1], 1)


def test_more_ties_than_candidates(tmp_path: Path) -> None:
    vectors = unit_rows(1200)
    vectors[np.random.default_rng(3).permutation(1200)[:300]] = vectors[0]
    scores, ids = one_shard(tmp_path, vectors).search(vectors[:3], 11)
    expected_scores, expected_ids = brute_force(vectors[:3], vectors, 11)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)


def test_differences_below_the_rounding_of_float32(tmp_path: Path) -> None:
    """300 near copies, less than 1e-6 apart: FAISS's first candidates miss some of the nearest."""
    rng = np.random.default_rng(3)
    vectors, queries = unit_rows(600, dim=512), unit_rows(20, seed=9, dim=512)
    queries[:, :64] /= 64
    queries = (queries / np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)).astype(np.float16)
    copies = rng.permutation(600)[:300]
    vectors[copies] = queries[0]
    vectors[copies, :64] = 2.0**-10 + rng.integers(0, 8, (300, 64)) * 2.0**-20
    shard = one_shard(tmp_path, vectors)
    scores, ids = shard.search(queries, 11)
    expected_scores, expected_ids = brute_force(queries, vectors, 11)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)
    rough = shard._index.search(queries.astype(np.float32), 16)[1]
    assert any(set(expected) - set(found) for expected, found in zip(expected_ids, rough, strict=True)), (
        "the example must be one that float32 gets wrong"
    )


def test_lost_actor_is_rebuilt(ray_session: None, gallery_set: tuple[Dataset, np.ndarray, np.ndarray]) -> None:
    dataset, vectors, _ = gallery_set
    with Gallery(dataset, DIM, GalleryOptions(num_actors=2)) as gallery:
        before = gallery.search(vectors[:30], 5)
        pid = ray.get(gallery._actors[0].__ray_call__.remote(lambda self: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        after = gallery.search(vectors[:30], 5)
        ray.kill(gallery._actors[1])
        with pytest.raises(GalleryError, match="gallery actor died"):
            gallery.search(vectors[:30], 5)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1], after[1])


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
        GalleryShard(dataset.url, [("00000", 0)], dim, 1).size()


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
        with pytest.raises(GalleryError, match="0 to 9"):
            gallery.lookup(np.array([10]))
        with pytest.raises(GalleryError, match=r"00001-.*is not what its manifest says") as caught:
            gallery.load()
    assert caught.value.fatal
    assert "Traceback" not in str(caught.value)


def test_unit_rows() -> None:
    require_unit_rows(unit_rows(1000, dim=512), 512, "here")
    require_unit_rows(unit_rows(0), DIM, "here")
    with pytest.raises(GalleryError, match="here: 2 embeddings"):
        require_unit_rows(np.array([[1, 0], [2, 0], [0, 0.9]], np.float16), 2, "here")
