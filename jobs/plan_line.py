"""One figure of a plan, and how it is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Basis = Literal["measured", "extrapolated", "computed", "given", "not measured"]
_POWERS = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True)
class Line:
    """One figure.

    Attributes:
        part, name: where it stands, and what it is.
        value: the figure in ``unit`` ("B" is bytes, "h" hours), None where it is not known.
        basis, why: how it is known: the formula, and the source of what went into it.
    """

    part: str
    name: str
    value: float | None
    unit: str
    basis: Basis
    why: str

    def __post_init__(self) -> None:
        assert (self.value is None) == (self.basis == "not measured"), self

    def text(self) -> str:
        """The line as it is printed."""
        return f"  {self.name:24} {self._figure():>20}  {self.basis.upper()}: {self.why}"

    def _figure(self) -> str:
        if self.value is None:
            return "?"
        if self.unit == "B":
            power = min(len(_POWERS) - 1, int(math.log10(max(self.value, 1)) // 3))
            return f"{self.value / 1000**power:,.3g} {_POWERS[power]}"
        return f"{f'{self.value:,.3g}' if self.value < 100 else f'{self.value:,.0f}'} {self.unit}".rstrip()
