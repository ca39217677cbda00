"""The attempts at a data set: which run they belong to, their number, and whether they still live.

    <root>/attempts/00002.json   one attempt; its driver writes it anew every few seconds

Any number of attempts may work at once: a shard's manifest is a conditional PUT, so the first commit wins. The records are not needed
for that. They say who committed what, and keep ``facemae verify --clean`` from tidying up under somebody's feet.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

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
class _Record:
    """What an attempt says of itself. ``beat`` counts up while it lives; no clock of another machine is ever compared."""

    run: str
    attempt: int
    state: str
    beat: int
    started: str

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self), indent=1) + "\n").encode()


@contextlib.contextmanager
def attempting(store: Store) -> Iterator[Attempt]:
    """Begin the next attempt at the data set in ``store``, and keep its record alive until the block ends.

    Raises:
        StoreError: the store cannot be written.
    """
    record = _begin(store)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(store, record, ended), name="heartbeat", daemon=True)
    beating.start()
    state = "failed"
    try:
        yield Attempt(record.run, record.attempt)
        state = "ended"
    finally:
        ended.set()
        beating.join()
        with contextlib.suppress(StoreError):  # the record will be taken for dead, which is true
            store.put(_key(record.attempt), replace(record, state=state, beat=-1).to_bytes())


def living(store: Store, patience: float = PATIENCE_SECONDS, announce: Callable[[str], None] = lambda _: None) -> list[int]:
    """Numbers of the attempts that are alive: their record changes while we watch, for at most ``patience`` seconds."""
    first = _running(store)
    if first:
        announce(f"{_numbers(first)} at {store.url} did not say that it ended: watching its heartbeat for {patience:.0f} s")
    deadline = time.monotonic() + patience
    while first and time.monotonic() < deadline:
        time.sleep(min(1.0, patience / 4))
        now = _running(store)
        alive = [number for number, beat in now.items() if first.get(number) != beat]  # also one that has begun since
        if alive:
            return alive
    return []


def _begin(store: Store) -> _Record:
    """Take the next number: of attempts that begin at the same time each gets its own."""
    while True:
        known = _records(store)
        run = known[min(known)].run if known else uuid.uuid4().hex[:12]
        record = _Record(run, max(known, default=0) + 1, RUNNING, 0, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        try:
            store.put(_key(record.attempt), record.to_bytes(), if_absent=True)
        except AlreadyExists:
            continue
        return record


def _beat(store: Store, record: _Record, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        record = replace(record, beat=record.beat + 1)
        with contextlib.suppress(StoreError):  # storage that fails is the stage's business
            store.put(_key(record.attempt), record.to_bytes())


def _running(store: Store) -> dict[int, int]:
    """Heartbeats of the attempts that have not said how they ended."""
    return {number: record.beat for number, record in _records(store).items() if record.state == RUNNING}


def _records(store: Store) -> dict[int, _Record]:
    """Every attempt's record, by number."""
    found = dict[int, _Record]()
    for stored in store.list(FOLDER):
        try:
            record = _Record(**json.loads(store.get(stored.key)))
        except (ValueError, TypeError, NotFound):
            raise StoreError(f"{store.url}/{stored.key} is no record of an attempt: remove it", fatal=True) from None
        found[record.attempt] = record
    return found


def _key(number: int) -> str:
    return f"{FOLDER}{number:05d}.json"


def _numbers(attempts: dict[int, int]) -> str:
    return ("attempt " if len(attempts) == 1 else "attempts ") + ", ".join(map(str, attempts))
