"""``facemae verify``: is every image accounted for, exactly once?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.dataset import Dataset
from cluster.verify import Verification, verify
from jobs.command import Config, main_of


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Config):
    """Read every object of a data set again: sha256 of each shard, samples and labels counted, ledger added up, strays named.

    Reads: ROOT and the embeddings below it. Writes nothing. Exit code 0 only when everything adds up.
    """

    root: str
    """Root of the data set."""


def run(config: VerifyConfig) -> dict[str, Any]:
    """Verify the data set and its embeddings, print what was found.

    Raises:
        ValueError: something is missing, doubled, damaged or stray.
    """
    dataset = Dataset(config.root)
    dataset.description()
    names = sorted({key.split("/")[1] for key in (stored.key for stored in dataset.store.list("embeddings/")) if key.count("/") > 1})
    found = [verify(config.root), *(verify(dataset.embeddings(name).url, ".parquet") for name in names)]
    for verification in found:
        _print(verification)
    bad = [verification.url for verification in found if not verification.ok]
    if bad:
        raise ValueError(f"{', '.join(bad)} does not add up: see above")
    return {"verified": [verification.url for verification in found]}


def _print(found: Verification) -> None:
    totals = found.totals
    print(f"{found.url} ({found.kind}): {totals['samples_in']} in = {totals['samples']} out + {totals['quarantined']} quarantined")
    print(f"  {totals['shards']} shards, {totals['bytes']} bytes, {found.identities} identities; every shard re-read and hashed")
    for problem in found.problems:
        print(f"  PROBLEM {problem}")
    for stray in found.strays:
        print(f"  STRAY   {stray}: no manifest names it; remove it once no attempt is running")
    if found.ok:
        print("  nothing missing, nothing doubled, no stray object")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; ROOT may be given without its flag."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments.insert(0, "--root")
    return main_of(VerifyConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
