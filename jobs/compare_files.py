"""Files that a configuration names: by their digests, since an edited list is another list, and by paths that every process finds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cluster.shard import sha256_hex
from cluster.store import open_store, read_url, split_url
from cluster.weights import local_weights
from facemae.model import CONFIG_FILE

FILES = {
    "protections": ("weights",),
    "pretrain": ("init", "deepspeed"),
    "evaluate": ("bin", "pairs", "images", "cfp", "identification", "distractors", "templates", "template_pairs", "template_gallery"),
    "leakage": (),
}
"""The fields of a section that name files or roots."""


def digests(settings: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Settings with every file and folder that they name replaced by its last name and digest. Raises StoreError where there is none."""
    return _mapped(settings, section, _digest)


def located(given: Mapping[str, Any], section: str) -> dict[str, Any]:
    """A section whose local paths are absolute: a worker may run in another folder."""
    return _mapped(given, section, absolute)


def absolute(url: str) -> str:
    """A path from the root of the file system on; what lies in S3 as it is."""
    return url if "://" in url else str(Path(url).expanduser().absolute())


def weights_digest(url: str) -> str:
    """Sha256 of the trained weights at ``url``, whose file was checked against it."""
    with local_weights(url) as folder:
        return str(json.loads((folder / CONFIG_FILE).read_bytes())["sha256"])


def _mapped(given: Mapping[str, Any], section: str, change: Callable[[str], str]) -> dict[str, Any]:
    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(item) for item in value]
        return change(value) if isinstance(value, str) else value

    return {name: changed(value) if name in FILES[section] else value for name, value in given.items()}


def _digest(url: str) -> str:
    name = split_url(url)[1]
    if url.startswith("s3://") or Path(url).is_dir():
        held = sorted((stored.key, stored.size) for stored in open_store(url).list())
        if held:
            return f"{name}: {len(held)} files, sha256 of names and sizes {sha256_hex(json.dumps(held).encode())}"
    return f"{name}: sha256 {sha256_hex(read_url(url))}"
