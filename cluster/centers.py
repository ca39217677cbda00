"""Class centres in checkpoints: a table with a row for every person, too large for one process, in ranges of rows.

    <run>/checkpoints/<step>-centers-<start>-<stop>-<sha256[:12]>.safetensors      rows start to stop (exclusive): weight, momentum

Every rank writes the rows that it holds, cut where a multiple of ROWS lies, before the checkpoint that names them is committed. A rank of
another group reads the files that overlap its own range, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cluster.checkpoint import CheckpointError
from cluster.shard import sha256_hex
from cluster.store import Store

ROWS = 1 << 16
"""Rows of a file: 256 MiB with embeddings of length 512 and their momentum."""


def save_rows(store: Store, step: int, start: int, tables: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Publish a range of rows.

    Args:
        store: the run's root.
        step: of the checkpoint that will name them.
        start: number of the first row.
        tables: tensors of equal length N, whose rows are start to start + N.

    Returns:
        What the checkpoint's JSON lists under "parts": file, start, stop, bytes, sha256.
    """
    stop, parts = start + len(next(iter(tables.values()))), list[dict[str, Any]]()
    cuts = [start, *range(start - start % ROWS + ROWS, stop, ROWS), stop]
    for first, last in pairwise(cuts):
        if first == last:
            continue
        data = save({name: table[first - start : last - start].detach().float().cpu().contiguous() for name, table in tables.items()})
        digest = sha256_hex(data)
        file = f"checkpoints/{step:08d}-centers-{first}-{last}-{digest[:12]}.safetensors"
        store.put(file, data, sha256=digest)
        parts.append({"file": file, "start": first, "stop": last, "bytes": len(data), "sha256": digest})
    return parts


def load_rows(store: Store, parts: Sequence[Mapping[str, Any]], start: int, stop: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The rows ``start`` to ``stop`` (exclusive) of a checkpoint, piece by piece, as (number of the first row, tables).

    Raises:
        CheckpointError: a file is damaged, or rows are missing; NotFound: a file is gone.
    """
    done = start
    for part in sorted(parts, key=lambda part: int(part["start"])):
        first, last = max(part["start"], done), min(part["stop"], stop)
        if first >= last:
            continue
        if first > done:
            break
        tables = _read(store, part)
        yield first, {name: table[first - part["start"] : last - part["start"]] for name, table in tables.items()}
        done = last
    if done < stop:
        raise CheckpointError(f"{store.url}/checkpoints holds no class centres {done} to {stop}: {_REMEDY}")


def check_parts(store: Store, parts: Sequence[Mapping[str, Any]]) -> None:
    """Read every file. Raises what ``load_rows`` raises."""
    for part in parts:
        _read(store, part)


_REMEDY = "delete this checkpoint's JSON, and training goes on from the one before"


def _read(store: Store, part: Mapping[str, Any]) -> dict[str, Tensor]:
    data = store.get(part["file"])
    if len(data) != part["bytes"] or sha256_hex(data) != part["sha256"]:
        raise CheckpointError(f"{store.url}/{part['file']} is damaged or cut short: {_REMEDY}")
    try:
        return load(data)
    except SafetensorError as error:
        raise CheckpointError(f"{store.url}/{part['file']} is no safetensors file ({error}): {_REMEDY}") from None
