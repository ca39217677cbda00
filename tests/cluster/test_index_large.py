"""20,000 queries in 20,000 images against brute force: the exact rank of every mate, on drawn and on real embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.index import Gallery, GalleryOptions
from cluster.picture import decode
from facemae.recognizer.onnx import OnnxRecognizer
from facemae.synthetic_embeddings import SyntheticEmbeddings
from tests.cluster.test_index import write_set

COUNT = 20_000
BLOCK = 500


def assert_equal_to_brute_force(root: Path, originals: np.ndarray, protected: np.ndarray, factory: str) -> None:
    """The rank of each query's own original, and the nearest image, by an exact search and by all similarities in float64."""
    dim = originals.shape[1]
    dataset = write_set(root, originals, np.arange(COUNT) // 10, (7000, 7000, COUNT - 14000))
    mates = np.einsum("nd,nd->n", protected.astype(np.float64), originals.astype(np.float64)).astype(np.float32)
    with Gallery(dataset, dim, GalleryOptions(factory, num_actors=2)) as gallery:
        found = gallery.search(protected, 1, mates[:, None])
    wide = originals.astype(np.float64).T
    for start in range(0, COUNT, BLOCK):
        part = slice(start, start + BLOCK)
        scores = (protected[part].astype(np.float64) @ wide).astype(np.float32)
        np.testing.assert_array_equal(found.nearer[part, 0], (scores > mates[part, None]).sum(axis=1))
        np.testing.assert_array_equal(found.ids[part, 0], scores.argmax(axis=1))
        np.testing.assert_array_equal(found.scores[part, 0], scores.max(axis=1))


@pytest.mark.parametrize("factory", ["Flat", "IVF64,SQfp16"])
def test_drawn_embeddings(ray_session: None, tmp_path: Path, factory: str, request: pytest.FixtureRequest) -> None:
    if factory != "Flat":
        request.getfixturevalue("long")
    drawn = SyntheticEmbeddings(2000, 10, dim=64, leak=0.1, shard_identities=2000).shard(0)
    assert_equal_to_brute_force(tmp_path, drawn.originals, drawn.protected, factory)


@pytest.mark.faces
@pytest.mark.timeout(900)
def test_real_embeddings(long: None, ray_session: None, tmp_path: Path, shared: Path) -> None:
    """Faces, and the same faces darkened and mirrored as queries."""
    files = sorted((shared / "faces").glob("*/*/*.jpg"))
    pictures = np.stack([decode(file.read_bytes()) for file in files])
    pictures = np.concatenate([pictures, pictures[:, ::-1]])[:COUNT]  # upside down, where there are fewer than 20,000
    recognizer = OnnxRecognizer.load(shared / "models" / "edgeface_xxs.onnx", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "edgeface")
    originals, protected = (recognizer.embed(one).astype(np.float16) for one in (pictures, pictures[:, :, ::-1] // 4 * 3))
    assert_equal_to_brute_force(tmp_path, originals, protected, "Flat")
