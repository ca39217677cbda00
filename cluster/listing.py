"""What a stranger's store lists, before any of it is opened: its order and pieces, what is refused unread, and names fit to be shown."""

from __future__ import annotations

import re

import numpy as np

from cluster.store import NO_FILE, NotFound, Store, StoredObject

MAX_SHARD_BYTES = 2 << 30
"""What one unit of a source may fetch: it is held in memory whole. A larger tar is refused unread."""
MAX_NAME_LENGTH = 1024
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters, line ends, and what turns the direction of writing."""


def cut(offsets: np.ndarray, shard_size: int) -> list[tuple[int, int]]:
    """Cut items that begin and end at ``offsets``, int64 (N + 1,), into pieces (start, stop) of at most ``shard_size`` items and
    ``MAX_SHARD_BYTES`` bytes; an item with more bytes is a piece alone."""
    pieces, start = list[tuple[int, int]](), 0
    while start < len(offsets) - 1:
        within = int(np.searchsorted(offsets, offsets[start] + MAX_SHARD_BYTES, "right")) - 1
        stop = max(start + 1, min(start + shard_size, within, len(offsets) - 1))
        pieces.append((start, stop))
        start = stop
    return pieces


def in_order(store: Store) -> list[StoredObject]:
    """Every object in key order, which not every S3 server keeps: labels and shards must not depend on where the files lie. The empty
    objects that stand for folders on S3 are no files."""
    found = (stored for stored in store.list() if stored.size or not stored.key.endswith("/"))
    return sorted(found, key=lambda stored: stored.key)


def printable(key: str) -> str:
    """A stranger's name as one line of Unicode that shows as what it is: it need not be UTF-8, and may hold anything at all."""
    text = key if key.isascii() else key.encode(errors="surrogateescape").decode(errors="replace")
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text[:MAX_NAME_LENGTH])


def too_large(size: int, limit: int) -> tuple[str, str]:
    """The reason and the sentence for an object above its limit."""
    return "too-large", f"{size} bytes, the limit is {limit}: it was not fetched. Cut it into smaller pieces"


def refusal(key: str, size: int, limit: int) -> tuple[str, str] | None:
    """Why an object is not even opened: a reason and a sentence. None: it may be."""
    if key.startswith("/") or ".." in key.split("/"):
        return "bad-name", "a name that begins with / or holds .. is never opened: rename the object"
    if size == NO_FILE:
        return "not-a-file", "a pipe, a device, or a link to nothing or out of the source: put a copy of the file there"
    return too_large(size, limit) if size > limit else None


def get_listed(store: Store, key: str, size: int, limit: int) -> bytes | None:
    """An object's bytes, None where there is none or it is refused. What is listed as empty is not opened."""
    if refusal(key, size, limit):
        return None
    try:
        return store.get(key) if size else b"" * store.size(key)
    except NotFound:
        return None
