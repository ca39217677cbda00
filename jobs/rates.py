"""The rates that were measured, each with its hardware, date and commit: jobs/rates.yaml."""

from __future__ import annotations

import datetime
from pathlib import Path

import pydantic
import yaml

FILE = Path(__file__).with_suffix(".yaml")


@pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Rate:
    """One measurement.

    Attributes:
        value: in ``unit``, by ``cores`` CPU cores together.
        what: what ran, by ``command``.
        hardware: on what, on ``date``, at ``commit`` of this repository.
    """

    value: pydantic.PositiveFloat
    unit: str
    cores: pydantic.PositiveInt
    what: str
    command: str
    hardware: str
    date: datetime.date
    commit: str

    @property
    def per_core(self) -> float:
        """The rate of one core, as though cores added up."""
        return self.value / self.cores

    def source(self) -> str:
        """What ran, where, when, and how to run it again."""
        return f"{self.what}; {self.hardware}; {self.date}, commit {self.commit}; {self.command}"


def load_rates(file: Path = FILE) -> dict[str, Rate]:
    """The rates of a file by name; a name that is absent was not measured.

    Raises:
        ValueError: it is no mapping of names to rates; the message names the entry and the reason.
    """
    try:
        return pydantic.TypeAdapter(dict[str, Rate]).validate_python(yaml.safe_load(file.read_text()))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{file}: {'.'.join(map(str, first['loc']))}: {first['msg']} (given: {first['input']!r})") from None
