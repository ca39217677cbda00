"""FaceMAE beside the runner-up at equal leakage: the ratio of their verification errors (the claim of arXiv 2205.11090: at most 0.5).

Our reading of "runner-up": of the protections that leak *no less* than a FaceMAE point, the one with the lowest mean error. So FaceMAE
never has the advantage of the larger leakage. A setting that leaves most images to be traced is no protection, and would be the
runner-up of everything by being the real set: with a CMC@1 above ``MOST`` it does not compete, and neither does FaceMAE's own.
What leaks no more *and* errs no more beats a FaceMAE point outright; it is named, and the claim does not hold beside it.
Leakage is that of the worst attacker, compared twice: by its estimate, and by the upper end of its interval.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jobs.compare_row import OURS, REFERENCE, Record, Row
from jobs.compare_table import markdown_table

MOST = 0.5
"""Above this CMC@1 of the worst attacker a setting is no protection (our reading): most images are traced."""
CLAIMED = 0.5
"""The ratio that the paper claims: at least 50 % less error."""
Bound = Literal["cmc1", "high"]
BOUNDS: dict[Bound, str] = {"cmc1": "estimate", "high": "upper end"}


@dataclass(frozen=True)
class Duel:
    """One FaceMAE point and its runner-up.

    Attributes:
        protocol, bound: what is compared, at leakage equal by which figure.
        ours: the FaceMAE point.
        runner_up: None where no other protection leaks as much and is one.
        ratio: mean error of ours over the runner-up's; below 1 ours is better; None where there is none or the runner-up has no error.
        by_seed: smallest and largest ratio of one seed, both trained with it; None where they share no seed.
        beaten_by: other protections that leak no more and err no more.
        alone: why there is no runner-up.
        excess: ratio of the errors above the real set's; None where the runner-up has none above it, or there is no real set.
    """

    protocol: str
    bound: Bound
    ours: Row
    runner_up: Row | None
    ratio: float | None = None
    by_seed: tuple[float, float] | None = None
    excess: float | None = None
    beaten_by: tuple[str, ...] = ()
    alone: str = ""


def duels(record: Record) -> list[Duel]:
    """Every FaceMAE point that is a protection beside its runner-up, for every protocol and both bounds; the lowest error leads."""
    return [
        _duel(record, protocol, bound, ours)
        for protocol in record.protocols()
        for bound in BOUNDS
        for ours in _by_error([row for row in record.rows if row.method == OURS], protocol, bound)
    ]


def claim(record: Record) -> str:
    """The comparison in markdown: each protocol's best FaceMAE point in words, then all points."""
    found = duels(record)
    if not found:
        held = any(row.method == OURS for row in record.rows)
        why = f"every FaceMAE point leaks more than {100 * MOST:.0f} % or was not measured" if held else "it has no FaceMAE point"
        return f"This comparison says nothing about the paper's claim: {why}.\n"
    lines = [_words(next(duel for duel in found if duel.protocol == protocol)) for protocol in record.protocols() if _any(found, protocol)]
    head = [
        "FaceMAE point",
        "protocol",
        "leakage compared by",
        "runner-up",
        "its error %",
        "ours %",
        "ratio (by seed)",
        "above the real set",
        "beaten by",
    ]
    table = markdown_table(head, [_cells(duel) for duel in found])
    return "\n".join([*(f"- {line}" for line in lines), "", table])


def pareto(rows: Sequence[Row], protocol: str) -> list[Row]:
    """The protections that no other beats in both leakage (estimate of the worst attacker) and mean error, by rising leakage."""
    placed = [(row.worst.cmc1, error, row) for row in rows if row.worst and (error := row.error(protocol)) is not None]
    front = list[Row]()
    lowest = float("inf")
    for _, error, row in sorted((place for place in placed if place[2].method != REFERENCE), key=lambda place: place[:2]):
        if error < lowest:
            front, lowest = [*front, row], error
    return front


def _duel(record: Record, protocol: str, bound: Bound, ours: Row) -> Duel:
    least, mine = _leak(ours, bound), _mean(ours, protocol)
    others = _by_error([row for row in record.rows if row.method not in (OURS, REFERENCE)], protocol, bound)
    beaten_by = tuple(row.name for row in others if _leak(row, bound) <= least and _mean(row, protocol) <= mine)
    runner_up = next((row for row in others if _leak(row, bound) >= least), None)
    if runner_up is None:
        alone = "every other protection leaks less" if others else f"every other leaves more than {100 * MOST:.0f} % to be traced"
        return Duel(protocol, bound, ours, None, beaten_by=beaten_by, alone=alone)
    theirs = _mean(runner_up, protocol)
    real = reference.error(protocol) if (reference := record.reference()) else None
    pairs = [(ours.errors[protocol][seed], other) for seed, other in runner_up.errors[protocol].items() if seed in ours.errors[protocol]]
    ratios = [one / other for one, other in pairs if other > 0]
    return Duel(
        protocol,
        bound,
        ours,
        runner_up,
        ratio=mine / theirs if theirs > 0 else None,
        by_seed=(min(ratios), max(ratios)) if ratios else None,
        excess=(mine - real) / (theirs - real) if real is not None and theirs > real else None,
        beaten_by=beaten_by,
    )


def _by_error(rows: Sequence[Row], protocol: str, bound: Bound) -> list[Row]:
    """Rows that are protections and were verified, the lowest mean error first."""
    able = [row for row in rows if _leak(row, bound) <= MOST and row.error(protocol) is not None]
    return sorted(able, key=lambda row: _mean(row, protocol))


def _leak(row: Row, bound: Bound) -> float:
    """CMC@1 of the worst attacker; of what was not measured, more than any protection's."""
    return float("inf") if row.worst is None else getattr(row.worst, bound)


def _mean(row: Row, protocol: str) -> float:
    return statistics.fmean(row.errors[protocol].values())


def _any(found: Sequence[Duel], protocol: str) -> bool:
    return any(duel.protocol == protocol for duel in found)


def _words(duel: Duel) -> str:
    """What the best FaceMAE point of a protocol says of the claim."""
    start = f"{duel.protocol}: {duel.ours.name} has an error of {_mean(duel.ours, duel.protocol):.2f} % and leaks {_percent(duel.ours)}"
    beaten = f"; {', '.join(duel.beaten_by)}: leaks no more and errs no more" if duel.beaten_by else ""
    if duel.runner_up is None:
        return f"{start}; no runner-up leaks as much ({duel.alone}){beaten}."
    other = f"{duel.runner_up.name} has {_mean(duel.runner_up, duel.protocol):.2f} % and leaks {_percent(duel.runner_up)}"
    if duel.ratio is None:
        return f"{start}; the runner-up at no less leakage, {other}: no ratio to an error of 0{beaten}."
    holds = "holds" if duel.ratio <= CLAIMED and not duel.beaten_by else "does not hold"
    verdict = f"the paper's claim ({CLAIMED} or less) {holds} here"
    return f"{start}; the runner-up at no less leakage, {other}: ratio {_ratio(duel)}{beaten}; {verdict}."


def _cells(duel: Duel) -> list[str]:
    ours, other = f"{_mean(duel.ours, duel.protocol):.2f}", duel.runner_up
    start = [duel.ours.name, duel.protocol, BOUNDS[duel.bound]]
    beaten = ", ".join(duel.beaten_by) or "-"
    if other is None:
        return [*start, f"none: {duel.alone}", "-", ours, "-", "-", beaten]
    excess = "-" if duel.excess is None else f"{duel.excess:.2f}"
    return [*start, other.name, f"{_mean(other, duel.protocol):.2f}", ours, _ratio(duel), excess, beaten]


def _ratio(duel: Duel) -> str:
    if duel.ratio is None:
        return "-"
    ends = f" ({duel.by_seed[0]:.2f} to {duel.by_seed[1]:.2f})" if duel.by_seed else ""
    return f"{duel.ratio:.2f}{ends}"


def _percent(row: Row) -> str:
    assert row.worst is not None
    return f"{100 * row.worst.cmc1:.2f} %"
