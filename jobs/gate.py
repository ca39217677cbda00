"""The release gate of ``facemae leakage``: decides, writes the verdict into the protected set's dataset.json, and says it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.dataset import Dataset
from cluster.release import Evidence, grant, revoke
from cluster.shard import sha256_hex
from facemae.release import decide


def gate(report: Mapping[str, Any], written: bytes, url: str, max_cmc1: float | None, max_identity_cmc1: float | None) -> dict[str, Any]:
    """Release the protected set of a measurement, or withhold it. Without a limit nothing is decided and nothing is written.

    Args:
        report, written, url: the content of leakage.json, its bytes, and where they are.
        max_cmc1, max_identity_cmc1: see ``decide``.

    Returns:
        What the job's summary adds: ``released``, and ``withheld``, the reason or None, by which ``main_of`` ends with exit code 4.

    Raises:
        ValueError: see ``decide``.
        StoreError: the set changed since it was measured, or its dataset.json cannot be written with these credentials.
    """
    if max_cmc1 is None and max_identity_cmc1 is None:
        return {}
    decision, protected = decide(report, max_cmc1, max_identity_cmc1), report["protected"]
    dataset = Dataset(protected["url"])
    if not decision.passed:
        revoke(dataset, decision.reason)
        return {"released": False, "withheld": decision.reason}
    seen = protected["fingerprint"], protected["samples"]
    grant(dataset, Evidence(decision.to_json(), url, sha256_hex(written), *seen, decision.attackers))
    print(f"released: {decision.reason}\nwritten: {dataset.url}/dataset.json (released: true)")
    return {"released": True, "withheld": None}
