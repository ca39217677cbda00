from __future__ import annotations

from pathlib import Path

import numpy as np

from facemae.protection import create_protection
from facemae.protection.mae import MaeProtection
from tests.training import initial


def test_is_facemae_under_its_own_name(tmp_path: Path) -> None:
    initial().save_pretrained(tmp_path)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), dtype=np.uint8)
    mae, facemae = (create_protection(name, weights=tmp_path, device="cpu", mask_ratio=0.5) for name in ("mae", "facemae"))
    np.testing.assert_array_equal(mae.protect(pictures, ["a", "b"]), facemae.protect(pictures, ["a", "b"]))
    assert mae.describe() == {**facemae.describe(), "method": "mae"}
    assert {type(each) for each in mae.variants()} == {MaeProtection}
