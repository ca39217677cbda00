from __future__ import annotations

import numpy as np
import pytest

from facemae.masking import random_mask
from facemae.protection.random_mask import RandomMaskProtection


def test_hides_the_patches_that_facemae_hides_and_nothing_else() -> None:
    pictures = np.random.default_rng(3).integers(0, 256, (5, 112, 112, 3), dtype=np.uint8)
    keys = list("abcde")
    found = RandomMaskProtection(0.6, seed=9, patch_size=8).protect(pictures, keys)
    for picture, visible in enumerate(random_mask(keys, 196, 0.6, 9)):
        for patch in range(196):
            place = np.s_[picture, patch // 14 * 8 : patch // 14 * 8 + 8, patch % 14 * 8 : patch % 14 * 8 + 8]
            np.testing.assert_array_equal(found[place], pictures[place] if patch in visible else np.full((8, 8, 3), 128))


def test_a_share_that_hides_no_patch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hides none of the 49 patches of 16 pixels.*smaller patches"):
        RandomMaskProtection(0.01)
    with pytest.raises(ValueError, match="hides none of the 1 patches"):
        RandomMaskProtection(0.75, patch_size=112)
    assert RandomMaskProtection(0.01, patch_size=8).strength == 0.01
