"""The rank of a query's mate: 1 + the number of gallery items that are *strictly* more similar to the query than the mate.

A tie counts for the attacker, the reading that never understates the leakage. A search that overlooks items can only count too few of
them: its ranks are lower bounds, and the CMC made of them an upper bound.
"""

from __future__ import annotations

import numpy as np

UNDEFINED = -1
"""The rank where there is no mate: the identity has no other image, or the search leaves the same image out."""


def ranks(nearer: np.ndarray, mate: np.ndarray) -> np.ndarray:
    """Ranks of the mates.

    Args:
        nearer: integers (Q,), gallery items strictly more similar than the mate.
        mate: float32 (Q,), similarity of the mate, NaN where there is none.

    Returns:
        int64 (Q,): 1 + nearer, UNDEFINED where there is no mate.
    """
    return np.where(np.isnan(mate), UNDEFINED, 1 + nearer.astype(np.int64))
