"""The rows of a comparison as markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from jobs.compare_row import Record, Row, Traced


def markdown(record: Record) -> str:
    """The rows as a table: leakage of the worst attacker, utility, and the verification error of every protocol."""
    protocols, many = record.protocols(), len(record.seeds) > 1
    head = ["protection", "worst attacker", "same image, CMC@1 % [95 %]", "another image of the person", "utility %"]
    head += [f"error, {name}, %" + (" (± seeds)" if many else "") for name in protocols]
    return markdown_table(head, [_cells(row, protocols, many) for row in record.rows])


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of markdown; a bar inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def failures(record: Record) -> list[str]:
    """What was not done, a line for each cell."""
    return [f"{row.name}: {reason}" for row in record.rows for reason in row.failed]


def to_csv(record: Record) -> str:
    """The rows with every figure: shares and errors in %, one column for each seed."""
    sink = io.StringIO()
    protocols = record.protocols()
    parts = ("cmc1", "low", "high")
    head = ["name", "method", "strength", "attacker", *(f"{kind}_{part}" for kind in ("image", "identity", "utility") for part in parts)]
    for protocol in protocols:
        head += [f"{protocol}_error", f"{protocol}_std", *(f"{protocol}_seed_{seed}" for seed in record.seeds)]
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow([*head, "failed"])
    for row in record.rows:
        line: list[object] = [row.name, row.method, row.strength, row.worst.attacker if row.worst else None]
        for found in (row.worst, worst_identity(row), best_utility(row)):
            line += [None if found is None else round(100 * getattr(found, part), 6) for part in parts]
        for protocol in protocols:
            by_seed = row.errors.get(protocol, {})
            line += [row.error(protocol), row.spread(protocol) if len(by_seed) > 1 else None, *map(by_seed.get, record.seeds)]
        writer.writerow([*line, "; ".join(row.failed)])
    return sink.getvalue()


def worst_identity(row: Row) -> Traced | None:
    """The attacker that recognises most people by another image."""
    return max(row.identity, key=lambda found: found.cmc1, default=None)


def best_utility(row: Row) -> Traced | None:
    """The recogniser that tells most people apart inside the protected set."""
    return max(row.utility, key=lambda found: found.cmc1, default=None)


def _cells(row: Row, protocols: Sequence[str], many: bool) -> list[str]:
    cells = [f"{row.name}{' (real)' if row.method == 'none' else ''}", row.worst.attacker if row.worst else "-"]
    cells += [share(row.worst), share(worst_identity(row)), share(best_utility(row), interval=False)]
    return cells + [error_text(row, protocol, many) for protocol in protocols]


def share(found: Traced | None, *, interval: bool = True) -> str:
    """A share in %, with its interval."""
    if found is None:
        return "-"
    return f"{100 * found.cmc1:.2f}" + (f" [{100 * found.low:.2f}, {100 * found.high:.2f}]" if interval else "")


def error_text(row: Row, protocol: str, many: bool) -> str:
    """Mean error in % with the standard deviation of the seeds; how many there are where some failed."""
    mean, count = row.error(protocol), len(row.errors.get(protocol, {}))
    if mean is None:
        return "-"
    text = f"{mean:.2f}" + (f" ± {row.spread(protocol):.2f}" if count > 1 else "")
    return text + (f" ({count} seed)" if many and count == 1 else "")
