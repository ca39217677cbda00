"""The finished embeddings of an image set by one recogniser: opened, checked, read shard by shard, and matched with their originals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.dataset import Dataset
from cluster.embedding import Embeddings, read_embeddings
from cluster.secret import KeyMap
from cluster.shard import ShardError
from cluster.store import NotFound, StoreError


class GalleryError(StoreError):
    """The gallery cannot be searched; the message names the shard, the reason and the remedy. Always fatal: it ends a stage."""

    def __init__(self, message: str, *, fatal: bool = True) -> None:
        super().__init__(message, fatal=fatal)


@dataclass(frozen=True)
class EmbeddedSet:
    """The finished embeddings of one image set by one recogniser.

    Attributes:
        dataset: the data set of embedding shards.
        recognizer: its description: name, sha256, dim, mean, std.
        fingerprint: of the run that made it.
        samples: number of embeddings.
    """

    dataset: Dataset
    recognizer: Mapping[str, Any]
    fingerprint: str
    samples: int

    @classmethod
    def open(cls, root: str, recognizer: str) -> EmbeddedSet:
        """The embeddings of the image set at ``root`` by the recogniser of that name.

        Raises:
            GalleryError: there are none, they are unfinished, or they are of another state of the image set.
        """
        images = Dataset(root)
        embeddings = images.embeddings(recognizer)
        try:
            content = embeddings.description()
        except StoreError as error:
            raise GalleryError(f"{error}: run `facemae embed --input {root} --recognizer {recognizer}.onnx` first") from None
        lineage = content["lineage"]
        made_of = (lineage.get("parent") or {}).get("fingerprint")
        if made_of != images.description()["lineage"].get("fingerprint"):
            raise GalleryError(f"{embeddings.url} was made from another state of {root}: delete it and run `facemae embed` again")
        return cls(embeddings, lineage["config"]["recognizer"], lineage["fingerprint"], content["samples"])

    def lineage(self) -> dict[str, Any]:
        """The set as the parent of what is made of it."""
        return {"url": self.dataset.url, "fingerprint": self.fingerprint, "samples": self.samples}


def require_same_recognizer(queries: EmbeddedSet, gallery: EmbeddedSet) -> None:
    """Raise GalleryError unless both sets were embedded by the same network with the same normalisation."""
    for field in ("sha256", "dim", "mean", "std"):
        here, there = queries.recognizer[field], gallery.recognizer[field]
        if here != there:
            raise GalleryError(
                f"{queries.dataset.url} and {gallery.dataset.url} are of different recognisers ({field} {here} and {there}): "
                "delete one of them and embed both sets with the same file"
            )


def require_unit_rows(vectors: np.ndarray, dim: int, where: str) -> None:
    """Raise GalleryError, naming ``where`` and the row, unless ``vectors`` is (N, dim) with finite rows of unit length."""
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise GalleryError(f"{where}: embeddings of shape {vectors.shape} in a gallery of {dim} dimensions: of another recogniser?")
    lengths = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float32)
    bad = np.flatnonzero(~(np.abs(lengths - 1) < 0.02))  # a NaN is bad too
    if len(bad):
        raise GalleryError(
            f"{where}: {len(bad)} embeddings are not of unit length (row {bad[0]}: squared length {lengths[bad[0]]:.3g}): zero, not finite "
            "or not normalised. Delete this set of embeddings and run `facemae embed` again"
        )


def read_shard(dataset: Dataset, name: str, dim: int | None = None) -> Embeddings:
    """One shard of embeddings, checked against its manifest; of unit rows of length ``dim`` where that is given. Empty where every one of
    its images is in the quarantine.

    Raises:
        GalleryError: there is none, or it is not what it should be; the message names it.
    """
    try:
        manifest = dataset.manifest(name)
    except NotFound:
        raise GalleryError(f"{dataset.url} has no shard {name}: are these two sets of the same origin? Run `facemae embed`") from None
    if manifest.file is None:
        return Embeddings([], np.empty(0, np.int64), np.empty((0, dim or 0), np.float16))
    where = f"{dataset.url}/{manifest.file}"
    try:
        data = dataset.read(manifest)
    except ShardError as error:  # names the file
        raise GalleryError(str(error)) from None
    except NotFound:
        raise GalleryError(f"{where} does not exist: delete manifests/{name}.json there too, and run `facemae embed` again") from None
    try:
        rows = read_embeddings(data)
    except ShardError as error:
        raise GalleryError(f"{where}: {error}") from None
    if len(rows) != manifest.samples:
        raise GalleryError(f"{where}: {len(rows)} rows, its manifest says {manifest.samples}: run `facemae verify` on the set")
    if dim is not None:
        require_unit_rows(rows.vectors, dim, where)
    return rows


def places(queries: Embeddings, originals: Embeddings, shard: str, new_key: KeyMap | None) -> np.ndarray:
    """The row of each query's original, int64 (N,), -1 where it has no embedding.

    Raises:
        GalleryError: the two shards are not of the same images.
    """
    rows = {key: row for row, key in enumerate(map(new_key, originals.keys) if new_key else originals.keys)}
    found = np.array([rows.get(key, -1) for key in queries.keys], np.int64)
    if len(queries) and len(originals) and (found < 0).all():
        raise GalleryError(
            f"shard {shard}: no key of the queries is in the gallery's shard of the same name (first: {queries.keys[0]!r}): the protected "
            "set is of other originals"
        )
    kept = np.flatnonzero(found >= 0)
    wrong = kept[originals.identities[found[kept]] != queries.identities[kept]]
    if len(wrong):
        raise GalleryError(f"shard {shard}: {queries.keys[wrong[0]]!r} has another identity in the gallery than among the queries")
    return found


def take(rows: Embeddings, kept: np.ndarray) -> Embeddings:
    """The rows where ``kept``, bool (N,), is true."""
    if kept.all():
        return rows
    keys = [key for key, keep in zip(rows.keys, kept, strict=True) if keep]
    return Embeddings(keys, rows.identities[kept], rows.vectors[kept])
