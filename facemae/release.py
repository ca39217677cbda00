"""The release gate: whether a measured leakage is low enough for a protected set to be handed out. Pure arithmetic on leakage.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_FOUND = {"image": "be traced to the original they were made from", "identity": "be recognised by another image of the person"}
_FLAGS = {"image": "--max-cmc1", "identity": "--max-identity-cmc1"}
WEAK_ATTACKER = 0.5
"""An attacker that finds the person in a smaller share of the originals says nothing about protected images (our reading)."""


@dataclass(frozen=True)
class Bound:
    """What the worst attacker may find at rank 1, beside the limit.

    Attributes:
        mate: "image" (the query's source) or "identity" (another image of the person).
        limit: the largest share allowed, in (0, 1).
        upper: upper end of the attacker's share at rank 1, in [0, 1]; every image without a rank counts as found.
        attacker: its name.
        queries: images with a rank; without any, nothing was measured and ``upper`` is 1.
        cmc1: the share found, of images with a rank and without, of which ``upper`` is the upper end.
    """

    mate: str
    limit: float
    upper: float
    attacker: str
    queries: int
    cmc1: float

    @property
    def passed(self) -> bool:
        """Whether the bound keeps the limit. Nothing measured never does."""
        return self.queries > 0 and self.upper <= self.limit

    @property
    def text(self) -> str:
        """The bound as a sentence."""
        if not self.queries:
            return f"no image could be searched for by {self.attacker} ({_FLAGS[self.mate]}): nothing was measured, so nothing is safe"
        verdict = "within" if self.passed else "above"
        shares = f"up to {100 * self.upper:.4g} % of the images may {_FOUND[self.mate]} by {self.attacker}, the worst attacker"
        text = f"{shares}, {verdict} the limit of {100 * self.limit:.4g} % (upper end of the interval; no rank counts as found)"
        if self.passed or self.cmc1 > self.limit:
            return text
        return f"{text}. {100 * self.cmc1:.4g} % were found: so few people cannot show that it is not more, a larger set may"


@dataclass(frozen=True)
class Decision:
    """Whether a set may be released. ``bounds`` holds one entry for each limit that was asked, ``objections`` what speaks against a release
    whatever the bounds, ``attackers`` who attacked."""

    bounds: tuple[Bound, ...]
    objections: tuple[str, ...] = ()
    attackers: tuple[Mapping[str, Any], ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every bound keeps its limit, and nothing else speaks against it."""
        return not self.objections and all(bound.passed for bound in self.bounds)

    @property
    def worst(self) -> Bound:
        """The bound that decides: a broken one first, then the one nearest to its limit."""
        return max(self.bounds, key=lambda bound: (not bound.passed, bound.upper / bound.limit))

    @property
    def reason(self) -> str:
        """For people: what speaks against it and the bounds that are broken, or all that are kept."""
        return "; ".join([*self.objections, *(bound.text for bound in self.bounds if self.passed or not bound.passed)])

    def to_json(self) -> list[dict[str, Any]]:
        """The bounds, for the release record."""
        return [asdict(bound) for bound in self.bounds]


def limits_of(max_cmc1: float | None, max_identity_cmc1: float | None) -> dict[str, float]:
    """The limits that were given, by mate. Raises ValueError for one outside (0, 1): ask before a long measurement, not after it."""
    limits = {mate: limit for mate, limit in (("image", max_cmc1), ("identity", max_identity_cmc1)) if limit is not None}
    for mate, limit in limits.items():
        if not 0 < limit < 1:
            raise ValueError(f"{_FLAGS[mate]} {limit}: give a share above 0 and below 1 (0.01 is one image in a hundred)")
    return limits


def decide(report: Mapping[str, Any], max_cmc1: float | None = None, max_identity_cmc1: float | None = None) -> Decision:
    """Hold a measurement against limits on CMC@1.

    For every attacker the upper end h of the interval at rank 1, over its Q queries, counts; the L images that have no rank (left_out)
    count as found, all of them: (h Q + L) / (Q + L). So the bound holds for the whole set whenever h holds for the queries. The attacker
    with the largest bound decides, adaptive ones included. Whatever the bounds, nothing passes that was not made from
    these originals, that calls itself no protection, or that only weak attackers have looked at: they fail on the originals too.

    Args:
        report: leakage.json.
        max_cmc1: the largest share of images that may be traced to their source; None asks nothing.
        max_identity_cmc1: the same for another image of the person.

    Raises:
        ValueError: no limit, a limit outside (0, 1), or a report without attackers.
    """
    limits = limits_of(max_cmc1, max_identity_cmc1)
    if not limits:
        raise ValueError("the gate needs a limit: give --max-cmc1 or --max-identity-cmc1")
    if not report["attackers"]:
        raise ValueError("the measurement has no attacker: run facemae leakage with one --recognizer or more")
    found = {mate: [_bound(attacker, mate, limit) for attacker in report["attackers"]] for mate, limit in limits.items()}
    worst = tuple(max(bounds, key=lambda bound: bound.upper) for bounds in found.values())
    return Decision(worst, tuple(_objections(report)), tuple(_who(attacker) for attacker in report["attackers"]))


def _objections(report: Mapping[str, Any]) -> Iterator[str]:
    """What speaks against a release whatever was found."""
    parent = report["protected"].get("parent") or {}
    if not parent or parent.get("fingerprint") != report["original"]["fingerprint"]:
        yield "the set was not made from the originals that were searched: nothing is known of it"
    if warning := report["protected"]["config"].get("protection", {}).get("warning"):
        yield f"the set is never released: {warning}"
    shares = [_who(attacker)["reference"] for attacker in report["attackers"]]
    known = [share for share in shares if share is not None]
    if known and max(known) < WEAK_ATTACKER:
        yield (
            f"the attackers are too weak to tell: the best finds the person in {100 * max(known):.3g} % of the originals themselves, "
            f"give one that finds {100 * WEAK_ATTACKER:g} % or more"
        )


def _who(attacker: Mapping[str, Any]) -> dict[str, Any]:
    """An attacker in the release record: its name, whether it adapted, the share of the originals in which it finds the person."""
    reference = attacker["reference"]["identity"]
    return {"name": attacker["name"], "adaptive": bool(attacker["adaptive"]), "reference": reference["cmc"][0] if reference else None}


def _bound(attacker: Mapping[str, Any], mate: str, limit: float) -> Bound:
    search, name = attacker["leakage"], attacker["name"]
    curve, left_out = search[mate], search["left_out"]
    high = curve["high"][0] if curve and curve["queries"] else None
    if high is None or not 0 <= high <= 1:  # a NaN is nothing measured either
        return Bound(mate, limit, 1.0, name, 0, 1.0)
    queries = curve["queries"]
    upper, cmc1 = ((share * queries + left_out) / (queries + left_out) for share in (high, curve["cmc"][0]))
    return Bound(mate, limit, upper, name, queries, cmc1)
