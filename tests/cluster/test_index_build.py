"""Builds of an index that are interrupted, killed, made twice at once or damaged afterwards: it is the same index, or an error by name."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

import cluster.index_build
from cluster.cells import CellsProcessor
from cluster.dataset import Dataset
from cluster.embedded import GalleryError
from cluster.index import Gallery, GalleryOptions
from cluster.neighbours import Neighbours
from cluster.progress import Progress
from cluster.stage import Interrupted, StageError, StageOptions
from cluster.verify import verify
from tests.cluster.test_index import DIM, SIZES, brute_force, load_here, unit_rows, write_set

OPTIONS = GalleryOptions("IVF16,SQfp16", num_actors=2)
VECTORS, IDENTITIES = unit_rows(sum(SIZES)), np.arange(sum(SIZES)) // 5
QUERIES, THRESHOLDS = unit_rows(40, seed=7), np.full((40, 1), 0.3, np.float32)

DRIVER = """
import os, signal, sys
import cluster.cells, cluster.stage
from cluster.dataset import Dataset
from cluster.index import Gallery, GalleryOptions
from cluster.progress import Progress
from cluster.session import session

address, url, stage, count = sys.argv[1:]

class Deadly(Progress):
    def committed(self, manifest, **facts):
        super().committed(manifest, **facts)
        if self._bar.desc.startswith(stage) and self._done == int(count):
            os.kill(os.getpid(), signal.SIGKILL)

cluster.cells.GROUP_BYTES, cluster.stage.Progress = 1, Deadly
with session(address):
    Gallery(Dataset(url, ".parquet"), 48, GalleryOptions("IVF16,SQfp16", num_actors=2)).load()
"""


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every embedding shard is a shard of the intermediate set; one worker, which starts sooner than two."""
    monkeypatch.setattr("cluster.cells.GROUP_BYTES", 1)
    monkeypatch.setattr("cluster.index_build.DEFAULTS", StageOptions(num_workers=1, in_flight=2))


@dataclass(frozen=True)
class Undisturbed:
    """An index that was built in one go: its bytes, what it answers, and a copy of it."""

    data: dict[str, bytes]
    answer: Neighbours
    copy: Path


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder, copy = (tmp_path_factory.mktemp(name) for name in ("undisturbed", "copy"))
    write_set(folder / "toy", VECTORS, IDENTITIES)
    answer = search_in(folder)
    data = data_of(index_in(folder))
    assert len(data) == 1 + 16, "the quantiser, and a part for each of 16 cells"
    shutil.copytree(index_in(folder), copy / index_in(folder).name)
    return Undisturbed(data, answer, copy)


@pytest.fixture
def folder(ray_session: None, tmp_path: Path) -> Path:
    """The same embeddings, without an index."""
    write_set(tmp_path / "toy", VECTORS, IDENTITIES)
    return tmp_path


@pytest.fixture
def built(folder: Path, undisturbed: Undisturbed) -> Path:
    """The same embeddings, with it."""
    return Path(shutil.copytree(undisturbed.copy, folder, dirs_exist_ok=True))


def search_in(folder: Path, num_probes: int = 5) -> Neighbours:
    """Build what is missing of the index and search with it, in this process."""
    gallery = load_here(Gallery(Dataset(str(folder / "toy"), ".parquet"), DIM, OPTIONS))
    gallery.num_probes = num_probes
    return gallery.search(QUERIES, 4, THRESHOLDS)


def index_in(folder: Path) -> Path:
    (found,) = folder.glob("toy.index-*")
    return found


def data_of(index: Path) -> dict[str, bytes]:
    """All of an index but its records of who did what when."""
    files = [*index.glob("shards/*"), *index.glob("*.safetensors"), *index.glob("*.faiss")]
    return {str(file.relative_to(index)): file.read_bytes() for file in files}


def intermediate(folder: Path) -> list[Path]:
    return [path for path in folder.glob("toy.cells-*/**/*") if path.is_file()]


def assert_same_answer(found: Neighbours, expected: Neighbours) -> None:
    for name in ("scores", "ids", "nearer", "scanned"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def assert_as_undisturbed(folder: Path, undisturbed: Undisturbed) -> None:
    """Finish the build."""
    assert_same_answer(search_in(folder), undisturbed.answer)
    assert data_of(index_in(folder)) == undisturbed.data
    assert verify(str(index_in(folder)), ".parquet").ok
    assert intermediate(folder) == []


def attempts_of(index: Path) -> set[int]:
    return {manifest.attempt for manifest in Dataset(str(index), ".parquet").manifests()}


@pytest.mark.parametrize(("stage", "count"), [("index: cells", 2), ("index: parts", 5)])
def test_a_build_that_is_asked_to_stop_resumes(
    folder: Path, undisturbed: Undisturbed, stage: str, count: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if stage == "index: cells":
        request.getfixturevalue("long")

    class Stopping(Progress):
        def committed(self, manifest: Any, **facts: Any) -> None:
            super().committed(manifest, **facts)
            if self._bar.desc.startswith(stage) and self._done == count:
                signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("cluster.stage.Progress", Stopping)
        with pytest.raises(Interrupted):
            search_in(folder)
    assert intermediate(folder), "an unfinished build keeps what it has"
    assert_as_undisturbed(folder, undisturbed)
    assert attempts_of(index_in(folder)) == ({1} if stage == "index: cells" else {1, 2})


def test_a_build_that_stopped_between_its_stages_resumes(
    long: None, folder: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not sort the embeddings again."""
    whole, sorted_sets = cluster.index_build.run_stage, list[str]()

    def stop_after(processor: Any, units: Any, output: Dataset, **options: Any) -> Any:
        done = whole(processor, units, output, **options)
        sorted_sets.append(f"{options['name']}: {done.committed} new, {done.resumed} there")
        if len(sorted_sets) == 1:
            raise Interrupted("stopped")
        return done

    monkeypatch.setattr(cluster.index_build, "run_stage", stop_after)
    with pytest.raises(Interrupted):
        search_in(folder)
    assert len([path for path in intermediate(folder) if path.parent.name == "shards"]) == len(SIZES)
    assert_as_undisturbed(folder, undisturbed)
    assert sorted_sets == ["index: cells: 6 new, 0 there", "index: cells: 0 new, 6 there", "index: parts: 16 new, 0 there"]


@pytest.mark.faults
def test_a_build_whose_driver_is_killed_twice_resumes(long: None, folder: Path, undisturbed: Undisturbed) -> None:
    """SIGKILL among the cells, then among the parts."""
    address = ray.get_runtime_context().gcs_address
    for stage, count in (("index: cells", 3), ("index: parts", 4)):
        command = [sys.executable, "-c", DRIVER, address, str(folder / "toy"), stage, str(count)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (index_in(folder) / "dataset.json").exists()
    assert_as_undisturbed(folder, undisturbed)
    assert len(attempts_of(index_in(folder))) == 2


def test_two_attempts_at_once_make_one_index(long: None, folder: Path, undisturbed: Undisturbed) -> None:
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: search_in(folder), range(2)):
            assert_same_answer(found, undisturbed.answer)
    assert_as_undisturbed(folder, undisturbed)


@pytest.mark.parametrize("moment", ["before the cells", "between", "before the last look"])
def test_the_slower_of_two_attempts_finds_the_index_complete(
    folder: Path, undisturbed: Undisturbed, moment: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The other one took the intermediate set away while this one still worked with it."""
    if moment != "before the last look":
        request.getfixturevalue("long")
    whole, calls = cluster.index_build.run_stage, list[str]()

    def overtaken(processor: Any, units: Any, output: Dataset, **options: Any) -> Any:
        calls.append(options["name"])
        mine, first = len(calls) <= 2, isinstance(processor, CellsProcessor)
        if mine and first and moment == "before the cells":
            calls.append("another")
            search_in(folder)
        if mine and first and moment == "before the last look":
            monkeypatch.setattr("cluster.stage._require_data", overtaken_look)
        done = whole(processor, units, output, **options)
        if mine and first and moment == "between":
            calls.append("another")
            search_in(folder)
        return done

    look = cluster.stage._require_data

    def overtaken_look(output: Dataset, manifests: Any) -> None:
        monkeypatch.setattr("cluster.stage._require_data", look)
        calls.append("another")
        search_in(folder)
        look(output, manifests)

    monkeypatch.setattr(cluster.index_build, "run_stage", overtaken)
    assert_same_answer(search_in(folder), undisturbed.answer)
    assert "another" in calls
    assert intermediate(folder) == []
    assert_as_undisturbed(folder, undisturbed)


def test_a_failure_of_ones_own_is_not_taken_for_another_attempts_success(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise StageError("out of memory")

    monkeypatch.setattr(cluster.index_build, "run_stage", fail)
    with pytest.raises(StageError, match="out of memory"):
        search_in(folder)


def test_changed_embeddings_get_another_index(built: Path) -> None:
    before = index_in(built)
    shutil.rmtree(built / "toy")
    changed = unit_rows(sum(SIZES), seed=99)
    write_set(built / "toy", changed, IDENTITIES, fingerprint="g")
    found = search_in(built, num_probes=16)
    np.testing.assert_array_equal(found.ids, brute_force(QUERIES, changed, 4)[1])
    assert len({*built.glob("toy.index-*")} - {before}) == 1


def delete_object(index: Path) -> str:
    shard = next(index.glob("shards/00007-*"))
    shard.unlink()
    return rf"{re.escape(str(index))}, part 00007: .*{shard.name} does not exist\. Delete this index; it is built again"


def damage_object(index: Path) -> str:
    shard = next(index.glob("shards/00007-*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    return rf"{re.escape(str(index))}, part 00007: .*{shard.name} is not what its manifest says.*Delete this index; it is built again"


@pytest.mark.parametrize("harm", [delete_object, damage_object])
def test_a_part_that_was_deleted_or_damaged_is_named(built: Path, harm: Callable[[Path], str]) -> None:
    message = harm(index_in(built))
    with pytest.raises(GalleryError, match=message) as caught:
        search_in(built)
    assert caught.value.fatal


def test_a_part_without_a_manifest_is_made_anew(folder: Path, undisturbed: Undisturbed) -> None:
    search_in(folder)
    index = index_in(folder)
    for shard in ("00003", "00015"):
        (index / f"manifests/{shard}.json").unlink()
        next(index.glob(f"shards/{shard}-*")).unlink()
    assert_as_undisturbed(folder, undisturbed)
    assert attempts_of(index) == {1, 2}


def test_a_damaged_description_is_written_anew(long: None, folder: Path, undisturbed: Undisturbed) -> None:
    search_in(folder)
    (index_in(folder) / "dataset.json").write_text("{")
    assert_as_undisturbed(folder, undisturbed)
    assert attempts_of(index_in(folder)) == {1}


def test_an_index_that_lacks_images_is_refused(built: Path) -> None:
    """A part was given up whole."""
    index = Dataset(str(index_in(built)), ".parquet")
    content = index.description()
    index.describe({**content, "samples": content["samples"] - 3})
    with pytest.raises(GalleryError, match=r"holds 2497 of 2500 images: delete it; it is built again"):
        search_in(built)
