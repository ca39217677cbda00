"""A run that was handed to somebody else's machines: Ray's job API, or KubeRay on Kubernetes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class Phase(StrEnum):
    """Where a submitted run stands."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def ended(self) -> bool:
        """Whether nothing will happen any more."""
        return self in (Phase.SUCCEEDED, Phase.FAILED, Phase.STOPPED)


@dataclass(frozen=True)
class RunState:
    """What is known of a submitted run.

    Attributes:
        phase: where it stands.
        message: one line of what it waits for, or why it ended so.
        findings: explained troubles, one a line (no quota, image not found, no node that fits): reason and remedy.
        attempt: the number of the try, from 1, where the other side tries again.
    """

    phase: Phase
    message: str = ""
    findings: tuple[str, ...] = ()
    attempt: int = 1


class SubmittedRun(Protocol):
    """A submitted run. Every method may raise ConnectionError, whose message says what does not answer and what to do."""

    name: str

    def state(self) -> RunState:
        """Ask how it stands. Raises LookupError where there is no such run (any more)."""

    def log(self) -> Iterator[str]:
        """Lines of the driver's log from its first one, as they come; ends when the log does, or breaks off: ask ``state`` which."""

    def cancel(self) -> None:
        """Ask it to stop: drivers drain and leave what is committed. Returns at once; ask ``state`` until it has ended."""
