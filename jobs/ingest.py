"""``facemae ingest``: faces from a folder, .rec, tars or the synthetic renderer into a data set."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.dataset import Dataset
from cluster.ingest import REJECTED, IngestProcessor
from cluster.inputs import require_apart
from cluster.session import session
from cluster.source import listed_root, open_source
from cluster.stage import run_stage
from jobs.command import RayConfig, main_of
from jobs.summary import print_summary


@dataclass(frozen=True, kw_only=True)
class IngestConfig(RayConfig):
    """Bring faces into a data set of WebDataset shards, every image checked, nothing lost.

    Reads: a folder with one folder of images an identity; an InsightFace FILE.rec with its .idx; tars of <key>.jpg + <key>.cls; or
    synthetic faces. Faces that already are 112 x 112 JPEGs are kept byte for byte. A file that cannot be used becomes a row of the
    quarantine ledger with the reason.
    Writes: OUTPUT/shards, manifests, quarantine, dataset.json.
    Next: facemae embed, facemae train, facemae protect.
    """

    source: str
    """DIR, FILE.rec, TARS (a .tar, a folder of them, or a pattern with *), or synthetic:ids=500,images=20[,seed=0]; local or s3://."""
    output: str
    """Root of the new data set: a folder or s3://bucket/prefix."""
    shard_size: int = 10_000
    """Images a shard (tars keep their own size)."""
    resize: bool = False
    """Scale images that are not 112 x 112 instead of quarantining them. Recognisers expect aligned faces: align first if you can."""
    keep_source: bool = True
    """Write each image's origin (path or record) into its .json member. Protected sets never carry it."""

    def check(self) -> None:
        """See Config."""
        if self.shard_size < 1:
            raise ValueError(f"shard_size is {self.shard_size}: a shard holds at least one image")


def run(config: IngestConfig) -> dict[str, Any]:
    """Ingest, and return the summary that is printed."""
    config.check()
    root = listed_root(config.source)
    if root is not None:
        require_apart(root, config.output)
    source = open_source(config.source)
    units = source.units(config.shard_size)
    processor = IngestProcessor(source, resize=config.resize, keep_source=config.keep_source)
    output = Dataset(config.output)
    with session(config.address):
        result = run_stage(processor, units, output, name="ingest", kind="images", options=config.stage_options())
    reasons = _reasons(output) if result.description["quarantined"] else {}
    if reasons:
        print(f"left out: {', '.join(f'{count} {reason}' for reason, count in reasons.items())} (docs/ingest.md says what to do)")
    next_step = f"facemae embed --input {config.output} --recognizer FILE.onnx, or facemae protect --help"
    return {**print_summary(result, output, next_step=next_step), "reasons": reasons}


def _reasons(output: Dataset) -> dict[str, int]:
    """How many samples were left out by reason, most first: from the manifests, no ledger is read. Shards given up whole have none."""
    counts: Counter[str] = Counter()
    for manifest in output.manifests():
        counts += Counter({name.removeprefix(REJECTED): n for name, n in manifest.counts.items() if name.startswith(REJECTED)})
        if manifest.failure is not None:
            counts["failed-shard"] += manifest.quarantined
    return dict(counts.most_common())


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(IngestConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
