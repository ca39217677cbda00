from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from facemae.protection.noise import NoiseProtection


def noise_of(strength: float, seed: int, count: int = 40) -> np.ndarray:
    """What is added to a grey picture, float64 (count, 112, 112, 3)."""
    grey = np.full((count, 112, 112, 3), 128, np.uint8)
    return NoiseProtection(strength, seed).protect(grey, [f"{row}" for row in range(count)]).astype(float) - 128


def test_the_noise_is_normal_of_this_sigma() -> None:
    noise = noise_of(20, seed=3)
    count = noise.size
    assert abs(noise.mean()) < 5 * 20 / math.sqrt(count)
    assert noise.var() == pytest.approx(20**2 + 1 / 12, rel=5 * math.sqrt(2 / count))
    for sigmas in (1, 2, 3):  # whole numbers: the edge lies half a step out
        expected = math.erf((20 * sigmas + 0.5) / 20 / math.sqrt(2))
        spread = math.sqrt(expected * (1 - expected) / count)
        assert abs((np.abs(noise) <= 20 * sigmas).mean() - expected) < 5 * spread


def test_pixels_colors_and_pictures_are_independent() -> None:
    noise = noise_of(20, seed=4)
    bound = 5 / math.sqrt(noise.size / 3)
    for one, other in (
        (noise[..., 0], noise[..., 1]),
        (noise[:, 1:], noise[:, :-1]),
        (noise[:, :, 1:], noise[:, :, :-1]),
        (noise[1:], noise[:-1]),
        (noise[:, :56], noise[:, 56:]),  # both ends of Box and Muller's pairs
        (noise[:, :56] ** 2, noise[:, 56:] ** 2),
    ):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < bound


def test_the_noise_is_that_of_shake_128_by_loops() -> None:
    picture, seed = np.full((1, 3, 2, 3), 100, np.uint8), 2**100 + 7
    stream = hashlib.shake_128(f"noise/{seed}/a key".encode()).digest(9 * 8)
    words = [int.from_bytes(stream[start : start + 8], "little") for start in range(0, 72, 8)]
    radii = [math.sqrt(-2 * math.log(((word >> 32) + 0.5) / 2**32)) for word in words]
    angles = [2 * math.pi * (word & 0xFFFFFFFF) / 2**32 for word in words]
    values = [r * math.cos(a) for r, a in zip(radii, angles, strict=True)] + [r * math.sin(a) for r, a in zip(radii, angles, strict=True)]
    expected = np.array([min(255, max(0, 100 + 30 * value)) for value in values]).reshape(3, 2, 3)
    assert np.abs(NoiseProtection(30, seed).protect(picture, ["a key"])[0] - expected).max() < 0.501


def test_a_seed_is_told_by_its_hash_alone_and_one_that_can_be_guessed_is_never_released() -> None:
    seed = 2**127 + 12345
    described = NoiseProtection(seed=seed).describe()
    assert str(seed) not in str(described)
    assert described["seed_sha256"] == hashlib.sha256(f"facemae noise seed {seed}".encode()).hexdigest()
    assert "warning" not in described
    for guessable in (0, 7, -(2**80), 2**95 - 1):
        assert "whoever guesses it" in NoiseProtection(seed=guessable).describe()["warning"]
