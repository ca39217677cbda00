"""Recognisers in object storage: FILE.onnx in S3, with FILE.json beside it, used as one on disk is.

A recogniser from a local file travels to the workers by value. One in S3 travels as a reference: every worker reads it from the store for
itself, and refuses one that is not, byte for byte, what the driver saw.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.shard import sha256_hex
from cluster.store import NotFound, StoreError, read_url
from facemae.recognizer.onnx import OnnxRecognizer, read_model
from facemae.recognizer.sidecar import Triple, parse_sidecar, sidecar_of

if TYPE_CHECKING:
    from facemae.recognizer.frozen import FrozenRecognizer


@dataclass(frozen=True)
class StoredRecognizer:
    """A recogniser in S3 as it travels: where it is and what it must be. It holds no network; `on` and `differentiable` read it.

    Attributes:
        url: s3://.../FILE.onnx.
        name: for reports and embedding manifests.
        dim: length of an embedding.
        sha256: of the ONNX file.
        mean, std: its normalisation of value/255.
    """

    url: str
    name: str
    dim: int
    sha256: str
    mean: Triple
    std: Triple

    def describe(self) -> dict[str, Any]:
        """See `OnnxRecognizer.describe`."""
        return {"name": self.name, "sha256": self.sha256, "dim": self.dim, "mean": list(self.mean), "std": list(self.std)}

    def on(self, device: str, threads: int) -> OnnxRecognizer:
        """The network, read from the store.

        Raises:
            StoreError: it is not there any more, or another file than the driver saw.
            ValueError: no such device.
        """
        model = read_model_url(self.url, self.sha256)
        return OnnxRecognizer(model, self.name, self.mean, self.std, device=device, threads=threads, source=self.url)

    def differentiable(self, layers: Sequence[str] = ()) -> FrozenRecognizer:
        """The network in torch; see `OnnxRecognizer.differentiable`. Raises also what `on` does."""
        return self.on("cpu", 1).differentiable(layers)


Recognizer = OnnxRecognizer | StoredRecognizer
"""What a job hands to its workers: from a local file, or in S3."""


def open_recognizer(
    url: str, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, name: str | None = None
) -> Recognizer:
    """A recogniser for workers: FILE.onnx by path or s3:// URL, or "pixels". It was loaded and tried once.

    Raises:
        FileNotFoundError, StoreError: there is no such file, or it cannot be read.
        ValueError: see `OnnxRecognizer.load`.
    """
    found = load_recognizer(url, mean, std, name)
    if not url.startswith("s3://"):
        return found
    return StoredRecognizer(url, found.name, found.dim, found.sha256, found.mean, found.std)


def load_recognizer(
    url: str,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str | None = None,
    *,
    device: str = "cpu",
    threads: int = 1,
) -> OnnxRecognizer:
    """The same for use in this process. Raises what `open_recognizer` does."""
    if not url.startswith("s3://"):
        return OnnxRecognizer.load(url, mean, std, name, device=device, threads=threads)
    model, beside = read_model_url(url), _beside(url)
    sidecar = parse_sidecar(beside, url, sha256_hex(model)) if beside is not None else {}
    return OnnxRecognizer.of(model, sidecar, url, mean, std, name, device=device, threads=threads)


def has_sidecar(url: str) -> bool:
    """Whether FILE.json lies beside FILE.onnx."""
    return _beside(url) is not None if url.startswith("s3://") else Path(url).with_suffix(".json").exists()


def read_model_url(url: str, sha256: str | None = None) -> bytes:
    """The content of FILE.onnx by path or s3:// URL, or of "pixels".

    Args:
        sha256: what it must have; None: anything.

    Raises:
        FileNotFoundError, StoreError: there is no such file, it cannot be read, or it is another.
    """
    if not url.startswith("s3://"):
        return read_model(url)
    try:
        model = read_url(url)
    except NotFound as error:
        hint = "" if url.endswith(".onnx") else f" Give FILE.onnx; of a run of facemae pretrain {url.rstrip('/')}/weights/recognizer.onnx."
        raise StoreError(f"there is no such recogniser: {error}.{hint}", fatal=True) from None
    if sha256 is not None and sha256_hex(model) != sha256:
        now = sha256_hex(model)
        raise StoreError(f"{url} has sha256 {now}, and had {sha256} when the job began: overwritten: start the job again", fatal=True)
    return model


@contextmanager
def local_recognizer(url: str, sha256: str | None = None) -> Iterator[Path]:
    """FILE.onnx with its sidecar file on this machine: a copy, in a private folder that goes with the block, where it lies in S3.

    Raises:
        FileNotFoundError, StoreError: see `read_model_url`; a local file's ``sha256`` is not looked at.
    """
    if not url.startswith("s3://"):
        yield Path(url)
        return
    with tempfile.TemporaryDirectory(prefix="facemae-recognizer-") as folder:  # mode 700
        path = Path(folder) / url.rpartition("/")[2]
        path.write_bytes(read_model_url(url, sha256))
        if (beside := _beside(url)) is not None:  # where there is none, the reader says so
            path.with_suffix(".json").write_bytes(beside)
        yield path


def _beside(url: str) -> bytes | None:
    """FILE.json beside a recogniser in S3; None where there is none."""
    try:
        return read_url(sidecar_of(url))
    except NotFound:
        return None
