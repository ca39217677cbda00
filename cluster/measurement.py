"""A finished measurement of leakage, read back: what it says, and where the ranks behind it are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.dataset import Dataset
from cluster.shard import sha256_hex
from cluster.store import NotFound, StoreError, join_url, open_store


@dataclass(frozen=True)
class Measurement:
    """The content of leakage.json below ``url``, and the digest that names it in lineage."""

    url: str
    report: Mapping[str, Any]
    sha256: str

    @classmethod
    def open(cls, url: str) -> Measurement:
        """The measurement below a root. Raises StoreError when there is none, or it is damaged."""
        store = open_store(url)
        try:
            data = store.get("leakage.json")
            report = json.loads(data)
            _ = report["attackers"], report["original"]["fingerprint"], report["protected"]["fingerprint"]
        except NotFound:
            raise StoreError(f"{store.url} holds no leakage.json: give the --output of a finished facemae leakage", fatal=True) from None
        except (ValueError, LookupError, TypeError) as error:
            raise StoreError(f"{store.url}/leakage.json is damaged ({error!r}): run facemae leakage again", fatal=True) from None
        return cls(store.url, report, sha256_hex(data))

    @property
    def attackers(self) -> Sequence[Mapping[str, Any]]:
        """Each attacker's part of the report."""
        return self.report["attackers"]

    def protected(self) -> Dataset:
        """The set that was measured. Raises StoreError when it is another one by now."""
        measured = self.report["protected"]
        dataset = Dataset(measured["url"])
        content = dataset.description()
        if (content["lineage"]["fingerprint"], content["samples"]) != (measured["fingerprint"], measured["samples"]):
            raise StoreError(f"{dataset.url} is no longer what {self.url}/leakage.json measured: run facemae leakage again", fatal=True)
        return dataset

    def ranks(self, attacker: Mapping[str, Any]) -> Dataset:
        """An attacker's ranks of the protected images. Raises StoreError when they are not those that leakage.json was made from."""
        search = attacker["leakage"]
        found = Dataset(join_url(self.url, search["ranks"].removesuffix("/shards")), ".parquet")
        if found.description()["lineage"]["fingerprint"] != search["fingerprint"]:
            raise StoreError(
                f"{found.url} is another search than the one in {self.url}/leakage.json: run facemae leakage again", fatal=True
            )
        return found
