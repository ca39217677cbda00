"""iResNet: the residual networks that ArcFace is trained with (arXiv 1801.07698)."""

from __future__ import annotations

from torch import Tensor, nn

DEPTHS: dict[int, tuple[int, int, int, int]] = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}
"""Blocks in each of the four stages, by the number in the network's name."""

_CHANNELS = (64, 128, 256, 512)


class IResNet(nn.Module):
    """A residual network for 112 x 112 faces that keeps them large at first: nothing is pooled before the first block.

    A 3 x 3 stem of stride 1, four stages of 64 to 512 channels that each halve the side (56, 28, 14, 7), then batch
    norm, dropout, a linear layer over all 7 x 7 places and a last batch norm.
    """

    def __init__(self, depth: int, dim: int = 512, dropout: float = 0.0) -> None:
        """Build the network with torch's current random state.

        Args:
            depth: 18, 34, 50 or 100.
            dim: length of an embedding.
            dropout: probability, before the linear layer.

        Raises:
            ValueError: another depth.
        """
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"no iResNet of depth {depth}: give one of {', '.join(map(str, DEPTHS))}")
        first, last = _CHANNELS[0], _CHANNELS[-1]
        self.stem = nn.Sequential(_convolution(3, first), nn.BatchNorm2d(first), nn.PReLU(first))
        inputs = (first, *_CHANNELS)
        self.stages = nn.Sequential(*(_stage(*sizes) for sizes in zip(inputs, _CHANNELS, DEPTHS[depth], strict=False)))
        self.head = nn.Sequential(
            nn.BatchNorm2d(last),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(last * 7 * 7, dim),
            nn.BatchNorm1d(dim),
        )
        # The embedding's direction alone matters: a learnt scale for each of its numbers would only fight the margin.
        self.head[-1].weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: (N, 3, 112, 112) float32 in [-1, 1].

        Returns:
            (N, dim) float32 embeddings, not yet divided by their length.
        """
        return self.head(self.stages(self.stem(images)))


class _Block(nn.Module):
    """Batch norm before and after each of two convolutions; the sum with the shortcut is left as it is."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            _convolution(inputs, outputs),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            _convolution(outputs, outputs, stride=stride),
            nn.BatchNorm2d(outputs),
        )
        projected = nn.Sequential(_convolution(inputs, outputs, kernel=1, stride=stride), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else projected

    def forward(self, features: Tensor) -> Tensor:
        return self.body(features) + self.shortcut(features)


def _stage(inputs: int, outputs: int, num_blocks: int) -> nn.Module:
    return nn.Sequential(_Block(inputs, outputs, 2), *(_Block(outputs, outputs, 1) for _ in range(num_blocks - 1)))


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
