"""The sums over a data set's manifests: what dataset.json and index.json say of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.dataset import Labels, Manifest


def index_of(manifests: Sequence[Manifest]) -> bytes:
    """The content of index.json: the shards that hold data, in order."""
    shards = [
        {"url": manifest.file, "nsamples": manifest.samples, "filesize": manifest.num_bytes, "sha256": manifest.sha256}
        for manifest in manifests
        if manifest.file is not None
    ]
    return json_bytes({"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": shards})


def totals(manifests: Sequence[Manifest]) -> dict[str, int | None]:
    """The accounting of many shards. ``identities`` is None when labels are spread over shards so that manifests cannot count them."""
    return {
        "shards": sum(m.file is not None for m in manifests),
        "samples_in": sum(m.samples_in for m in manifests),
        "samples": sum(m.samples for m in manifests),
        "quarantined": sum(m.quarantined for m in manifests),
        "bytes": sum(m.num_bytes for m in manifests),
        "identities": _count_identities([m.identities for m in manifests if m.identities.count]),
    }


def _count_identities(labels: Sequence[Labels]) -> int | None:
    """Distinct identities where they run through the shards in order, so that only neighbours can share one."""
    count = 0
    for i, here in enumerate(labels):
        if i and here.first < labels[i - 1].last:
            return None
        count += here.count - (i > 0 and here.first == labels[i - 1].last)
    return count


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """JSON as a data set stores it, keys sorted: equal content gives equal bytes."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
