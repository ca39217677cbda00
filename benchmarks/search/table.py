"""The search's table for people, and the record of it for the page of results.

    python -m benchmarks.search.table benchmarks/search/ablation.json --output docs/results/ablation.json

Rows are those of search.json, shares are in percent with their 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def table(rows: dict[str, Any]) -> str:
    """Markdown: a line a row, leakage beside utility; empty where there is none."""
    head, lines = cells(rows)
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ruler, *lines)) + "\n"


def cells(rows: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The head of the table and its lines, as text."""
    attackers = list(next(iter(rows.values()))["leakage_cmc1"]) if rows else []
    inside = attackers[0] if attackers else ""
    head = ["setting", "samples", "train s", "pixel error", "relation error"]
    head += [f"CMC@1 % ({name})" for name in attackers] + [f"utility % ({inside})", "accuracy % on pairs"]
    lines = []
    for name, row in rows.items():
        seen = f"{row['samples_seen']:,}" + (" (cut short)" if row["cut_short"] else "") if "samples_seen" in row else ""
        leaks = [_interval(row["leakage_cmc1"][attacker]["image"], "share") for attacker in attackers]
        figures = [_interval(row["utility"][inside], "share"), _interval(row["verification"], "accuracy")]
        errors = [f"{row['pixel_error']:.4f}", f"{row['relation_error']:.4f}"]
        lines.append([name, seen, str(row.get("training_seconds", "")), *errors, *leaks, *figures])
    return head, lines


def record(found: dict[str, Any], title: str) -> dict[str, Any]:
    """What a search found as a file of docs/results (``jobs.compare_row.Record``): what measured it, its table, its notes."""
    head, lines = cells(found["rows"])
    machine = found["machine"]
    hardware = f"{machine['cores']} cores of an {machine['processor']}, {machine['threads']} thread, {machine['gpu'] or 'no GPU'}"
    return {
        "schema": 1,
        "title": title,
        "hardware": hardware,
        "date": machine["date"],
        "commit": machine["commit"],
        "commands": [found["command"]],
        "blocks": [{"head": head, "rows": lines}],
        "notes": found.get("notes", []),
    }


def _interval(figure: dict[str, float], name: str) -> str:
    return f"{figure[name]:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("found", type=Path, help="search.json")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--title", default="Ablation: which FaceMAE")
    given = parser.parse_args(arguments)
    made = record(json.loads(given.found.read_text()), given.title)
    given.output.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
