"""1:1 verification as the field reports it: accuracy in ten folds, TAR@FAR, ROC, AUC and EER from distances of pairs. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_FOLDS = 10
THRESHOLDS = np.arange(0, 4, 0.01)
"""Of squared Euclidean distances between unit vectors, which lie in [0, 4]; a pair is taken for one person *below* the threshold."""
FAR_EXPONENTS = (1, 2, 3, 4, 5, 6)
"""False accept rates 1e-1 to 1e-6."""
_CURVE_STEPS = 10
"""Points of the stored ROC curve a decade of FAR."""
_BLOCK = 4096


class VerificationError(ValueError):
    """Pairs, templates or embeddings from which nothing can be measured; the message says what is missing."""


def unit_rows(vectors: np.ndarray, what: str = "embeddings") -> np.ndarray:
    """Rows divided by their lengths, float32 (N, D).

    Raises:
        VerificationError: a row is zero or not finite.
    """
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
    if len(bad):
        raise VerificationError(f"{len(bad)} of {len(vectors)} {what} are zero or not finite, the first is number {bad[0]}")
    return (vectors / lengths).astype(np.float32)


def require_both_kinds(same: np.ndarray) -> None:
    """Raise VerificationError where all pairs, bool (N,), are of one kind."""
    if same.all() or not same.any():
        kind = "one person" if same.any() else "two people"
        raise VerificationError(f"all {len(same)} pairs show {kind}: no threshold can be judged. Give pairs of both kinds")


def squared_distances(vectors: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances of the rows ``left`` and ``right``, both int64 (N,), of ``vectors`` (I, D): float64 (N,)."""
    found = np.empty(len(left))
    for start in range(0, len(left), _BLOCK):
        part = slice(start, start + _BLOCK)
        found[part] = np.square(vectors[left[part]].astype(np.float64) - vectors[right[part]]).sum(1)
    return found


def file_folds(num_pairs: int, num_folds: int = NUM_FOLDS) -> np.ndarray:
    """Folds in the order of the file, int64 (N,): as equal as can be, the first ones larger by one.

    Raises:
        VerificationError: there are fewer pairs than folds.
    """
    if num_pairs < num_folds:
        raise VerificationError(f"{num_pairs} pairs cannot be cut into {num_folds} folds: give more pairs, or a list with folds of its own")
    sizes = num_pairs // num_folds + (np.arange(num_folds) < num_pairs % num_folds)
    return np.repeat(np.arange(num_folds), sizes)


@dataclass(frozen=True)
class Folds:
    """Accuracy by cross-validation.

    Attributes:
        accuracy: float64 (F,), of each fold, by the threshold that is best on all the others.
        threshold: float64 (F,), that threshold; the smallest where several are best.
    """

    accuracy: np.ndarray
    threshold: np.ndarray

    @property
    def std(self) -> float:
        """Population standard deviation over the folds (divided by F, not F - 1), as InsightFace prints it."""
        return float(np.std(self.accuracy))


def cross_validate(distances: np.ndarray, same: np.ndarray, fold: np.ndarray) -> Folds:
    """Accuracy of each fold, its threshold chosen on the other ones.

    Args:
        distances: float (N,), squared Euclidean.
        same: bool (N,).
        fold: int (N,), any numbers, two different ones at least.
    """
    names = np.unique(fold)
    if len(names) < 2:
        raise VerificationError("all pairs are of one fold: a threshold is chosen on the other ones, so two folds are needed")
    # right[f, t]: pairs of fold f that are decided rightly by threshold t
    right = np.array([_right(distances[fold == name], same[fold == name]) for name in names])
    best = (right.sum(0) - right).argmax(1)
    sizes = np.array([np.count_nonzero(fold == name) for name in names])
    return Folds(right[np.arange(len(names)), best] / sizes, THRESHOLDS[best])


def _right(distances: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Pairs decided rightly by each threshold, int64 (T,)."""
    accepted = np.searchsorted(np.sort(distances[same]), THRESHOLDS, "left")
    mistaken = np.searchsorted(np.sort(distances[~same]), THRESHOLDS, "left")
    return accepted + np.count_nonzero(~same) - mistaken


@dataclass(frozen=True)
class Roc:
    """The ROC of some pairs, by counting: sorted distances of genuine and impostor pairs, float64 (G,) and (I,).

    No value is interpolated. TAR@FAR is the largest share of genuine pairs accepted by any threshold that accepts at most floor(FAR x I) of
    the impostor pairs; pairs of equal distance are accepted or refused together.
    """

    genuine: np.ndarray
    impostor: np.ndarray

    @classmethod
    def of(cls, distances: np.ndarray, same: np.ndarray) -> Roc:
        """From distances (N,) and bool (N,).

        Raises:
            VerificationError: a distance is not finite, or all pairs are of one kind.
        """
        if not np.isfinite(distances).all():
            raise VerificationError(f"{np.count_nonzero(~np.isfinite(distances))} distances are not finite: an embedding is broken")
        require_both_kinds(same)
        return cls(np.sort(distances[same]), np.sort(distances[~same]))

    def accepted(self, mistakes: np.ndarray | int) -> np.ndarray:
        """Genuine pairs accepted when at most ``mistakes`` impostor pairs may be: int64, of the same shape."""
        limits = np.append(self.impostor, np.inf)[np.minimum(mistakes, len(self.impostor))]
        return np.searchsorted(self.genuine, limits, "left")

    def tar(self, exponent: int) -> float | None:
        """TAR at FAR = 10^-exponent; None where there are fewer than 10^exponent impostor pairs, which cannot show such a rate."""
        allowed = len(self.impostor) // 10**exponent
        return float(self.accepted(allowed) / len(self.genuine)) if allowed else None

    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """FAR and TAR at every threshold that decides otherwise than the one before, from (0, 0) to (1, 1): float64 (P,) each."""
        edges = np.unique(np.concatenate([self.genuine, self.impostor]))
        far, tar = (np.searchsorted(part, edges, "right") / len(part) for part in (self.impostor, self.genuine))
        return np.append(0.0, far), np.append(0.0, tar)

    @property
    def auc(self) -> float:
        """Area under the curve by trapezoids: ties count half."""
        far, tar = self.points()
        return float(np.trapezoid(tar, far))

    @property
    def eer(self) -> float:
        """Equal error rate: the mean of FAR and FRR at the threshold where they differ least (the lowest of several)."""
        far, tar = self.points()
        nearest = np.abs(far - (1 - tar)).argmin()
        return float((far[nearest] + 1 - tar[nearest]) / 2)

    def sketch(self) -> dict[str, list[float]]:
        """The curve for a picture: TAR at FARs evenly spaced on a log axis, each a count of impostor pairs that there is."""
        decades = np.log10(len(self.impostor))
        counts = np.unique(np.rint(np.logspace(0, decades, 1 + int(np.ceil(decades * _CURVE_STEPS)))).astype(np.int64))
        far, tar = counts / len(self.impostor), self.accepted(counts) / len(self.genuine)
        return {"far": far.tolist(), "tar": tar.tolist()}


@dataclass(frozen=True)
class Verification:
    """What a set of pairs says of a recogniser. ``folds`` is None where no fold can be tested (``roc`` alone)."""

    roc: Roc
    folds: Folds | None

    def to_json(self) -> dict[str, Any]:
        """Counts, accuracy, TAR@FAR with a reason where there is none, AUC, EER and the curve."""
        tar = {f"1e-{exponent}": self.roc.tar(exponent) for exponent in FAR_EXPONENTS}
        why = {far: f"needs 10^{far[3:]} impostor pairs, there are {len(self.roc.impostor)}" for far, value in tar.items() if value is None}
        return {
            "genuine": len(self.roc.genuine),
            "impostor": len(self.roc.impostor),
            **_folds_json(self.folds),
            "tar_at_far": tar,
            "tar_at_far_absent": why,
            "auc": self.roc.auc,
            "eer": self.roc.eer,
            "roc": self.roc.sketch(),
        }


def verify(distances: np.ndarray, same: np.ndarray, fold: np.ndarray | None = None) -> Verification:
    """Judge pairs by their squared distances.

    Args:
        distances: float64 (N,).
        same: bool (N,).
        fold: int64 (N,), the list's own folds; None cuts ten in the order of the file.

    Raises:
        VerificationError: no pair of one of the two kinds, fewer pairs than folds, one fold only, or a distance that is not finite.
    """
    roc = Roc.of(distances, same)
    return Verification(roc, cross_validate(distances, same, file_folds(len(same)) if fold is None else fold))


def _folds_json(folds: Folds | None) -> Mapping[str, Any]:
    if folds is None:
        return {"folds": 0, "accuracy": None, "std": None, "threshold": None, "by_fold": None}
    return {
        "folds": len(folds.accuracy),
        "accuracy": float(folds.accuracy.mean()),
        "std": folds.std,
        "threshold": float(folds.threshold.mean()),
        "by_fold": {"accuracy": folds.accuracy.tolist(), "threshold": folds.threshold.tolist()},
    }
