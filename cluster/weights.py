"""Trained weights in object storage, as a local folder."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from cluster.shard import sha256_hex
from cluster.store import NotFound, StoreError, join_url, open_store
from facemae.model import CONFIG_FILE, WEIGHTS_FILE


def local_weights(url: str) -> Path:
    """The folder of model.safetensors and config.json behind a training run or a weights folder, local or s3://.

    What lies in S3 is downloaded once a process, checked against the sha256 in config.json, and removed when the process ends.

    Raises:
        StoreError: there are no weights at ``url``, or they are not what config.json says.
    """
    for place in (url, join_url(url, "weights")):
        store = open_store(place)
        try:
            config = store.get(CONFIG_FILE)
        except NotFound:
            continue
        return _download(store.url) if store.url.startswith("s3://") else _checked(Path(store.url), config)
    raise StoreError(
        f"{url} holds no weights ({CONFIG_FILE}, or weights/{CONFIG_FILE}): give the output of a finished facemae train", fatal=True
    )


@cache
def _download(url: str) -> Path:
    store, folder = open_store(url), Path(tempfile.mkdtemp(prefix="facemae-weights-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = store.get(CONFIG_FILE)
    (folder / WEIGHTS_FILE).write_bytes(store.get(WEIGHTS_FILE))
    (folder / CONFIG_FILE).write_bytes(config)
    return _checked(folder, config, url)


def _checked(folder: Path, config: bytes, url: str | None = None) -> Path:
    where = url or str(folder)
    try:
        expected = json.loads(config)["sha256"]
        actual = sha256_hex((folder / WEIGHTS_FILE).read_bytes())
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{where}/{CONFIG_FILE} does not describe weights: copy the whole folder again", fatal=True) from None
    except FileNotFoundError:
        raise StoreError(f"{where} holds no {WEIGHTS_FILE}: copy the whole folder", fatal=True) from None
    if actual != expected:
        reason = f"has sha256 {actual}, {CONFIG_FILE} says {expected}: copy the folder again"
        raise StoreError(f"{where}/{WEIGHTS_FILE} {reason}", fatal=True)
    return folder
