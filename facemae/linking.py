"""Linking two given images by their similarity: histograms, and the true accept rate at a false accept rate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

NUM_BINS = 1000
HISTOGRAM_RANGE = (-1.0, 1.0)
MIN_FALSE_ACCEPTS = 10
"""Fewer expected false accepts than this do not fix a threshold."""
_POWERS = range(1, 7)
"""False accept rates of 1e-1 to 1e-6."""


def histogram(similarities: np.ndarray) -> np.ndarray:
    """Counts in NUM_BINS equal bins over [-1, 1], int64 (1000,); a value outside by rounding falls in the end bin."""
    return np.histogram(np.clip(similarities, *HISTOGRAM_RANGE), NUM_BINS, HISTOGRAM_RANGE)[0].astype(np.int64)


def add_histograms(parts: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The sum by name of the histograms of many shards."""
    total: dict[str, np.ndarray] = {}
    for part in parts:
        for name, counts in part.items():
            total[name] = total.get(name, 0) + np.asarray(counts, np.int64)
    return total


def linking(mate: np.ndarray, impostor: np.ndarray) -> list[dict[str, Any]]:
    """The share of mates accepted at each false accept rate, 1e-1 to 1e-6, never understated.

    The threshold lies just above the most similar impostor that must be refused. A histogram tells that impostor's bin, and all mates in
    the bin are counted as accepted: the rate is at least that of the raw similarities, and at most the mates of one bin above it.

    Args:
        mate, impostor: int64 (B,) histograms over [-1, 1] of the similarities of mates, and of images of two people.

    Returns:
        For each rate: "far"; "tar", and "threshold", the lower edge of that bin. Both are None, with a "reason", where there is no mate, or
        where fewer than ten impostors may be accepted.
    """
    mates, impostors = int(mate.sum()), int(impostor.sum())
    edges = np.linspace(*HISTOGRAM_RANGE, len(mate) + 1)
    mates_above, impostors_above = np.cumsum(mate[::-1]), np.cumsum(impostor[::-1])  # in a bin and all above it
    rows: list[dict[str, Any]] = []
    for power in _POWERS:
        allowed, reason = impostors // 10**power, None
        if not mates:
            reason = "no pair of mates"
        elif impostors < MIN_FALSE_ACCEPTS * 10**power:
            reason = f"{impostors} impostor pairs, {MIN_FALSE_ACCEPTS * 10**power} are needed"
        if reason:
            rows.append({"far": 10.0**-power, "tar": None, "threshold": None, "reason": reason})
            continue
        place = int(np.searchsorted(impostors_above, allowed, side="right"))  # the bin, from the top, of impostor number allowed + 1
        rows.append({"far": 10.0**-power, "tar": int(mates_above[place]) / mates, "threshold": float(edges[len(mate) - 1 - place])})
    return rows
