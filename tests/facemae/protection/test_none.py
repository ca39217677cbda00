from __future__ import annotations

import numpy as np
import pytest

from facemae.protection.none import NoProtection


def test_pictures_come_back_unchanged() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    assert NoProtection().protect(pictures, ["a", "b", "c"]) is pictures
    description = NoProtection().describe()
    assert description["method"] == "none"
    assert description["warning"].startswith("not a protection")


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (np.zeros((2, 8, 8, 3), dtype=np.uint8), "2 pictures with 1 keys"),
        (np.zeros((1, 8, 8, 3), dtype=np.float32), r"pictures are float32 \(1, 8, 8, 3\)"),
        (np.zeros((1, 8, 8), dtype=np.uint8), r"pictures are uint8 \(1, 8, 8\)"),
        (np.zeros((1, 3, 8, 8), dtype=np.uint8), "give uint8"),
    ],
)
def test_a_wrong_batch_is_named(pictures: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoProtection().protect(pictures, ["a"])
