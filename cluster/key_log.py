"""Which samples every training step consumed, written down beside the checkpoints: the evidence that a resume repeats and skips nothing.

    <run>/keys/<first>-<last>-<rank>of<ranks>-<sha256[:12]>.parquet     step, epoch, key: what one rank consumed in these steps

Every rank writes its part before the checkpoint after step <last> is committed, so the steps behind a published checkpoint are always
covered. Steps that are done again after a death are written again: the same keys give the same bytes and hence the same name, other
keys would stand beside the first as evidence.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.shard import sha256_hex
from cluster.store import Store, StoreError

_NAME = re.compile(r"keys/(\d{8,})-(\d{8,})-(\d+)of(\d+)-([0-9a-f]{12})\.parquet")


class KeyLog:
    """The log of one rank.

    Args:
        store: the run's root.
        first: steps that were done before; the log goes on with the next.
        rank, world_size: whose log it is.
    """

    def __init__(self, store: Store, first: int, rank: int, world_size: int) -> None:
        self._store, self._first, self._part = store, first, f"{rank}of{world_size}"
        self._steps: list[tuple[int, int, Sequence[str]]] = []

    def add(self, step: int, epoch: int, keys: Sequence[str]) -> None:
        """Take down what this rank consumed in a step."""
        self._steps.append((step, epoch, keys))

    def publish(self) -> None:
        """Write what was taken down since the last time, and forget it."""
        if not self._steps:
            return
        counts = [len(keys) for _, _, keys in self._steps]
        columns = {
            "step": np.repeat(np.array([step for step, _, _ in self._steps], np.int64), counts),
            "epoch": np.repeat(np.array([epoch for _, epoch, _ in self._steps], np.int32), counts),
            "key": pa.array([key for _, _, keys in self._steps for key in keys], pa.string()),
        }
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file, compression="zstd", use_dictionary=False)
        last = self._steps[-1][0]
        data = file.getvalue()
        digest = sha256_hex(data)
        self._store.put(f"keys/{self._first + 1:08d}-{last:08d}-{self._part}-{digest[:12]}.parquet", data, sha256=digest)
        self._first, self._steps = last, []


@dataclass
class KeyLogCheck:
    """What a log of keys says. ``problems`` is empty when every step is there, and every epoch has every key exactly once.

    Attributes:
        steps: steps that are there.
        samples: keys of these steps.
        epochs: epochs that are complete.
        repeated: steps that were logged more than once, always with the same keys unless a problem says otherwise.
    """

    steps: int = 0
    samples: int = 0
    epochs: int = 0
    repeated: int = 0
    problems: list[str] = field(default_factory=list)


def check_key_log(store: Store, last: int, num_samples: int, keys: Collection[str] | None = None) -> KeyLogCheck:
    """Read the log of a run back.

    A part that some rank did not write is what an attempt left that died before its checkpoint; it is left out.

    Memory holds 8 bytes for each sample of an epoch, and the keys of one span of steps.

    Args:
        store: the run's root.
        last: the newest step that a checkpoint or the finished run stands for; what was logged beyond it is left out.
        num_samples: samples of an epoch.
        keys: the data set's keys, where they are known; otherwise the first complete epoch's are compared with the others'.
    """
    found, digests = KeyLogCheck(), dict[int, bytes]()
    epochs = _Epochs(found, num_samples, None if keys is None else _hashes(keys))
    for where, rows in _spans(store, found.problems):
        for step, epoch, hashes in rows:
            if step > last:
                continue
            digest = blake2b(np.sort(hashes).tobytes(), digest_size=16).digest()
            if step not in digests:
                digests[step] = digest
                epochs.add(epoch, hashes)
            elif digests[step] == digest:
                found.repeated += 1
            else:
                found.problems.append(f"{where}: step {step} was done again with other keys")
    epochs.close()
    found.steps = len(digests)
    missing = sorted(set(range(1, last + 1)) - set(digests))
    if missing:
        found.problems.append(f"{len(missing)} of {last} steps were not logged, the first is {missing[0]}")
    return found


class _Epochs:
    """Adds up epochs, of which one at a time is open: steps come in ascending order."""

    def __init__(self, found: KeyLogCheck, num_samples: int, expected: np.ndarray | None) -> None:
        self._found, self._num_samples = found, num_samples
        self._expected = None if expected is None else np.unique(expected)
        self._open, self._parts = 0, list[np.ndarray]()

    def add(self, epoch: int, hashes: np.ndarray) -> None:
        """Take the keys of one more step."""
        if epoch != self._open:
            self.close()
            self._open = epoch
        self._parts.append(hashes)
        self._found.samples += len(hashes)

    def close(self) -> None:
        """Judge the open epoch; one that training has not finished may lack keys, but none may come twice."""
        if not self._parts:
            return
        hashes = np.concatenate(self._parts)
        seen, where = np.unique(hashes), f"epoch {self._open}"
        self._parts = []
        if len(seen) < len(hashes):
            self._found.problems.append(f"{where}: {len(hashes) - len(seen)} of {len(hashes)} keys came more than once")
        if len(hashes) >= self._num_samples:
            self._found.epochs += 1
            if len(seen) != self._num_samples:
                self._found.problems.append(f"{where}: {len(seen)} different keys, the data set has {self._num_samples}")
            self._expected = seen if self._expected is None else self._expected
        if self._expected is not None and len(strangers := np.setdiff1d(seen, self._expected)):
            self._found.problems.append(f"{where}: {len(strangers)} keys that are not the data set's")


_Rows = list[tuple[int, int, np.ndarray]]


def _spans(store: Store, problems: list[str]) -> Iterator[tuple[str, _Rows]]:
    """(name, (step, epoch, the keys' hashes) of all ranks) for every span of steps that all ranks logged, by first step."""
    spans: dict[tuple[int, int, int], list[tuple[int, str]]] = {}
    for stored in store.list("keys/"):
        match = _NAME.fullmatch(stored.key)
        if match is None:
            problems.append(f"{stored.key} is no part of a log of keys")
            continue
        first, last, rank, world_size = map(int, match.groups()[:4])
        spans.setdefault((first, last, world_size), []).append((rank, stored.key))
    for (first, last, world_size), parts in sorted(spans.items()):
        where = f"keys/{first:08d}-{last:08d}-*of{world_size}"
        ranks = [rank for rank, _ in parts]
        if set(ranks) != set(range(world_size)):
            continue
        if len(ranks) > world_size:
            problems.append(f"{where}: logged more than once with different keys ({', '.join(sorted(key for _, key in parts))})")
            continue
        try:
            yield where, _merged([_read(store, key) for _, key in sorted(parts)])
        except (StoreError, pa.ArrowException, KeyError, ValueError) as error:
            problems.append(f"{where}: {error}")


def _read(store: Store, key: str) -> pa.Table:
    data = store.get(key)
    if not key.endswith(f"-{sha256_hex(data)[:12]}.parquet"):
        raise ValueError(f"{key} is damaged or cut short (sha256 checked)")
    return pq.read_table(pa.BufferReader(data), columns=["step", "epoch", "key"])


def _merged(tables: Sequence[pa.Table]) -> _Rows:
    """All ranks' rows, step by step."""
    table = pa.concat_tables(tables)
    steps, epochs, hashes = table["step"].to_numpy(), table["epoch"].to_numpy(), _hashes(table["key"].to_pylist())
    order = np.argsort(steps, kind="stable")
    starts = np.flatnonzero(np.diff(steps[order], prepend=-1))
    return [(int(steps[rows[0]]), int(epochs[rows[0]]), hashes[rows]) for rows in np.split(order, starts[1:])]


def _hashes(keys: Iterable[str]) -> np.ndarray:
    """int64 (N,), the same within this process alone."""
    return np.fromiter(map(hash, keys), np.int64)
