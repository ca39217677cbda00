"""A recogniser small enough to train on a laptop: for the demo, the tests and first experiments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor, nn

Block = Literal["plain", "residual", "separable"]


class CompactNet(nn.Module):
    """A convolutional embedding network for 112 x 112 faces, trainable on two CPU cores.

    Average pooling to 56 px, a strided convolution to 28, three stages to 7, a depthwise 7 x 7 convolution over the
    whole map (the global one of MobileFaceNet, arXiv 1804.07573), a linear layer and a batch norm. Networks of another
    `block` and `width` make errors of their own: one can serve the relation loss and another one attack.
    """

    def __init__(self, dim: int = 128, width: int = 32, block: Block = "residual") -> None:
        """Build the network with torch's current random state.

        Args:
            dim: length of an embedding.
            width: channels after the first stage, an even number; cost grows with its square.
            block: what the stages are made of: "plain" 3 x 3 convolutions, "residual" pairs of them with a shortcut,
                or "separable" (inverted bottlenecks with depthwise convolutions).

        Raises:
            ValueError: an unknown block, or a width that is odd or not positive.
        """
        super().__init__()
        if block not in _STAGES:
            raise ValueError(f"unknown block {block!r}: give one of {', '.join(get_args(Block))}")
        if width < 2 or width % 2:
            raise ValueError(f"width must be an even number of channels from 2 on, not {width}")
        self.dim = dim
        stage = _STAGES[block]
        self.stem = nn.Sequential(nn.AvgPool2d(2), _convolution(3, width // 2, stride=2), nn.PReLU(width // 2))
        self.stages = nn.Sequential(stage(width // 2, width, 2), stage(width, 2 * width, 2), stage(2 * width, 2 * width, 1))
        self.head = nn.Sequential(
            _convolution(2 * width, 2 * width, kernel=7, padding=0, groups=2 * width),
            nn.Flatten(),
            nn.Linear(2 * width, dim, bias=False),
            nn.BatchNorm1d(dim),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: (N, 3, 112, 112) float32 in [-1, 1].

        Returns:
            (N, dim) float32 embeddings, not yet divided by their length.
        """
        return self.head(self.stages(self.stem(images)))


class _Residual(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_convolution(inputs, outputs, stride=stride), nn.PReLU(outputs), _convolution(outputs, outputs))
        same = stride == 1 and inputs == outputs
        pooled = nn.Sequential(nn.AvgPool2d(stride), _convolution(inputs, outputs, kernel=1, padding=0))
        self.shortcut = nn.Identity() if same else pooled
        self.activation = nn.PReLU(outputs)

    def forward(self, features: Tensor) -> Tensor:
        return self.activation(self.body(features) + self.shortcut(features))


class _Separable(nn.Module):
    """An inverted bottleneck: wide depthwise convolution between two pointwise ones."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 2 * inputs
        self.body = nn.Sequential(
            _convolution(inputs, wide, kernel=1, padding=0),
            nn.PReLU(wide),
            _convolution(wide, wide, stride=stride, groups=wide),
            nn.PReLU(wide),
            _convolution(wide, outputs, kernel=1, padding=0),
        )
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        return features + self.body(features) if self.has_shortcut else self.body(features)


def _plain(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(_convolution(inputs, outputs, stride=stride), nn.PReLU(outputs))


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, padding: int = 1, groups: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


_STAGES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "plain": _plain,
    "residual": _Residual,
    "separable": _Separable,
}
