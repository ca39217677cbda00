from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from facemae.protection.pixel_dp import PixelDpProtection, _laplace


def test_equals_fan_s_mechanism_by_loops() -> None:
    seed, epsilon, neighbors, block = 2**99, 40.0, 8, 16
    pictures = np.random.default_rng(4).integers(60, 200, (1, 40, 20, 3), dtype=np.uint8)
    found = PixelDpProtection(epsilon, seed, neighbors, block).protect(pictures, ["k"])[0]
    stream = hashlib.shake_128(f"pixel_dp/{seed}/k".encode()).digest(8 * 3 * 2 * 3)
    numbers = iter(range(0, len(stream), 8))
    for top in (0, 16, 32):
        for left in (0, 16):
            for color in range(3):
                values = pictures[0, top : top + block, left : left + block, color].astype(float)
                start = next(numbers)
                share = ((int.from_bytes(stream[start : start + 8], "little") >> 12) + 0.5) / 2**52
                unit = math.copysign(1, share - 0.5) * -math.log(1 - 2 * abs(share - 0.5))
                noisy = values.mean() + unit * 255 * neighbors / (values.size * epsilon)
                place = found[top : top + block, left : left + block, color]
                assert (place == place[0, 0]).all()
                assert abs(float(place[0, 0]) - min(255, max(0, noisy))) < 0.501


def test_the_noise_is_laplace_of_the_paper_s_scale() -> None:
    grey, keys = np.full((400, 112, 112, 3), 128, np.uint8), [f"{row}" for row in range(400)]
    blocks = PixelDpProtection(5.0, seed=1).protect(grey, keys)[:, ::16, ::16].astype(float) - 128
    scale = 255 * 16 / (16**2 * 5)  # 255 m / (b^2 epsilon)
    count = blocks.size
    assert np.abs(blocks).mean() == pytest.approx(scale, rel=0.02)
    assert abs(blocks.mean()) < 5 * scale * math.sqrt(2 / count)
    for edge in (1, 4, 10):
        expected = 1 - math.exp(-(edge + 0.5) / scale)
        assert abs((np.abs(blocks) <= edge).mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / count)


def test_the_laplace_variates_have_no_infinite_end() -> None:
    ends = _laplace(np.array([0, 2**64 - 1, 2**63, 2**63 - 1], np.uint64))
    assert np.isfinite(ends).all()
    np.testing.assert_allclose(ends[:2], [-math.log(2**52), math.log(2**52)])
    np.testing.assert_allclose(ends[2:], 0, atol=1e-15)


def test_m_neighbors_are_as_likely_up_to_e_to_the_epsilon() -> None:
    """The guarantee itself: the worst pair of m-neighbours, one colour, one block, over the histogram of what comes out."""
    epsilon, neighbors, block = 1.0, 1, 4
    keys = [f"{row}" for row in range(60_000)]
    outputs = []
    for seed, changed in enumerate((0, 255)):
        picture = np.full((1, block, block, 3), 120, np.uint8)
        picture[0].reshape(-1, 3)[:neighbors, 0] = changed
        mechanism = PixelDpProtection(epsilon, seed, neighbors, block)
        blocks = mechanism.protect(np.repeat(picture, len(keys), axis=0), keys)[:, 0, 0, 0]
        outputs.append(np.histogram(blocks, bins=np.arange(0, 272, 16))[0])
    first, second = (np.maximum(each, 1) for each in outputs)
    enough = np.minimum(first, second) > 500
    assert enough.sum() >= 5
    assert epsilon / 2 < np.abs(np.log(first / second))[enough].max() < epsilon + 0.15


def test_the_budgets_of_a_neighborhood_and_of_a_picture_are_stated() -> None:
    described = PixelDpProtection(0.5, seed=2**100, neighborhood=16).describe()
    assert described["epsilon"]["neighborhood_one_color"] == 0.5
    assert described["epsilon"]["neighborhood"] == 1.5
    assert described["epsilon"]["picture_112"] == 3 * 0.5 * 112 * 112 / 16 == 1176
    assert "warning" not in described
    assert "warning" in PixelDpProtection().describe()
