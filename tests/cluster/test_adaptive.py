"""The adaptive attacker's fit as a Ray task over stored embeddings, and its maps as the workers hold them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.adaptive import QueryMap, _fit, fit_adaptive
from cluster.attempt import Attempt
from cluster.dataset import Dataset, Labels, ShardData
from cluster.embedding import Embeddings, write_embeddings
from cluster.index import GalleryError
from cluster.leakage import EmbeddedSet
from cluster.secret import KeyMap, SecretError
from cluster.shard import sha256_hex
from cluster.store import join_url, open_store

DIM = 16
SHARD = 50
NAME = "toy"


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def faces(people: int = 150) -> tuple[Embeddings, Embeddings]:
    """Originals of two images a person, and protected ones that are turned in the embedding space."""
    rng = np.random.default_rng(0)
    originals = unit_rows(rng.standard_normal((2 * people, DIM)))
    turned = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0]
    protected = unit_rows(originals @ turned + 0.02 * rng.standard_normal(originals.shape))
    keys, identities = [f"k{row:04d}" for row in range(2 * people)], np.repeat(np.arange(people), 2)
    return Embeddings(keys, identities, originals), Embeddings(keys, identities, protected)


def write_set(root: str, rows: Embeddings, gaps: range = range(0), **recognizer: Any) -> EmbeddedSet:
    """A finished image set (its dataset.json only) and its embeddings in shards; the rows of ``gaps`` have none."""
    images = Dataset(root)
    images.finish("images", {"parent": None, "config": {}, "fingerprint": f"images of {root}"}, [])
    output = images.embeddings(NAME)
    for number, start in enumerate(range(0, len(rows), SHARD)):
        kept = [row for row in range(start, min(start + SHARD, len(rows))) if row not in gaps]
        part = Embeddings([rows.keys[row] for row in kept], rows.identities[kept], rows.vectors[kept])
        data = ShardData(write_embeddings(part) if kept else None, len(kept), Labels.of(part.identities.tolist()))
        output.commit(f"{number:05d}", data, fingerprint="f", attempt=Attempt("run", 1), seconds={})
    description = {"name": NAME, "sha256": "0" * 64, "dim": DIM, "mean": [0.5] * 3, "std": [0.5] * 3, **recognizer}
    lineage = {"parent": {"fingerprint": f"images of {root}"}, "config": {"recognizer": description}, "fingerprint": f"of {root}"}
    output.finish("embeddings", lineage, output.manifests())
    return EmbeddedSet.open(root, NAME)


def sets_at(root: str, **changes: Any) -> tuple[EmbeddedSet, EmbeddedSet]:
    """The protected and the original set of ``faces``."""
    originals, protected = faces()
    return write_set(join_url(root, "protected"), protected, **changes), write_set(join_url(root, "original"), originals)


def cmc1(queries: np.ndarray, gallery: np.ndarray) -> float:
    scores = queries.astype(np.float64) @ gallery.astype(np.float64).T
    return float(np.mean(np.sum(scores > np.diag(scores)[:, None], axis=1) == 0))


def test_a_fit_in_a_task_is_the_fit_of_all_pairs_and_finds_them(ray_session: None, any_root: str) -> None:
    protected, originals = sets_at(any_root, gaps=range(90, 160))  # shard 2 has no protected embedding at all
    data, said = fit_adaptive(protected, originals, seed=3)
    assert (data, said) == _fit((protected.dataset.url, originals.dataset.url), DIM, 3, 200_000, None), "another process gives the same"
    assert {name: said[name] for name in ("seed", "max_pairs", "pairs", "identities", "shards")} == {
        "seed": 3,
        "max_pairs": 200_000,
        "pairs": 230,
        "identities": 115,
        "shards": 6,
    }
    assert said["sha256"] == sha256_hex(data)
    assert json.loads(json.dumps(said)) == said
    rows, queries = faces()
    assert [one["kind"] for one in said["maps"]] == ["ridge", "ridge"]
    assert sum(one["pairs"] for one in said["maps"]) == 230
    url = join_url(any_root, "leakage", "adaptive.safetensors")
    open_store(join_url(any_root, "leakage")).put("adaptive.safetensors", data)
    attack = pickle.loads(pickle.dumps(QueryMap(url, said["sha256"])))
    attack.open()
    mapped = attack(queries.vectors, queries.identities)
    assert cmc1(queries.vectors, rows.vectors) < 0.05
    assert cmc1(mapped, rows.vectors) > 0.9


def test_few_pairs_come_from_shards_that_the_seed_chooses(tmp_path: Path) -> None:
    protected, originals = sets_at(str(tmp_path))
    urls, chosen = (protected.dataset.url, originals.dataset.url), set()
    for seed in range(4):
        data, said = _fit(urls, DIM, seed, 120, None)
        assert (said["pairs"], said["shards"]) == (120, 3)
        assert data == _fit(urls, DIM, seed, 120, None)[0]
        chosen.add(data)
    assert len(chosen) == 4
    data, said = _fit(urls, DIM, 0, 7, None)
    assert (said["pairs"], said["shards"], {one["kind"] for one in said["maps"]}) == (7, 1, {"identity"})
    assert "at least" in said["maps"][0]["reason"]


def test_pairs_are_found_by_key_where_the_keys_were_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_SECRET", "s" * 64)
    new_key = KeyMap("env:ADAPTIVE_SECRET")
    originals, protected = faces()
    order = np.concatenate([np.random.default_rng(start).permutation(SHARD) + start for start in range(0, 300, SHARD)])
    released = Embeddings([new_key(protected.keys[row]) for row in order], protected.identities[order], protected.vectors[order])
    urls = [write_set(str(tmp_path / name), rows).dataset.url for name, rows in (("released", released), ("original", originals))]
    _, said = _fit((urls[0], urls[1]), DIM, 0, 1000, ("env:ADAPTIVE_SECRET", new_key.check))
    assert (said["pairs"], said["maps"][0]["kind"]) == (300, "ridge")
    with pytest.raises(GalleryError, match="no key of the queries is in the gallery's shard"):
        _fit((urls[0], urls[1]), DIM, 0, 1000, None)
    monkeypatch.setenv("ADAPTIVE_SECRET", "t" * 64)
    with pytest.raises(SecretError, match="another secret"):
        _fit((urls[0], urls[1]), DIM, 0, 1000, ("env:ADAPTIVE_SECRET", new_key.check))


def test_errors_of_the_task_name_the_shard_and_have_no_traceback(ray_session: None, tmp_path: Path) -> None:
    originals, protected = faces()
    gallery = write_set(str(tmp_path / "original"), originals)
    relabelled = Embeddings(protected.keys, protected.identities + (np.arange(300) == 210), protected.vectors)
    vectors = protected.vectors.copy()
    vectors[57] = np.nan
    for name, rows, message in (
        ("relabelled", relabelled, "shard 00004: 'k0210' has another identity"),
        ("broken", Embeddings(protected.keys, protected.identities, vectors), r"shard 00001: 1 embeddings are not of unit length \(row 7"),
    ):
        with pytest.raises(GalleryError, match=message) as caught:
            fit_adaptive(write_set(str(tmp_path / name), rows), gallery)
        assert "Traceback" not in str(caught.value)
    with pytest.raises(SecretError, match="not set here"):
        fit_adaptive(gallery, gallery, rekey=("env:NOT_SET_ANYWHERE", "0" * 16))


def test_damaged_and_missing_shards_and_other_recognisers(tmp_path: Path) -> None:
    protected, originals = sets_at(str(tmp_path))
    urls = protected.dataset.url, originals.dataset.url
    with pytest.raises(GalleryError, match=r"different recognisers \(dim 8"):
        fit_adaptive(write_set(str(tmp_path / "other"), faces()[1], dim=8), originals)
    with pytest.raises(GalleryError, match=r"shard 0000\d: embeddings of shape \(50, 16\) in a gallery of 8"):
        _fit(urls, 8, 0, 1000, None)
    with pytest.raises(GalleryError, match="max_pairs is 0"):
        fit_adaptive(protected, originals, max_pairs=0)
    originals.dataset.store.put(str(originals.dataset.manifest("00003").file), b"damaged")
    with pytest.raises(GalleryError, match=r"original.*00003-\w+\.parquet is not what its manifest says"):
        _fit(urls, DIM, 0, 1000, None)
    originals.dataset.store.delete("manifests/00003.json")
    with pytest.raises(GalleryError, match="has no shard 00003"):
        _fit(urls, DIM, 0, 1000, None)


def test_maps_that_are_not_what_was_fitted_are_refused(tmp_path: Path) -> None:
    protected, originals = sets_at(str(tmp_path))
    data, said = _fit((protected.dataset.url, originals.dataset.url), DIM, 0, 1000, None)
    path = tmp_path / "maps"
    attack = QueryMap(str(path), said["sha256"])
    with pytest.raises(GalleryError, match=r"maps at .*maps cannot be used .*delete them and run again"):
        attack.open()
    path.write_bytes(data[:-1])
    with pytest.raises(GalleryError, match=f"it has sha256 .*{said['sha256']} is expected"):
        attack.open()
    path.write_bytes(b"nonsense")
    with pytest.raises(GalleryError, match="no file of adaptive maps"):
        QueryMap(str(path), sha256_hex(b"nonsense")).open()
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match="open was not called"):
        attack(protected.dataset, originals)  # type: ignore[arg-type]
    attack.open()
    with pytest.raises(GalleryError, match="of another recogniser"):
        attack(unit_rows(np.ones((3, 9))), np.arange(3))
    _, queries = faces()
    parts = [attack(queries.vectors[i : i + 7], queries.identities[i : i + 7]) for i in range(0, 300, 7)]
    assert np.concatenate(parts).tobytes() == attack(queries.vectors, queries.identities).tobytes()
