"""The strength dial of a protection."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dial:
    """What one turns to make a protection stronger.

    Attributes:
        what: what it is, in a few words, with its unit.
        low, high: the range.
        default: the strength where none is given.
        open_low, open_high: whether `low` or `high` itself is outside of the range.
        whole: whether it is a whole number.
        rising: whether a larger number hides more; of a privacy budget the smaller one does.
        option: the keyword of the method's class that takes it.
    """

    what: str
    low: float
    high: float
    default: float
    open_low: bool = False
    open_high: bool = False
    whole: bool = False
    rising: bool = True
    option: str = "strength"

    @property
    def range(self) -> str:
        """The range in words, as "above 0 to 112"."""
        low = f"above {self.low:g}" if self.open_low else f"{self.low:g}"
        high = f"below {self.high:g}" if self.open_high else f"{self.high:g}"
        return f"{low} to {high}"

    def checked(self, method: str, value: float | None) -> float:
        """Returns `value`, or the default for None; an int where the dial is whole.

        Raises:
            ValueError: the value is outside of the range, or is not whole; names method, value and range.
        """
        value = self.default if value is None else value
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        if not (above and below) or (self.whole and value != int(value)):  # a NaN is neither above nor below
            kind = "a whole number from" if self.whole else "from"
            raise ValueError(f"{method}: strength is {value:g}: give {kind} {self.range} ({self.what})")
        return int(value) if self.whole else float(value)
