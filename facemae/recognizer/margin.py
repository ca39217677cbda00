"""Margin heads: the classifiers that a face recogniser is trained with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional


class MarginHead(nn.Module, ABC):
    """Scaled cosines to one centre a class, the cosine of the true class made harder by a margin.

    Train with `cross_entropy(head(embeddings, labels), labels)`. The maths is float32, also under autocast.
    """

    def __init__(self, dim: int, num_classes: int, scale: float, margin: float, seed: int = 0) -> None:
        """Draw the centres from N(0, 0.01^2), a function of `seed` alone.

        Args:
            dim: length of an embedding.
            num_classes: number of identities; labels are 0 .. num_classes - 1.
            scale: factor on the cosines.
            margin: how much harder the true class becomes.
            seed: of the centres.
        """
        super().__init__()
        self.scale, self.margin = scale, margin
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(num_classes, dim, generator=generator) * 0.01)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            embeddings: (N, dim), of any length: they are divided by it here.
            labels: (N,) int64 classes.

        Returns:
            (N, num_classes) float32 logits.
        """
        with torch.autocast(device_type=embeddings.device.type, enabled=False):
            unit_rows = functional.normalize(embeddings.float())
            cosines = functional.linear(unit_rows, functional.normalize(self.weight.float()))
            true_class = labels.unsqueeze(1)
            harder = self.harden(cosines.gather(1, true_class))
            return self.scale * cosines.scatter(1, true_class, harder)

    @abstractmethod
    def harden(self, cosines: Tensor) -> Tensor:
        """The cosines of the true classes with the margin taken off.

        Args:
            cosines: (N, 1) in [-1, 1].

        Returns:
            (N, 1), nowhere larger.
        """


class CosFace(MarginHead):
    """CosFace (arXiv 1801.09414): cos(theta) - margin."""

    def __init__(self, dim: int, num_classes: int, scale: float = 64.0, margin: float = 0.4, seed: int = 0) -> None:
        """As `MarginHead`, with the margin 0.4 that is usual for WebFace."""
        super().__init__(dim, num_classes, scale, margin, seed)

    def harden(self, cosines: Tensor) -> Tensor:
        """cos(theta) - margin."""
        return cosines - self.margin


class ArcFace(MarginHead):
    """ArcFace (arXiv 1801.07698): cos(theta + margin)."""

    def __init__(self, dim: int, num_classes: int, scale: float = 64.0, margin: float = 0.5, seed: int = 0) -> None:
        """As `MarginHead`, with the margin 0.5 rad that is usual for MS1M."""
        super().__init__(dim, num_classes, scale, margin, seed)

    def harden(self, cosines: Tensor) -> Tensor:
        """cos(theta + margin); past theta = pi - margin, where that would rise again, a straight line."""
        # The clamp keeps the gradient of the root finite at cos = 1 and -1.
        sines = (1 - cosines.square()).clamp_min(1e-9).sqrt()
        shifted = cosines * math.cos(self.margin) - sines * math.sin(self.margin)
        straight = cosines - math.sin(self.margin) * self.margin
        return torch.where(cosines > math.cos(math.pi - self.margin), shifted, straight)
