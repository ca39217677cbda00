"""Builds an index beside the embeddings it is made of: quantiser, then cells, then parts; each step is committed, so a build resumes.

<embeddings>.index-<12 hex>/quantizer.safetensors   cells, and the part of each
<embeddings>.index-<12 hex>/<factory>.codes.faiss   an empty FAISS index with trained codes, where the factory asks for codes
<embeddings>.index-<12 hex>/shards/...              a data set of parts
<embeddings>.cells-<12 hex>/...                     the intermediate set, gone when the parts are complete
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import ray

from cluster.cells import CellsProcessor, cells_units
from cluster.coded import train_codes
from cluster.dataset import Dataset, fingerprint
from cluster.embedded import GalleryError, read_shard
from cluster.index_choice import Choice
from cluster.index_part import PartProcessor
from cluster.index_plan import Plan
from cluster.node import num_working
from cluster.processor import Unit
from cluster.quantizer import SAMPLES_PER_CELL, Quantizer
from cluster.shard import sha256_hex
from cluster.stage import StageError, StageOptions, run_stage
from cluster.store import AlreadyExists, NotFound, StoreError
from cluster.task import answer_of

log = logging.getLogger(__name__)

QUANTIZER, CODES = "quantizer.safetensors", "codes.faiss"
SEED = 0
DEFAULTS = StageOptions(in_flight=2)
SAMPLE_SHARDS = 256
"""The training sample comes from at most this many embedding shards, chosen at random."""


def build_index(
    embeddings: Dataset,
    names: list[str],
    starts: np.ndarray,
    dim: int,
    choice: Choice,
    options: StageOptions | None = None,
    gpus: float = 0,
) -> tuple[Plan, Quantizer]:
    """Build what is missing of the index. Ray must be connected; no embedding passes through this process.

    Args:
        embeddings: the data set; ``names`` of its shards and ``starts``, int64 (len(names) + 1,), the global numbers of their images.
        dim: length of the embeddings.
        choice: which index.
        options: of the stages.
        gpus: for the training of the quantiser.

    Returns:
        What its actors need, and its cells.

    Raises:
        GalleryError: the sample is too small for so many cells, or a part is lost.
        StoreError, StageError, Interrupted: as run_stage.
    """
    source = embeddings.description()["lineage"]["fingerprint"]
    description = {"embeddings": source, "cells": choice.num_cells, "parts": choice.num_parts, "dim": dim, "seed": SEED}
    mark = fingerprint(description)[:12]
    index, cells = Dataset(f"{embeddings.url}.index-{mark}", ".parquet"), Dataset(f"{embeddings.url}.cells-{mark}", ".parquet")
    quantizer, codes = _trained(embeddings, index, names, starts, dim, choice, gpus)
    found = Quantizer.from_bytes(quantizer, f"{index.url}/{QUANTIZER}")
    description["quantizer"] = sha256_hex(quantizer)
    if not _complete(index):
        parts = [Unit(f"{part:05d}") for part in range(int(found.part.max()) + 1)]
        parent = {"url": embeddings.url, "fingerprint": source, "samples": int(starts[-1])}
        stages: list[tuple[str, str, Any, Any, Dataset]] = [
            ("cells", "cells", CellsProcessor(embeddings.url, dim, quantizer, description), cells_units(names, starts, dim), cells),
            ("parts", "index", PartProcessor(cells.url, description), parts, index),
        ]
        try:
            for name, kind, processor, units, output in stages:
                run_stage(processor, units, output, name=f"index: {name}", kind=kind, parent=parent, options=options or DEFAULTS)
        except (StageError, StoreError) as error:
            if not _complete(index):
                raise
            log.debug("%s was completed by another attempt: %s", index.url, error)  # which then took the intermediate set away
    _require_whole(index, int(starts[-1]))
    _remove(cells)
    return Plan(index.url, dim, cells=True, codes=(_codes_key(choice), sha256_hex(codes)) if codes else None), found


def _trained(
    embeddings: Dataset, index: Dataset, names: list[str], starts: np.ndarray, dim: int, choice: Choice, gpus: float
) -> tuple[bytes, bytes | None]:
    """The stored quantiser and codes, trained first where they are not there; of two attempts the first counts."""
    wanted = [QUANTIZER, *([_codes_key(choice)] if choice.coded else [])]
    found = [_get(index, key) for key in wanted]
    if None in found:
        nodes = num_working()
        threads = max(1, int(ray.available_resources().get("CPU", 1) // nodes))  # the mean of what is free: some node has as much
        train = ray.remote(_train).options(num_cpus=threads, num_gpus=gpus)
        made = answer_of(train.remote(embeddings.url, names, starts, dim, choice, found[0], gpus > 0, threads))
        for key, data in zip(wanted, made, strict=False):
            try:
                index.store.put(key, data, if_absent=True)
            except AlreadyExists:
                log.debug("%s/%s was trained by another attempt", index.url, key)
        found = [index.store.get(key) for key in wanted]
    return found[0], found[1] if choice.coded else None  # type: ignore[return-value]  # every one is there by now


def _codes_key(choice: Choice) -> str:
    return f"{choice.factory.replace(',', '-')}.{CODES}"


def _train(
    url: str, names: list[str], starts: np.ndarray, dim: int, choice: Choice, quantizer: bytes | None, gpu: bool, threads: int
) -> list[bytes]:
    """In a task: the quantiser (unless it is there) and the codes, trained on a random sample."""
    import faiss

    faiss.omp_set_num_threads(threads)
    sample = _sample(Dataset(url, ".parquet"), names, starts, dim, choice.num_cells * SAMPLES_PER_CELL)
    if len(sample) < choice.num_cells:
        raise GalleryError(f"{url}: {len(sample)} embeddings for {choice.num_cells} cells: choose fewer cells, or Flat")
    cells = (
        Quantizer.train(sample, choice.num_cells, choice.num_parts, SEED, gpu)
        if quantizer is None
        else Quantizer.from_bytes(quantizer, url)
    )
    return [cells.to_bytes(), *([train_codes(choice.factory, cells, sample)] if choice.coded else [])]


def _sample(embeddings: Dataset, names: list[str], starts: np.ndarray, dim: int, size: int) -> np.ndarray:
    """Random rows of random shards, float16 (at most ``size``, dim); a function of the set and SEED."""
    rng = np.random.default_rng(SEED)
    shards = np.sort(rng.permutation(len(names))[:SAMPLE_SHARDS])
    share = min(1.0, size / max(int(np.diff(starts)[shards].sum()), 1))
    parts = []
    for shard in shards:
        vectors = read_shard(embeddings, names[shard], dim).vectors
        parts.append(vectors[np.sort(rng.permutation(len(vectors))[: max(1, round(share * len(vectors)))])])
    return np.concatenate(parts)[:size]


def _get(index: Dataset, key: str) -> bytes | None:
    try:
        return index.store.get(key)
    except NotFound:
        return None


def _complete(index: Dataset) -> bool:
    """Whether every part is committed. One whose manifest was deleted is made anew, from a new intermediate set."""
    try:
        return bool(index.description()["shards"] == len(index.names()))
    except StoreError as error:
        if not error.fatal:
            raise
        return False  # none, or damaged: it is written again


def _require_whole(index: Dataset, num_images: int) -> None:
    """Raise GalleryError when an index holds fewer images than its embeddings: they would never be found."""
    held: Any = index.description()["samples"]
    if held != num_images:
        raise GalleryError(f"{index.url} holds {held} of {num_images} images: delete it; it is built again")


def _remove(cells: Dataset) -> None:
    """Delete the intermediate set. Where this role may not delete, the embeddings' lifetime rule does it later."""
    try:
        for stored in list(cells.store.list()):
            cells.store.delete(stored.key)
    except StoreError as error:
        log.warning("%s is not needed any more and stays: %s", cells.url, error)
