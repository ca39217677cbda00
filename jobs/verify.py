"""``facemae verify``: is every image accounted for, exactly once?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from cluster.dataset import Dataset, NotADataset
from cluster.verify import Verification, clean, embedded, verify
from cluster.verify_training import holds_training, verify_training
from jobs.command import Config, main_of

Root = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ROOT")]


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Config):
    """Read every object of a data set again: sha256 of each shard, samples and labels counted, ledger added up, strays named. Of a
    training run: weights, checkpoints, and from the log of keys that no sample was repeated or skipped.

    Reads: ROOT (images, embeddings, an index or ranks) and the embeddings below it. Writes nothing, unless --clean is given.
    Exit code 0 only when everything adds up, 3 when it does but whole shards were given up.
    """

    root: Root
    """Root of the data set, or of the training run."""
    clean: bool = False
    """First remove what dead attempts left behind. Refused while an attempt is alive (watches heartbeats for up to 20 seconds)."""


def run(config: VerifyConfig) -> dict[str, Any]:
    """Verify the data set and its embeddings, or the training run, and print what was found.

    Raises:
        ValueError: something is missing, doubled, damaged or stray.
    """
    dataset = Dataset(config.root)
    try:
        suffix = ".tar" if dataset.description().get("kind") == "images" else ".parquet"
    except NotADataset:
        if holds_training(config.root):
            if config.clean:
                print("a training run cleans up after itself: --clean does nothing here")
            return _run_training(config.root)
        raise
    places = [(config.root, suffix), *((dataset.embeddings(name).url, ".parquet") for name in embedded(dataset))]
    for url, suffix in places if config.clean else ():
        for key in clean(url, suffix, announce=lambda text: print(text, flush=True)):
            print(f"removed {url}/{key}")
    found = [verify(url, suffix) for url, suffix in places]
    for verification in found:
        _print(verification)
    sys.stdout.flush()  # before the verdict, which goes to stderr
    bad = [verification.url for verification in found if not verification.ok]
    if bad:
        raise ValueError(f"{', '.join(bad)} does not add up: see above")
    given_up = [f"{verification.url}: {shard}" for verification in found for shard in verification.given_up]
    return {"verified": [verification.url for verification in found], "failed_shards": given_up}


def _run_training(root: str) -> dict[str, Any]:
    found = verify_training(root)
    print("\n".join(found.lines()), flush=True)
    if not found.ok:
        raise ValueError(f"{found.url} is not what it claims to be: see above")
    return {"verified": [found.url]}


def _print(found: Verification) -> None:
    totals = found.totals
    print(f"{found.url} ({found.kind}): {totals['samples_in']} in = {totals['samples']} out + {totals['quarantined']} quarantined")
    attempts = f"{found.attempts} attempt{'s' * (found.attempts != 1)}"
    print(
        f"  {totals['shards']} shards by {attempts}, {totals['bytes']} bytes, {found.identities} identities; every shard re-read and hashed"
    )
    for shard, reason in found.given_up.items():
        print(f"  GIVEN UP {shard}: {reason}")
    for problem in found.problems:
        print(f"  PROBLEM  {problem}")
    for stray in found.strays:
        print(f"  STRAY    {stray}: no manifest names it; --clean removes what dead attempts left, other files are yours to move")
    for each in found.unfinished:
        print(f"  STRAY    {each.key}: a write that was never completed; --clean removes it")
    if found.problems:
        print("  REMEDY   delete what is left of a missing or damaged shard, its manifest and dataset.json, and run the job that wrote it")
        print("           again: the other shards stay. A damaged dataset.json or index.json alone is written anew by the same command")
    for note in found.notes:
        print(f"  NOTE     {note}")
    if found.ok:
        print("  nothing missing, nothing doubled, no stray object")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(VerifyConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
