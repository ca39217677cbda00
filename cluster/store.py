"""Object storage behind one small protocol: S3 (cluster/s3.py) and a local folder (cluster/local.py).

A store is opened from a URL (``s3://bucket/prefix`` or a folder) wherever it is needed; a store object never travels, and neither
do credentials: boto3 finds them the ordinary ways (environment, profile, instance role) in every process.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from cluster.secret import carries_credentials

PROBE = ".probe-"
"""How the names of the objects begin that test a store's conditional PUT."""


class StoreError(RuntimeError):
    """A store could not do what was asked. ``fatal``: trying again cannot help (credentials, bucket, full disk)."""

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal

    def __reduce__(self):  # type: ignore[no-untyped-def]  # keep ``fatal`` across processes
        return _rebuild_error, (type(self), self.args[0], self.fatal)


class NotFound(StoreError):
    """No object has this key, or it may not be read, or it ends before the bytes that were asked for."""


class AlreadyExists(StoreError):
    """A conditional PUT met an object that is already there."""


def _rebuild_error(kind: type[StoreError], message: str, fatal: bool) -> StoreError:
    return kind(message, fatal=fatal)


NO_FILE = -1
"""The size of what a folder lists and nobody should open: a pipe, a device, a link to nothing or out of the folder."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One listed object: its key below the store's root and its size in bytes, NO_FILE for what is no file that may be read."""

    key: str
    size: int


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A write that was begun and never completed: no reader sees it, but it takes space. ``token`` is the store's own name for it."""

    key: str
    token: str


class Store(Protocol):
    """What the rest of the system needs of object storage. Keys are relative to ``url`` and use ``/``."""

    url: str

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises NotFound."""

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` (exclusive) of an object. Raises NotFound, also when they are not all there."""

    def put(self, key: str, data: bytes, *, if_absent: bool = False, sha256: str | None = None) -> None:
        """Write an object whole or not at all. With ``if_absent`` exactly one of many writers wins; the others get AlreadyExists.
        ``sha256`` (hex) spares its computation where the caller has it."""

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """Objects whose key begins with ``prefix``, in key order where the server keeps it (SeaweedFS lists ``a/1`` before ``a-b``)."""

    def size(self, key: str) -> int:
        """Size in bytes. Raises NotFound."""

    def entries(self, prefix: str = "") -> Iterator[str]:
        """Names directly below ``prefix``, which is empty or ends with ``/``: objects, and with a ``/`` at their end folders."""

    def age(self, key: str) -> float | None:
        """Seconds since an object was last written, by the store's own clock; None where it does not tell. Raises NotFound."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""

    def unfinished(self) -> Iterator[Unfinished]:
        """Writes that were begun and never completed, by whomever: a killed process leaves them."""

    def discard(self, unfinished: Unfinished) -> None:
        """Take back an unfinished write. Its writer, should it live, gets an error and may write again."""


def open_store(url: str | os.PathLike[str]) -> Store:
    """The store behind ``s3://bucket/prefix``, ``file:///folder`` or a folder's path.

    Raises:
        StoreError: the URL has another scheme or no bucket.
    """
    text = os.fspath(url)
    require_no_credentials(text, "a store's URL")
    if text.startswith("s3:") and not text.startswith("s3://"):
        raise StoreError(f"{text} is no S3 URL: write s3://bucket/prefix with two slashes", fatal=True)
    if text.startswith("s3://"):
        from cluster.s3 import S3Store  # boto3 takes a while to import, and a folder does without

        return S3Store(text)
    if "://" in text and not text.startswith("file://"):
        raise StoreError(f"cannot open {text}: only s3://bucket/prefix and local folders are known", fatal=True)
    from cluster.local import LocalStore

    return LocalStore(text.removeprefix("file://"))


def require_no_credentials(url: str, what: str) -> None:
    """Refuse a URL with a user or password in it: it would reach configurations, lineage and messages. Raises StoreError, without it."""
    if carries_credentials(url):
        raise StoreError(
            f"{what} holds a user or password (it is not repeated here): leave them out. boto3 finds credentials in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile or a role",
            fatal=True,
        )


def join_url(root: str, *parts: str) -> str:
    """``root`` and ``parts`` joined with single slashes, for folders and s3:// alike."""
    return "/".join([root.rstrip("/"), *parts])


def split_url(url: str) -> tuple[str, str]:
    """The root and the last name of an object's full URL or path, relative or absolute."""
    root, slash, name = url.rstrip("/").rpartition("/")
    return root or slash or ".", name


def read_url(url: str) -> bytes:
    """The bytes of one object or file given by its full URL or path. Raises StoreError or NotFound."""
    root, name = split_url(url)
    return open_store(root).get(name)


def require_conditional_put(store: Store) -> None:
    """Refuse a store that ignores ``If-None-Match``: on it two attempts could both commit the same shard.

    Raises:
        StoreError: the store cannot be written, or the second of two conditional PUTs was accepted.
    """
    key = f"{PROBE}{uuid.uuid4().hex}"
    store.put(key, b"first")
    try:
        store.put(key, b"second", if_absent=True)
    except AlreadyExists:
        return
    finally:
        with contextlib.suppress(StoreError):  # `facemae verify --clean` removes what a failing store keeps
            store.delete(key)
    raise StoreError(
        f"{store.url} ignores If-None-Match (a second conditional PUT of the same key was accepted), so two attempts could both "
        "commit a shard. Use a store with conditional writes: AWS S3, SeaweedFS, Ceph RGW, MinIO, or a local folder.",
        fatal=True,
    )


def require_inside(url: str, key: str) -> str:
    """The key, unless it would leave the store, which is a fatal StoreError: servers may resolve ``..`` as a file system does."""
    if key.startswith("/") or ".." in key.split("/"):
        raise StoreError(f"the key {key!r} points outside {url}", fatal=True)
    return key
