"""MobileFaceNet (arXiv 1804.07573): a recogniser for telephones."""

from __future__ import annotations

from torch import Tensor, nn

# Table 1 of the paper, the bottlenecks: expansion, channels, repeats, stride of the first.
_STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


class MobileFaceNet(nn.Module):
    """Inverted bottlenecks from 56 to 7 px, then a global depthwise 7 x 7 convolution with a weight for each place."""

    def __init__(self, dim: int = 512) -> None:
        """Build the network with torch's current random state.

        Args:
            dim: length of an embedding; the paper's is 128.
        """
        super().__init__()
        self.stem = nn.Sequential(_active(3, 64, kernel=3, stride=2), _active(64, 64, kernel=3, groups=64))
        blocks: list[nn.Module] = []
        inputs = 64
        for expansion, outputs, repeats, stride in _STAGES:
            for repeat in range(repeats):
                blocks.append(_Bottleneck(inputs, outputs, expansion, 1 if repeat else stride))
                inputs = outputs
        self.stages = nn.Sequential(*blocks)
        self.head = nn.Sequential(
            _active(inputs, 512),
            nn.Conv2d(512, 512, 7, groups=512, bias=False),
            nn.BatchNorm2d(512),
            nn.Flatten(),
            nn.Linear(512, dim, bias=False),
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


class _Bottleneck(nn.Module):
    """A wide depthwise convolution between two pointwise ones, the last of them linear."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = expansion * inputs
        self.body = nn.Sequential(
            _active(inputs, wide),
            _active(wide, wide, kernel=3, stride=stride, groups=wide),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        return features + self.body(features) if self.has_shortcut else self.body(features)


def _active(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Module:
    """Convolution, batch norm, PReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.PReLU(outputs))
