"""What a set of redrawn faces gives away, and what it is worth: shares in percent with 95 % intervals."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.search.learn import embed
from facemae.interval import clustered, effective_queries, wilson

Figure = dict[str, float]


def leakage(probe: Tensor, gallery: Tensor, people: np.ndarray) -> dict[str, Figure]:
    """How often the nearest original of a redrawn face is the one that it was made from, or another one of the person.

    Args:
        probe: float32 (N, D) unit rows of the redrawn faces.
        gallery: float32 (N, D) of the originals, in the same order.
        people: int64 (N,).

    Returns:
        "image" and "identity"; the latter leaves the image's own original out.
    """
    scores = probe @ gallery.T
    own = torch.arange(len(scores), device=scores.device)
    image = (scores.argmax(1) == own).cpu().numpy()
    scores[own, own] = -2.0
    return {"image": _share(image, people), "identity": _share(people[scores.argmax(1).cpu().numpy()] == people, people)}


def utility(rows: Tensor, people: np.ndarray) -> Figure:
    """How often the nearest other redrawn face shows the same person: float32 (N, D) unit rows."""
    scores = (rows @ rows.T).fill_diagonal_(-2.0)
    return _share(people[scores.argmax(1).cpu().numpy()] == people, people)


def verification(net: nn.Module, pictures: Tensor, folds: np.ndarray, pairs: np.ndarray) -> Figure:
    """Accuracy on pairs, each fold at the threshold that is best on the others, and the area under the ROC curve.

    Args:
        net: embeds (N, 3, 112, 112) in [-1, 1].
        pictures: uint8 (N, 112, 112, 3).
        folds: int64 (N,) of the pictures; with one fold alone the threshold is its own.
        pairs: int64 (M, 3): rows of `pictures`, and 1 where they show the same person.
    """
    rows = nn.functional.normalize(embed(net, pictures) + embed(net, pictures.flip(2))).cpu().numpy()
    scores, same, fold = (rows[pairs[:, 0]] * rows[pairs[:, 1]]).sum(1), pairs[:, 2] == 1, folds[pairs[:, 0]]
    right = np.zeros(len(pairs), bool)
    for held_out in np.unique(fold):
        others = fold != held_out if (fold != held_out).any() else np.ones(len(fold), bool)
        right[fold == held_out] = (scores[fold == held_out] >= best_threshold(scores[others], same[others])) == same[fold == held_out]
    low, high = wilson(np.array(right.sum()), len(right))
    return {
        "accuracy": _percent(right.mean()),
        "low": _percent(low),
        "high": _percent(high),
        "area": area(scores, same),
        "pairs": len(right),
    }


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """The score from which on calling a pair the same is right most often."""
    order = np.argsort(-scores, kind="stable")
    gained = np.cumsum(np.where(same[order], 1, -1))
    best = int(gained.argmax())
    return float(scores[order[best]]) if gained[best] > 0 else float("inf")


def area(scores: np.ndarray, same: np.ndarray) -> float:
    """Share of (same, different) couples of pairs in the right order; a tie counts half."""
    different = np.sort(scores[~same])
    below, up_to = (np.searchsorted(different, scores[same], side) for side in ("left", "right"))
    return round(float((below + up_to).mean() / (2 * max(1, len(different)))), 4)


def _share(hits: np.ndarray, people: np.ndarray) -> Figure:
    """Percentage of hits; the interval takes the pictures of one person for related (`facemae.interval`)."""
    images, found = np.bincount(people), np.bincount(people, weights=hits)
    there = images > 0
    low, high = clustered(np.array(hits.sum()), len(hits), effective_queries(images[there], found[there]))
    return {"share": _percent(hits.mean()), "low": _percent(low), "high": _percent(high)}


def _percent(value: np.ndarray | float) -> float:
    return round(100 * float(value), 2)
