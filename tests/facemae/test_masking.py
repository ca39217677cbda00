from __future__ import annotations

from hashlib import blake2b

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from facemae.masking import count_visible, random_mask

WORD = 2**64 - 1
KEYS = st.lists(st.text(max_size=12), max_size=6)


def reference_mask(key: str, num_patches: int, num_visible: int, seed: int) -> list[int]:
    """splitmix64 as published, one step after the other, in Python's own integers."""
    state = int.from_bytes(blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "little")
    scores = []
    for _ in range(num_patches):
        state = (state + 0x9E3779B97F4A7C15) & WORD
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        scores.append(z ^ (z >> 31))
    return sorted(sorted(range(num_patches), key=scores.__getitem__)[:num_visible])


@given(KEYS, st.integers(1, 200), st.floats(0, 0.99), st.integers(-(2**70), 2**70))
def test_the_mask_is_splitmix64_of_seed_and_key(keys: list[str], num_patches: int, mask_ratio: float, seed: int) -> None:
    masks = random_mask(keys, num_patches, mask_ratio, seed)
    num_visible = count_visible(num_patches, mask_ratio)
    assert masks.shape == (len(keys), num_visible)
    assert masks.dtype == np.int64
    assert masks.tolist() == [reference_mask(key, num_patches, num_visible, seed) for key in keys]


@given(KEYS, st.permutations(range(6)))
def test_a_mask_does_not_depend_on_the_batch(keys: list[str], order: list[int]) -> None:
    order = [i for i in order if i < len(keys)]
    shuffled = random_mask([keys[i] for i in order], 49, 0.75, 3)
    alone = [random_mask([keys[i]], 49, 0.75, 3)[0].tolist() for i in order]
    assert shuffled.tolist() == alone


def test_masks_of_released_data_sets_never_change() -> None:
    assert random_mask(["0/alice"], 49, 0.75, 0).tolist() == [[0, 4, 6, 13, 18, 23, 26, 31, 35, 41, 43, 44]]


def test_seed_and_epoch_change_the_mask() -> None:
    masks = {tuple(random_mask([key], 196, 0.75, seed)[0]) for key in ("a", "b", "0/a", "1/a") for seed in (0, 1)}
    assert len(masks) == 8


def test_every_patch_and_every_pair_is_visible_equally_often() -> None:
    num_keys, num_patches, num_visible = 20_000, 49, 12
    masks = random_mask([str(i) for i in range(num_keys)], num_patches, 0.75, 0)
    seen = np.zeros((num_keys, num_patches))
    np.put_along_axis(seen, masks, 1.0, axis=1)
    once, twice = num_visible / num_patches, num_visible * (num_visible - 1) / (num_patches * (num_patches - 1))
    deviation = np.sqrt(twice * (1 - twice) / num_keys)
    pairs = (seen.T @ seen) / num_keys
    assert np.abs(np.diag(pairs) - once).max() < 5 * np.sqrt(once * (1 - once) / num_keys)
    assert np.abs(pairs[~np.eye(num_patches, dtype=bool)] - twice).max() < 5.5 * deviation


@pytest.mark.parametrize(
    ("num_patches", "mask_ratio", "num_visible"),
    [(49, 0.75, 12), (196, 0.75, 49), (10, 0.25, 7), (10, 0.0, 10), (49, 0.999, 1), (1, 0.75, 1)],
)
def test_the_hidden_share_is_rounded_half_up_and_one_patch_stays(num_patches: int, mask_ratio: float, num_visible: int) -> None:
    assert count_visible(num_patches, mask_ratio) == num_visible


@pytest.mark.parametrize("mask_ratio", [-0.1, 1.0, 75, float("nan")])
def test_a_mask_ratio_out_of_range_is_named(mask_ratio: float) -> None:
    with pytest.raises(ValueError, match=f"mask_ratio is {mask_ratio}"):
        random_mask(["a"], 49, mask_ratio, 0)


def test_no_patches_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_patches is 0"):
        random_mask(["a"], 0, 0.75, 0)
