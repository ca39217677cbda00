"""Recognisers in object storage: the same embeddings as from a file, read by each worker, and never another file."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.recognizer_file import StoredRecognizer, has_sidecar, load_recognizer, local_recognizer, open_recognizer
from cluster.store import StoreError, open_store
from facemae.recognizer.onnx import OnnxRecognizer
from tests.jobs.test_leakage_job import write_recognizer

pytestmark = pytest.mark.s3
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_recognizer(tmp_path / "alpha.onnx", 0, "the name")


@pytest.fixture
def url(s3_root: str, file: Path) -> str:
    store = open_store(s3_root)
    store.put("nets/alpha.onnx", file.read_bytes())
    store.put("nets/alpha.json", file.with_suffix(".json").read_bytes())
    return f"{s3_root}/nets/alpha.onnx"


def test_what_travels_is_a_reference_that_gives_the_same_embeddings(url: str, file: Path) -> None:
    local, stored = open_recognizer(str(file)), open_recognizer(url)
    assert isinstance(local, OnnxRecognizer)
    assert isinstance(stored, StoredRecognizer)
    assert stored.describe() == local.describe()
    travelled = pickle.dumps(stored)
    assert len(travelled) < 500 < file.stat().st_size, "the network stays where it is"
    arrived = pickle.loads(travelled)
    np.testing.assert_array_equal(arrived.on("cpu", 2).embed(PICTURES), local.embed(PICTURES))
    images = torch.from_numpy(PICTURES).permute(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(arrived.differentiable()(images)[0].numpy(), local.embed(PICTURES), atol=1e-4)


def test_a_file_that_was_overwritten_is_refused(url: str, s3_root: str, tmp_path: Path) -> None:
    stored = open_recognizer(url)
    open_store(s3_root).put("nets/alpha.onnx", write_recognizer(tmp_path / "other.onnx", 1).read_bytes())
    with pytest.raises(StoreError, match=r"nets/alpha.onnx has sha256 .*overwritten: start the job again") as caught:
        stored.on("cpu", 1)
    assert caught.value.fatal


def test_a_sidecar_of_another_file_is_refused(url: str, s3_root: str) -> None:
    open_store(s3_root).put("nets/alpha.json", b'{"mean": [0, 0, 0], "std": [1, 1, 1], "sha256": "00"}')
    with pytest.raises(ValueError, match=r"nets/alpha.json: describes another file"):
        open_recognizer(url)


def test_without_a_sidecar_the_flags_count_and_nothing_is_guessed(url: str, s3_root: str) -> None:
    assert has_sidecar(url)
    open_store(s3_root).delete("nets/alpha.json")
    assert not has_sidecar(url)
    with pytest.raises(ValueError, match=rf"{url}: the normalisation of this recogniser is not known.*{s3_root}/nets/alpha.json"):
        load_recognizer(url)
    assert load_recognizer(url, (0.5,) * 3, (0.5,) * 3).name == "alpha"


@pytest.mark.parametrize(("name", "hint"), [("absent.onnx", "absent.onnx does not exist"), ("run", "run/weights/recognizer.onnx")])
def test_what_is_not_there_is_said(s3_root: str, name: str, hint: str) -> None:
    with pytest.raises(StoreError, match=f"there is no such recogniser: .*{hint}"):
        open_recognizer(f"{s3_root}/{name}")


def test_a_local_copy_is_private_and_goes(url: str, file: Path) -> None:
    with local_recognizer(url) as path:
        assert path.read_bytes() == file.read_bytes()
        assert path.with_suffix(".json").exists()
        assert path.parent.stat().st_mode & 0o077 == 0
    assert not path.parent.exists()
    with local_recognizer(str(file)) as path:
        assert path == file, "a local file is not copied"
