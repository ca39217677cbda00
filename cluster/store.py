"""Object storage behind one small protocol: S3 by boto3, and a local folder.

A store is opened from a URL (``s3://bucket/prefix`` or a folder) wherever it is needed; a store object never travels, and neither
do credentials: boto3 finds them the ordinary ways (environment, profile, instance role) in every process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.secret import carries_credentials


class StoreError(RuntimeError):
    """A store could not do what was asked. ``fatal``: trying again cannot help (credentials, bucket, full disk)."""

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal

    def __reduce__(self):  # type: ignore[no-untyped-def]  # keep ``fatal`` across processes
        return _rebuild_error, (type(self), self.args[0], self.fatal)


class NotFound(StoreError):
    """No object has this key."""


class AlreadyExists(StoreError):
    """A conditional PUT met an object that is already there."""


def _rebuild_error(kind: type[StoreError], message: str, fatal: bool) -> StoreError:
    return kind(message, fatal=fatal)


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One listed object: its key below the store's root and its size in bytes."""

    key: str
    size: int


class Store(Protocol):
    """What the rest of the system needs of object storage. Keys are relative to ``url`` and use ``/``."""

    url: str

    def get(self, key: str) -> bytes:
        """The object's bytes. Raises NotFound."""

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` (exclusive) of an object. Raises NotFound, and StoreError when they are not all there."""

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        """Write an object whole or not at all. With ``if_absent`` exactly one of many writers wins; the others get AlreadyExists."""

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        """Objects whose key begins with ``prefix``, in key order where the server keeps it (SeaweedFS lists ``a/1`` before ``a-b``)."""

    def size(self, key: str) -> int:
        """Size in bytes. Raises NotFound."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""


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
        return S3Store(text)
    if "://" in text and not text.startswith("file://"):
        raise StoreError(f"cannot open {text}: only s3://bucket/prefix and local folders are known", fatal=True)
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
    key = f".probe-{uuid.uuid4().hex}"
    store.put(key, b"first", if_absent=True)
    try:
        store.put(key, b"second", if_absent=True)
    except AlreadyExists:
        return
    finally:
        store.delete(key)
    raise StoreError(
        f"{store.url} ignores If-None-Match (a second conditional PUT of the same key was accepted), so two attempts could both "
        "commit a shard. Use a store with conditional writes: AWS S3, SeaweedFS, Ceph RGW, MinIO, or a local folder.",
        fatal=True,
    )


def _require_inside(url: str, key: str) -> str:
    """The key, unless it would leave the store: servers may resolve ``..`` as a file system does."""
    if key.startswith("/") or ".." in key.split("/"):
        raise StoreError(f"the key {key!r} points outside {url}", fatal=True)
    return key


class LocalStore:
    """A folder. Writes go to a hidden temporary name and appear whole by a hard link (conditional) or a rename."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = str(self.root)

    def get(self, key: str) -> bytes:
        with self._translated(key):
            return self._path(key).read_bytes()

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        with self._translated(key), self._path(key).open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise StoreError(f"{self.url}/{key} ends at byte {start + len(data)}, bytes up to {stop} were asked for")
        return data

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        path = self._path(key)
        temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
        with self._translated(key):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise StoreError(f"{path.parent} cannot be made: a part of it is a file. Choose another folder", fatal=True) from None
            try:
                with temporary.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if if_absent:
                    os.link(temporary, path)
                else:
                    os.replace(temporary, path)
                _sync_folder(path.parent)
            finally:
                temporary.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        folder = self._path(prefix.rpartition("/")[0]) if "/" in prefix else self.root
        with self._translated(prefix):
            for path in _walk(folder):
                key = path.relative_to(self.root).as_posix()
                if not key.startswith(prefix):
                    continue
                try:
                    yield StoredObject(key, path.stat().st_size)
                except FileNotFoundError:  # deleted since its folder was read, or a link to nothing, which its reader must learn of
                    if path.is_symlink():
                        yield StoredObject(key, 0)

    def size(self, key: str) -> int:
        with self._translated(key):
            return self._path(key).stat().st_size

    def delete(self, key: str) -> None:
        with contextlib.suppress(NotFound), self._translated(key):
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        return self.root / _require_inside(self.url, key)

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        """Raise the protocol's errors in place of the operating system's."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise NotFound(f"{self.url}/{key} does not exist") from error
        except FileExistsError as error:
            raise AlreadyExists(f"{self.url}/{key} is already there") from error
        except OSError as error:
            fatal = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTSUP, errno.ENAMETOOLONG)
            raise StoreError(f"{self.url}/{key}: {error.strerror}", fatal=fatal) from error


def _sync_folder(folder: Path) -> None:
    """Make a new name last through a power cut, so that no manifest outlives the data that it names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(folder: Path) -> Iterator[Path]:
    """Files below ``folder`` in key order, unfinished writes left out."""
    if not folder.is_dir():
        return
    # a folder sorts as its name plus "/", so that the order is that of whole keys, as S3 lists them
    entries = sorted(os.scandir(folder), key=lambda e: e.name + "/" if e.is_dir() else e.name)
    for entry in entries:
        if entry.is_dir():
            yield from _walk(Path(entry.path))
        elif not entry.name.startswith(".tmp-"):
            yield Path(entry.path)


_MISSING = {"NoSuchKey", "404", "NotFound"}
_DENIED = {"AccessDenied", "403"}
_EXISTS = {"PreconditionFailed", "412"}
_REMEDY = {
    "NoSuchBucket": "the bucket does not exist: create it, or correct the URL",
    "AccessDenied": "access denied: check the credentials and the bucket's policy",
    "403": "access denied: check the credentials and the bucket's policy",
    "InvalidAccessKeyId": "the access key is not known to this endpoint: check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret key is wrong: check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired: renew the credentials and run the same command again",
}


class S3Store:
    """A bucket's prefix, by boto3. Endpoint, region and credentials come from boto3's ordinary places."""

    def __init__(self, url: str) -> None:
        import boto3
        from botocore.config import Config

        self.url = url.rstrip("/")
        self.bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self.prefix = prefix.strip("/")
        if not self.bucket:
            raise StoreError(f"{url} names no bucket: write s3://bucket/prefix", fatal=True)
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            require_no_credentials(os.environ.get(name, ""), name)
        config = Config(
            retries={"mode": "standard", "max_attempts": 8},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=32,
            # servers other than AWS rarely have a DNS name for each bucket
            s3={"addressing_style": "path" if os.environ.get("AWS_ENDPOINT_URL") else "auto"},
        )
        with self._translated(""):
            session = boto3.session.Session()
            self._client = session.client("s3", config=config, region_name=session.region_name or "us-east-1")
        require_no_credentials(self._client.meta.endpoint_url, "the endpoint_url of the AWS profile")

    def get(self, key: str) -> bytes:
        with self._translated(key, reading=True):
            return self._client.get_object(Bucket=self.bucket, Key=self._full(key))["Body"].read()

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        with self._translated(key, reading=True):
            span = f"bytes={start}-{stop - 1}"
            data = self._client.get_object(Bucket=self.bucket, Key=self._full(key), Range=span)["Body"].read()
        if len(data) != stop - start:
            raise StoreError(f"{self.url}/{key} gave {len(data)} of the {stop - start} bytes asked for")
        return data

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        with self._translated(key):
            self._client.put_object(Bucket=self.bucket, Key=self._full(key), Body=data, **condition)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        strip = len(self.prefix) + 1 if self.prefix else 0
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._full(prefix))
        with self._translated(prefix):
            for page in pages:
                for entry in page.get("Contents", []):
                    yield StoredObject(entry["Key"][strip:], entry["Size"])

    def size(self, key: str) -> int:
        with self._translated(key, reading=True):
            return self._client.head_object(Bucket=self.bucket, Key=self._full(key))["ContentLength"]

    def delete(self, key: str) -> None:
        with self._translated(key):
            self._client.delete_object(Bucket=self.bucket, Key=self._full(key))

    def _full(self, key: str) -> str:
        _require_inside(self.url, key)
        return f"{self.prefix}/{key}" if self.prefix else key

    def _is_missing(self, key: str) -> bool:
        """Whether a key that was refused is only not there: AWS says 403 for both, to keys that may list but a part of the bucket."""
        from botocore.exceptions import ClientError

        try:
            page = self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._full(key), MaxKeys=1)
        except ClientError:
            return False
        return all(entry["Key"] != self._full(key) for entry in page.get("Contents", []))

    @contextlib.contextmanager
    def _translated(self, key: str, *, reading: bool = False) -> Iterator[None]:
        """Raise the protocol's errors in place of botocore's; no message carries a credential."""
        from botocore import exceptions as boto

        where = f"{self.url}/{key}" if key else self.url
        try:
            yield
        except boto.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in _MISSING or (reading and code in _DENIED and self._is_missing(key)):
                raise NotFound(f"{where} does not exist") from None
            if code in _EXISTS:
                raise AlreadyExists(f"{where} is already there") from None
            raise StoreError(f"{where}: {_REMEDY.get(code, code)}", fatal=code in _REMEDY) from None
        except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound, ValueError) as error:
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile or role, and AWS_ENDPOINT_URL as http://host:port"
            raise StoreError(f"{where}: {error}: {remedy}", fatal=True) from None
        except boto.EndpointConnectionError:
            raise StoreError(f"{where}: the endpoint does not answer: check AWS_ENDPOINT_URL and the network") from None
        except (boto.BotoCoreError, boto.HTTPClientError) as error:
            raise StoreError(f"{where}: {error}") from None
