"""The Pareto picture of a comparison: leakage against verification error, one panel for each protocol."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.compare_claim import pareto
from jobs.compare_row import OURS, REFERENCE, Record, Row

PANEL, DPI = (5.4, 4.4), 150
"""Inches of one panel, and dots an inch of the PNG."""
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c6d31", "#7f7f7f", "#332288")
"""Colours that colour-blind eyes tell apart (Okabe and Ito, with three more), for all methods but ours and the reference."""
OUR_COLORS, REAL_COLOR, FRONT_COLOR = ("#d55e00", "#8b1a1a", "#f4a582"), "#111111", "#999999"
MARKERS = "osD^vP*X"
LOG_SPAN = 20.0
"""From this ratio of largest to smallest leakage on, the axis is logarithmic."""
STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#333333",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "grid.color": "#dddddd",
    "text.parse_math": False,
}


def picture(record: Record) -> bytes:
    """The picture as PNG; the same record gives the same bytes by one build of matplotlib.

    Raises:
        ValueError: no row has both a leakage and an error: there is nothing to draw.
    """
    panels = [name for name in record.protocols() if any(_place(row, name) for row in record.rows)]
    if not panels:
        raise ValueError("no row has both a leakage and a verification error: nothing to draw")
    styles = _styles(record.rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PANEL[0] * len(panels), PANEL[1]), layout="constrained")
        for axes, protocol in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _panel(axes, record, protocol, styles)
        handles = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 6), frameon=False)
        sink = io.BytesIO()
        figure.savefig(sink, format="png", dpi=DPI, metadata={"Software": None})
    return sink.getvalue()


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Series -> colour and marker, the same in every panel."""
    found: dict[str, tuple[str, str]] = {}
    for colors, mine in ((OUR_COLORS, True), (COLORS, False)):
        names = dict.fromkeys(row.series for row in rows if (row.method == OURS) == mine and row.method != REFERENCE)
        found |= {name: (colors[i % len(colors)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}
    return found | {row.series: (REAL_COLOR, "s") for row in rows if row.method == REFERENCE}


def _panel(axes: Axes, record: Record, protocol: str, styles: dict[str, tuple[str, str]]) -> None:
    rows = [row for row in record.rows if _place(row, protocol)]
    floor = _floor(rows)
    for series in dict.fromkeys(row.series for row in rows):
        _series(axes, [row for row in rows if row.series == series], protocol, styles[series], floor)
    front = [_place(row, protocol) for row in pareto(rows, protocol)]
    if len(front) > 1:
        xs, ys = [max(100 * place[0], floor) for place in front if place], [place[1] for place in front if place]
        axes.step(xs, ys, where="post", color=FRONT_COLOR, linestyle="--", linewidth=1.1, zorder=1, label="Pareto front")
    _real_line(axes, record.reference(), protocol)
    many = len(record.seeds) > 1
    axes.set(title=protocol, xlabel="leakage: CMC@1 of the worst attacker, % (95 % interval)")
    axes.set_ylabel("verification error, %" + (f" (mean ± std of {len(record.seeds)} seeds)" if many else " (one seed)"))
    axes.grid(linewidth=0.6)
    axes.margins(y=0.12)
    _scale(axes, rows, floor)


def _series(axes: Axes, rows: Sequence[Row], protocol: str, style: tuple[str, str], floor: float) -> None:
    """Points of one dial with error bars, joined along its dial, each labelled by its strength."""
    color, marker = style
    rows = sorted(rows, key=lambda row: (row.strength is None, row.strength or 0.0))
    xs = [max(100 * row.worst.cmc1, floor) for row in rows if row.worst]
    ys = [row.error(protocol) or 0.0 for row in rows]
    lows = [x - max(100 * row.worst.low, floor) for x, row in zip(xs, rows, strict=True) if row.worst]
    highs = [max(100 * row.worst.high - x, 0.0) for x, row in zip(xs, rows, strict=True) if row.worst]
    bars = [row.spread(protocol) for row in rows]
    label = "real set" if rows[0].method == REFERENCE else rows[0].series
    width = 1.6 if rows[0].method == OURS else 0.9
    axes.errorbar(xs, ys, yerr=bars, xerr=[lows, highs], fmt="none", ecolor=color, elinewidth=0.9, capsize=2, alpha=0.7)
    axes.plot(xs, ys, linestyle=":", linewidth=width, color=color, marker=marker, markersize=6, label=label, zorder=3)
    for x, y, row in zip(xs, ys, rows, strict=True):
        if row.strength is not None:
            text, shift = f"{row.strength:g}", (5, 5)
            axes.annotate(text, (x, y), xytext=shift, textcoords="offset points", fontsize=8, color=color, zorder=4)


def _real_line(axes: Axes, reference: Row | None, protocol: str) -> None:
    """The error of the real set across the panel, with the spread of its seeds."""
    error = reference.error(protocol) if reference else None
    if reference is None or error is None:
        return
    spread = reference.spread(protocol)
    axes.axhline(error, color=REAL_COLOR, linewidth=0.9, linestyle="-", alpha=0.6, zorder=1)
    axes.axhspan(error - spread, error + spread, color=REAL_COLOR, alpha=0.08, linewidth=0, zorder=0)


def _scale(axes: Axes, rows: Sequence[Row], floor: float) -> None:
    """A logarithmic axis where leakages lie far apart, else one from 0."""
    if floor <= 0:
        axes.set_xlim(left=0)
        return
    axes.set_xscale("log")
    axes.set_xlim(floor / 1.3, 140)
    ticks = [10.0**power for power in range(math.floor(math.log10(floor)), 3)]
    none_found = any(row.worst and 100 * row.worst.cmc1 < floor for row in rows)
    axes.set_xticks(ticks, [f"{tick:g}" + (" or less" if none_found and tick == ticks[0] else "") for tick in ticks])
    axes.minorticks_off()


def _floor(rows: Sequence[Row]) -> float:
    """The smallest leakage in % that is drawn, a power of ten; 0 for a linear axis."""
    shares = [100 * row.worst.cmc1 for row in rows if row.worst]
    tops = [100 * row.worst.high for row in rows if row.worst]
    positive = [share for share in shares if share > 0] or tops
    if max(tops) < LOG_SPAN * min(positive):
        return 0.0
    return 10.0 ** math.floor(math.log10(min(positive)))


def _place(row: Row, protocol: str) -> tuple[float, float] | None:
    """Leakage share and mean error of a row; None where one of them is missing."""
    error = row.error(protocol)
    return None if row.worst is None or error is None else (row.worst.cmc1, error)
