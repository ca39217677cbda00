"""What every fault case ends with: the bytes in the bucket against those of an undisturbed run.

It shares no code with the system that it judges: boto3 or pathlib, tarfile, hashlib, json and pyarrow only.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
from botocore.config import Config

_ATTEMPT = re.compile(r"attempts/\d{5,}\.json")
_TOTALS = ("samples_in", "samples", "quarantined")


@dataclass(frozen=True)
class Snapshot:
    """What a data set holds: ``samples`` is key -> {extension: sha256 of that member}, label and origin included; ``ledger`` is
    key -> (reason, number of samples that the row stands for)."""

    samples: Mapping[str, Mapping[str, str]]
    ledger: Mapping[str, tuple[str, int]]


@dataclass
class Tally:
    """The outcome of one check. All but ``objects`` and ``samples``, which say how much was looked at, must be 0.

    Attributes:
        objects, samples: read and hashed.
        lost: keys of the undisturbed run that are neither in a committed shard nor in the ledger.
        doubled: keys that are there more than once.
        torn: objects that are missing, unreadable, or not what their manifest says.
        changed: keys whose bytes, or whose reason in the ledger, differ from the undisturbed run, and keys that it does not have.
        strays: objects and unfinished uploads that nothing names.
        wrong: sums that do not add up, and files that contradict each other.
        problems: each of the above in words.
    """

    objects: int = 0
    samples: int = 0
    lost: int = 0
    doubled: int = 0
    torn: int = 0
    changed: int = 0
    strays: int = 0
    wrong: int = 0
    problems: list[str] = field(default_factory=list)

    def count(self, what: str, problem: str) -> None:
        """Add one to ``what``."""
        setattr(self, what, getattr(self, what) + 1)
        self.problems.append(f"{what}: {problem}")

    def require(self) -> None:
        """Raise AssertionError with all problems unless there are none."""
        assert not self.problems, f"{len(self.problems)} problems:\n" + "\n".join(self.problems[:50])

    def numbers(self) -> dict[str, int]:
        """The counts."""
        return {name: value for name, value in asdict(self).items() if name != "problems"}


def snapshot(root: str) -> Snapshot:
    """The samples and ledger of a whole data set, for the comparison. Raises AssertionError where it is not sound in itself."""
    examined = _Examination(root)
    examined.tally.require()
    return examined.snapshot


def compare(root: str, undisturbed: Snapshot) -> Tally:
    """Everything below ``root`` (a folder or s3://bucket/prefix) against an undisturbed run."""
    examined = _Examination(root)
    tally, found = examined.tally, examined.snapshot
    here, there = {**found.samples, **found.ledger}, {**undisturbed.samples, **undisturbed.ledger}
    for key in here:
        if here[key] != there.get(key):
            tally.count("changed", f"{key} is {here[key]}, in the undisturbed run {there.get(key)}")
    for key in there.keys() - here.keys():
        tally.count("lost", key)
    return tally


def assert_same(root: str, undisturbed: Snapshot) -> Tally:
    """``compare``, and AssertionError with every problem unless there is none."""
    tally = compare(root, undisturbed)
    tally.require()
    return tally


class _Examination:
    """Reads a whole data set once: what it holds, and what is wrong with it in itself."""

    def __init__(self, root: str) -> None:
        self._objects: _Objects = _Bucket(root) if root.startswith("s3://") else _Folder(root)
        self.tally = Tally()
        self._samples: dict[str, dict[str, str]] = {}
        self._ledger: dict[str, tuple[str, int]] = {}
        self._times: Counter[str] = Counter()
        names = set(self._objects.names())
        found = (self._json(name) for name in sorted(names) if re.fullmatch(r"manifests/\d{5,}\.json", name))
        manifests = [manifest for manifest in found if manifest]
        for manifest in manifests:
            self._examine_shard(manifest)
        for key, times in self._times.items():
            if times > 1:
                self.tally.count("doubled", f"{key} is there {times} times")
        self._examine_whole(manifests)
        self._examine_strays(names, manifests)
        self.tally.samples = len(self._samples)

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(self._samples, self._ledger)

    def _examine_shard(self, manifest: dict[str, Any]) -> None:
        shard, file = manifest["shard"], manifest["file"]
        rows: dict[str, dict[str, str]] = {}
        labels: set[int] = set()
        if file is not None:
            data = self._whole(file, manifest["sha256"], manifest["num_bytes"])
            if not re.fullmatch(rf"shards/{shard}-{(manifest['sha256'] or '')[:12]}\.(tar|parquet)", file):
                self.tally.count("wrong", f"{file} is not named by its content")
            with self._readable(file):
                if data is not None:
                    rows, labels = self._read_tar(data) if file.endswith(".tar") else self._read_parquet(data)
        rejected = self._read_ledger(manifest)
        self._times.update(rejected.keys())
        self._samples.update(rows)
        self._ledger.update(rejected)
        identities = {"count": len(labels), "first": min(labels, default=-1), "last": max(labels, default=-1)}
        quarantined = sum(number for _, number in rejected.values())
        found = {"samples": len(rows), "quarantined": quarantined, "samples_in": len(rows) + quarantined, "identities": identities}
        for name, value in found.items():
            if manifest[name] != value:
                self.tally.count("wrong", f"shard {shard}: {name} is {value}, {manifest[name]} in its manifest")

    def _read_tar(self, data: bytes) -> tuple[dict[str, dict[str, str]], set[int]]:
        """Members by key, and labels."""
        rows: dict[str, dict[str, str]] = {}
        labels = set()
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                key, _, extension = member.name.rpartition(".")
                content = tar.extractfile(member)
                assert content is not None, f"{member.name} is no file"
                body = content.read()
                if extension == "cls":
                    labels.add(int(body))
                if extension == "jpg":
                    self._times[key] += 1
                elif extension in rows.get(key, {}):
                    self.tally.count("doubled", f"{member.name} is twice in one tar")
                rows.setdefault(key, {})[extension] = hashlib.sha256(body).hexdigest()
        for key, parts in rows.items():
            if not {"jpg", "cls"} <= parts.keys():
                self.tally.count("torn", f"{key} has only {sorted(parts)}")
        return rows, labels

    def _read_parquet(self, data: bytes) -> tuple[dict[str, dict[str, str]], set[int]]:
        rows: dict[str, dict[str, str]] = {}
        labels = set()
        for row in pq.read_table(pa.BufferReader(data)).to_pylist():
            self._times[row["key"]] += 1
            labels.add(row["identity"])
            rows[row["key"]] = {"row": hashlib.sha256(json.dumps(row, default=repr, sort_keys=True).encode()).hexdigest()}
        return rows, labels

    def _read_ledger(self, manifest: dict[str, Any]) -> dict[str, tuple[str, int]]:
        name = manifest["ledger"]
        rows: dict[str, tuple[str, int]] = {}
        if name is None:
            return rows
        data = self._whole(name, manifest.get("ledger_sha256"), None)
        with self._readable(name):
            if data is None:
                return rows
            for row in pq.read_table(pa.BufferReader(data)).to_pylist():
                if row["key"] in rows:
                    self.tally.count("doubled", f"{row['key']} is twice in {name}")
                rows[row["key"]] = (row["reason"], row["num_samples"])
        return rows

    def _examine_whole(self, manifests: list[dict[str, Any]]) -> None:
        """dataset.json and index.json against the sum of the manifests."""
        described, index = self._json("dataset.json"), self._json("index.json")
        sums = {name: sum(manifest[name] for manifest in manifests) for name in _TOTALS}
        sums |= {"bytes": sum(manifest["num_bytes"] for manifest in manifests)}
        sums |= {"shards": sum(manifest["file"] is not None for manifest in manifests)}
        for name, value in sums.items():
            if described.get(name) != value:
                self.tally.count("wrong", f"{name} is {described.get(name)} in dataset.json, {value} in the manifests' sum")
        if sums["samples_in"] != sums["samples"] + sums["quarantined"]:
            self.tally.count("wrong", f"in = out + quarantined does not hold: {sums}")
        expected = [(m["file"], m["samples"], m["num_bytes"]) for m in manifests if m["file"] is not None]
        listed = [(entry["url"], entry["nsamples"], entry["filesize"]) for entry in index.get("shardlist", [])]
        if sorted(listed) != sorted(expected):
            self.tally.count("wrong", "index.json does not list the shards of the manifests")

    def _examine_strays(self, names: set[str], manifests: list[dict[str, Any]]) -> None:
        known = {"dataset.json", "index.json"}
        for manifest in manifests:
            known |= {f"manifests/{manifest['shard']}.json", manifest["file"], manifest["ledger"]}
        # data sets of their own below this one: their own check looks into them
        nested = {name.removesuffix("dataset.json") for name in names if re.fullmatch(r"embeddings/[^/]+/dataset\.json", name)}
        for name in sorted(names - known):
            if not _ATTEMPT.fullmatch(name) and not name.startswith(tuple(nested)):
                self.tally.count("strays", name)
        for upload in self._objects.uploads():
            self.tally.count("strays", f"the unfinished upload of {upload}")

    def _whole(self, name: str, sha256: str | None, size: int | None) -> bytes | None:
        """An object's bytes, None where there is none; counted as torn unless they are those expected."""
        self.tally.objects += 1
        try:
            data = self._objects.read(name)
        except (OSError, self._objects.missing) as error:
            self.tally.count("torn", f"{name} cannot be read: {error}")
            return None
        if size not in (None, len(data)) or sha256 not in (None, hashlib.sha256(data).hexdigest()):
            self.tally.count("torn", f"{name} ({len(data)} bytes) is not what its manifest says ({size} bytes)")
        return data

    def _json(self, name: str) -> dict[str, Any]:
        data = self._whole(name, None, None)
        with self._readable(name):
            return dict(json.loads(data)) if data is not None else {}
        return {}

    @contextlib.contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        """What cannot be parsed is torn."""
        try:
            yield
        except (tarfile.TarError, pa.ArrowException, ValueError, KeyError, AssertionError) as error:
            self.tally.count("torn", f"{name} cannot be read: {error}")


class _Objects(Protocol):
    """Everything below a root, hidden or not."""

    @property
    def missing(self) -> type[Exception]: ...

    def names(self) -> Iterator[str]: ...

    def read(self, name: str) -> bytes: ...

    def uploads(self) -> Iterator[str]: ...


class _Folder:
    missing = FileNotFoundError

    def __init__(self, root: str) -> None:
        self._root = Path(root)

    def names(self) -> Iterator[str]:
        return (path.relative_to(self._root).as_posix() for path in self._root.rglob("*") if not path.is_dir() or path.is_symlink())

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def uploads(self) -> Iterator[str]:
        return iter(())


class _Bucket:
    def __init__(self, root: str) -> None:
        self._bucket, _, prefix = root.removeprefix("s3://").partition("/")
        self._prefix = prefix.rstrip("/") + "/"
        # a session of its own: the default one keeps the first credentials that it finds
        self._s3 = boto3.session.Session().client("s3", config=Config(s3={"addressing_style": "path"}))
        self.missing = self._s3.exceptions.NoSuchKey

    def names(self) -> Iterator[str]:
        for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix):
            yield from (entry["Key"].removeprefix(self._prefix) for entry in page.get("Contents", []))

    def read(self, name: str) -> bytes:
        return self._s3.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read()

    def uploads(self) -> Iterator[str]:
        for page in self._s3.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=self._prefix):
            yield from (upload["Key"].removeprefix(self._prefix) for upload in page.get("Uploads", []))
