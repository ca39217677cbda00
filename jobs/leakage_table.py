"""What ``facemae leakage`` prints: the measurement as a table of plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def table_of(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as lines of plain text; the worst attacker leads."""
    num_queries, num_gallery = report["protected"]["samples"], report["original"]["samples"]
    exact = report["search"] == "exact"
    yield f"every protected image ({num_queries}) searched among all originals ({num_gallery}){', exactly' if exact else ''}"
    if not exact:
        yield "not every image was looked at for every query: ranks can only be too low, the figures only too high"
    head = ("attacker", "finds", "CMC@1 % [95 %]", "CMC@5", "CMC@10", "chance@1", "orig->orig@1")
    rows = [head]
    for attacker in report["attackers"]:
        name, reference = attacker["name"], attacker["reference"]["identity"]
        rows.append((name, "the same image", *_cells(attacker["leakage"]["image"]), "-"))
        ceiling = _percent(reference["cmc"][0]) if reference else "-"
        rows.append((name, "another image of the identity", *_cells(attacker["leakage"]["identity"]), ceiling))
        if not attacker["adaptive"]:
            rows.append((name, "utility: protected -> protected", *_cells(attacker["utility"]["identity"]), ceiling))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        yield "  ".join(cells).rstrip()
    for attacker in report["attackers"]:
        yield from _notes(attacker)
    for other in report["beside"]:
        yield from _beside(other)
    yield f"worst attacker: {report['worst_attacker']}. A low leakage means something only beside a utility well above chance."


def _notes(attacker: Mapping[str, Any]) -> Iterator[str]:
    """What the figures of one attacker leave out, and how far an approximate search may overstate them."""
    name, search = attacker["name"], attacker["leakage"]
    if search["left_out"]:
        yield f"{name}: {search['left_out']} protected images have no rank (their embedding or their original's is in quarantine)"
    if (sample := search["sample"]) and sample["image"]:
        ends = sample["image"]["bounds"]
        yield (
            f"{name}: of {sample['queries']} queries searched exactly besides, the nearest image was found for "
            f"{_percent(sample['recall_at_1'])} %; the true CMC@1 lies in {_percent(ends['low'])} to {_percent(ends['high'])} %"
        )


def _beside(other: Mapping[str, Any]) -> Iterator[str]:
    """CMC@1 of another protection of the same originals."""
    method = other["protection"].get("method", "originals")
    for attacker in other["attackers"]:
        found = {part: attacker[part]["cmc"] if attacker[part] else None for part in ("image", "identity", "utility")}
        shares = ", ".join(f"{part} {'-' if share is None else _percent(share)}" for part, share in found.items())
        yield f"beside: {method} by {attacker['name']}, CMC@1 %: {shares} ({other['url']})"


def _cells(curve: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    """CMC@1 with its interval, CMC@5, CMC@10 and chance at 1."""
    if curve is None:
        return ("no identity has two images", "-", "-", "-")
    first = f"{_percent(curve['cmc'][0])} [{_percent(curve['low'][0])}, {_percent(curve['high'][0])}]"
    return first, _percent(curve["cmc"][4]), _percent(curve["cmc"][9]), _percent(curve["chance"][0])


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
