"""A complete data set as the input of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.dataset import Dataset
from cluster.processor import Unit
from cluster.store import StoreError, open_store


def require_apart(source: str, output: str) -> None:
    """Raise StoreError when one root lies in the other: a job would write into its own input, or take its output for input."""
    here, there = (open_store(url).url.rstrip("/") + "/" for url in (source, output))
    if here.startswith(there) or there.startswith(here):
        raise StoreError(f"the output {output} and the input {source} lie in each other: choose an output beside it", fatal=True)


def input_units(source: Dataset) -> tuple[Sequence[Unit], dict[str, Any]]:
    """One unit a shard, under the shard's own name, and the lineage entry that names this parent.

    Raises:
        StoreError: the data set is unfinished, is none, or cannot be read.
    """
    content = source.description()
    units = [Unit(manifest.shard, manifest.samples) for manifest in source.manifests()]
    return units, {"url": source.url, "fingerprint": content["lineage"]["fingerprint"], "samples": content["samples"]}
