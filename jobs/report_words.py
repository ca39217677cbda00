"""The report's sentences: what the numbers amount to, in words for readers who do not know the method."""

from __future__ import annotations

from facemae.release import WEAK_ATTACKER
from jobs.report_data import CurveData, Measurement


def headline(measurement: Measurement) -> str:
    """The page's first sentence."""
    name, curve = measurement.worst.name, measurement.worst.leakage.image
    if curve is None:
        return f"No protected image could be looked for by {name}."
    most = "" if measurement.search == "exact" else "at most "  # an approximate search can only overstate
    traced = f"traces {most}{count(curve.hits[0])} ({percent(curve.cmc[0])}, {interval(curve, measurement.confidence)})"
    whose = "its original" if curve.hits[0] == 1 else "their originals"
    who = f"Of {count(curve.queries)} protected images, an attacker with {name}"
    return f"{who} {traced} to {whose}; guessing would trace {percent(curve.chance[0])}."


def conclusion(measurement: Measurement) -> tuple[str, str]:
    """What the numbers amount to: a heading, and a sentence or two.

    A low leakage of a set without utility is called no result (rule of thumb: see jobs/report_data.py), and no set is ever called safe.
    """
    if measurement.all_weak:
        least = f"{100 * WEAK_ATTACKER:g} %"
        return (
            "No result: the attackers are too weak",
            f"Among the originals none of them finds the person in {least} of the cases: what they fail to trace is not safe.",
        )
    if measurement.utility == "unknown":
        return (
            "Utility could not be measured",
            "No identity has two images here, so nothing says whether the protected set is still worth anything. Read the leakage so.",
        )
    shares = (a.kept_utility for a in measurement.attackers if not a.weak)
    best = max(share for share in shares if share is not None)
    kept = f"The protected images keep {percent(max(best, 0.0))} of what tells people apart in the originals."
    if measurement.utility == "none":
        return (
            "No result: the protected images are of no use",
            f"{kept} A low leakage of images that carry nothing is no protection: train longer, or hide fewer patches.",
        )
    if measurement.utility == "little":
        return "Little utility is left", f"{kept} Leakage is low the more easily, the less is left to trace. {_traced(measurement)}"
    title = "Protected images can be traced" if _above_chance(measurement) else "Useful, and traced no more than by guessing"
    return title, f"{kept} {_traced(measurement)}"


def percent(share: float) -> str:
    """A share for readers: two significant digits below 1 %, and never rounded up to 100 %."""
    value = 100 * share
    if value == 0 or value >= 100:
        return f"{min(value, 100):.0f} %"
    if value > 99:
        return f"{min(value, 99.99):.2f} %"
    if value >= 1:
        return f"{value:.1f} %"
    return f"{value:.2g} %" if value >= 1e-4 else f"{value:.1e} %"


def interval(curve: CurveData, confidence: float, k: int = 1) -> str:
    """The interval of CMC@k in words."""
    low, high = percent(curve.low[k - 1]).removesuffix(" %"), percent(curve.high[k - 1])
    return f"{100 * confidence:g} % interval {low} to {high}"


def count(number: int | None) -> str:
    """An integer with commas; n/a for what is not known."""
    return "n/a" if number is None else f"{number:,}"


def _above_chance(measurement: Measurement) -> tuple[str, float] | None:
    """What is traced more often than by guessing, and how many times as often, by the attacker that is best at it."""
    for mate, what in (("image", "the very image"), ("identity", "the person")):
        curves: list[CurveData | None] = [getattr(attacker.leakage, mate) for attacker in measurement.attackers]
        times = [curve.cmc[0] / curve.chance[0] for curve in curves if curve and curve.above_chance and curve.chance[0]]
        if times:
            return what, max(times)
    return None


def _traced(measurement: Measurement) -> str:
    found = _above_chance(measurement)
    if found is None:
        return "No attacker here traces them more often than guessing does, as far as this many images show."
    what, times = found
    often = f"{times:,.0f}" if times >= 10 else f"{times:.1f}"
    return f"With the best attacker {what} is found {often} times as often as by guessing: hold that against your limit."
