"""``facemae verify`` of embeddings, of their index, and of what a build of it left behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from cluster.dataset import Dataset
from cluster.index import Gallery, GalleryOptions
from cluster.stage import StageOptions
from jobs.verify import main
from tests.cluster.test_index import DIM, unit_rows, write_set
from tests.cluster.test_verify import build

COUNT = 12


@pytest.fixture(scope="module")
def built(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of images with embeddings, their index, and the intermediate set that its builder was not allowed to remove."""
    root = tmp_path_factory.mktemp("built")
    images = build(str(root))
    embeddings = write_set(root / "embeddings" / "toy", unit_rows(COUNT), np.arange(COUNT) // 2, (4, 4, 4))
    description = embeddings.description()
    embeddings.describe({**description, "lineage": {**description["lineage"], "parent": {"url": images.url, "fingerprint": "f"}}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.index_build._remove", lambda cells: None)
        patch.setattr("cluster.index_build.DEFAULTS", StageOptions(num_workers=1))
        Gallery(embeddings, DIM, GalleryOptions("IVF3,SQfp16"))._parts()
    return root


@pytest.fixture
def root(built: Path, tmp_path: Path) -> Path:
    """A copy of it, that says so."""
    shutil.copytree(built, tmp_path / "set")
    for file in (tmp_path / "set").rglob("dataset.json"):
        file.write_text(file.read_text().replace(str(built), str(tmp_path / "set")))
    return tmp_path / "set"


def one(root: Path, pattern: str) -> Path:
    (found,) = (root / "embeddings").glob(pattern)
    return found


def verified(root: Path, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert main([str(root)]) == code
    return capsys.readouterr().out


def test_each_set_is_read_as_what_it_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {root / "embeddings" / "toy": "embeddings", one(root, "toy.index-*"): "index", one(root, "toy.cells-*"): "cells"}
    for path, kind in kinds.items():
        shown = verified(path, capsys)
        assert f"{path} ({kind}): {COUNT} in = {COUNT} out + 0 quarantined" in shown
        assert "nothing missing, nothing doubled, no stray object" in shown
        assert ("NOTE" in shown) is (kind == "cells")
    shown = verified(root, capsys)
    assert all(f"{path} ({kind})" in shown for path, kind in {root: "images", **kinds}.items())


def test_an_intermediate_set_says_what_it_is(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = f"NOTE     what the index of {root}/embeddings/toy is built from: the search that builds it takes this away, or delete all of it"
    cells = one(root, "toy.cells-*")
    assert note in verified(root, capsys)
    (cells / "dataset.json").unlink()  # its build was stopped
    shown = verified(root, capsys, code=2)
    assert note in shown
    assert f"PROBLEM  {cells} is unfinished, 1 shards are committed" in shown
    shutil.rmtree(cells)
    assert "NOTE" not in verified(root, capsys)


def test_an_index_that_is_not_complete(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the training of its quantiser on it is an index, and no stray of the images."""
    shutil.rmtree(one(root, "toy.cells-*"))
    index = one(root, "toy.index-*")
    note = f"NOTE     an index of {root}/embeddings/toy that is not complete: the search that began it goes on with it, or delete all of it"
    (index / "dataset.json").unlink()
    shown = verified(root, capsys, code=2)
    assert note in shown
    assert "PROBLEM  dataset.json" not in shown
    for part in ("manifests", "attempts", "shards", "index.json"):
        path = index / part
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shown = verified(root, capsys, code=2)
    assert note in shown
    assert "STRAY" not in shown
    assert re.search(rf"{re.escape(str(root))} \(images\).*?nothing missing, nothing doubled, no stray object", shown, re.DOTALL)


def test_an_index_of_embeddings_that_were_replaced(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(one(root, "toy.cells-*"))
    assert "NOTE" not in verified(root, capsys)
    embeddings = Dataset(str(root / "embeddings" / "toy"), ".parquet")
    content = embeddings.description()
    embeddings.describe({**content, "lineage": {**content["lineage"], "fingerprint": "g"}})
    note = f"NOTE     an index of embeddings that are no longer at {embeddings.url}: no search uses it, delete all of it"
    assert note in verified(root, capsys)
    shutil.rmtree(embeddings.url)
    assert note in verified(root, capsys)


def test_a_damaged_part_is_named(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = one(root, "toy.index-*")
    manifest = next(iter(sorted((index / "manifests").iterdir())))
    shard = index / json.loads(manifest.read_text())["file"]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    shown = verified(index, capsys, code=2)
    assert f"{shard} is not what its manifest says" in shown
    assert "REMEDY" in shown
