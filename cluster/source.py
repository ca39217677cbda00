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
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import numpy as np

from cluster.listing import MAX_SHARD_BYTES, cut, get_listed, in_order, printable, refusal, too_large
from cluster.local import LocalStore
from cluster.picture import encode
from cluster.processor import Unit
from cluster.record import RecordFile, read_records
from cluster.shard import Rejected, Sample, read_samples
from cluster.store import Store, StoreError, join_url, open_store, split_url
from cluster.tar import MAX_MEMBER_BYTES, NotATarError, ShardError
from facemae.synthetic import SyntheticFaces

FETCH_THREADS = 16
VANISHED = ("vanished", "the file was listed but cannot be read: it is gone, or its permissions do not allow it")


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
        StoreError: nothing is there, it is no source of faces, or it cannot be read.
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
    _require_folder(store)
    first = next(iter(store.list()), None)
    if first is None:
        raise StoreError(f"{text} holds no files: give a folder with one folder of images an identity", fatal=True)
    if first.key.endswith(".tar"):
        return TarSource(text, "*.tar")
    return FolderSource(text)


def listed_root(text: str) -> str | None:
    """The folder whose listing is the source; None for synthetic faces and single files."""
    root, name = split_url(text)
    if "*" in name:
        return root
    return None if text.startswith("synthetic:") or name.endswith((".rec", ".tar")) else text


def _require_folder(store: Store) -> None:
    """Raises StoreError when the store is a folder that is not there, a file, or a data set."""
    if isinstance(store, LocalStore) and not store.root.is_dir():
        problem = "is a file" if store.root.exists() else "does not exist"
        raise StoreError(f"{store.url} {problem}: give a folder, FILE.rec, or a .tar that is not compressed", fatal=True)
    if any(stored.key.endswith(".json") for stored in islice(store.list("manifests/"), 1)):
        raise StoreError(
            f"{store.url} is a data set already: facemae embed, train and protect read it as it is. To bring its images into another "
            f"data set give its tars: --source {join_url(store.url, 'shards')}",
            fatal=True,
        )


@dataclass(frozen=True)
class FolderUnit(Unit):
    """Files of a folder: (key below the root, identity, bytes)."""

    files: Sequence[tuple[str, int, int]] = ()


class FolderSource(Source):
    """One folder an identity; labels count the folders in name order. Any file that is no picture becomes a ledger row."""

    def __init__(self, url: str) -> None:
        self._url, self._digest = url, ""

    def describe(self) -> dict[str, Any]:
        """The kind and a digest of the listing, so that a resumed run notices a folder that changed."""
        return {"source": "folder", "listing_sha256": self._digest}

    def units(self, shard_size: int) -> Sequence[FolderUnit]:
        """Files in key order, ``shard_size`` a unit, fewer where they would be more than ``MAX_SHARD_BYTES``."""
        digest, files, labels = hashlib.sha256(), list[tuple[str, int, int]](), dict[str, int]()
        for stored in in_order(open_store(self._url)):
            digest.update(f"{stored.key}\0{stored.size}\n".encode(errors="surrogateescape"))
            folder = stored.key.rpartition("/")[0]
            files.append((stored.key, labels.setdefault(folder, len(labels)) if folder else -1, stored.size))
        if not labels:
            remedy = f"put each person's images into a folder of their own; for tars give {join_url(self._url, '*.tar')}"
            raise StoreError(f"{self._url} holds {len(files)} files and no folder of an identity: {remedy}", fatal=True)
        self._digest = digest.hexdigest()
        fetched = [0 if refusal(key, size, MAX_MEMBER_BYTES) else size for key, _, size in files]
        pieces = cut(np.cumsum([0, *fetched]), shard_size)
        return [FolderUnit(_name(i), stop - start, files[start:stop]) for i, (start, stop) in enumerate(pieces)]

    def fetch(self, unit: FolderUnit) -> list[bytes | None]:
        """The files' bytes, None for one that vanished since the listing or is refused unread."""
        store = open_store(self._url)
        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            return list(pool.map(lambda file: get_listed(store, file[0], file[2], MAX_MEMBER_BYTES), unit.files))

    def samples(self, unit: FolderUnit, fetched: list[bytes | None]) -> Iterator[Sample | Rejected]:
        """One sample a file."""
        for (key, identity, size), data in zip(unit.files, fetched, strict=True):
            source = printable(key)
            if data is None:
                yield Rejected("", *(refusal(key, size, MAX_MEMBER_BYTES) or VANISHED), size, source)
            elif identity < 0:
                yield Rejected("", "no-label", "the file lies in no identity's folder: put it into ROOT/<identity>/", len(data), source)
            else:
                yield Sample("", data, identity, source)


@dataclass(frozen=True, eq=False)
class RecordUnit(Unit):
    """Records of a .rec file: where each begins and the last one ends, int64 (N + 1,)."""

    offsets: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))


class RecordSource(Source):
    """InsightFace FILE.rec with FILE.idx beside it, read by byte ranges in parallel, without mxnet."""

    def __init__(self, url: str) -> None:
        self._file = RecordFile(url)
        self._index_digest = ""

    def describe(self) -> dict[str, Any]:
        """The kind and a digest of the index."""
        return {"source": "rec", "index_sha256": self._index_digest}

    def units(self, shard_size: int) -> Sequence[RecordUnit]:
        """Records in file order, ``shard_size`` a unit, fewer where they would be more than ``MAX_SHARD_BYTES``."""
        offsets, self._index_digest = self._file.image_offsets()
        pieces = cut(offsets, shard_size)
        return [RecordUnit(_name(i), stop - start, offsets[start : stop + 1]) for i, (start, stop) in enumerate(pieces)]

    def fetch(self, unit: RecordUnit) -> bytes | None:
        """The records' bytes, None for a single one that is refused unread."""
        start, stop = int(unit.offsets[0]), int(unit.offsets[-1])
        return self._file.read(start, stop) if stop - start <= MAX_SHARD_BYTES else None

    def samples(self, unit: RecordUnit, fetched: bytes | None) -> Iterator[Sample | Rejected]:
        """One sample a record; a damaged record costs itself alone, because the index says where the next one begins."""
        places = unit.offsets.tolist()
        if fetched is None:
            yield Rejected("", *too_large(places[-1] - places[0], MAX_SHARD_BYTES), places[-1] - places[0], _bytes(*places))
            return
        view = memoryview(fetched)
        for start, stop in pairwise(places):
            try:
                found = list(read_records(view[start - places[0] : stop - places[0]]))
                if start == stop:
                    raise ShardError("the index gives the record no bytes")
            except ShardError as error:  # what could be read of it is not to be trusted either
                yield Rejected("", "damaged-record", str(error), stop - start, _bytes(start, stop))
                continue
            for record in found:
                source = f"record {record.number}"
                if record.identity is None:
                    yield Rejected("", "bad-label", "the record's label is no integer >= 0", len(record.image), source)
                else:
                    yield Sample("", record.image, record.identity, source)


@dataclass(frozen=True)
class TarUnit(Unit):
    """One existing tar and its size."""

    file: str = ""
    num_bytes: int = 0


class TarSource(Source):
    """Existing WebDataset tars: one output shard for each, in name order."""

    def __init__(self, url: str, pattern: str) -> None:
        self._url, self._pattern, self._digest = url, pattern, ""

    def describe(self) -> dict[str, Any]:
        """The kind and a digest of the tars' names and sizes."""
        return {"source": "tars", "listing_sha256": self._digest}

    def units(self, shard_size: int) -> Sequence[TarUnit]:
        """One unit a tar; ``shard_size`` does not apply: how many samples a tar holds is known when it is read."""
        match = self._pattern
        found = [s for s in in_order(open_store(self._url)) if s.key == match or fnmatch.fnmatchcase(s.key, match)]
        if not found:
            raise StoreError(f"no object in {self._url} matches {self._pattern}", fatal=True)
        self._digest = hashlib.sha256("\n".join(f"{s.key}\0{s.size}" for s in found).encode(errors="surrogateescape")).hexdigest()
        return [TarUnit(_name(i), 0, stored.key, stored.size) for i, stored in enumerate(found)]

    def fetch(self, unit: TarUnit) -> bytes | None:
        """The tar's bytes, None when it vanished since the listing or is refused unread."""
        return get_listed(open_store(self._url), unit.file, unit.num_bytes, MAX_SHARD_BYTES)

    def samples(self, unit: TarUnit, fetched: bytes | None) -> Iterator[Sample | Rejected]:
        """The tar's samples; where it is cut short, those before the damage and one ledger row."""
        file = printable(unit.file)
        if fetched is None:
            yield Rejected("", *(refusal(unit.file, unit.num_bytes, MAX_SHARD_BYTES) or VANISHED), unit.num_bytes, file)
            return
        try:
            for sample in read_samples(fetched, sources=False):
                origin = printable(f"{unit.file}/{sample.key}")
                if isinstance(sample, Sample):
                    yield Sample("", sample.image, sample.identity, origin)
                else:
                    yield Rejected("", sample.reason, sample.error, sample.num_bytes, origin)
        except NotATarError as error:
            yield Rejected("", "not-a-tar", str(error), len(fetched), file)
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

    def units(self, shard_size: int) -> Sequence[SyntheticUnit]:
        """Images in order, ``shard_size`` a unit."""
        total = len(self._faces)
        return [SyntheticUnit(_name(i), min(shard_size, total - s), s) for i, s in enumerate(range(0, total, shard_size))]

    def fetch(self, unit: SyntheticUnit) -> None:
        """Nothing: faces are drawn where they are needed."""

    def samples(self, unit: SyntheticUnit, fetched: None) -> Iterator[Sample | Rejected]:
        """One sample an image."""
        for start in range(unit.start, unit.start + unit.num_samples, self.RENDER_AHEAD):
            indices = np.arange(start, min(start + self.RENDER_AHEAD, unit.start + unit.num_samples))
            labels = self._faces.identities(indices)
            for index, identity, picture in zip(indices, labels, self._faces.render(indices), strict=True):
                yield Sample("", encode(picture), int(identity), f"synthetic image {index}")


def _name(number: int) -> str:
    return f"{number:05d}"


def _bytes(start: int, stop: int) -> str:
    return f"bytes {start} to {stop}"
