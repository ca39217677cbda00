"""A status in words and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from cluster.attempt import RUNNING
from cluster.pulse import Tally
from cluster.status import Status
from cluster.status_dataset import DatasetStatus
from cluster.status_part import AttemptStatus, PartStatus, State
from cluster.status_training import TrainingStatus
from cluster.training_pulse import TrainingTally

SHOWN = 10
"""Shards that were given up are shown up to so many; --json has all."""
ENDED_SHOWN = 3
"""Attempts that are over are shown up to so many, the newest; --json has all."""


def lines(status: Status) -> list[str]:
    """The whole status, for people."""
    return [line for part in status.parts for line in _part_lines(part)]


def brief(status: Status) -> list[str]:
    """One line for each part, without times: it changes only when something happens."""
    return [f"{part.url} ({part.kind}): {part.state}{_details(part)}" for part in status.parts]


def to_json(status: Status) -> dict[str, Any]:
    """The whole status as plain values; what is not known is absent."""
    parts = [_known({**asdict(part), "state": str(part.state)}) for part in status.parts]
    content = {"root": status.url, "state": str(status.state), "parts": parts}
    return content if status.withheld is None else {**content, "withheld": status.withheld}


def _known(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _known(value) for name, value in content.items() if value is not None}
    return [_known(value) for value in content] if isinstance(content, list | tuple) else content


def _part_lines(part: PartStatus) -> Iterator[str]:
    yield f"{part.url} ({part.kind}): {_headline(part)}"
    if isinstance(part, DatasetStatus):
        yield from _dataset_lines(part)
    elif isinstance(part, TrainingStatus):
        yield from _training_lines(part)
    yield from _attempt_lines(part)
    yield from (f"  PROBLEM  {problem}" for problem in part.problems)
    yield f"  next     {part.next}"


def _headline(part: PartStatus) -> str:
    if isinstance(part, DatasetStatus):
        if part.withheld is not None:
            return f"{part.state}, release withheld: {part.withheld}"
        if part.released:
            return f"{part.state}, released"
        if part.state is State.COMPLETE and part.given_up:
            return f"complete, but for {_count(len(part.given_up), 'shard')} given up"
        if part.state is State.RUNNING and part.shards == part.shards_total:
            return "running, about to finish"
    if part.state is State.UNKNOWN:
        return "not complete; whether anybody is at work on it these credentials may not read"
    if part.state is State.UNFINISHED and part.attempts:
        return f"unfinished, the last attempt {_how(part.attempts[-1])}"
    return str(part.state)


def _dataset_lines(part: DatasetStatus) -> Iterator[str]:
    yield f"  shards   {_of(part.shards, part.shards_total)}"
    quarantined = f", {part.quarantined:,} quarantined" if part.quarantined else ""
    yield f"  samples  {_of(part.samples + part.quarantined, part.samples_total)}{quarantined}"
    if part.waiting is not None:
        yield f"  rate     none: waiting for workers: {_workers(part)} for {duration(part.waiting)}"
    elif part.alive:
        yield f"  rate     {_rate(part.samples_per_second)}{_left(part.seconds_left)}"
    given_up = list(part.given_up.items())
    yield from (f"  GIVEN UP {shard}: {reason}" for shard, reason in given_up[:SHOWN])
    if len(given_up) > SHOWN:
        yield f"  GIVEN UP {len(given_up) - SHOWN} more: --json names all"


def _training_lines(part: TrainingStatus) -> Iterator[str]:
    if part.step is not None:
        yield f"  steps    {_of(part.step, part.steps)}"
    if part.samples is not None:
        yield f"  samples  {_of(part.samples, part.samples_total)}"
    if part.metrics:
        yield f"  metrics  {', '.join(f'{name} {value:.4g}' for name, value in part.metrics.items())}"
    if part.waiting is not None:
        yield f"  rate     none: waiting for {_workers(part)} for {duration(part.waiting)}"
    elif part.alive:
        yield f"  rate     {_rate(part.samples_per_second)}{_left(part.seconds_left)}"
    if part.state is not State.COMPLETE:
        yield f"  saved    {'no checkpoint yet' if part.checkpoint is None else f'checkpoint of step {part.checkpoint:,}'}"


def _attempt_lines(part: PartStatus) -> Iterator[str]:
    over = [attempt for attempt in part.attempts or () if attempt.state != RUNNING]
    left_out = set() if part.state is State.COMPLETE else {attempt.number for attempt in over[:-ENDED_SHOWN]}
    if part.state is State.COMPLETE:
        return
    if left_out:
        yield f"  attempts {_count(len(left_out), 'older one')}: --json has all"
    for attempt in part.attempts or ():
        if attempt.number not in left_out:
            yield f"  attempt  {attempt.number} {_how(attempt)}, began {attempt.started or 'at an unknown time'}{_did(attempt)}"


def _how(attempt: AttemptStatus[Any]) -> str:
    """How an attempt stands, after its number."""
    how = {"running": "is running", "dead": "died (its heartbeat stopped)", "stopped": "was stopped", "damaged": "left a damaged record"}
    return how.get(attempt.state, attempt.state) + (f" ({attempt.error})" if attempt.state == "failed" and attempt.error else "")


def _did(attempt: AttemptStatus[Any]) -> str:
    tally = attempt.tally
    if isinstance(tally, Tally):
        workers = f", {tally.workers_ready} of {_count(tally.workers_wanted, 'worker')}" if attempt.state == RUNNING else ""
        retries = f", {tally.retries} handed out again" if tally.retries else ""
        return f"{workers}, {_count(tally.own_shards, 'shard')} in {duration(tally.seconds)}{retries}"
    if isinstance(tally, TrainingTally):
        return (
            f", {_count(tally.workers, 'worker')}, at step {tally.step} after {duration(tally.seconds)}" if tally.step is not None else ""
        )
    return ""


def _details(part: PartStatus) -> str:
    """What of a part's progress is worth a line when it changes."""
    if isinstance(part, DatasetStatus):
        text = f", {_of(part.shards, part.shards_total)} shards"
        text += f", {len(part.given_up)} given up" if part.given_up else ""
        return text + (f", waiting for workers: {_workers(part)}" if part.waiting is not None else "")
    if isinstance(part, TrainingStatus) and part.step is not None:
        return f", step {_of(part.step, part.steps)}"
    return ""


def _workers(part: PartStatus) -> str:
    """Ready of wanted workers of the newest attempt that is alive."""
    tallies = [attempt.tally for attempt in part.attempts or () if attempt.state == RUNNING and attempt.tally is not None]
    last = tallies[-1] if tallies else None
    if isinstance(last, Tally):
        return f"{last.workers_ready} of {last.workers_wanted}" if last.workers_wanted else "starting"
    return _count(last.workers, "worker") if isinstance(last, TrainingTally) else "starting"


def _of(done: int, total: int | None) -> str:
    if total is None:
        return f"{done:,} of an unknown number"
    share = f" ({100 * done / total:.1f} %)" if total and done < total else ""
    return f"{done:,} of {total:,}{share}"


def _rate(rate: float | None) -> str:
    if rate is None:
        return "not known yet"
    return f"{rate:,.0f} samples/s" if rate >= 10 else f"{rate:.2g} samples/s"


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f", {duration(seconds)} left"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time in words: 12 s, 3 min 20 s, 5 h 7 min, 2 d 3 h."""
    whole = round(seconds)
    for (large, size), (small, part) in ((("d", 86400), ("h", 3600)), (("h", 3600), ("min", 60)), (("min", 60), ("s", 1))):
        if whole >= size:
            return f"{whole // size} {large}" + (f" {whole % size // part} {small}" if whole % size >= part else "")
    return f"{whole} s"
