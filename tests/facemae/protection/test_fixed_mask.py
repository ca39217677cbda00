from __future__ import annotations

import numpy as np
import pytest

from facemae.protection.fixed_mask import EYE_HALF, MOUTH_HALF, FixedMaskProtection

POINTS = {"eyes": [(38.2946, 51.6963), (73.5318, 51.5014)], "mouth": [(41.5493, 92.3655), (70.7299, 92.2041)]}
NOSE = (56, 72)


@pytest.mark.parametrize("strength", [0.3, 1.0, 1.7])
def test_the_hidden_pixels_are_those_of_the_rectangles(strength: float) -> None:
    pictures = np.full((2, 112, 112, 3), 255, np.uint8)
    found = FixedMaskProtection(strength).protect(pictures, ["a", "b"])
    middle = tuple(np.mean(POINTS["mouth"], axis=0))
    areas = [(point, EYE_HALF) for point in POINTS["eyes"]] + [(middle, MOUTH_HALF)]
    for y in range(112):
        for x in range(112):
            hidden = any(abs(x - px) <= strength * w and abs(y - py) <= strength * h for (px, py), (w, h) in areas)
            assert (found[:, y, x] == (128 if hidden else 255)).all()


def test_the_template_s_points_are_hidden_and_the_nose_is_not() -> None:
    found = FixedMaskProtection().protect(np.full((1, 112, 112, 3), 255, np.uint8), ["a"])[0]
    for x, y in [*POINTS["eyes"], *POINTS["mouth"]]:
        assert (found[round(y), round(x)] == 128).all()
    assert (found[NOSE[1], NOSE[0]] == 255).all()


def test_a_picture_of_another_size_is_masked_at_the_same_places() -> None:
    small = FixedMaskProtection().protect(np.full((1, 112, 112, 3), 255, np.uint8), ["a"])[0]
    large = FixedMaskProtection().protect(np.full((1, 336, 224, 3), 255, np.uint8), ["a"])[0]
    assert (large[1::3, ::2] == small).mean() > 0.99
    assert (large == 128).mean() == pytest.approx((small == 128).mean(), rel=0.03)
