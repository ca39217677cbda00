"""The page's diagrams as inline SVG whose colours are the page's own, light or dark. The same numbers give the same bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jobs.report_data import Attacker, Bins, CurveData

PALETTE = {"--ink": "#010101", "--muted": "#010102", "--line": "#010103", "--leak": "#010104", "--real": "#010105", "--use": "#010106"}
"""CSS variable -> the colour that stands for it while matplotlib draws."""
CMC_SIZE, HISTOGRAM_SIZE = (3.8, 2.6), (3.4, 2.4)
"""Inches; the page scales them to their columns, so that text is of one size."""
MAX_TICKS = 6
MAX_BINS = 60
"""Where the similarities fill more bins, several are drawn as one: narrow bins of few pairs show noise."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, in the page's font
    "font.size": 9.0,
    "text.color": PALETTE["--ink"],
    "axes.edgecolor": PALETTE["--line"],
    "axes.labelcolor": PALETTE["--muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": PALETTE["--muted"],
    "ytick.color": PALETTE["--muted"],
    "grid.color": PALETTE["--line"],
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Line:
    """How one kind of search or pair is drawn, the same on every diagram."""

    color: str
    dashes: str = "-"


LEAKAGE, REFERENCE, UTILITY, CHANCE = Line("--leak"), Line("--real", "--"), Line("--use", "-."), Line("--muted", ":")
PAIRS = {"impostor": Line("--muted"), "genuine": Line("--real"), "mate": Line("--leak")}


@dataclass(frozen=True)
class Panel:
    """One diagram with its heading."""

    title: str
    svg: Markup


def cmc_panels(attacker: Attacker) -> list[Panel]:
    """CMC curves of one attacker, the same image and the same identity on one scale."""
    name = attacker.name
    image, identity = attacker.leakage.image, attacker.leakage.identity
    by_person = [(REFERENCE, attacker.reference.identity), (UTILITY, attacker.utility.identity), (LEAKAGE, identity)]
    panels = {"The same image": [(LEAKAGE, image)], "Another image of the same person": by_person}
    floor = _floor([curve for curves in panels.values() for _, curve in curves if curve])
    return [
        Panel(title, _cmc([(line, curve) for line, curve in curves if curve], floor, f"CMC of {name}: {title}"))
        for title, curves in panels.items()
        if curves[-1][1]
    ]


def similarity_panels(attacker: Attacker, bins: Bins) -> list[Panel]:
    """Densities of similarities, the same scale across the three searches of one attacker."""
    searches: dict[str, Mapping[str, Sequence[int]]] = {
        "Originals among themselves": attacker.reference.histograms,
        "Protected against originals": attacker.leakage.histograms,
        "Protected among themselves": attacker.utility.histograms,
    }
    edges = np.linspace(bins.low, bins.high, bins.bins + 1)
    filled = np.flatnonzero(np.sum([counts for found in searches.values() for counts in found.values()], axis=0))
    if not len(filled):
        return []
    step = next(step for step in range(1, bins.bins + 1) if bins.bins % step == 0 and (filled[-1] - filled[0]) // step <= MAX_BINS)
    span = float(edges[max(filled[0] - 2 * step, 0)]), float(edges[min(filled[-1] + 2 * step + 1, bins.bins)])
    searches = {title: {name: _joined(counts, step) for name, counts in found.items()} for title, found in searches.items()}
    edges = edges[::step]
    name = attacker.name
    return [Panel(title, _histogram(found, edges, span, f"Similarities by {name}: {title}")) for title, found in searches.items()]


def _cmc(curves: Sequence[tuple[Line, CurveData]], floor: float, label: str) -> Markup:
    figure, axes = _figure(CMC_SIZE)
    leakage, last = curves[-1][1], max(curve.depths[-1] for _, curve in curves)
    axes.plot(leakage.depths, np.maximum(leakage.chance, floor), CHANCE.dashes, color=PALETTE[CHANCE.color], linewidth=1.6)
    for line, curve in curves:
        ks, color = curve.depths, PALETTE[line.color]
        axes.fill_between(ks, np.maximum(curve.low, floor), np.maximum(curve.high, floor), color=color, alpha=0.16, linewidth=0)
        axes.plot(ks, np.maximum(curve.cmc, floor), line.dashes, color=color, linewidth=1.8, marker="o", markersize=2.8)
    axes.set(
        xscale="log", yscale="log", ylim=(floor, 1.15), xlim=(0.9, 1.1 * last), xlabel="k nearest looked at", ylabel="found among them"
    )
    shares = _powers(round(-math.log10(floor)))
    axes.set_yticks([1 / power for power in shares], [f"{_plain(100 / power)} %" for power in shares])
    decades = len(str(last)) - 1
    ks_shown = _powers(decades) if decades > 2 else [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500) if k <= last]
    axes.set_xticks(ks_shown, [f"{k:,}" if k < 10_000 else f"{k:.0e}".replace("e+0", "e").replace("e+", "e") for k in ks_shown])
    axes.minorticks_off()
    axes.grid(axis="y", linewidth=0.6)
    return _svg(figure, label)


def _histogram(found: Mapping[str, Sequence[int]], edges: np.ndarray, span: tuple[float, float], label: str) -> Markup:
    figure, axes = _figure(HISTOGRAM_SIZE)
    for name, line in PAIRS.items():
        counts = np.asarray(found.get(name, ()), float)
        if counts.sum():
            density, color = counts / counts.sum(), PALETTE[line.color]
            axes.stairs(density, edges, fill=True, color=color, alpha=0.18)
            axes.stairs(density, edges, color=color, linewidth=1.5)
    axes.set(xlim=span, xlabel="cosine similarity", yticks=[])
    axes.set_ylim(bottom=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylabel("share of pairs")
    return _svg(figure, label)


def _joined(counts: Sequence[int], step: int) -> list[int]:
    return np.reshape(counts, (-1, step)).sum(axis=1).tolist()


def _powers(decades: int) -> list[int]:
    """Powers of ten from 1 on, up to 10^decades, few enough to be labelled."""
    step = max(1, -(-decades // MAX_TICKS))
    return [10**power for power in range(0, decades + 1, step)]


def _figure(size: tuple[float, float]) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots()


def _floor(curves: Sequence[CurveData]) -> float:
    """The power of ten below every value that a logarithmic axis can show, 1 % at the most."""
    values = [value for curve in curves for value in (*curve.cmc, *curve.chance) if value > 0]
    return min(10.0 ** math.floor(math.log10(min(values, default=1.0))), 0.01)


def _plain(value: float) -> str:
    return f"{value:g}" if value >= 1e-4 else np.format_float_positional(value, precision=1, unique=False, fractional=False, trim="-")


def _svg(figure: Figure, label: str) -> Markup:
    """The figure as one <svg> for the middle of a page: no prolog, metadata, namespaces or fixed size, colours by CSS variable."""
    sink = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}):  # ids of their own for all diagrams of one page
        figure.savefig(sink, format="svg", transparent=True, metadata=nothing)
    text = sink.getvalue()
    text = re.sub(r"<(metadata|style)\b.*?</\1>\s*|font-family: [^;]*;", "", text[text.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="([^"]+)"', text)
    body = re.sub(r'<g id="[^"]*">', "<g>", text[text.index(">") + 1 :])
    for variable, color in PALETTE.items():
        body = body.replace(color, f"var({variable})")
    return Markup(f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{escape(label)}">') + Markup(body)
