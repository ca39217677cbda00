"""Augmentation that depends on the seed, the epoch and the picture's key alone.

As with the masks of `facemae.masking`, the random numbers come from hashing, not from a generator's state: a picture
looks the same in any batch, on any rank and on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from facemae.masking import random_bits
from facemae.model import to_tensor

# Each dial reads columns of its own: turning one leaves what the others draw as it is.
_NUM_DRAWS = 12
_FLIP, _CROP, _ERASE, _COLOR = slice(0, 1), slice(1, 4), slice(4, 9), slice(9, 12)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How far pictures are changed; the default is the recipe of arcface_torch, mirroring alone.

    Raises:
        ValueError: a number out of range.
    """

    flip: bool = True
    """Mirror with probability 1/2."""
    crop: float = 0.0
    """A square window, its side uniform in [1 - crop, 1] of the picture's, anywhere inside, enlarged again (bilinear); in [0, 1)."""
    erase: float = 0.0
    """Probability of random erasing (arXiv 1708.04896): a rectangle of 2 to 33 % of the area, sides 0.3 to 3.3 to one, becomes mid-grey."""
    color: float = 0.0
    """Brightness, contrast and saturation are each multiplied by a factor uniform in [1 - color, 1 + color]; in [0, 1]."""

    def __post_init__(self) -> None:
        if not 0 <= self.crop < 1:
            raise ValueError(f"crop is {self.crop}: give the largest share of a side to cut off, from 0 to below 1")
        if not 0 <= self.erase <= 1:
            raise ValueError(f"erase is {self.erase}: give a probability, from 0 to 1")
        if not 0 <= self.color <= 1:
            raise ValueError(f"color is {self.color}: give the largest change of a factor, from 0 to 1")


def augment(images: Tensor, keys: Sequence[str], epoch: int, seed: int, config: AugmentConfig) -> Tensor:
    """Change pictures for training, on the device they are on: mirrored, cropped, recoloured, erased, in this order.

    Args:
        images: uint8 (N, H, W, 3), or float32 (N, 3, H, W) in [-1, 1].
        keys: N sample keys.
        epoch: passes over the data before this one; each pass draws anew.
        seed: any integer.
        config: how far.

    Returns:
        float32 (N, 3, H, W) in [-1, 1]; where every dial is 0, the pictures themselves.

    Raises:
        ValueError: other images than that, or not one key for each.
    """
    axis = 3 if images.dtype == torch.uint8 else 1
    if images.dim() != 4 or images.shape[axis] != 3 or images.dtype not in (torch.uint8, torch.float32):
        shape = tuple(images.shape)
        raise ValueError(f"images must be uint8 (N, H, W, 3) or float32 (N, 3, H, W) in [-1, 1], not {images.dtype} {shape}")
    if len(keys) != len(images):
        raise ValueError(f"{len(images)} images with {len(keys)} keys: give one key for each image")
    images = to_tensor(images) if images.dtype == torch.uint8 else images
    draws = _draw(keys, epoch, seed).to(images.device)
    if config.flip:
        images = torch.where(draws[:, _FLIP].view(-1, 1, 1, 1) < 0.5, images.flip(3), images)
    if config.crop:
        images = _crop(images, config.crop, *draws[:, _CROP].unbind(1))
    if config.color:
        images = _recolor(images, 1 + config.color * (2 * draws[:, _COLOR] - 1))
    if config.erase:
        images = _erase(images, config.erase, *draws[:, _ERASE].unbind(1))
    return images


def _draw(keys: Sequence[str], epoch: int, seed: int) -> Tensor:
    """float32 (N, _NUM_DRAWS), uniform in [0, 1): multiples of 2^-24, which float32 holds exactly."""
    bits = random_bits([f"augment/{epoch}/{key}" for key in keys], _NUM_DRAWS, seed)
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def _crop(images: Tensor, crop: float, size: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The window of each picture, resized to the whole; size, x and y are draws (N,)."""
    side = 1 - crop * size

    def positions(count: int, place: Tensor) -> Tensor:
        """Where output pixels lie in the input, (N, count) on grid_sample's scale of -1 to 1."""
        centers = (torch.arange(count, device=images.device) + 0.5) / count
        return 2 * ((place * (1 - side)).unsqueeze(1) + side.unsqueeze(1) * centers) - 1

    height, width = images.shape[2:]
    columns = positions(width, x).unsqueeze(1).expand(-1, height, -1)
    rows = positions(height, y).unsqueeze(2).expand(-1, -1, width)
    grid = torch.stack((columns, rows), dim=3)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False).clamp(-1, 1)


def _recolor(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast and saturation times the factors (N, 3), clipped once at the end."""
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    values = (images + 1) / 2 * brightness
    mean = _grey(values).mean((2, 3), keepdim=True)
    values = mean + contrast * (values - mean)
    grey = _grey(values)
    values = grey + saturation * (values - grey)
    return (2 * values - 1).clamp(-1, 1)


def _grey(values: Tensor) -> Tensor:
    """Luma (ITU-R BT.601), (N, 1, H, W)."""
    red, green, blue = values.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _erase(images: Tensor, erase: float, chance: Tensor, area: Tensor, ratio: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A rectangle of the chosen pictures at 0, the middle of the range; the other tensors are draws (N,)."""
    share = 0.02 + 0.31 * area
    stretch = 0.3 ** (1 - 2 * ratio)  # log-uniform in [0.3, 1/0.3)

    def inside(count: int, portion: Tensor, place: Tensor) -> Tensor:
        """Which of `count` rows or columns the rectangle covers, bool (N, count)."""
        length = (portion * count).round().clamp(1, count)
        start = (place * (count - length + 1)).floor()
        index = torch.arange(count, device=images.device)
        return (index >= start.unsqueeze(1)) & (index < (start + length).unsqueeze(1))

    rows = inside(images.shape[2], (share * stretch).sqrt(), y) & (chance < erase).unsqueeze(1)
    columns = inside(images.shape[3], (share / stretch).sqrt(), x)
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)
