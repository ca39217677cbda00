"""What protections with nothing random in them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from facemae.protection.dial import Dial
from facemae.protection.protocol import Protection


class DeterministicProtection:
    """A strength decides everything: no seed, no secret, and so no other variant to try on a picture that is traced.

    Args:
        strength: where the method's dial stands; None takes its default.

    Raises:
        ValueError: the strength is out of range.
    """

    name: str
    dial: Dial

    def __init__(self, strength: float | None = None) -> None:
        self.strength = self.dial.checked(self.name, strength)

    def describe(self) -> dict[str, Any]:
        """Returns method and strength; see `Protection.describe`."""
        return {"method": self.name, "strength": self.strength}

    def variants(self, skip: int = 0) -> Sequence[Protection]:
        """Returns nothing: there is nothing random; see `Protection.variants`."""
        return []
