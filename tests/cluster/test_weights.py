"""Trained weights as a local folder: checked wherever they are, and nothing stays behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from cluster.protect import load_protection
from cluster.store import StoreError, open_store
from cluster.weights import local_weights
from facemae.model import MaskedAutoencoder
from tests.training import initial


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    initial().save_pretrained(folder)
    return folder


def upload(saved: Path, root: str, cut: int = 0) -> None:
    store = open_store(root)
    for path in saved.iterdir():
        data = path.read_bytes()
        store.put(f"weights/{path.name}", data[:-cut] if cut and path.suffix == ".safetensors" else data)


def test_a_run_and_its_weights_folder_give_the_same(saved: Path, any_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    upload(saved, any_root)
    for url in (any_root, f"{any_root}/weights"):
        with local_weights(url) as folder:
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == {p.name: p.read_bytes() for p in saved.iterdir()}
        protection = load_protection("facemae", {"weights": url})
        assert protection.describe()["weights_sha256"] == MaskedAutoencoder.from_pretrained(saved).weights_sha256
    assert not list((tmp_path / "scratch").iterdir())  # a worker that is killed later leaves nothing


def test_weights_that_are_not_what_they_claim_to_be_are_refused(saved: Path, any_root: str):
    with pytest.raises(StoreError, match="holds no weights"), local_weights(any_root):
        pass
    upload(saved, any_root, cut=1)
    with pytest.raises(StoreError, match=r"has sha256 .* says"), local_weights(any_root):
        pass
    store = open_store(any_root)
    store.delete("weights/model.safetensors")
    with pytest.raises(StoreError, match=r"holds no model\.safetensors"), local_weights(any_root):
        pass
    store.put("weights/config.json", b"[]")
    with pytest.raises(StoreError, match="does not describe weights"), local_weights(any_root):
        pass
