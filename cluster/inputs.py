"""A complete data set as the input of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.dataset import Dataset
from cluster.processor import Unit


def input_units(source: Dataset) -> tuple[Sequence[Unit], dict[str, Any]]:
    """One unit a shard, under the shard's own name, and the lineage entry that names this parent.

    Raises:
        StoreError: the data set is unfinished, is none, or cannot be read.
    """
    content = source.description()
    units = [Unit(manifest.shard, manifest.samples) for manifest in source.manifests()]
    return units, {"url": source.url, "fingerprint": content["lineage"]["fingerprint"], "samples": content["samples"]}
