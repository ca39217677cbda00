"""The search's table for people."""

from __future__ import annotations

from typing import Any


def table(rows: dict[str, Any]) -> str:
    """Markdown: a line a row, leakage beside utility; empty where there is none."""
    attackers = list(next(iter(rows.values()))["leakage_cmc1"]) if rows else []
    inside = attackers[0] if attackers else ""
    head = ["setting", "samples", "train s", "pixel error", "relation error"]
    head += [f"CMC@1 % ({name})" for name in attackers] + [f"utility % ({inside})", "accuracy % on pairs"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, row in rows.items():
        seen = f"{row['samples_seen']:,}" + (" (cut short)" if row["cut_short"] else "") if "samples_seen" in row else ""
        leaks = [_interval(row["leakage_cmc1"][attacker]["image"], "share") for attacker in attackers]
        figures = [_interval(row["utility"][inside], "share"), _interval(row["verification"], "accuracy")]
        errors = [f"{row['pixel_error']:.4f}", f"{row['relation_error']:.4f}"]
        lines.append([name, seen, str(row.get("training_seconds", "")), *errors, *leaks, *figures])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _interval(figure: dict[str, float], name: str) -> str:
    return f"{figure[name]:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"
