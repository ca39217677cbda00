"""The attacker that compares thumbnails, against plain numpy."""

from __future__ import annotations

import numpy as np

from facemae.protection import create_protection
from facemae.recognizer.onnx import OnnxRecognizer


def thumbnails(pictures: np.ndarray) -> np.ndarray:
    """The same, written down once more."""
    blocks = pictures.astype(np.float64).reshape(len(pictures), 14, 8, 14, 8, 3).mean((2, 4))
    rows = (blocks - blocks.mean((1, 2), keepdims=True)).transpose(0, 3, 1, 2).reshape(len(pictures), -1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_it_is_the_cosine_of_thumbnails_whatever_the_light():
    random = np.random.default_rng(0)
    pictures = random.integers(0, 128, (5, 112, 112, 3), np.uint8)
    found = OnnxRecognizer.load("pixels").embed(pictures)
    expected = thumbnails(pictures)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-3)
    np.testing.assert_allclose(OnnxRecognizer.load("pixels").embed(2 * pictures + 1), found, atol=1e-3)


def test_it_traces_what_recognizers_look_past_and_takes_any_picture():
    random = np.random.default_rng(1)
    pictures = random.integers(0, 256, (40, 7, 7, 3)).repeat(16, 1).repeat(16, 2).astype(np.uint8)
    hidden = create_protection("blur", strength=8).protect(pictures, [str(n) for n in range(40)])
    attacker = OnnxRecognizer.load("pixels")
    scores = attacker.embed(hidden) @ attacker.embed(pictures).T
    assert (scores.argmax(1) == np.arange(40)).all()
    plain = attacker.embed(np.full((1, 112, 112, 3), 200, np.uint8))
    assert np.isfinite(plain).all()
    assert attacker.describe()["name"] == "pixels"
