"""How far a data set is: from one listing, the tallies of its attempts, and manifests only where these do not say enough.

The tallies are enough while each attempt knows of all shards that earlier ones committed. They are not after an attempt that died
between a commit and its next beat, beside attempts that overlap, and in sets of earlier versions: then every manifest is read, once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from cluster.attempt import RUNNING, Record
from cluster.dataset import IO_THREADS, Dataset, NotADataset
from cluster.listing import printable
from cluster.pulse import Tally
from cluster.status_part import AttemptStatus, PartStatus, State, advice, attempt_status, read_records, state_without_result
from cluster.store import NotFound, StoreError

MANY = 2000
"""From so many manifests on, reading them is announced."""
Attempts = Sequence[AttemptStatus[Tally]] | None


@dataclass(frozen=True, kw_only=True)
class DatasetStatus(PartStatus):
    """A data set.

    Attributes:
        shards, shards_total: committed, and in all; the latter None where nobody says.
        samples, quarantined: of the committed shards.
        samples_total: that come in, in all; None where nobody says. Of a complete set samples + quarantined.
        given_up: shards that were quarantined whole, with the reason.
        samples_per_second, shards_per_second: lately, of the attempts that are alive; samples with what was quarantined.
        seconds_left: at that rate; None where it is not known.
        waiting: seconds for which an attempt that is alive has had no worker; None otherwise.
        released: True by the gate's word; withheld: why not.
    """

    shards: int
    shards_total: int | None
    samples: int
    quarantined: int
    samples_total: int | None
    given_up: Mapping[str, str]
    samples_per_second: float | None = None
    shards_per_second: float | None = None
    seconds_left: float | None = None
    waiting: float | None = None
    released: bool = False
    withheld: str | None = None


@dataclass(frozen=True)
class _Counted:
    """Of one manifest."""

    samples: int
    quarantined: int
    failure: str | None


class DatasetWatch:
    """Looks at one data set again and again; a manifest is read at most once, since it never changes.

    Args:
        url: its root.
        announce: told of what takes long.
    """

    def __init__(self, url: str, announce: Callable[[str], None]) -> None:
        self._dataset, self._announce = Dataset(url), announce
        self._known: dict[str, _Counted] = {}
        self._damaged: dict[str, str] = {}

    def look(self, entries: set[str]) -> DatasetStatus:
        """How it stands now. ``entries``: what lies directly below its root."""
        names = self._dataset.names() if "manifests/" in entries else []
        found = read_records(self._dataset.store)
        records = list((found or {}).values())
        attempts: Attempts = None
        if found is not None:
            attempts = [attempt_status(self._dataset.store, record, Tally.of(record.tally)) for record in records]
        self._forget(names)
        try:
            content = self._dataset.description() if "dataset.json" in entries else None
        except NotADataset:
            content = None  # deleted since
        except StoreError as error:
            if not error.fatal:
                raise
            return self._unfinished(names, records, attempts, str(error))
        return self._unfinished(names, records, attempts, "") if content is None else self._finished(content, names, attempts)

    def _finished(self, content: Mapping[str, Any], names: list[str], attempts: Attempts) -> DatasetStatus:
        url, problems = self._dataset.url, list[str]()
        if len(names) < content["shards"]:
            problems = [
                f"dataset.json counts {content['shards']} shards, {len(names)} manifests are there: run the command that wrote the set "
                "again, it makes the missing ones anew"
            ]
        given_up = self._given_up(self._without_data(names, problems)) if content["quarantined"] else {}
        alive = any(attempt.state == RUNNING for attempt in attempts or ())
        state = State.RUNNING if alive else State.DAMAGED if problems or self._damaged else State.COMPLETE
        withheld = (content.get("release") or {}).get("withheld")
        return DatasetStatus(
            url=url,
            kind=str(content.get("kind")),
            state=state,
            attempts=attempts,
            problems=[*problems, *self._damaged.values()],
            next=_after(content, url, state),
            shards=len(names),
            shards_total=max(len(names), content["shards"]),
            samples=content["samples"],
            quarantined=content["quarantined"],
            samples_total=content["samples_in"],
            given_up=given_up,
            released=content.get("released") is True,
            withheld=None if withheld is None else str(withheld),
        )

    def _unfinished(self, names: list[str], records: Sequence[Record], attempts: Attempts, problem: str) -> DatasetStatus:
        tallies = [(attempt.state == RUNNING, attempt.tally) for attempt in attempts or () if attempt.tally is not None]
        last = tallies[-1][1] if tallies else None
        if attempts is not None and len(tallies) == len(records) and vouched(len(names), tallies):
            samples, quarantined = sum(t.own_samples for _, t in tallies), sum(t.own_quarantined for _, t in tallies)
            given_up = self._given_up(name for _, tally in tallies for name in tally.given_up)
        else:
            self._read(names)
            samples = sum(each.samples for each in self._known.values())
            quarantined = sum(each.quarantined for each in self._known.values())
            given_up = self._given_up(names)
        total = None if last is None else last.samples
        shards_total = None if last is None else max(last.shards, len(names))
        left = "what is left" if shards_total is None else f"the {shards_total - len(names)} shards that are left"
        problems = [*([problem] if problem else []), *self._damaged.values()]
        state = State.DAMAGED if problems and not any(alive for alive, _ in tallies) else state_without_result(attempts)
        if problem and state is State.DAMAGED:
            remedy = "run the command that wrote the set again: it goes on with what is committed and writes dataset.json anew"
        else:
            remedy = advice(attempts, self._dataset.url, left)
        status = DatasetStatus(
            url=self._dataset.url,
            kind=last.stage if last else "data set",
            state=state,
            attempts=attempts,
            problems=problems,
            next=remedy,
            shards=len(names),
            shards_total=shards_total,
            samples=samples,
            quarantined=quarantined,
            samples_total=total,
            given_up=given_up,
        )
        return _paced(status, [tally for alive, tally in tallies if alive])

    def _given_up(self, names: Iterable[str]) -> dict[str, str]:
        """Of these committed shards those that were given up, with the reason."""
        names = list(names)
        self._read(names)
        known = ((name, self._known[name].failure) for name in names if name in self._known)
        return {name: printable(failure) for name, failure in known if failure}

    def _without_data(self, names: Sequence[str], problems: list[str]) -> list[str]:
        """Of the committed shards those of which nothing could be used, by index.json."""
        try:
            index = json.loads(self._dataset.store.get("index.json"))
            held = {str(each["url"]).removeprefix("shards/").partition("-")[0] for each in index["shardlist"]}
        except (NotFound, ValueError, KeyError, TypeError):
            problems.append("index.json is missing or damaged: run the command that wrote the set again, it writes it anew")
            return []
        return [name for name in names if name not in held]

    def _read(self, names: Iterable[str]) -> None:
        """Read the manifests of these shards that were not read before."""
        new = [name for name in names if name not in self._known and name not in self._damaged]
        if len(new) >= MANY:
            self._announce(f"{self._dataset.url}: reading {len(new)} manifests")
        with ThreadPoolExecutor(IO_THREADS) as pool:
            list(pool.map(self._read_one, new))

    def _read_one(self, name: str) -> None:
        try:
            manifest = self._dataset.committed(name)
        except StoreError as error:
            if not error.fatal:
                raise
            self._damaged[name] = str(error)
            return
        if manifest is not None:
            self._known[name] = _Counted(manifest.samples, manifest.quarantined, manifest.failure)

    def _forget(self, names: Sequence[str]) -> None:
        """A manifest that was deleted, to make its shard anew, does not count any more; a damaged one is looked at again."""
        self._damaged.clear()
        for name in self._known.keys() - set(names):
            del self._known[name]


def vouched(committed: int, tallies: Sequence[tuple[bool, Tally]]) -> bool:
    """Whether the tallies of all attempts, (alive, tally) by number, add up to the ``committed`` shards; one that is alive may be a beat
    behind."""
    own = 0
    for _, tally in tallies:
        if tally.resumed != own:
            return False
        own += tally.own_shards
    behind = bool(tallies) and tallies[-1][0] and sum(alive for alive, _ in tallies) == 1
    if any(tally.own_given_up > len(tally.given_up) for _, tally in tallies):
        return False
    return own <= committed if behind else own == committed


def _paced(status: DatasetStatus, alive: Sequence[Tally]) -> DatasetStatus:
    """The same with rate and time left by the attempts that are alive, or with how long none of them has had a worker."""
    if not alive:
        return status
    waits = [tally.waiting for tally in alive if tally.waiting is not None]
    if len(waits) == len(alive):
        return replace(status, waiting=min(waits))
    samples, shards = (sum(getattr(tally, name) or 0.0 for tally in alive) for name in ("samples_per_second", "shards_per_second"))
    left = None
    if status.samples_total is not None and samples:
        left = max(0, status.samples_total - status.samples - status.quarantined) / samples
    elif status.shards_total is not None and shards:
        left = (status.shards_total - status.shards) / shards
    return replace(status, samples_per_second=samples or None, shards_per_second=shards or None, seconds_left=left)


def _after(content: Mapping[str, Any], url: str, state: State) -> str:
    """What to do with a data set that has its dataset.json."""
    if state is State.RUNNING:
        return f"facemae status {url} --watch"
    if state is State.DAMAGED:
        return "run the command that wrote the set again"
    return f"facemae verify {url}"
