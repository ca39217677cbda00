"""Measurements of other protections of the same originals, to stand beside a new one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.measurement import Measurement


def beside(url: str, originals: Mapping[str, Any], recognizers: Sequence[str]) -> dict[str, Any]:
    """What another measurement says, in the form of leakage.json's ``beside``.

    Args:
        url: its root.
        originals: the lineage of the originals that are searched now; it must be of the same.
        recognizers: sha256 of the networks that attack now; what others found says nothing beside them.

    Raises:
        ValueError: it is of other originals, or none of its attackers is among these.
        StoreError: there is none, or it is damaged.
    """
    found = Measurement.open(url)
    if found.report["original"]["fingerprint"] != originals["fingerprint"]:
        raise ValueError(f"{found.url}/leakage.json is of other originals ({found.report['original']['url']}): its figures do not compare")
    attackers = [attacker for attacker in found.attackers if attacker["recognizer"]["sha256"] in recognizers]
    if not attackers:
        names = ", ".join(attacker["name"] for attacker in found.attackers)
        raise ValueError(f"{found.url}/leakage.json was attacked by {names} and by none of --recognizer: its figures do not compare")
    return {
        "url": found.url,
        "sha256": found.sha256,
        "protection": found.report["protected"]["config"].get("protection", {}),
        "attackers": [
            {"name": attacker["name"], **{part: _first(attacker[search][mate]) for part, (search, mate) in _PARTS.items()}}
            for attacker in attackers
        ],
    }


_PARTS = {"image": ("leakage", "image"), "identity": ("leakage", "identity"), "utility": ("utility", "identity")}


def _first(curve: Mapping[str, Any] | None) -> dict[str, float] | None:
    """CMC@1 of a curve with the ends of its interval."""
    return None if curve is None else {name: curve[name][0] for name in ("cmc", "low", "high")}
