"""What a stage computes: the units of work and the processor that turns one into a shard. Knows nothing of Ray."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cluster.dataset import ShardData


@dataclass(frozen=True)
class Unit:
    """One shard's worth of work: ``name`` is the output shard's name, ``num_samples`` what is known to be in it (0: unknown)."""

    name: str
    num_samples: int = 0


UnitT = TypeVar("UnitT", bound=Unit)


class Processor(ABC, Generic[UnitT]):
    """What a stage computes. Made on the driver, sent to each worker by pickle, so it holds configuration only until ``open``."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The configuration that determines the output's bytes, JSON-able; its hash is the fingerprint in every manifest."""

    def open(self, threads: int) -> None:
        """Load what the work needs, once a worker. An error here ends the run."""

    @abstractmethod
    def fetch(self, unit: UnitT) -> Any:
        """Read the unit's input from storage. Runs beside other units' compute."""

    @abstractmethod
    def compute(self, unit: UnitT, fetched: Any) -> ShardData:
        """Turn the input into a shard's bytes. One unit at a time on each worker."""
