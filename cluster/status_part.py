"""What a data set's status and a training's have in common: where it is, its state, and the attempts at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from cluster.attempt import RUNNING, Record, is_alive, records
from cluster.s3 import AccessDenied
from cluster.store import Store

TallyT = TypeVar("TallyT")


class State(StrEnum):
    """Where it stands. UNFINISHED: nobody is at work on it. UNKNOWN: these credentials may not read who is."""

    COMPLETE = "complete"
    RUNNING = "running"
    UNFINISHED = "unfinished"
    DAMAGED = "damaged"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class AttemptStatus(Generic[TallyT]):
    """One attempt.

    Attributes:
        number: from 1.
        state: running, dead (its heart stopped), ended, stopped (as asked), failed, or damaged (its record).
        started: by its driver's clock.
        error: the kind of error that ended it.
        tally: how its work stood at its last beat; None in records of earlier versions.
    """

    number: int
    state: str
    started: str
    error: str
    tally: TallyT | None


@dataclass(frozen=True, kw_only=True)
class PartStatus:
    """A data set or a training.

    Attributes:
        url: its root.
        kind: images, embeddings, index, training ...
        state: see State.
        attempts: by number; None where these credentials may not read their records.
        problems: what is damaged, with the remedy.
        next: what to do now.
    """

    url: str
    kind: str
    state: State
    attempts: Sequence[AttemptStatus] | None
    problems: Sequence[str] = ()
    next: str = ""

    @property
    def alive(self) -> bool:
        """Whether an attempt is at work."""
        return any(attempt.state == RUNNING for attempt in self.attempts or ())


def read_records(store: Store) -> dict[int, Record] | None:
    """Every attempt's record; None where these credentials may not read them."""
    try:
        return records(store)
    except AccessDenied:
        return None


def attempt_status(store: Store, record: Record, tally: TallyT | None) -> AttemptStatus[TallyT]:
    """What a record says, and for one that does not say that it ended whether it lives."""
    state = record.state
    if state == RUNNING and not is_alive(store, record):
        state = "dead"
    if record.error in ("Interrupted", "KeyboardInterrupt"):
        state = "stopped"
    return AttemptStatus(record.attempt, state, record.started, record.error, tally)


def state_without_result(attempts: Sequence[AttemptStatus] | None) -> State:
    """The state of what is not complete."""
    if attempts is None:
        return State.UNKNOWN
    return State.RUNNING if any(attempt.state == RUNNING for attempt in attempts) else State.UNFINISHED


def advice(attempts: Sequence[AttemptStatus] | None, url: str, left: str) -> str:
    """What to do about something that is not complete."""
    state = state_without_result(attempts)
    if state is State.RUNNING:
        return f"facemae status {url} --watch"
    if state is State.UNKNOWN:
        return "ask with credentials that may read attempts/ whether anybody is at work on it"
    last = attempts[-1] if attempts else None
    died = f"attempt {last.number} died; " if last is not None and last.state == "dead" else ""
    return f"{died}nobody is at work on it: run the same command again, it goes on with {left}"
