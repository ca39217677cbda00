"""The search as a stage against brute force: the full similarity matrix of float64, sorted."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster.attempt import Attempt
from cluster.dataset import Dataset, Labels, ShardData
from cluster.embedded import EmbeddedSet, GalleryError, read_shard, require_same_recognizer
from cluster.embedding import Embeddings, write_embeddings
from cluster.index import Gallery, GalleryOptions
from cluster.leakage import LeakageProcessor, run_search, summarise
from cluster.neighbours import Neighbours
from cluster.processor import Unit
from cluster.ranks import Ranks, read_ranks, write_ranks
from cluster.shard import ShardError
from cluster.stage import StageOptions, StageResult
from cluster.store import open_store
from cluster.verify import verify
from facemae.curve import depths
from facemae.linking import NUM_BINS, histogram
from facemae.rank import UNDEFINED

DIM = 32
SHARD = 60
NUM_SHARDS = 5
NAME = "toy"


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def write_set(root: Path, rows: Embeddings, gaps: Collection[str] = (), **recognizer: Any) -> EmbeddedSet:
    """A finished image set (its dataset.json only) with embeddings in shards of SHARD rows; keys in ``gaps`` have none."""
    images = Dataset(str(root))
    images.finish("images", {"parent": None, "config": {}, "fingerprint": f"images of {root.name}"}, [])
    output = images.embeddings(NAME)
    for number, start in enumerate(range(0, len(rows), SHARD)):
        kept = [row for row in range(start, min(start + SHARD, len(rows))) if rows.keys[row] not in gaps]
        part = Embeddings([rows.keys[row] for row in kept], rows.identities[kept], rows.vectors[kept])
        data = ShardData(write_embeddings(part) if kept else None, len(kept), Labels.of(part.identities.tolist()))
        output.commit(f"{number:05d}", data, fingerprint="f", attempt=Attempt("run", 1), seconds={})
    description = {"name": NAME, "sha256": "0" * 64, "dim": DIM, "mean": [0.5] * 3, "std": [0.5] * 3, **recognizer}
    lineage = {"parent": {"fingerprint": f"images of {root.name}"}, "config": {"recognizer": description}, "fingerprint": f"of {root.name}"}
    output.finish("embeddings", lineage, output.manifests())
    return EmbeddedSet.open(str(root), NAME)


def faces(seed: int = 0) -> tuple[Embeddings, Embeddings]:
    """Originals in clusters by identity, and protected ones of which a part is close to its original. Some rows tie exactly."""
    rng = np.random.default_rng(seed)
    count = SHARD * NUM_SHARDS
    identities = np.sort(rng.integers(0, 90, count))
    originals = unit_rows(rng.standard_normal((90, DIM))[identities] + 0.8 * rng.standard_normal((count, DIM)))
    noise = np.where(rng.random((count, 1)) < 0.4, 0.05, 3.0)
    protected = unit_rows(originals + noise * rng.standard_normal((count, DIM)))
    originals[200:203], protected[100] = originals[10], originals[10]
    keys = [f"k{row:04d}" for row in range(count)]
    return Embeddings(keys, identities, originals), Embeddings(keys, identities, protected)


def brute_force(queries: Embeddings, gallery: Embeddings, *, leave_out_own: bool) -> dict[str, tuple[int, int, int, float, float, float]]:
    """Key -> rank of the image, of the identity, other images, similarity to both mates and to the nearest."""
    everything = (queries.vectors.astype(np.float64) @ gallery.vectors.astype(np.float64).T).astype(np.float32)
    place = {key: row for row, key in enumerate(gallery.keys)}
    found = {}
    for scores, key, identity in zip(everything, queries.keys, queries.identities, strict=True):
        if key not in place:
            continue
        own = place[key]
        elsewhere = np.delete(scores, own)
        mates = elsewhere[np.delete(gallery.identities, own) == identity]
        image = UNDEFINED if leave_out_own else int(np.sum(np.sort(scores)[::-1] > scores[own])) + 1
        person = int(np.sum(elsewhere > mates.max())) + 1 if len(mates) else UNDEFINED
        mate = np.nan if leave_out_own else scores[own]
        top = elsewhere.max() if leave_out_own else scores.max()
        found[key] = (image, person, len(mates), mate, max(mates, default=np.nan), top)
    return found


def search(
    queries: EmbeddedSet, gallery_set: EmbeddedSet, output: Dataset, num_actors: int = 1, num_workers: int = 1
) -> tuple[StageResult, dict[str, tuple[Any, ...]]]:
    """Run a search; its rows by key."""
    with Gallery(gallery_set.dataset, DIM, GalleryOptions(num_actors=num_actors)) as gallery:
        result = run_search(queries, gallery_set, gallery, output, name="search", options=StageOptions(num_workers=num_workers))
    rows: dict[str, tuple[Any, ...]] = {}
    for manifest in output.manifests():
        if manifest.file is not None:
            table, _ = read_ranks(output.read(manifest))
            columns = (table.rank_image, table.rank_identity, table.others, table.mate_similarity, table.identity_similarity)
            rows |= dict(zip(table.key, zip(*columns, table.top_similarity, strict=True), strict=True))
    return result, rows


def assert_rows_equal(found: dict[str, tuple[Any, ...]], expected: dict[str, tuple[Any, ...]]) -> None:
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        np.testing.assert_array_equal(np.array(found[key], np.float64), np.array(row, np.float64), err_msg=key)


def test_protected_to_original_equals_brute_force(ray_session: None, tmp_path: Path) -> None:
    originals, protected = faces()
    unmeasured = {"k0003", "k0004", *(f"k{row:04d}" for row in range(120, 180))}  # a whole shard of originals without embeddings
    gallery_set = write_set(tmp_path / "original", originals, gaps=unmeasured)
    queries = write_set(tmp_path / "protected", protected, gaps={"k0007"})
    output = Dataset(str(tmp_path / "ranks"), ".parquet")
    result, rows = search(queries, gallery_set, output)
    embedded = [row for row, key in enumerate(originals.keys) if key not in unmeasured]
    kept = Embeddings([originals.keys[row] for row in embedded], originals.identities[embedded], originals.vectors[embedded])
    expected = brute_force(protected, kept, leave_out_own=False)
    expected.pop("k0007")
    assert_rows_equal(rows, expected)
    by_image = {row[0] for row in expected.values()}
    assert by_image >= {1, 2}, "the example must hold traced images"
    assert max(by_image) > 100, "and untraced ones"
    counts = {name: result.description[name] for name in ("samples_in", "samples", "quarantined")}
    assert counts == {"samples_in": 299, "samples": 237, "quarantined": 62}
    assert {row.reason for row in output.ledger(output.manifest("00002"))} == {"no-mate"}
    assert verify(output.url, ".parquet").ok
    again = Dataset(str(tmp_path / "again"), ".parquet")
    search(queries, gallery_set, again, num_actors=3, num_workers=2)
    assert [m.sha256 for m in again.manifests()] == [m.sha256 for m in output.manifests()]
    _check_summary(output, rows, originals.identities)


def _check_summary(output: Dataset, rows: dict[str, tuple[Any, ...]], identities: np.ndarray) -> None:
    """The summary is what a sort over all rows says."""
    found = summarise(output).to_json(num_gallery=238)
    for column, curve in ((0, found["image"]), (1, found["identity"])):
        all_ranks = np.array([row[column] for row in rows.values() if row[column] != UNDEFINED])
        assert curve["queries"] == len(all_ranks)
        assert curve["hits"] == [int(np.sum((all_ranks >= 1) & (all_ranks <= k))) for k in depths(238)]
    assert found["image"]["chance"][0] == pytest.approx(1 / 238)
    assert np.array_equal(found["histograms"]["mate"], histogram(np.array([row[3] for row in rows.values()], np.float32)))
    label = found["image"]["by_identity"]["worst"][0]
    mine = [rows[key][0] for key in rows if identities[int(key[1:])] == label["identity"]]
    assert (label["images"], label["traced"]) == (len(mine), sum(rank == 1 for rank in mine))


def test_what_cells_leave_out_can_only_overstate_the_leakage(long: None, ray_session: None, tmp_path: Path) -> None:
    originals, protected = faces()
    gallery_set, queries = write_set(tmp_path / "original", originals), write_set(tmp_path / "protected", protected)
    expected = brute_force(protected, originals, leave_out_own=False)
    digests = []
    for num_actors in (1, 2):
        output = Dataset(str(tmp_path / f"ranks{num_actors}"), ".parquet")
        options = GalleryOptions("IVF16,SQfp16", recall=0.6, num_actors=num_actors)
        with Gallery(gallery_set.dataset, DIM, options) as gallery:
            run_search(queries, gallery_set, gallery, output, name="search", options=StageOptions(num_workers=1))
            assert 1 <= gallery.num_probes < 16
        digests.append([manifest.sha256 for manifest in output.manifests()])
    assert digests[0] == digests[1]
    tables = [read_ranks(output.read(manifest))[0] for manifest in output.manifests()]
    for table in tables:
        for row, key in enumerate(table.key):  # fewer queries than the sample asks for: every one is searched exactly besides
            image, person, others, mate, best, top = expected[key]
            assert (table.exact_image[row], table.exact_identity[row], table.others[row]) == (image, person, others)
            np.testing.assert_array_equal(
                [table.mate_similarity[row], table.identity_similarity[row], table.exact_top[row]], [mate, best, top]
            )
            assert table.rank_image[row] <= image
            assert table.rank_identity[row] <= person
            assert table.top_similarity[row] <= top
    assert sum(int((table.rank_image < table.exact_image).sum()) for table in tables) > 10, (
        "the example must be one in which something is missed"
    )
    found = summarise(output).to_json(300)
    truth = np.mean([row[0] == 1 for row in expected.values()])
    assert found["image"]["cmc"][0] >= truth
    assert found["sample"]["image"]["bounds"]["low"] <= truth <= found["sample"]["image"]["bounds"]["high"]
    assert found["sample"]["queries"] == 300
    with Gallery(gallery_set.dataset, DIM, options) as gallery:  # a second run finds everything done, without asking anybody
        again = run_search(queries, gallery_set, gallery, output, name="search", options=StageOptions(num_workers=1))
        assert (again.committed, gallery._actors) == (0, [])


def test_utility_by_cells_is_not_overstated(long: None, ray_session: None, tmp_path: Path) -> None:
    """That a query finds itself does not answer whether anybody is nearer than its person's other images."""
    _, protected = faces()
    one = write_set(tmp_path / "protected", protected)
    output = Dataset(str(tmp_path / "ranks"), ".parquet")
    with Gallery(one.dataset, DIM, GalleryOptions("IVF32,SQfp16")) as gallery:
        run_search(one, one, gallery, output, name="search", options=StageOptions(num_workers=1))
        assert gallery.num_probes > 1
    tables = [read_ranks(output.read(manifest))[0] for manifest in output.manifests()]
    found, exact = (np.concatenate([getattr(table, name) for table in tables]) for name in ("rank_identity", "exact_identity"))
    assert np.mean((found == 1) == (exact == 1)) >= 0.98


def test_a_set_searched_in_itself_leaves_each_image_out(ray_session: None, tmp_path: Path) -> None:
    originals, _ = faces()
    one = write_set(tmp_path / "original", originals)
    output = Dataset(str(tmp_path / "ranks"), ".parquet")
    _, rows = search(one, one, output)
    assert_rows_equal(rows, brute_force(originals, originals, leave_out_own=True))
    found = summarise(output)
    assert found.image.queries == 0
    assert set(found.histograms) == {"genuine", "impostor"}
    # no identity has more than nine images in a shard here, so every genuine pair within a shard is drawn, once
    expected = np.zeros(NUM_BINS, np.int64)
    for start in range(0, len(originals), SHARD):
        part = range(start, start + SHARD)
        scores = (originals.vectors[part].astype(np.float64) @ originals.vectors[part].astype(np.float64).T).astype(np.float32)
        same = originals.identities[part][:, None] == originals.identities[part]
        assert same.sum(axis=1).max() <= 9
        expected += histogram(scores[np.triu(same, 1)])
    np.testing.assert_array_equal(found.histograms["genuine"], expected)
    assert found.histograms["impostor"].sum() > 0.9 * 8 * len(originals)


def test_resume_does_only_what_is_missing(ray_session: None, tmp_path: Path) -> None:
    originals, protected = faces()
    gallery_set, queries = write_set(tmp_path / "original", originals), write_set(tmp_path / "protected", protected)
    output = Dataset(str(tmp_path / "ranks"), ".parquet")
    _, first = search(queries, gallery_set, output)
    for shard in ("00001", "00003"):
        output.store.delete(f"manifests/{shard}.json")
    result, second = search(queries, gallery_set, output)
    assert (result.committed, result.resumed) == (2, 3)
    assert_rows_equal(second, first)


def test_a_bad_gallery_ends_the_search_with_one_clear_line(ray_session: None, tmp_path: Path) -> None:
    originals, protected = faces()
    queries = write_set(tmp_path / "protected", protected)
    originals.vectors[77] = 0
    gallery_set = write_set(tmp_path / "original", originals)
    with pytest.raises(Exception, match=r"00001-\w+\.parquet: 1 embeddings are not of unit length \(row 17") as caught:
        search(queries, gallery_set, Dataset(str(tmp_path / "ranks"), ".parquet"))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("shrunk", ["original", "protected"])
def test_embeddings_that_expired_are_no_smaller_leakage(ray_session: None, tmp_path: Path, shrunk: str) -> None:
    originals, protected = faces()
    sets = {"original": write_set(tmp_path / "original", originals), "protected": write_set(tmp_path / "protected", protected)}
    sets[shrunk].dataset.store.delete("manifests/00002.json")
    message = rf"{shrunk}/embeddings/toy has 240 of its 300 embeddings left \(expired.*facemae embed"
    with pytest.raises(GalleryError, match=message):
        search(sets["protected"], sets["original"], Dataset(str(tmp_path / "ranks"), ".parquet"))


def test_a_file_of_embeddings_that_is_gone_is_named_with_its_remedy(tmp_path: Path) -> None:
    one = write_set(tmp_path / "original", faces()[0])
    file = one.dataset.manifest("00002").file
    assert file is not None
    one.dataset.store.delete(file)
    with pytest.raises(GalleryError, match=rf"{file} does not exist: delete manifests/00002\.json there too, and run `facemae embed`"):
        read_shard(one.dataset, "00002")


def test_what_goes_wrong_in_a_task_is_one_clear_line_too(ray_session: None, tmp_path: Path) -> None:
    """The number of cells is chosen in a task; what it cannot read is told as anywhere else."""
    originals, protected = faces()
    queries, gallery_set = write_set(tmp_path / "protected", protected), write_set(tmp_path / "original", originals)
    for manifest in queries.dataset.manifests():
        assert manifest.file is not None
        queries.dataset.store.delete(manifest.file)
    with Gallery(gallery_set.dataset, DIM, GalleryOptions("IVF8,SQfp16")) as gallery, pytest.raises(GalleryError) as caught:
        run_search(queries, gallery_set, gallery, Dataset(str(tmp_path / "ranks"), ".parquet"), name="search")
    assert re.fullmatch(
        r".*parquet does not exist: delete manifests/\d{5}\.json there too, and run `facemae embed` again", str(caught.value)
    )


class FakeGallery:
    """Numbers from 0, as a gallery of one shard; never searched."""

    exact = True

    def start(self, shard: str) -> int:
        return 0


class ShortSighted(FakeGallery):
    """Sees every image in a wider search, and every third otherwise; nobody has another image."""

    exact, num_probes, choice = False, 1, SimpleNamespace(factory="IVF16,SQfp16", num_cells=16)

    def __init__(self, rows: Embeddings) -> None:
        self._rows, self.asked = rows, list[tuple[int, int]]()

    def same_identity(self, vectors: np.ndarray, identities: np.ndarray, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(len(vectors), np.int64), np.full(len(vectors), np.nan, np.float32)

    def search(self, vectors: np.ndarray, k: int, thresholds: np.ndarray, exact: bool, wider: int) -> Neighbours:
        self.asked.append((len(vectors), wider))
        held = np.arange(len(self._rows))[:: 1 if wider > 1 else 3]
        scores = (vectors.astype(np.float64) @ self._rows.vectors[held].astype(np.float64).T).astype(np.float32)
        found = Neighbours.none(len(vectors), k, thresholds.shape[1])
        top = scores.argmax(axis=1)[:, None]
        nearer = (scores[:, :, None] > thresholds[:, None, :]).sum(axis=1)
        found.add(np.arange(len(vectors)), np.take_along_axis(scores, top, 1), held[top], nearer, np.full(len(vectors), len(held)))
        return found


@pytest.mark.parametrize("few", [True, False])
def test_the_few_at_rank_one_are_looked_at_again_in_more_cells(tmp_path: Path, few: bool) -> None:
    originals, protected = faces()
    strangers = unit_rows(np.random.default_rng(9).standard_normal(protected.vectors.shape))  # know nothing of their originals
    strangers[7] = originals.vectors[7]
    sets = [Embeddings(originals.keys, originals.identities, rows) for rows in (originals.vectors, strangers if few else protected.vectors)]
    gallery_set, queries = write_set(tmp_path / "original", sets[0]), write_set(tmp_path / "protected", sets[1])
    gallery = ShortSighted(Embeddings(originals.keys[:SHARD], originals.identities[:SHARD], originals.vectors[:SHARD]))
    processor = LeakageProcessor(queries, gallery_set, gallery, sample=0)  # type: ignore[arg-type]
    processor.open(1)
    content = processor.compute(Unit("00000"), processor.fetch(Unit("00000")))
    assert content.payload is not None
    rows, _ = read_ranks(content.payload)
    scores = (sets[1].vectors[:SHARD].astype(np.float64) @ originals.vectors[:SHARD].astype(np.float64).T).astype(np.float32)
    true = 1 + (scores > np.diag(scores)[:, None]).sum(axis=1)
    blind = 1 + (scores[:, ::3] > np.diag(scores)[:, None]).sum(axis=1)
    first = blind == 1
    assert gallery.asked == [(SHARD, 1), (first.sum(), 8)] if few else [(SHARD, 1)], "where many are at rank 1 it would cost too much"
    np.testing.assert_array_equal(rows.rank_image, np.where(first & few, true, blind))
    assert not few or (first.sum() > 1 and 1 <= (rows.rank_image == 1).sum() < first.sum()), "some are at rank 1 for want of cells"


def test_sets_that_do_not_belong_together(tmp_path: Path) -> None:
    originals, protected = faces()
    gallery_set = write_set(tmp_path / "original", originals)
    renamed = Embeddings([f"x{key}" for key in protected.keys], protected.identities, protected.vectors)
    relabelled = Embeddings(protected.keys, protected.identities + 1, protected.vectors)
    for name, rows, message in (("renamed", renamed, "no key of the queries"), ("relabelled", relabelled, "another identity")):
        queries = write_set(tmp_path / name, rows)
        processor = LeakageProcessor(queries, gallery_set, FakeGallery())  # type: ignore[arg-type]
        processor.open(1)
        with pytest.raises(GalleryError, match=f"shard 00000: .*{message}"):
            processor.compute(Unit("00000"), processor.fetch(Unit("00000")))
    with pytest.raises(GalleryError, match="has no shard 00009"):
        processor.fetch(Unit("00009"))


def test_embedded_sets_are_checked(tmp_path: Path) -> None:
    originals, _ = faces()
    Dataset(str(tmp_path / "bare")).finish("images", {"fingerprint": "x"}, [])
    with pytest.raises(GalleryError, match=r"embeddings/toy holds no data set.*facemae embed --input"):
        EmbeddedSet.open(str(tmp_path / "bare"), NAME)
    one = write_set(tmp_path / "one", originals)
    open_store(one.dataset.url).delete("dataset.json")
    with pytest.raises(GalleryError, match=r"is unfinished.*facemae embed"):
        EmbeddedSet.open(str(tmp_path / "one"), NAME)
    other = write_set(tmp_path / "other", originals, sha256="1" * 64)
    with pytest.raises(GalleryError, match=r"different recognisers \(sha256"):
        require_same_recognizer(one, other)
    Dataset(str(tmp_path / "other")).finish("images", {"fingerprint": "ingested again"}, [])
    with pytest.raises(GalleryError, match="another state"):
        EmbeddedSet.open(str(tmp_path / "other"), NAME)


def test_rank_tables_round_trip() -> None:
    ints, floats = np.array([1, 1 << 40, -1], np.int64), np.array([0.5, np.nan, -1], np.float32)
    identities, others = np.array([1, 2, 1 << 60], np.int64), np.array([3, 4, 0], np.int64)
    rows = Ranks(["a", "b", "ü"], identities, ints, ints[::-1], ints, ints, others, floats, floats[::-1], floats, floats)
    histograms = {"mate": histogram(np.array([0.5, -1], np.float32))}
    data = write_ranks(rows, histograms)
    assert data == write_ranks(rows, histograms)
    back, found = read_ranks(data)
    assert list(back.key) == list(rows.key)
    for name in ("identity", "rank_image", "rank_identity", "others", "mate_similarity", "identity_similarity", "top_similarity"):
        np.testing.assert_array_equal(getattr(back, name), getattr(rows, name))
        assert getattr(back, name).dtype == getattr(rows, name).dtype
    np.testing.assert_array_equal(found["mate"], histograms["mate"])
    for bad in (b"", data[:-9], write_embeddings(Embeddings(["a"], np.array([1], np.int64), np.array([[1, 0]], np.float16)))):
        with pytest.raises(ShardError, match="no table of ranks"):
            read_ranks(bad)
