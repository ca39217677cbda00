"""A local folder as a Store: every object a file, whole or not there at all, after a power cut too."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

from cluster.store import NO_FILE, AlreadyExists, NotFound, StoredObject, StoreError, Unfinished, require_inside

_TEMPORARY = ".tmp-"
_ROOM = "free some space and run the same command again: what was committed stays"
_RIGHTS = "make it readable and writable for this user, or choose another"
_LOCAL_REMEDY = {
    errno.EROFS: "the file system is mounted read-only: choose another folder",
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.ENOTSUP: "the file system has no hard links, by which a commit is made: choose another",
    errno.ENAMETOOLONG: "choose a shorter path",
}
"""Errors that trying again cannot help, and what can."""


class LocalStore:
    """A folder. Objects are written to a file without a name and appear whole, by a hard link or (over an older one) a rename."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser().absolute()
        self.url = str(self.root)

    def get(self, key: str) -> bytes:
        with self._translated(key, reading=True):
            return self._path(key).read_bytes()

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        with self._translated(key, reading=True), self._path(key).open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise NotFound(f"{self.url}/{key} ends at byte {start + len(data)}, bytes up to {stop} were asked for")
        return data

    def put(self, key: str, data: bytes, *, if_absent: bool = False, sha256: str | None = None) -> None:
        path = self._path(key)
        with self._translated(key):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise StoreError(f"{path.parent} cannot be made: a part of it is a file. Choose another folder", fatal=True) from None
            with _nameless(path.parent) as (descriptor, source):
                with open(descriptor, "wb", closefd=False) as file:
                    file.write(data)
                    file.flush()
                    os.fsync(descriptor)
                try:
                    _link(source, path)
                except FileExistsError:
                    if if_absent:
                        raise
                    other = path.parent / f"{_TEMPORARY}{uuid.uuid4().hex}"
                    _link(source, other)
                    os.replace(other, path)
            _sync_folder(path.parent)

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        folder = self._path(prefix.rpartition("/")[0]) if "/" in prefix else self.root
        with self._translated(prefix):
            for path in _walk(folder, self.root.resolve()):
                key = path.relative_to(self.root).as_posix()
                if not key.startswith(prefix):
                    continue
                try:
                    yield StoredObject(key, self._size(path))
                except FileNotFoundError:  # deleted since its folder was read, or a link to nothing, which its reader must learn of
                    if path.is_symlink():
                        yield StoredObject(key, NO_FILE)

    def size(self, key: str) -> int:
        with self._translated(key):
            return self._path(key).stat().st_size

    def entries(self, prefix: str = "") -> Iterator[str]:
        folder = self._path(prefix)
        with self._translated(prefix):
            try:
                found = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except (FileNotFoundError, NotADirectoryError):
                return
            yield from (f"{entry.name}/" if entry.is_dir() else entry.name for entry in found if not entry.name.startswith(_TEMPORARY))

    def age(self, key: str) -> float | None:
        path = self._path(key)
        with self._translated(key, reading=True):
            written = path.stat().st_mtime
        try:  # a file without a name has the time of whoever keeps the folder; network file systems and read-only folders make none
            descriptor = os.open(path.parent, os.O_WRONLY | os.O_TMPFILE, 0o600)
        except (AttributeError, OSError):
            return None
        try:
            return max(0.0, os.fstat(descriptor).st_mtime - written)
        finally:
            os.close(descriptor)

    def delete(self, key: str) -> None:
        with contextlib.suppress(NotFound), self._translated(key):
            self._path(key).unlink()

    def unfinished(self) -> Iterator[Unfinished]:
        for path in sorted(self.root.rglob(f"{_TEMPORARY}*")):
            key = path.relative_to(self.root).as_posix()
            yield Unfinished(key, key)

    def discard(self, unfinished: Unfinished) -> None:
        self.delete(unfinished.token)

    def _size(self, path: Path) -> int:
        """Bytes of a regular file of this folder, else NO_FILE: a stranger's link could draw in anything on the machine."""
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode) and path.resolve().is_relative_to(self.root.resolve()):
            status = path.stat()
        return status.st_size if stat.S_ISREG(status.st_mode) else NO_FILE

    def _path(self, key: str) -> Path:
        return self.root / require_inside(self.url, key)

    @contextlib.contextmanager
    def _translated(self, key: str, *, reading: bool = False) -> Iterator[None]:
        """Raise the protocol's errors in place of the operating system's."""
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise NotFound(f"{self.url}/{key} does not exist") from error
        except PermissionError as error:
            if reading:
                raise NotFound(f"{self.url}/{key} cannot be read: {error.strerror}") from error
            raise StoreError(f"{self.url}/{key}: {error.strerror}: {_RIGHTS}", fatal=True) from error
        except FileExistsError as error:
            raise AlreadyExists(f"{self.url}/{key} is already there") from error
        except OSError as error:
            remedy = _LOCAL_REMEDY.get(error.errno or 0)
            raise StoreError(f"{self.url}/{key}: {error.strerror}" + (f": {remedy}" if remedy else ""), fatal=remedy is not None) from error


@contextlib.contextmanager
def _nameless(folder: Path) -> Iterator[tuple[int, str]]:
    """A new file in ``folder``: its descriptor, and a path by which it can be linked. On Linux it has no name, so that a process that is
    killed leaves nothing; elsewhere, and on file systems that cannot do so, a hidden one."""
    name = None
    try:
        descriptor = os.open(folder, os.O_WRONLY | os.O_TMPFILE, 0o666)
        source = f"/proc/self/fd/{descriptor}"
    except (AttributeError, OSError):
        source = name = str(folder / f"{_TEMPORARY}{uuid.uuid4().hex}")
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        yield descriptor, source
    finally:
        os.close(descriptor)
        if name is not None:
            Path(name).unlink(missing_ok=True)


def _link(source: str, path: Path) -> None:
    """A hard link, also to a file that has no name but its descriptor's in /proc. Raises FileExistsError."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.link(source, path.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=True)
    finally:
        os.close(folder)


def _sync_folder(folder: Path) -> None:
    """Make a new name last through a power cut, so that no manifest outlives the data that it names."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _walk(folder: Path, root: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Files below ``folder`` in key order, unfinished writes left out. A link to a folder that it lies in leads nowhere, and one out of
    ``root`` counts as a file."""
    if not folder.is_dir():
        return
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    # a folder sorts as its name plus "/", so that the order is that of whole keys, as S3 lists them
    entries = sorted(os.scandir(folder), key=lambda e: e.name + "/" if e.is_dir() else e.name)
    for entry in entries:
        if entry.is_dir() and (not entry.is_symlink() or Path(entry.path).resolve().is_relative_to(root)):
            yield from _walk(Path(entry.path), root, (*above, here))
        elif not entry.name.startswith(_TEMPORARY):
            yield Path(entry.path)
