"""The linear maps of an adaptive attacker: ridge regression in closed form, drawn to zero or to the identity, with three endings."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""In units of the mean variance of the protected embeddings' coordinates."""
BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Settings:
    """How a linear map is fitted.

    Attributes:
        penalty: see PENALTIES.
        towards_identity: whether W0, which the penalty draws to, is the identity (for a protection that moves embeddings little) or zero
            (for one that turns them).
        finish: "mean", the estimate of the original. "plain", that less the originals' mean, so that no gallery image is near to everyone
            because it is average. "whitened", the latter times the inverse covariance of the estimate's errors, which is drawn halfway to a
            multiple of the identity: directions in which the estimate is uncertain count less, as in linear discriminant analysis.
    """

    penalty: float
    towards_identity: bool
    finish: str

    def __str__(self) -> str:
        return f"penalty {self.penalty:g} towards {'the identity' if self.towards_identity else 'zero'}, {self.finish}"


SETTINGS = [Settings(*chosen) for chosen in itertools.product(PENALTIES, (True, False), ("mean", "plain", "whitened"))]


@dataclass(frozen=True)
class Moments:
    """What a ridge regression knows of its pairs, float64.

    Attributes:
        mean_protected, mean_original: (D,).
        axes, variances: eigenvectors (D, D), in columns, and eigenvalues (D,) of the covariance of the protected rows.
        cross: (D, D), the covariance of the protected rows, in these axes, with the originals.
        originals: (D, D), the covariance of the originals.
    """

    mean_protected: Tensor
    mean_original: Tensor
    axes: Tensor
    variances: Tensor
    cross: Tensor
    originals: Tensor

    @classmethod
    def of(cls, protected: np.ndarray, originals: np.ndarray) -> Moments:
        """From pairs of rows (N, D), a block at a time."""
        dim = protected.shape[1]
        total, products = torch.zeros(2 * dim, dtype=torch.float64), torch.zeros(2 * dim, 2 * dim, dtype=torch.float64)
        for start in range(0, len(protected), BLOCK_ROWS):
            block = torch.cat([torch.from_numpy(rows[start : start + BLOCK_ROWS]).double() for rows in (protected, originals)], 1)
            total += block.sum(0)
            products += block.T @ block
        mean = total / len(protected)
        covariance = products / len(protected) - torch.outer(mean, mean)
        variances, axes = torch.linalg.eigh(covariance[:dim, :dim])
        return cls(mean[:dim], mean[dim:], axes, variances.clamp(min=0), axes.T @ covariance[:dim, dim:], covariance[dim:, dim:])

    def ridge(self, settings: Settings) -> dict[str, np.ndarray]:
        """The W that minimises mean |y - x W|^2 + penalty x mean variance x |W - W0|^2 over centred pairs, and its ending.

        Returns:
            The tensors of a "ridge" map: "linear" (D, D) and "offset" (D,), float64.
        """
        added = settings.penalty * self.variances.mean() + 1e-12
        start = added * self.axes.T if settings.towards_identity else 0
        in_axes = (self.cross + start) / (self.variances + added)[:, None]
        linear = self.axes @ in_axes
        if settings.finish == "whitened":
            linear = torch.linalg.solve(self._errors(in_axes), linear.T).T
        offset = -self.mean_protected @ linear + (self.mean_original if settings.finish == "mean" else 0)
        return {"linear": linear.numpy(), "offset": offset.numpy()}

    def _errors(self, in_axes: Tensor) -> Tensor:
        """Covariance of what an estimate misses, plus its own mean variance on the diagonal."""
        shared = in_axes.T @ self.cross
        errors = self.originals - shared - shared.T + (in_axes.T * self.variances) @ in_axes
        return errors + (errors.diagonal().mean().clamp(min=0) + 1e-12) * torch.eye(len(errors), dtype=torch.float64)
