"""How far everything at a root is, from its store alone: data sets, trainings, and what lies below them. Needs no Ray and no driver.

A root is a data set (with embeddings and indexes below it), a training run, or a folder of such, as a pipeline makes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.pulse import Tally
from cluster.status_dataset import DatasetStatus, DatasetWatch
from cluster.status_part import PartStatus, State
from cluster.status_training import TrainingStatus, look_at_training
from cluster.store import NotFound, Store, StoreError, join_url, open_store, split_url
from cluster.training_pulse import TrainingTally

__all__ = ["DatasetStatus", "State", "Status", "Tally", "TrainingStatus", "TrainingTally", "Watch"]

DEPTH = 4
FOLDERS = 500
"""How deep, and into how many folders, a root that is neither data set nor training is searched."""
_SET, _RUN = {"dataset.json", "manifests/"}, {"run.json", "checkpoints/", "keys/"}


@dataclass(frozen=True)
class Status:
    """What was found at a root.

    Attributes:
        url: the root.
        parts: data sets and trainings, each before what lies below it.
    """

    url: str
    parts: Sequence[PartStatus]

    @property
    def state(self) -> State:
        """Of all parts together: running while one is, and complete when all are."""
        states = [part.state for part in self.parts]
        return next((state for state in (State.RUNNING, State.DAMAGED, State.UNFINISHED, State.UNKNOWN) if state in states), State.COMPLETE)

    @property
    def given_up(self) -> list[str]:
        """Shards that were quarantined whole, each with the root of its set."""
        return [f"{part.url}: {shard}" for part in self.parts if isinstance(part, DatasetStatus) for shard in part.given_up]

    @property
    def withheld(self) -> str | None:
        """Why the gate withholds the set at this root; None where it does not."""
        return next((part.withheld for part in self.parts if isinstance(part, DatasetStatus) and part.withheld), None)


class Watch:
    """Looks at a root again and again; later looks read only what is new.

    Args:
        url: a folder or s3://bucket/prefix.
        announce: told of what takes long.

    Raises:
        StoreError: the URL is none.
    """

    def __init__(self, url: str, announce: Callable[[str], None] = lambda _: None) -> None:
        if not url.strip():
            raise StoreError("ROOT is empty: give the --output of a job, a folder or s3://bucket/prefix", fatal=True)
        self._store, self._announce = open_store(url), announce
        self._stores: dict[str, Store] = {}
        self._sets: dict[str, DatasetWatch] = {}

    def look(self) -> Status:
        """How it stands now.

        Raises:
            StoreError: the root cannot be read, is a file, or holds neither data set nor training.
        """
        parts = list(self._parts(self._store, DEPTH, [FOLDERS]))
        if not parts:
            _require_no_file(self._store.url)
            raise StoreError(
                f"{self._store.url} holds neither a data set nor a training: correct ROOT, or begin with `facemae ingest --source FACES "
                f"--output {self._store.url}`",
                fatal=True,
            )
        return Status(self._store.url, parts)

    def _parts(self, store: Store, depth: int, folders: list[int]) -> Iterator[PartStatus]:
        """Every data set and training from ``store`` downwards; ``folders`` counts down."""
        folders[0] -= 1
        entries = set(store.entries())
        if entries & _RUN:
            yield look_at_training(store, entries)
        elif entries & _SET or ("attempts/" in entries and not _trains(store)):
            yield self._look_at_set(store, entries)
            for name in _folders(store.entries("embeddings/")) if "embeddings/" in entries else ():
                below = self._open(join_url(store.url, "embeddings", name))
                if (found := set(below.entries())) & {*_SET, "attempts/"}:
                    yield self._look_at_set(below, found)
        elif "attempts/" in entries:
            yield look_at_training(store, entries)
        elif depth and folders[0] > 0:
            for name in _folders(entries):
                yield from self._parts(self._open(join_url(store.url, name)), depth - 1, folders)

    def _open(self, url: str) -> Store:
        """A store below the root, opened once: a client of S3 takes a while to make."""
        if url not in self._stores:
            self._stores[url] = open_store(url)
        return self._stores[url]

    def _look_at_set(self, store: Store, entries: set[str]) -> DatasetStatus:
        if store.url not in self._sets:
            self._sets[store.url] = DatasetWatch(store.url, self._announce)
        return self._sets[store.url].look(entries)


def _folders(entries: Iterable[str]) -> list[str]:
    """Names of the folders among the entries, in order; hidden ones are nobody's data."""
    return sorted(entry.rstrip("/") for entry in entries if entry.endswith("/") and not entry.startswith("."))


def _trains(store: Store) -> bool:
    """Whether the attempts at a root that holds nothing else yet are those of a training."""
    from cluster.attempt import records

    return any(TrainingTally.of(record.tally) for record in records(store).values())


def _require_no_file(url: str) -> None:
    """Raise StoreError where the root is one file or object, or where there is none."""
    root, name = split_url(url)
    if url.startswith("s3://"):
        if "/" not in url.removeprefix("s3://"):
            return
        try:
            open_store(root).size(name)
        except NotFound:
            return
        except StoreError as error:
            if not error.fatal:
                raise
            return  # what the credentials do not show of the folder above says nothing of the root
    elif not os.path.lexists(url):
        raise StoreError(f"{url} does not exist: correct ROOT; a job's --output, or the root: of a pipeline", fatal=True)
    elif Path(url).is_dir():
        return
    raise StoreError(f"{url} is a file: give the folder that it lies in, {root}", fatal=True)
