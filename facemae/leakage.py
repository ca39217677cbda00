"""What one search says of the leakage: the sum of its curves, histograms, most exposed images and exact sample. numpy only.

A query is a protected image, the gallery holds the originals. Everything here is additive: what many shards say is the ``merge`` of what
each says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from facemae.curve import Curve
from facemae.exposure import Exposure
from facemae.linking import add_histograms, linking
from facemae.recall import Sample


def similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Cosine similarities of rows, free of rounding until the last step.

    For float16 unit rows every product and partial sum is a multiple of 2^-48 below 2^2, which float64 holds exactly: the result does not
    depend on the order of summation, so neither on batch size, threads nor machine, and equal pairs tie exactly.

    Args:
        left, right: (..., D) unit rows, float16 (or float32, then exact to about 1e-15 before the last rounding); they broadcast.

    Returns:
        float32 (...).
    """
    return np.einsum("...d,...d->...", left.astype(np.float64), right.astype(np.float64)).astype(np.float32)


@dataclass(frozen=True)
class Leakage:
    """What one search found.

    Attributes:
        image: mate = the query's own source image; without queries where the search leaves it out.
        identity: mate = the most similar *other* image of the same identity.
        histograms: name -> int64 (1000,): "mate", "genuine", "impostor".
        exposure: the most exposed images.
        sample: what an exact search of some queries says; empty where all of the search was exact.
    """

    image: Curve
    identity: Curve
    histograms: Mapping[str, np.ndarray] = field(default_factory=dict)
    exposure: Exposure = field(default_factory=Exposure)
    sample: Sample = field(default_factory=Sample)

    @classmethod
    def merge(cls, parts: Sequence[Leakage]) -> Leakage:
        """What all parts together say. Raises ValueError when there is no part, or parts are of different galleries."""
        return cls(
            Curve.merge([part.image for part in parts]),
            Curve.merge([part.identity for part in parts]),
            add_histograms(part.histograms for part in parts),
            Exposure.merge(part.exposure for part in parts),
            Sample.merge([part.sample for part in parts]),
        )

    def to_json(self, num_gallery: int) -> dict[str, Any]:
        """The search's part of leakage.json."""
        rates = linking(self.histograms["mate"], self.histograms["impostor"]) if {"mate", "impostor"} <= self.histograms.keys() else None
        return {
            "gallery": num_gallery,
            "image": self.image.to_json(num_gallery),
            "identity": self.identity.to_json(num_gallery),
            "histograms": {name: self.histograms[name].tolist() for name in sorted(self.histograms)},
            "linking": rates,
            "most_exposed": self.exposure.to_json(),
            "sample": self.sample.to_json(self.image, self.identity),
        }
