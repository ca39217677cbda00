"""The images of all protocols of ``facemae evaluate``: each distinct one is read, decoded and embedded once by every recogniser."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from cluster.lookahead import ahead_map, chunks, codec_pool
from cluster.picture import SIZE, PictureError, align, decode
from cluster.store import NO_FILE, join_url, open_store, read_url
from facemae.bin_file import read_bin
from facemae.pairs import digest
from facemae.recognizer.onnx import OnnxRecognizer
from facemae.verification import unit_rows

Read = Callable[[str], bytes]
SHOWN = 3
"""Names of images in a message."""


class Images(ABC):
    """Images that a protocol asks for. ``keys`` are distinct, and the same key anywhere is the same image."""

    keys: Sequence[str]

    def absent(self) -> Sequence[str]:
        """Keys of which there is no image."""
        return ()

    def name_of(self, key: str) -> str:
        """What a user calls an image."""
        return key

    @abstractmethod
    def reader(self) -> Read:
        """The bytes of an image by its key; to be called in threads."""


class FolderImages(Images):
    """Files below a root, a folder or s3://bucket/prefix.

    Args:
        names: paths below the root, distinct.
        listed: the paths that there are.
    """

    def __init__(self, url: str, names: Sequence[str], listed: Mapping[str, int]) -> None:
        self._url = url
        self.keys = [join_url(url, name) for name in names]
        self._absent = [key for key, name in zip(self.keys, names, strict=True) if listed.get(name, NO_FILE) == NO_FILE]

    def absent(self) -> Sequence[str]:
        """What the root does not list, and links that lead out of it."""
        return self._absent

    def reader(self) -> Read:
        """Reads one file a call."""
        store, start = open_store(self._url), len(join_url(self._url, ""))
        return lambda key: store.get(key[start:])


class BinImages(Images):
    """The images of a ``.bin`` file, read again when they are wanted, so that no more than one file is held in memory."""

    def __init__(self, file: str, keys: Sequence[str]) -> None:
        self._file, self.keys = file, keys

    def reader(self) -> Read:
        """Holds the file."""
        return {digest(image): image for image in read_bin(read_url(self._file)).images}.__getitem__

    def name_of(self, key: str) -> str:
        """The file, and the number of the image in it, from 0."""
        images = read_bin(read_url(self._file)).images
        return f"{self._file}, image {[digest(image) for image in images].index(key)}"


@dataclass(frozen=True)
class Options:
    """How images are embedded.

    Attributes:
        flip: add the embedding of the mirrored image before dividing by the length, as the field does.
        skip: leave out what does not decode.
        resize: scale pictures of another size, as ingest does.
    """

    flip: bool = True
    skip: bool = False
    resize: bool = False
    batch_size: int = 128
    threads: int = 1


@dataclass
class Embedded:
    """Embeddings of all images.

    Attributes:
        place: key -> row.
        present: bool (I,), rows of images that were embedded.
        vectors: for each recogniser float32 (I, D), unit rows; zeros where not present.
        seconds: what each recogniser took.
    """

    place: Mapping[str, int]
    present: np.ndarray
    vectors: Sequence[np.ndarray]
    seconds: list[float] = field(default_factory=list)

    def rows(self, keys: Sequence[str], recognizer: int) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings by a recogniser, float32 (N, D), and bool (N,), which of them there are."""
        places = np.array([self.place[key] for key in keys], np.int64)
        return self.vectors[recognizer][places], self.present[places]


def embed_images(sources: Sequence[Images], recognizers: Sequence[OnnxRecognizer], options: Options) -> Embedded:
    """Embed the images that there are, with a progress bar.

    Raises:
        ValueError: an image does not decode (without ``skip``), or a recogniser gives an embedding that is zero or not finite.
    """
    place = {key: row for row, key in enumerate(dict.fromkeys(key for source in sources for key in source.keys))}
    vectors = [np.zeros((len(place), recognizer.dim), np.float32) for recognizer in recognizers]
    found = Embedded(place, np.zeros(len(place), bool), vectors, [0.0] * len(recognizers))
    pool = codec_pool(options.threads)
    quiet = 0.5 if sys.stderr.isatty() else 5.0
    try:
        with tqdm(desc="embed", total=len(place), unit=" images", mininterval=quiet, file=sys.stderr) as bar:
            for keys, pictures in _pictures(sources, options, pool, bar):
                _embed(found, np.array([place[key] for key in keys], np.int64), pictures, recognizers, options)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return found


def _pictures(sources: Sequence[Images], options: Options, pool: Executor | None, bar: tqdm[Any]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Keys and pictures in batches, each distinct image once; what cannot be had moves the bar too."""
    seen = set[str]()
    for source in sources:
        absent = set(source.absent())
        fresh = [key for key in source.keys if key not in seen and key not in absent]
        seen.update(source.keys)
        if not fresh:
            continue
        decoded = partial(_decode, source, source.reader(), options)
        for keys, pictures in ahead_map(pool, decoded, chunks(fresh, options.batch_size), options.threads + 1):
            if keys:
                yield keys, pictures
            bar.update(len(keys))
    bar.update((bar.total or 0) - bar.n)


def _decode(source: Images, read: Read, options: Options, keys: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The images that decode, and their pixels uint8 (N, 112, 112, 3), the same that ``facemae ingest`` would take."""
    kept, pictures = list[str](), np.empty((len(keys), SIZE, SIZE, 3), np.uint8)
    for key in keys:
        try:
            decode(align(read(key), resize=options.resize).jpeg, pictures[len(kept)])
        except PictureError as error:
            if options.skip:
                continue
            remedy = " Leave it out with --skip-missing" + (", or scale it with --resize" if error.reason == "wrong-size" else "")
            raise ValueError(f"{source.name_of(key)}: {str(error).partition(', or run ingest')[0]}.{remedy}") from None
        kept.append(key)
    return kept, pictures[: len(kept)]


def _embed(found: Embedded, rows: np.ndarray, pictures: np.ndarray, recognizers: Sequence[OnnxRecognizer], options: Options) -> None:
    """f(x) + f(flip x), or f(x), divided by its length."""
    for number, recognizer in enumerate(recognizers):
        started = time.perf_counter()
        features = recognizer.features(pictures)
        if options.flip:
            features = features + recognizer.features(np.ascontiguousarray(pictures[:, :, ::-1]))
        found.vectors[number][rows] = unit_rows(features, f"embeddings by {recognizer.name}")
        found.seconds[number] += time.perf_counter() - started
    found.present[rows] = True


def examples(keys: Sequence[str]) -> str:
    """A few of many names."""
    return ", ".join(keys[:SHOWN]) + (", ..." if len(keys) > SHOWN else "")
