"""No protection: the reference that every other one is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from facemae.protection.dial import Dial
from facemae.protection.protocol import check_batch


class NoProtection:
    """Hands the pictures back as they are."""

    name = "none"
    dial: Dial | None = None

    def describe(self) -> dict[str, Any]:
        """Returns the method's name, and that it protects nobody; see `Protection.describe`."""
        return {"method": self.name, "warning": "not a protection: these are the original pictures, encoded again"}

    def protect(self, pictures: np.ndarray, keys: Sequence[str]) -> np.ndarray:
        """Returns `pictures` itself; see `Protection.protect`."""
        check_batch(pictures, keys)
        return pictures

    def variants(self, skip: int = 0) -> Sequence[NoProtection]:
        """Returns nothing: there is nothing to vary; see `Protection.variants`."""
        return []
