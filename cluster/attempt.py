"""The attempts at a data set: which run they belong to, their number, and whether they still live.

    <root>/attempts/00002.json   one attempt; its driver writes it anew every few seconds, with a tally of what it has done

Any number of attempts may work at once: a shard's manifest is a conditional PUT, so the first commit wins. The records are not needed
for that. They say who committed what, and keep ``facemae verify --clean`` from tidying up under somebody's feet.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from cluster.store import AlreadyExists, NotFound, Store, StoreError

FOLDER = "attempts/"
BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 4 * BEAT_SECONDS
"""An attempt whose record does not change for so long is taken for dead."""
RUNNING = "running"


@dataclass(frozen=True)
class Attempt:
    """One try of one run at a data set: ``run`` is the same for all tries, ``number`` counts them from 1."""

    run: str
    number: int


@dataclass(frozen=True)
class Record:
    """What an attempt says of itself.

    Attributes:
        run, attempt: see Attempt.
        fingerprint: of input and settings.
        state: running, ended, failed, or damaged where the record cannot be read.
        beat: counts up while it lives; -1 afterwards.
        started: its driver's time, for people; no clock of another machine is ever compared.
        error: the kind of error that ended it, without its message.
        tally: how its work stands (cluster/pulse.py); None in records of earlier versions.
    """

    run: str
    attempt: int
    fingerprint: str
    state: str
    beat: int
    started: str
    error: str = ""
    tally: Mapping[str, Any] | None = None

    def to_bytes(self) -> bytes:
        """The record as the JSON that is stored."""
        return (json.dumps(asdict(self), indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """The inverse; what a later version adds is passed over. Raises ValueError or TypeError for anything else."""
        content, known = dict(json.loads(data)), {field.name for field in fields(cls)}
        record = cls(**{name: value for name, value in content.items() if name in known})
        if not isinstance(record.state, str) or type(record.beat) is not int:
            raise ValueError("no record")
        return record


@contextlib.contextmanager
def attempting(
    store: Store,
    fingerprint: str,
    announce: Callable[[str], None] = lambda _: None,
    tally: Callable[[], Mapping[str, Any] | None] = lambda: None,
) -> Iterator[Attempt]:
    """Begin the next attempt at the data set in ``store``, and keep its record alive until the block ends. ``tally`` is asked at every
    beat, from another thread.

    Raises:
        StoreError: the store cannot be written, or an earlier attempt with another fingerprint (other input or settings) is alive.
    """
    record = _begin(store, fingerprint, tally())
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(store, record, ended, tally), name="heartbeat", daemon=True)
    beating.start()
    state, kind = "failed", ""
    try:
        _require_no_rival(store, record, announce)
        yield Attempt(record.run, record.attempt)
        state = "ended"
    except BaseException as error:
        kind = type(error).__name__
        raise
    finally:
        ended.set()
        beating.join()
        with contextlib.suppress(StoreError):  # the record will be taken for dead, which is true
            store.put(_key(record.attempt), replace(record, state=state, beat=-1, error=kind, tally=tally()).to_bytes())


def living(
    store: Store,
    patience: float | None = None,
    announce: Callable[[str], None] = lambda _: None,
    among: Callable[[int, str], bool] = lambda _number, _fingerprint: True,
) -> list[int]:
    """Numbers of the attempts that are alive: their record changes while we watch, for at most ``patience`` seconds. ``among`` chooses
    by number and fingerprint which to look at."""
    patience = PATIENCE_SECONDS if patience is None else patience
    first = _running(store, among)
    if first:
        announce(f"{_numbers(first)} at {store.url} did not say that it ended: watching its heartbeat for {patience:.0f} s")
    deadline = time.monotonic() + patience
    while first and time.monotonic() < deadline:
        time.sleep(min(1.0, patience / 4))
        now = _running(store, among)
        alive = [number for number, beat in now.items() if first.get(number) != beat]  # also one that has begun since
        if alive:
            return alive
    return []


def is_alive(store: Store, record: Record, patience: float | None = None) -> bool:
    """Whether an attempt is at work. Its record's age by the store's own clock tells at once; a store that does not tell is watched for a
    beat, for at most ``patience`` seconds."""
    patience = PATIENCE_SECONDS if patience is None else patience
    if record.state != RUNNING:
        return False
    with contextlib.suppress(NotFound):
        age = store.age(_key(record.attempt))
        if age is not None:
            return age < patience
    return record.attempt in living(store, patience, among=lambda number, _: number == record.attempt)


def _require_no_rival(store: Store, mine: Record, announce: Callable[[str], None]) -> None:
    """Of two attempts that would mix their shards the later one goes."""
    rivals = living(store, None, announce, lambda number, fingerprint: number < mine.attempt and fingerprint != mine.fingerprint)
    if rivals:
        raise StoreError(
            f"attempt {rivals[0]} with other input or settings is at work on {store.url}: choose another output, or stop that one first",
            fatal=True,
        )


def _begin(store: Store, fingerprint: str, tally: Mapping[str, Any] | None) -> Record:
    """Take the next number: of attempts that begin at the same time each gets its own."""
    while True:
        known = records(store)
        run = next((record.run for _, record in sorted(known.items()) if record.state != "damaged"), uuid.uuid4().hex[:12])
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = Record(run, max(known, default=0) + 1, fingerprint, RUNNING, 0, started, tally=tally)
        try:
            store.put(_key(record.attempt), record.to_bytes(), if_absent=True)
        except AlreadyExists:
            continue
        return record


def _beat(store: Store, record: Record, ended: threading.Event, tally: Callable[[], Mapping[str, Any] | None]) -> None:
    while not ended.wait(BEAT_SECONDS):
        record = replace(record, beat=record.beat + 1, tally=tally())
        with contextlib.suppress(StoreError):  # storage that fails is the stage's business
            store.put(_key(record.attempt), record.to_bytes())


def _running(store: Store, among: Callable[[int, str], bool]) -> dict[int, int]:
    """Heartbeats of the attempts that have not said how they ended."""
    found = records(store).items()
    return {number: record.beat for number, record in found if record.state == RUNNING and among(number, record.fingerprint)}


def records(store: Store) -> dict[int, Record]:
    """Every attempt's record, by number. One that cannot be read is that of an attempt that ended we do not know how."""
    found = dict[int, Record]()
    for stored in store.list(FOLDER):
        if not is_record(stored.key):
            continue
        number = int(stored.key.removeprefix(FOLDER).removesuffix(".json"))
        try:
            found[number] = Record.from_bytes(store.get(stored.key))
        except (ValueError, TypeError, NotFound):
            found[number] = Record("unknown", number, "", "damaged", -1, "")
    return found


def is_record(key: str) -> bool:
    """Whether an object's key is that of an attempt's record."""
    return re.fullmatch(rf"{FOLDER}\d{{5,}}\.json", key) is not None


def _key(number: int) -> str:
    return f"{FOLDER}{number:05d}.json"


def _numbers(attempts: dict[int, int]) -> str:
    return ("attempt " if len(attempts) == 1 else "attempts ") + ", ".join(map(str, attempts))
