"""Risk by identity."""

from __future__ import annotations

import numpy as np
import pytest

from facemae.risk import Risk


def test_risk_by_identity() -> None:
    identities = np.array([7] * 20 + [3] + [5] * 4 + [9] * 2)
    ranks = np.array([1] * 19 + [2] + [1] + [3, 4, 9, 11] + [1, 6])
    risk = Risk.of(identities, ranks)
    assert risk.labels.tolist() == [3, 5, 7, 9]
    assert risk.images.tolist() == [1, 4, 20, 2]
    assert risk.hits.tolist() == [[1, 1, 1], [0, 2, 3], [19, 20, 20], [1, 1, 2]]
    content = risk.to_json()
    assert content["worst"][0] == {"identity": 7, "images": 20, "traced": 19, "share": 0.95}  # before the 1 of 1 of identity 3
    assert [row["identity"] for row in content["worst"]] == [7, 3, 9]
    assert (content["identities"], content["traced_once"], content["traced_always"]) == (4, 3, 1)
    assert content["mean_share"] == pytest.approx((0.95 + 1 + 0 + 0.5) / 4)
    assert content["share_quantiles"] == {"0.5": 0.5, "0.75": 0.95, "0.9": 1.0, "0.95": 1.0, "0.99": 1.0, "1": 1.0}


def test_no_identity() -> None:
    content = Risk.of(np.empty(0, np.int64), np.empty(0, np.int64)).to_json()
    assert (content["identities"], content["mean_share"], content["worst"]) == (0, 0.0, [])
    with pytest.raises(ValueError, match="no shard was searched"):
        Risk.merge([])
