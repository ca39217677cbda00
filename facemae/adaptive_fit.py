"""How an adaptive attacker learns its maps: ridge regressions and a small network on the best of them, judged by people held out.

Everything is computed in one thread, in a fixed order: the same pairs and seed give the same maps (on one build of torch and one kind of
processor).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from facemae.adaptive import AdaptiveError, AdaptiveMap, AdaptiveMaps, half, identity_hash
from facemae.adaptive_network import add_network
from facemae.adaptive_ridge import SETTINGS, Moments, Settings

MIN_IDENTITIES = 10
"""Fewer in a half leave nobody to hold out: the identity map stays."""
HELD_OUT = 0.2
"""Share of a half's identities that choose among the candidates."""
MAX_HELD_OUT = 4000
"""Images held out of one half, all of whose similarities are computed."""
FEW_IMAGES = 200
"""Below as many held-out images the mean order decides, since CMC@1 moves in steps that are too coarse."""

STRENGTHS = (0.1, 0.3, 1.0)
"""How much of the network's part is added: with few pairs it overfits, and a little of it is better than all or nothing."""


@dataclass(frozen=True)
class Pairs:
    """Rows of one half: unit float16 (N, D) of the protected images and of their originals, and labels int64 (N,)."""

    protected: np.ndarray
    originals: np.ndarray
    identities: np.ndarray

    def __len__(self) -> int:
        return len(self.identities)

    def take(self, rows: np.ndarray) -> Pairs:
        """The rows where a mask is true, or of these numbers."""
        return Pairs(self.protected[rows], self.originals[rows], self.identities[rows])


@dataclass(frozen=True)
class Trial:
    """A candidate and how it does on the people held out.

    Attributes:
        map: the candidate.
        cmc1: share of the held-out protected images whose own original is the nearest of the held-out originals; ties count.
        order: mean share of the other originals that are no nearer than the own one: 0.5 is guessing.
        settings: of its linear part; None for the identity.
        strength: of its network; 0 without one.
    """

    map: AdaptiveMap
    cmc1: float
    order: float
    settings: Settings | None = None
    strength: float = 0.0

    @classmethod
    def of(cls, one: AdaptiveMap, held: Pairs, settings: Settings | None = None, strength: float = 0.0) -> Trial:
        """Search the protected images among the originals."""
        queries, gallery = torch.from_numpy(one(held.protected)).float(), torch.from_numpy(held.originals).float()
        scores = queries @ gallery.T
        nearer = (scores > scores.diagonal()[:, None]).sum(1).double()
        cmc1, order = (nearer == 0).double().mean(), 1 - nearer.mean() / max(len(held) - 1, 1)
        return cls(one, round(float(cmc1), 6), round(float(order), 6), settings, strength)


def fit_maps(protected: np.ndarray, originals: np.ndarray, identities: np.ndarray, seed: int) -> AdaptiveMaps:
    """Learn from pairs to undo a protection, cross-fitted: no map has seen an identity that it will be used on.

    Args:
        protected, originals: float16 or float32 (N, D), unit rows; row i of both is of one image.
        identities: int64 (N,).
        seed: of the halves, the people held out and the network.

    Returns:
        The maps; ``fitted`` says of each what was chosen and why. A half of too few people gets the identity map, with the reason.

    Raises:
        AdaptiveError: the arrays do not fit together, or hold a row that is not of unit length.
    """
    half_precision = np.asarray(protected).astype(np.float16), np.asarray(originals).astype(np.float16)
    pairs = Pairs(*half_precision, np.asarray(identities, np.int64))
    _check(pairs)
    halves = half(pairs.identities, seed)
    with _one_thread():
        fits = [_fit(pairs.take(halves != which), seed) for which in (0, 1)]
    return AdaptiveMaps((fits[0][0], fits[1][0]), seed, [said for _, said in fits])


def _check(pairs: Pairs) -> None:
    shape = pairs.protected.shape
    if len(shape) != 2 or pairs.originals.shape != shape or pairs.identities.shape != shape[:1]:
        raise AdaptiveError(
            f"protected {shape}, originals {pairs.originals.shape} and identities {pairs.identities.shape} are no pairs: give two matrices "
            "of one recogniser and a label for each row"
        )
    for name, rows in (("protected", pairs.protected), ("original", pairs.originals)):
        lengths = np.einsum("nd,nd->n", rows, rows, dtype=np.float32)
        bad = np.flatnonzero(~(np.abs(lengths - 1) < 0.02))  # a NaN is bad too
        if len(bad):
            raise AdaptiveError(f"{name} row {bad[0]} is not of unit length (squared: {lengths[bad[0]]:.3g}): embed the set again")


@contextmanager
def _one_thread() -> Iterator[None]:
    """The order of torch's sums depends on the number of its threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fit(pairs: Pairs, seed: int) -> tuple[AdaptiveMap, dict[str, Any]]:
    """The best map that these pairs teach, fitted again on all of them, and what is said of it."""
    said: dict[str, Any] = {"pairs": len(pairs), "identities": len(np.unique(pairs.identities))}
    if said["identities"] < MIN_IDENTITIES:
        reason = f"{said['identities']} identities to learn from, at least {MIN_IDENTITIES} are needed"
        return AdaptiveMap(pairs.protected.shape[1], {}), {**said, "kind": "identity", "reason": reason}
    held_rows = _held_out(pairs.identities, seed)
    held = pairs.take(np.flatnonzero(held_rows)[:MAX_HELD_OUT])
    few = len(held) < FEW_IMAGES
    trials = _trials(pairs.take(~held_rows), held, few, seed)
    best = _best(trials, few)
    figures = {one.map.kind: {"cmc1": one.cmc1, "order": one.order} for one in trials}
    said |= {
        "kind": best.map.kind,
        "ridge": str(trials[1].settings),
        "strength": trials[2].strength,
        "chosen_by": "order" if few else "cmc1",
    }
    return _again(best, pairs, seed), {**said, "held_out": {"images": len(held), **figures}}


def _trials(seen: Pairs, held: Pairs, few: bool, seed: int) -> list[Trial]:
    """The identity, the best of the ridges, and a network on that."""
    dim, moments = seen.protected.shape[1], Moments.of(seen.protected, seen.originals)
    ridge = _best([Trial.of(AdaptiveMap.of(dim, moments.ridge(settings)), held, settings) for settings in SETTINGS], few)
    network = _network(ridge.map, seen, seed)
    networks = [Trial.of(_weakened(network, strength), held, ridge.settings, strength) for strength in STRENGTHS]
    return [Trial.of(AdaptiveMap(dim, {}), held), ridge, _best(networks, few)]


def _network(ridge: AdaptiveMap, pairs: Pairs, seed: int) -> dict[str, np.ndarray]:
    return add_network(ridge.tensors, pairs.protected, pairs.originals, pairs.identities, seed)


def _weakened(network: dict[str, np.ndarray], strength: float) -> AdaptiveMap:
    return AdaptiveMap.of(len(network["offset"]), {**network, "out": strength * network["out"]})


def _best(trials: list[Trial], few: bool) -> Trial:
    """The first of the best: the simpler ones come first."""
    return max(trials, key=lambda one: (one.order, one.cmc1) if few else (one.cmc1, one.order))


def _again(best: Trial, pairs: Pairs, seed: int) -> AdaptiveMap:
    """The chosen candidate, fitted on all pairs of the half."""
    if best.settings is None:
        return best.map
    ridge = AdaptiveMap.of(best.map.dim, Moments.of(pairs.protected, pairs.originals).ridge(best.settings))
    return _weakened(_network(ridge, pairs, seed), best.strength) if best.strength else ridge


def _held_out(identities: np.ndarray, seed: int) -> np.ndarray:
    """Which rows choose among the candidates, bool (N,): the first fifth of the identities in a seeded order, at least one and no more than
    have MAX_HELD_OUT images."""
    labels, place, counts = np.unique(identities, return_inverse=True, return_counts=True)
    order = np.argsort(identity_hash(labels, seed, "held out"), kind="stable")
    room = int(np.searchsorted(np.cumsum(counts[order]), MAX_HELD_OUT, side="right"))
    held = np.zeros(len(labels), bool)
    held[order[: max(1, min(room, int(HELD_OUT * len(labels))))]] = True
    return held[place]
