"""1:N identification: probes searched in a gallery with one entry a person, closed set (rank-k) and open set (TPIR@FPIR).

A tie counts *against* the recogniser here: the rank of a probe's mate is the number of gallery entries at least as similar as the mate, the
mate included, so that a network which gives all faces one embedding finds nobody. (In a leakage search a tie counts for the attacker,
facemae.rank: both readings are the careful one.) The comparison is exact for the half-precision rows that are stored everywhere else too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from facemae.leakage import similarity
from facemae.rank import UNDEFINED
from facemae.scan import Rows, Scan
from facemae.verification import VerificationError

RANKS = (1, 5)
FPIR_EXPONENTS = (1, 2, 3)
"""False positive identification rates 1e-1 to 1e-3."""


@dataclass(frozen=True)
class Split:
    """Which images are searched for, and among which.

    Attributes:
        gallery: int64 (G,), one image of each identity that has two or more: its first in the order given.
        probes: int64 (P,), all their other images.
        single: int64 (S,), the only image of an identity: it can be nobody's mate, only a distractor.
    """

    gallery: np.ndarray
    probes: np.ndarray
    single: np.ndarray

    @classmethod
    def of(cls, identities: np.ndarray) -> Split:
        """From the label of each image, int64 (N,)."""
        _, first, number, counts = np.unique(identities, return_index=True, return_inverse=True, return_counts=True)
        leads = np.zeros(len(identities), bool)
        leads[first] = True
        several = counts[number] > 1
        return cls(*(np.flatnonzero(mask) for mask in (leads & several, ~leads, leads & ~several)))


@dataclass(frozen=True)
class Identification:
    """The ranks of all probes, and what open-set decisions are made of.

    Attributes:
        ranks: int64 (P,), of the mate among gallery and distractors; UNDEFINED for a probe whose person is not in the gallery.
        num_gallery, num_distractors: entries searched.
        accepted: float32 (P,), similarity of the mate where it is the most similar entry of the gallery without distractors, else -inf.
        strangers: float32 (U,), descending: the highest similarity that each distractor, and each probe without a mate, finds in the
            gallery.
    """

    ranks: np.ndarray
    num_gallery: int
    num_distractors: int
    accepted: np.ndarray
    strangers: np.ndarray

    @property
    def num_probes(self) -> int:
        """Probes with a mate."""
        return int(np.count_nonzero(self.ranks != UNDEFINED))

    def rank(self, k: int) -> float:
        """Share of probes whose mate is among the k most similar entries."""
        return float(np.count_nonzero((self.ranks != UNDEFINED) & (self.ranks <= k)) / self.num_probes)

    def tpir(self, exponent: int) -> float | None:
        """TPIR at FPIR = 10^-exponent: share of probes whose mate is the most similar entry and above a threshold that at most
        floor(FPIR x U) strangers exceed; nothing is interpolated. None where there are fewer than 10^exponent strangers."""
        allowed = len(self.strangers) // 10**exponent
        if not allowed:
            return None
        return float(np.count_nonzero(self.accepted > np.append(self.strangers, -np.inf)[allowed]) / self.num_probes)

    def to_json(self) -> dict[str, Any]:
        """Counts, rank-1 and rank-5, TPIR@FPIR with a reason where there is none."""
        tpir = {f"1e-{exponent}": self.tpir(exponent) for exponent in FPIR_EXPONENTS}
        why = {fpir: f"needs 10^{fpir[3:]} strangers, there are {len(self.strangers)}" for fpir, value in tpir.items() if value is None}
        return {
            "gallery": self.num_gallery,
            "distractors": self.num_distractors,
            "probes": self.num_probes,
            "probes_without_mate": len(self.ranks) - self.num_probes,
            "strangers": len(self.strangers),
            **{f"rank{k}": self.rank(k) for k in RANKS},
            "tpir_at_fpir": tpir,
            "tpir_at_fpir_absent": why,
        }


def identify(
    gallery: np.ndarray, gallery_ids: np.ndarray, probes: np.ndarray, probe_ids: np.ndarray, distractors: np.ndarray
) -> Identification:
    """Search probes among gallery and distractors.

    Args:
        gallery: float (G, D) unit rows, one a person.
        gallery_ids: integers (G,), different labels.
        probes: float (P, D) unit rows.
        probe_ids: integers (P,); one that the gallery does not hold makes the probe a stranger.
        distractors: float (M, D) unit rows of people who are neither; M may be 0.

    Raises:
        VerificationError: an embedding is not finite, a label is twice in the gallery, or no probe has a mate.
    """
    gallery, probes, distractors = (_half(rows) for rows in (gallery, probes, distractors))
    mates = _mates(gallery_ids, probe_ids)
    mated = mates != UNDEFINED
    similarities = similarity(probes[mated], gallery[mates[mated]])
    ranks = np.full(len(probes), UNDEFINED)
    alone = _ranks(gallery, probes[mated], similarities)
    ranks[mated] = _ranks(np.concatenate([gallery, distractors]), probes[mated], similarities) if len(distractors) else alone
    accepted = np.full(len(probes), -np.inf, np.float32)
    accepted[mated] = np.where(alone == 1, similarities, -np.inf)
    strangers = _highest(gallery, np.concatenate([probes[~mated], distractors]))
    return Identification(ranks, len(gallery), len(distractors), accepted, np.sort(strangers)[::-1])


def _half(rows: np.ndarray) -> np.ndarray:
    if not np.isfinite(rows).all():
        raise VerificationError("an embedding is not finite")
    return rows.astype(np.float16)


def _mates(gallery_ids: np.ndarray, probe_ids: np.ndarray) -> np.ndarray:
    """The gallery's row of each probe's person, int64 (P,); UNDEFINED where there is none."""
    order = np.argsort(gallery_ids, kind="stable")
    known = gallery_ids[order]
    if (known[1:] == known[:-1]).any():
        raise VerificationError("a person is twice in the gallery: give one entry a person")
    if not np.isin(probe_ids, known).any():
        raise VerificationError("no probe's person is in the gallery: an identity needs two images, one for each side")
    places = np.minimum(np.searchsorted(known, probe_ids), len(known) - 1)
    return np.where(known[places] == probe_ids, order[places], UNDEFINED)


def _ranks(rows: np.ndarray, probes: np.ndarray, similarities: np.ndarray) -> np.ndarray:
    """Rows at least as similar as the mate, which is one of them: int64 (P,)."""
    below = np.nextafter(similarities, np.float32(-np.inf))  # what is above this is at least as similar
    scan = Scan(Rows(rows), probes, 0, below[:, None])
    scan.compare(np.arange(len(probes)), 0, len(rows))
    return scan.nearer[:, 0]


def _highest(rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The similarity of each query's nearest row, float32 (Q,)."""
    if not len(queries):
        return np.empty(0, np.float32)
    scan = Scan(Rows(rows), queries, 1)
    scan.compare(np.arange(len(queries)), 0, len(rows))
    return scan.nearest()[0][:, 0]
