"""Where faces come from: an image folder, InsightFace records, existing tars, or the synthetic renderer.

A source lists its units once on the driver (names, offsets, counts) and reads the bytes of one unit on a worker. Identities keep together:
units run through the people in order, so a shard holds whole identities and batches balanced by identity can be drawn from few shards.
"""

from __future__ import annotations

import fnmatch
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cluster.picture import encode
from cluster.processor import Unit
from cluster.record import RecordFile, read_records
from cluster.shard import Rejected, Sample, ShardError, read_samples
from cluster.store import NotFound, Store, StoredObject, StoreError, open_store, split_url
from facemae.synthetic import SyntheticFaces

FETCH_THREADS = 16


class Source(ABC):
    """Faces with labels, in units. ``open`` and ``read`` run on workers; the object itself travels by pickle."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What determines the data, JSON-able, without a path: it becomes lineage."""

    @abstractmethod
    def units(self, shard_size: int) -> Sequence[Unit]:
        """The work in shards of about ``shard_size`` images. Raises StoreError when the source cannot be read or is empty."""

    @abstractmethod
    def fetch(self, unit: Any) -> Any:
        """Read what the unit needs from storage."""

    @abstractmethod
    def samples(self, unit: Any, fetched: Any) -> Iterator[Sample | Rejected]:
        """The unit's images as they are in the source. ``key`` is a place holder that ingest replaces."""


def open_source(text: str) -> Source:
    """The source named by ``--source``: DIR, FILE.rec, TARS (file, folder or pattern with ``*``), ``synthetic:ids=,images=``.

    Raises:
        StoreError: nothing is there, or it cannot be read.
        ValueError: a synthetic source with wrong settings.
    """
    if text.startswith("synthetic:"):
        return SyntheticSource(SyntheticFaces.parse(text.removeprefix("synthetic:")))
    if text.endswith(".rec"):
        return RecordSource(text)
    root, name = split_url(text)
    if name.endswith(".tar") or "*" in name:
        return TarSource(root, name)
    store = open_store(text)
    first = next(iter(store.list()), None)
    if first is None:
        raise StoreError(f"{text} holds no files: give a folder with one folder of images an identity", fatal=True)
    if first.key.endswith(".tar"):
        return TarSource(text, "*.tar")
    return FolderSource(text)


@dataclass(frozen=True)
class FolderUnit(Unit):
    """Files of a folder: (key below the root, identity)."""

    files: Sequence[tuple[str, int]] = ()


class FolderSource(Source):
    """One folder an identity; labels count the folders in name order. Any file that is no picture becomes a ledger row."""

    def __init__(self, url: str) -> None:
        self._url, self._digest = url, ""

    def describe(self) -> dict[str, Any]:
        """The kind and a digest of the listing, so that a resumed run notices a folder that changed."""
        return {"source": "folder", "listing_sha256": self._digest}

    def units(self, shard_size: int) -> Sequence[Unit]:
        """Files in key order, ``shard_size`` a unit."""
        digest, files, labels = hashlib.sha256(), list[tuple[str, int]](), dict[str, int]()
        for stored in _in_order(open_store(self._url)):
            digest.update(f"{stored.key}\0{stored.size}\n".encode(errors="surrogateescape"))
            folder = stored.key.rpartition("/")[0]
            files.append((stored.key, labels.setdefault(folder, len(labels)) if folder else -1))
        self._digest = digest.hexdigest()
        starts = range(0, len(files), shard_size)
        return [FolderUnit(_name(i), len(files[s : s + shard_size]), files[s : s + shard_size]) for i, s in enumerate(starts)]

    def fetch(self, unit: FolderUnit) -> list[bytes | None]:
        """The files' bytes, None for one that vanished since the listing."""
        store = open_store(self._url)
        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            return list(pool.map(lambda file: _get(store, file[0]), unit.files))

    def samples(self, unit: FolderUnit, fetched: list[bytes | None]) -> Iterator[Sample | Rejected]:
        """One sample a file."""
        for (key, identity), data in zip(unit.files, fetched, strict=True):
            source = _printable(key)
            if data is None:
                yield Rejected("", "vanished", "the file was listed but is no longer there", 0, source)
            elif identity < 0:
                yield Rejected("", "no-label", "the file lies in no identity's folder: put it into ROOT/<identity>/", len(data), source)
            else:
                yield Sample("", data, identity, source)


@dataclass(frozen=True)
class RecordUnit(Unit):
    """A byte range of a .rec file."""

    start: int = 0
    stop: int = 0


class RecordSource(Source):
    """InsightFace FILE.rec with FILE.idx beside it, read by byte ranges in parallel, without mxnet."""

    def __init__(self, url: str) -> None:
        self._file = RecordFile(url)
        self._index_digest = ""

    def describe(self) -> dict[str, Any]:
        """The kind and a digest of the index."""
        return {"source": "rec", "index_sha256": self._index_digest}

    def units(self, shard_size: int) -> Sequence[Unit]:
        """Records in file order, ``shard_size`` a unit."""
        offsets, self._index_digest = self._file.image_offsets()
        bounds = range(0, len(offsets) - 1, shard_size)
        ends = [min(b + shard_size, len(offsets) - 1) for b in bounds]
        return [RecordUnit(_name(i), e - b, int(offsets[b]), int(offsets[e])) for i, (b, e) in enumerate(zip(bounds, ends, strict=True))]

    def fetch(self, unit: RecordUnit) -> bytes:
        """The range's bytes."""
        return self._file.read(unit.start, unit.stop)

    def samples(self, unit: RecordUnit, fetched: bytes) -> Iterator[Sample | Rejected]:
        """One sample a record; a damaged record costs the rest of its unit, which the ledger counts."""
        done = 0
        try:
            for record in read_records(fetched):
                source = f"record {record.number}"
                if record.identity is None:
                    yield Rejected("", "bad-label", "the record's label is no integer >= 0", len(record.image), source)
                else:
                    yield Sample("", record.image, record.identity, source)
                done += 1
        except ShardError as error:
            yield Rejected("", "damaged-record", str(error), 0, f"bytes {unit.start} to {unit.stop}", max(1, unit.num_samples - done))


@dataclass(frozen=True)
class TarUnit(Unit):
    """One existing tar."""

    file: str = ""


class TarSource(Source):
    """Existing WebDataset tars: one output shard for each, in name order."""

    def __init__(self, url: str, pattern: str) -> None:
        self._url, self._pattern, self._digest = url, pattern, ""

    def describe(self) -> dict[str, Any]:
        """The kind and a digest of the tars' names and sizes."""
        return {"source": "tars", "listing_sha256": self._digest}

    def units(self, shard_size: int) -> Sequence[Unit]:
        """One unit a tar; ``shard_size`` does not apply: how many samples a tar holds is known when it is read."""
        match = self._pattern
        found = [s for s in _in_order(open_store(self._url)) if s.key == match or fnmatch.fnmatchcase(s.key, match)]
        if not found:
            raise StoreError(f"no object in {self._url} matches {self._pattern}", fatal=True)
        self._digest = hashlib.sha256("\n".join(f"{s.key}\0{s.size}" for s in found).encode(errors="surrogateescape")).hexdigest()
        return [TarUnit(_name(i), 0, stored.key) for i, stored in enumerate(found)]

    def fetch(self, unit: TarUnit) -> bytes:
        """The tar's bytes."""
        return open_store(self._url).get(unit.file)

    def samples(self, unit: TarUnit, fetched: bytes) -> Iterator[Sample | Rejected]:
        """The tar's samples; where it is cut short, those before the damage and one ledger row."""
        file = _printable(unit.file)
        try:
            for sample in read_samples(fetched):
                if isinstance(sample, Sample):
                    yield Sample("", sample.image, sample.identity, f"{file}/{sample.key}")
                else:
                    yield Rejected("", sample.reason, sample.error, sample.num_bytes, f"{file}/{sample.key}")
        except ShardError as error:
            message = f"{error}; the samples before it were kept, how many followed is not known: fetch the tar again"
            yield Rejected("", "truncated-tar", message, len(fetched), file)


@dataclass(frozen=True)
class SyntheticUnit(Unit):
    """Images ``start`` to ``start + num_samples`` of the renderer."""

    start: int = 0


class SyntheticSource(Source):
    """Drawn faces: no real person is in them."""

    RENDER_AHEAD = 64

    def __init__(self, faces: SyntheticFaces) -> None:
        self._faces = faces

    def describe(self) -> dict[str, Any]:
        """The renderer's settings."""
        faces = self._faces
        return {"source": "synthetic", "ids": faces.num_identities, "images": faces.images_per_identity, "seed": faces.seed}

    def units(self, shard_size: int) -> Sequence[Unit]:
        """Images in order, ``shard_size`` a unit."""
        total = len(self._faces)
        return [SyntheticUnit(_name(i), min(shard_size, total - s), s) for i, s in enumerate(range(0, total, shard_size))]

    def fetch(self, unit: SyntheticUnit) -> None:
        """Nothing: faces are drawn where they are needed."""

    def samples(self, unit: SyntheticUnit, fetched: None) -> Iterator[Sample | Rejected]:
        """One sample an image."""
        import numpy as np

        for start in range(unit.start, unit.start + unit.num_samples, self.RENDER_AHEAD):
            indices = np.arange(start, min(start + self.RENDER_AHEAD, unit.start + unit.num_samples))
            labels = self._faces.identities(indices)
            for index, identity, picture in zip(indices, labels, self._faces.render(indices), strict=True):
                yield Sample("", encode(picture), int(identity), f"synthetic image {index}")


def _name(number: int) -> str:
    return f"{number:05d}"


def _in_order(store: Store) -> list[StoredObject]:
    """Every object in key order, which not every S3 server keeps: labels and shards must not depend on where the files lie."""
    return sorted(store.list(), key=lambda stored: stored.key)


def _printable(key: str) -> str:
    """The key as Unicode: a local file's name need not be UTF-8."""
    return key.encode(errors="surrogateescape").decode(errors="replace")


def _get(store: Store, key: str) -> bytes | None:
    try:
        return store.get(key)
    except NotFound:
        return None
