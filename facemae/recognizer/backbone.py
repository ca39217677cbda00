"""Backbones by name: the networks that embed faces, ours and every one of timm's that takes 112 x 112 pictures."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from functools import partial
from typing import Any, cast, get_args

import timm
import torch
from torch import Tensor, nn

from facemae.recognizer.compact import Block, CompactNet
from facemae.recognizer.iresnet import DEPTHS, IResNet
from facemae.recognizer.mobilefacenet import MobileFaceNet

_FIXED: dict[str, Callable[[int], nn.Module]] = {
    **{f"iresnet{depth}": partial(IResNet, depth) for depth in DEPTHS},
    "mobilefacenet": MobileFaceNet,
}
_COMPACT = re.compile(rf"compact(?:-({'|'.join(get_args(Block))}))?(?:-(\d+))?")

GRAMMAR = f"{', '.join(_FIXED)}, compact[-{'|'.join(get_args(Block))}][-WIDTH], timm/NAME"
"""The names that `create_backbone` knows."""


class Backbone(nn.Module):
    """A network that embeds faces, with what the code around it asks of it.

    Attributes:
        name: see `create_backbone`.
        dim: length of an embedding.
        network: does the work.
    """

    def __init__(self, name: str, dim: int, network: nn.Module) -> None:
        """Wrap a network that turns (N, 3, 112, 112) into (N, dim)."""
        super().__init__()
        self.name, self.dim, self.network = name, dim, network

    def forward(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: (N, 3, 112, 112) float32 in [-1, 1].

        Returns:
            (N, dim) embeddings, not yet divided by their length.
        """
        return self.network(images)


def create_backbone(name: str, dim: int = 512, seed: int = 0) -> Backbone:
    """An untrained backbone, in training mode; torch's own random state is left as it was.

    Args:
        name: "iresnet18", "iresnet34", "iresnet50", "iresnet100" (arXiv 1801.07698); "mobilefacenet" (arXiv
            1804.07573); "compact", with a block and a width where they are not the default ("compact-plain",
            "compact-64", "compact-separable-16", see `CompactNet`); or "timm/NAME", with random weights.
        dim: length of an embedding.
        seed: of the weights, which on the CPU are a function of name, dim and seed alone.

    Raises:
        ValueError: no such backbone, or one that does not take 112 x 112 pictures.
    """
    if dim < 1:
        raise ValueError(f"dim is {dim}: an embedding has at least one number")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds the GPUs as well
        return Backbone(name, dim, _build(name, dim))


def _build(name: str, dim: int) -> nn.Module:
    if name in _FIXED:
        return _FIXED[name](dim)
    if compact := _COMPACT.fullmatch(name):
        block, width = compact.groups()
        return CompactNet(dim, int(width or 32), cast(Block, block or "residual"))
    if name.startswith("timm/"):
        return _build_timm(name, dim)
    raise ValueError(f"unknown backbone {name!r}: give one of {GRAMMAR}")


def _build_timm(name: str, dim: int) -> nn.Module:
    timm_name = name.removeprefix("timm/")
    known = timm.list_models()
    if timm_name not in known:
        near = difflib.get_close_matches(timm_name, known, n=5, cutoff=0.4)
        raise ValueError(f"timm has no network {timm_name!r}; near: {', '.join(near) or 'none'}. timm.list_models() lists all")
    config = timm.models.get_pretrained_cfg(timm_name)
    size: dict[str, Any] = {"img_size": 112} if config is not None and config.fixed_input_size else {}
    try:
        network = timm.create_model(timm_name, pretrained=False, num_classes=dim, **size).eval()
        with torch.no_grad():
            shape = tuple(network(torch.zeros(2, 3, 112, 112, device=next(network.parameters()).device)).shape)
    except Exception as error:  # timm's networks fail in many ways on a size that they are not made for
        raise ValueError(f"{name} does not take 112 x 112 pictures ({error}): give another one") from error
    if shape != (2, dim):
        raise ValueError(f"{name} gives {shape} for two pictures, not (2, {dim}): give a network with one classifier")
    return network.train()
