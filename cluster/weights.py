"""Trained weights in object storage, as a local folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.shard import sha256_hex
from cluster.store import NotFound, Store, StoreError, join_url, open_store
from facemae.weights import CONFIG_FILE, GRAPH_FILE, WEIGHTS_FILE


@contextmanager
def local_weights(url: str) -> Iterator[Path]:
    """The folder of model.safetensors and config.json behind a training run or a weights folder, local or s3://; with the graph.onnx of a
    recogniser that was started from one.

    What lies in S3 is downloaded, checked against the sha256 in config.json, and removed at the end of the block: load the weights
    inside it. Workers are killed when their work is done, so nothing may wait for the end of the process.

    Raises:
        StoreError: there are no weights at ``url``, or they are not what config.json says.
    """
    store, config = _find(url)
    if not store.url.startswith("s3://"):
        _check(store, config)
        yield Path(store.url)
        return
    with tempfile.TemporaryDirectory(prefix="facemae-weights-") as name:
        folder = Path(name)
        (folder / WEIGHTS_FILE).write_bytes(_check(store, config))
        (folder / CONFIG_FILE).write_bytes(config)
        if "graph_sha256" in json.loads(config):  # its reader checks it
            (folder / GRAPH_FILE).write_bytes(store.get(GRAPH_FILE))
        yield folder


def _find(url: str) -> tuple[Store, bytes]:
    """Where the weights are, and their config.json."""
    for place in (url, join_url(url, "weights")):
        store = open_store(place)
        try:
            return store, store.get(CONFIG_FILE)
        except NotFound:
            continue
    raise StoreError(
        f"{url} holds no weights ({CONFIG_FILE}, or weights/{CONFIG_FILE}): give the output of a finished training", fatal=True
    )


def _check(store: Store, config: bytes) -> bytes:
    """The weights file, which is what config.json says."""
    try:
        expected = json.loads(config)["sha256"]
        data = store.get(WEIGHTS_FILE)
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{store.url}/{CONFIG_FILE} does not describe weights: copy the whole folder again", fatal=True) from None
    except NotFound:
        raise StoreError(f"{store.url} holds no {WEIGHTS_FILE}: copy the whole folder", fatal=True) from None
    actual = sha256_hex(data)
    if actual != expected:
        reason = f"has sha256 {actual}, {CONFIG_FILE} says {expected}: copy the folder again"
        raise StoreError(f"{store.url}/{WEIGHTS_FILE} {reason}", fatal=True)
    return data
