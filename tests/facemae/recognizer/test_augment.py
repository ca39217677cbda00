from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from facemae.masking import random_bits
from facemae.recognizer.augment import AugmentConfig, augment

NOTHING = AugmentConfig(flip=False)
EVERYTHING = AugmentConfig(crop=0.3, erase=0.5, color=0.4)
KEYS = [f"person{i:02d}/{i}" for i in range(24)]


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (24, 112, 112, 3), dtype=np.uint8))


def plain(pictures: torch.Tensor) -> np.ndarray:
    return (pictures.numpy().astype(np.float64) / 127.5 - 1).transpose(0, 3, 1, 2)


def draws(key: str, epoch: int, seed: int) -> list[float]:
    """The sample's twelve numbers, drawn alone: flip, size, x, y, chance, area, ratio, x, y, three factors."""
    return [int(bits) / 2**64 for bits in random_bits([f"augment/{epoch}/{key}"], 12, seed)[0]]


def test_all_dials_at_zero_are_the_plain_conversion(pictures):
    np.testing.assert_allclose(augment(pictures, KEYS, 0, 0, NOTHING).numpy(), plain(pictures), atol=1e-6)
    images = torch.from_numpy(plain(pictures)).float()
    assert torch.equal(augment(images, KEYS, 3, 4, NOTHING), images)


@given(order=st.permutations(range(6)), seed=st.integers(-5, 2**40), epoch=st.integers(0, 50), cut=st.integers(0, 6))
@settings(max_examples=10, deadline=None)
def test_independent_of_batch_and_order(pictures, order, seed, epoch, cut):
    whole = augment(pictures[:6], KEYS[:6], epoch, seed, EVERYTHING)
    parts = []
    for part in (order[:cut], order[cut:]):
        parts.append(augment(pictures[part], [KEYS[i] for i in part], epoch, seed, EVERYTHING))
    torch.testing.assert_close(torch.cat(parts), whole[list(order)], rtol=0, atol=1e-6)
    assert whole.dtype == torch.float32
    assert whole.shape == (6, 3, 112, 112)
    assert whole.abs().max() <= 1


def test_seed_epoch_and_key_each_draw_anew(pictures):
    same = pictures[:1].expand(24, -1, -1, -1)
    first = augment(same, KEYS, 0, 0, EVERYTHING)
    assert len({image.numpy().tobytes() for image in first}) == 24
    assert torch.equal(first, augment(same, KEYS, 0, 0, EVERYTHING))
    for other in (augment(same, KEYS, 1, 0, EVERYTHING), augment(same, KEYS, 0, 1, EVERYTHING)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_flip_against_numpy_and_its_probability(pictures):
    flipped = augment(pictures, KEYS, 2, 7, AugmentConfig()).numpy()
    for key, image, result in zip(KEYS, plain(pictures), flipped, strict=True):
        np.testing.assert_allclose(result, image[:, :, ::-1] if draws(key, 2, 7)[0] < 0.5 else image, atol=1e-6)
    tiny = torch.tensor([-1.0, 1.0]).expand(4000, 3, 2, 2)
    mirrored = augment(tiny, [str(i) for i in range(4000)], 0, 0, AugmentConfig())[:, 0, 0, 0] > 0
    assert 0.46 < mirrored.float().mean() < 0.54  # five standard deviations


def test_erase_against_numpy(pictures):
    config = AugmentConfig(flip=False, erase=0.6)
    erased = augment(pictures, KEYS, 1, 5, config).numpy()
    num_erased = 0
    for key, image, result in zip(KEYS, plain(pictures), erased, strict=True):
        chance, area, ratio, x, y = draws(key, 1, 5)[4:9]
        if chance < 0.6:
            num_erased += 1
            share, stretch = 0.02 + (0.33 - 0.02) * area, np.exp(np.log(0.3) * (1 - 2 * ratio))
            height = int(min(112, max(1, np.rint(112 * np.sqrt(share * stretch)))))
            width = int(min(112, max(1, np.rint(112 * np.sqrt(share / stretch)))))
            top, left = int(y * (113 - height)), int(x * (113 - width))
            image[:, top : top + height, left : left + width] = 0
        np.testing.assert_allclose(result, image, atol=1e-6)
    assert 5 < num_erased < 24


def test_crop_against_numpy():
    """A picture that is linear in x and y stays so under bilinear resizing: each pixel is its place in the source."""
    places = (np.arange(112) + 0.5) / 112
    images = torch.tensor(np.stack([np.tile(places, (112, 1)), np.tile(places[:, None], (1, 112)), np.zeros((112, 112))])).float()
    results = augment(images.expand(24, -1, -1, -1), KEYS, 0, 3, AugmentConfig(flip=False, crop=0.4)).numpy()
    for key, result in zip(KEYS, results, strict=True):
        size, x, y = draws(key, 0, 3)[1:4]
        side = 1 - 0.4 * size
        across = (x * (1 - side) + side * places).clip(places[0], places[-1])
        down = (y * (1 - side) + side * places).clip(places[0], places[-1])
        np.testing.assert_allclose(result[0], np.tile(across, (112, 1)), atol=1e-5)
        np.testing.assert_allclose(result[1], np.tile(down[:, None], (1, 112)), atol=1e-5)
        assert 0.6 <= side <= 1


def test_color_against_pillow():
    """Pictures of middling values, so that nothing is clipped on the way."""
    pictures = np.random.default_rng(1).integers(90, 150, (24, 112, 112, 3), dtype=np.uint8)
    results = augment(torch.from_numpy(pictures), KEYS, 0, 2, AugmentConfig(flip=False, color=0.3)).numpy()
    for key, picture, result in zip(KEYS, pictures, results, strict=True):
        expected = Image.fromarray(picture)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for enhance, draw in zip(enhancers, draws(key, 0, 2)[9:], strict=True):
            expected = enhance(expected).enhance(0.7 + 0.6 * draw)
        gap = np.abs((result.transpose(1, 2, 0) + 1) * 127.5 - np.asarray(expected))
        assert gap.max() < 4  # Pillow rounds after each of the three


def test_dials_do_not_disturb_each_other(pictures):
    alone = augment(pictures, KEYS, 0, 0, AugmentConfig(flip=False, erase=1.0))
    both = augment(pictures, KEYS, 0, 0, AugmentConfig(flip=False, crop=0.2, color=0.1, erase=1.0))
    rectangle = (alone == 0).all(1)
    assert rectangle.any((1, 2)).all()
    assert (both.permute(0, 2, 3, 1)[rectangle] == 0).all()


def test_bad_arguments_are_refused(pictures):
    for dial in ({"crop": 1.0}, {"erase": 1.5}, {"color": -0.1}):
        with pytest.raises(ValueError, match=f"{next(iter(dial))} is"):
            AugmentConfig(**dial)
    with pytest.raises(ValueError, match="24 images with 3 keys"):
        augment(pictures, KEYS[:3], 0, 0, NOTHING)
    for wrong in (pictures.permute(0, 3, 1, 2), pictures.float(), pictures[0]):
        with pytest.raises(ValueError, match=r"images must be uint8 \(N, H, W, 3\) or float32"):
            augment(wrong, KEYS, 0, 0, NOTHING)


def test_an_empty_batch():
    assert augment(torch.zeros(0, 112, 112, 3, dtype=torch.uint8), [], 0, 0, EVERYTHING).shape == (0, 3, 112, 112)
