"""Margins: what makes the true class harder for a face recogniser in training, and the classifier around them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Margin(nn.Module, ABC):
    """Lowers the cosine between an embedding and the centre of its own class.

    The logits of a classifier are `scale` times the cosines to all centres, that of the true class lowered by this.

    Attributes:
        margin: how much harder the true class becomes.
        scale: factor on all cosines, before the softmax.
    """

    def __init__(self, margin: float, scale: float) -> None:
        """Check and keep the two numbers.

        Raises:
            ValueError: a negative margin, or a scale that is not positive.
        """
        super().__init__()
        if not (0 <= margin < math.inf and 0 < scale < math.inf):
            raise ValueError(f"{type(self).__name__}: margin must be 0 or more and scale above 0, not {margin} and {scale}")
        self.margin, self.scale = margin, scale

    @abstractmethod
    def forward(self, cosines: Tensor, norms: Tensor) -> Tensor:
        """The cosines of the true classes with the margin taken off.

        Call it once a step with the whole batch, of all ranks: what a margin learns of the batch it learns here.

        Args:
            cosines: (N,) float32 in [-1, 1].
            norms: (N,) float32, lengths of the embeddings.

        Returns:
            (N,) float32.
        """


class CosFace(Margin):
    """CosFace (arXiv 1801.09414): cos(theta) - margin."""

    def __init__(self, margin: float = 0.4, scale: float = 64.0) -> None:
        """As `Margin`, with the margin 0.4 that is usual for WebFace."""
        super().__init__(margin, scale)

    def forward(self, cosines: Tensor, norms: Tensor) -> Tensor:
        """cos(theta) - margin."""
        return cosines - self.margin


class ArcFace(Margin):
    """ArcFace (arXiv 1801.07698): cos(theta + margin)."""

    def __init__(self, margin: float = 0.5, scale: float = 64.0) -> None:
        """As `Margin`, with the margin 0.5 rad that is usual for MS1M."""
        super().__init__(margin, scale)

    def forward(self, cosines: Tensor, norms: Tensor) -> Tensor:
        """cos(theta + margin); past theta = pi - margin, where that would rise again, a straight line."""
        # The clamp keeps the gradient of the root finite at cos = 1 and -1.
        sines = (1 - cosines.square()).clamp_min(1e-9).sqrt()
        shifted = cosines * math.cos(self.margin) - sines * math.sin(self.margin)
        straight = cosines - math.sin(self.margin) * self.margin
        return torch.where(cosines > math.cos(math.pi - self.margin), shifted, straight)


class AdaFace(Margin):
    """AdaFace (arXiv 2204.00964): the length of an embedding stands for the quality of its picture.

    With q = clip(h (length - mean) / std, -1, 1) the true class gets cos(theta - margin q) - margin (1 + q): hard examples
    are emphasised in good pictures (q = 1) and left in peace in bad ones (q = -1, where it is ArcFace).

    Attributes:
        mean: running mean of the lengths, a buffer.
        std: their running standard deviation, a buffer.
    """

    _EPSILON = 1e-3  # keeps angles off 0 and pi, where arccos has no gradient, and std off 0

    def __init__(self, margin: float = 0.4, scale: float = 64.0, h: float = 0.333, t_alpha: float = 0.01) -> None:
        """The paper's values by default; mean and std start at 20 and 100, as in its authors' code.

        Args:
            margin: the paper's m.
            scale: factor on all cosines.
            h: how far apart good and bad are held: a length of 1/h standard deviations above the mean gives q = 1.
            t_alpha: weight of the newest batch in the running mean and std, in (0, 1].

        Raises:
            ValueError: a number out of range.
        """
        super().__init__(margin, scale)
        if not (h > 0 and 0 < t_alpha <= 1):
            raise ValueError(f"AdaFace: h must be above 0 and t_alpha in (0, 1], not {h} and {t_alpha}")
        self.h, self.t_alpha = h, t_alpha
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    def forward(self, cosines: Tensor, norms: Tensor) -> Tensor:
        """cos(theta - margin q) - margin (1 + q); in training mode the statistics take in this batch first."""
        lengths = norms.detach().clamp(0.001, 100)  # quality steers the margin; it is not itself trained
        if self.training and len(lengths) > 1:  # one length has no standard deviation
            self.mean.lerp_(lengths.mean(), self.t_alpha)
            self.std.lerp_(lengths.std(), self.t_alpha)
        quality = ((lengths - self.mean) / (self.std + self._EPSILON) * self.h).clamp(-1, 1)
        angles = cosines.clamp(-1 + self._EPSILON, 1 - self._EPSILON).arccos()
        shifted = (angles - self.margin * quality).clamp(self._EPSILON, math.pi - self._EPSILON)
        return shifted.cos() - self.margin * (1 + quality)


_MARGINS: dict[str, Callable[..., Margin]] = {"cosface": CosFace, "arcface": ArcFace, "adaface": AdaFace}


def create_margin(name: str, **options: float | None) -> Margin:
    """A margin by its name.

    Args:
        name: "cosface", "arcface" or "adaface".
        options: arguments of the class, as margin=0.35; None leaves the class's default.

    Raises:
        ValueError: there is no such margin, or a number is out of range.
        TypeError: the margin has no such option.
    """
    if name not in _MARGINS:
        raise ValueError(f"unknown margin {name!r}: give one of {', '.join(_MARGINS)}")
    return _MARGINS[name](**{option: value for option, value in options.items() if value is not None})


class MarginHead(nn.Module):
    """The whole classifier in one process: a centre for each class, and a margin.

    Train with `cross_entropy(head(embeddings, labels), labels)`. The maths is float32, also under autocast.

    Attributes:
        weight: (num_classes, dim) float32, the centres.
        margin: what makes the true class harder.
    """

    def __init__(self, dim: int, num_classes: int, margin: Margin, seed: int = 0) -> None:
        """Draw the centres from N(0, 0.01^2), a function of `seed` alone.

        Args:
            dim: length of an embedding.
            num_classes: number of identities; labels are 0 .. num_classes - 1.
            margin: from `create_margin`.
            seed: of the centres.
        """
        super().__init__()
        self.margin = margin
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
            rows = embeddings.float()
            cosines = functional.linear(functional.normalize(rows), functional.normalize(self.weight.float()))
            true_class = labels.unsqueeze(1)
            harder = self.margin(cosines.gather(1, true_class).squeeze(1), rows.norm(dim=1))
            return self.margin.scale * cosines.scatter(1, true_class, harder.unsqueeze(1))
