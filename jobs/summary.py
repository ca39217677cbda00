"""What a stage's job prints at its end: the accounting, and where the output is."""

from __future__ import annotations

from typing import Any

from cluster.dataset import Dataset
from cluster.stage import StageResult


def print_summary(result: StageResult, output: Dataset, *, next_step: str) -> dict[str, Any]:
    """Print a stage's accounting. Returns it: counts, rate of this run, the shards that were given up, and what to run next."""
    content = result.description
    rate = result.samples / result.seconds if result.seconds else 0.0
    out, quarantined = content["samples"], content["quarantined"]
    print(f"{content['samples_in']} images in = {out} out + {quarantined} quarantined, {content['shards']} shards")
    if result.resumed:
        print(f"resumed: {result.resumed} shards were committed before, {result.committed} in this run")
    if result.samples:
        print(f"{rate:.0f} images/s over {result.seconds:.1f} s, after {result.startup_seconds:.1f} s of start-up")
    if quarantined:
        print(f"what was left out, and why: {output.url}/quarantine/ (parquet)")
    if not out:
        print("not a single image could be used: the reasons are above and in the quarantine ledger")
    for shard in result.failed_shards:
        print(f"shard {shard} was given up: {output.url}/manifests/{shard}.json says why")
    print(f"written: {output.url}")
    counts = {name: content[name] for name in ("samples_in", "samples", "quarantined", "shards", "identities")}
    summary = {"url": output.url, **counts, "images_per_second": rate, "seconds": result.seconds, "next": next_step}
    return {**summary, "failed_shards": list(result.failed_shards)}
