"""A planted leak, searched through cells of which a query sees few: the truth lies between the bounds, seed after seed."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.quantizer import Quantizer
from cluster.routing import by_cell
from facemae.curve import Curve
from facemae.leakage import similarity
from facemae.rank import ranks
from facemae.recall import NOT_SAMPLED, Tightness
from facemae.scan import Rows, Scan
from facemae.synthetic_embeddings import SyntheticEmbeddings, SyntheticShard

CELLS, SAMPLED = 32, 400


def searched(rows: SyntheticShard, num_probes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks by the probed cells, and by every image for a random sample of the queries (NOT_SAMPLED for the others)."""
    cells = Quantizer.train(rows.originals, CELLS, num_parts=1, seed=seed)
    homes = cells.nearest(rows.originals, 1)[:, 0]
    order = np.argsort(homes, kind="stable")
    edges = np.searchsorted(homes[order], np.arange(CELLS + 1))
    held, mates = Rows(rows.originals[order], order), similarity(rows.protected, rows.originals)
    scan = Scan(held, rows.protected, 0, mates[:, None])
    for cell, queries in by_cell(cells.nearest(rows.protected, num_probes)):
        scan.compare(queries, edges[cell], edges[cell + 1])
    chosen = np.random.default_rng(seed).permutation(len(rows))[:SAMPLED]
    whole = Scan(held, rows.protected[chosen], 0, mates[chosen, None])
    whole.compare(np.arange(SAMPLED), 0, len(rows))
    exact = np.full(len(rows), NOT_SAMPLED)
    exact[chosen] = ranks(whole.nearer[:, 0], mates[chosen])
    return ranks(scan.nearer[:, 0], mates), exact


@pytest.mark.parametrize("leak", [0.01, 0.1])
def test_the_bounds_hold_the_planted_rate_in_93_of_100_seeds(leak: float) -> None:
    above, held = 0, 0
    for seed in range(100):
        planted = SyntheticEmbeddings(300, 5, 64, leak=leak, correlation=0.2, seed=seed)
        rows = planted.shard(0)
        found, exact = searched(rows, num_probes=2, seed=seed)
        curve = Curve.of(found, rows.identities, len(rows))
        low, high = Tightness.of(found, exact).bounds(curve)
        above += int(np.mean(found == 1) > np.mean(rows.leaked))
        held += int(low <= planted.expected_cmc1 <= high)
    assert held >= 93
    assert above > 20, "so few cells do overstate it, which is what the bounds are for"
