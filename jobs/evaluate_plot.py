"""The ROC picture of ``facemae evaluate``: one curve a recogniser and protocol, FAR on a log axis. The same numbers give the same bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import matplotlib
from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
"""One a recogniser (Okabe and Ito's, which the colour-blind tell apart)."""
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
"""One a protocol."""
# names of files are shown as they are: a $ in one starts no formula
STYLE: dict[Any, Any] = {"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}


def roc_picture(results: Sequence[Mapping[str, Any]]) -> bytes | None:
    """A PNG of the results that have an ROC; None where none has."""
    curves = [result for result in results if "roc" in result]
    if not curves:
        return None
    color = _assigned([curve["recognizer"] for curve in curves], COLORS)
    dashes = _assigned([curve["protocol"] for curve in curves], DASHES)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.4), dpi=150, layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            name, protocol = curve["recognizer"], curve["protocol"]
            far, tar = curve["roc"]["far"], curve["roc"]["tar"]
            axes.step(far, tar, where="post", color=color[name], linestyle=dashes[protocol], linewidth=1.6, label=f"{name}, {protocol}")
        axes.set(xscale="log", xlim=(None, 1), xlabel="false accept rate", ylabel="true accept rate")
        axes.set_ylim(top=1 + 0.02 * (1 - axes.get_ylim()[0]))
        powers = range(math.floor(math.log10(min(curve["roc"]["far"][0] for curve in curves))), 1)
        axes.set_xticks([10.0**power for power in powers], [f"1e{power}" if power else "1" for power in powers])
        axes.grid(linewidth=0.4, alpha=0.6)
        axes.legend(loc="lower right", frameon=False)
        sink = io.BytesIO()
        figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _assigned(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    distinct = list(dict.fromkeys(names))
    return dict(zip(distinct, islice(cycle(values), len(distinct)), strict=True))
