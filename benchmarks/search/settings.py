"""What the search tries: a table of settings for each purpose."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import timm

import facemae.model  # noqa: F401  # registers the architectures
from facemae.loss import LossConfig
from facemae.model import MaskedAutoencoder


@dataclass(frozen=True)
class Setting:
    """One FaceMAE to train and measure.

    Attributes:
        name: folder of its results.
        relation, pixel, instance: weights of the loss terms.
        distance: of the relation graph, "cosine" or "euclidean".
        layers: steps of the packed recogniser, from the end (-4 is the last map of MobileFaceNet), that form graphs as well.
        mask_ratio: hidden share, in training and when the protected people are redrawn.
        patch, size, decoder: patch size, name of the encoder's and decoder's sizes, and fields of Architecture that differ from it.
        batch, people: pictures a batch, and how many people in it have up to four.
        lr, warmup: peak of the learning rate, and the share of the samples over which it rises.
        samples: training pictures to see; 0 measures the start itself.
        start: "random"; "bundle", the weights in the bundle; or "fresh ends", those without the layers that know the patch size.
    """

    name: str
    relation: float = 1.0
    pixel: float = 1.0
    instance: float = 0.0
    distance: str = "cosine"
    layers: tuple[int, ...] = ()
    mask_ratio: float = 0.75
    patch: int = 16
    size: str = "tiny"
    decoder: dict[str, Any] = field(default_factory=dict)
    batch: int = 64
    people: int = 12
    lr: float = 5e-4
    warmup: float = 0.1
    samples: int = 4800
    start: str = "bundle"

    def loss(self) -> LossConfig:
        """The loss; its layers are called by their number."""
        layers = tuple(map(str, self.layers))
        return LossConfig(self.relation, self.pixel, self.instance, distance=self.distance, layers=layers)  # type: ignore[arg-type]

    def network(self) -> MaskedAutoencoder:
        """The masked autoencoder, not yet trained, by torch's current random state."""
        model = timm.create_model(f"facemae_{self.size}_patch{self.patch}_112", **self.decoder)
        assert isinstance(model, MaskedAutoencoder)
        return model


MSE: dict[str, Any] = {"relation": 0.0, "pixel": 1.0}
IRM: dict[str, Any] = {"relation": 1.0, "pixel": 0.0}
INSTANCE: dict[str, Any] = {"relation": 1.0, "pixel": 0.0, "instance": 1.0}
PIXEL: dict[str, Any] = {"relation": 1.0, "pixel": 5.0}


def _ablation() -> list[Setting]:
    """One thing changed at a time, for two cores: every row starts from the same weights (an MSE network) and sees the same few samples."""
    middle = Setting("irm+pixel", **PIXEL)
    fresh = dataclasses.replace(middle, start="fresh ends")
    return [
        Setting("start", **MSE, samples=0),
        Setting("mse", **MSE),
        Setting("irm", **IRM),
        middle,
        Setting("irm+instance", **INSTANCE),
        dataclasses.replace(middle, name="irm+pixel mask 0.5", mask_ratio=0.5),
        dataclasses.replace(middle, name="irm+pixel mask 0.9", mask_ratio=0.9),
        dataclasses.replace(fresh, name="irm+pixel patch 16, fresh ends", patch=16),
        dataclasses.replace(fresh, name="irm+pixel patch 8, fresh ends", patch=8),
        dataclasses.replace(middle, name="irm+pixel euclidean", distance="euclidean"),
    ]


def _gpu() -> list[Setting]:
    """For one large GPU: from random weights, a thousand times the samples of two cores."""
    base = Setting("irm+pixel", **PIXEL, batch=256, people=48, lr=1e-3, samples=250_000, start="random")
    change = dataclasses.replace
    return [
        change(base, name="mse", **MSE),
        base,
        change(base, name="irm", **IRM),
        change(base, name="irm+instance", **INSTANCE),
        change(base, name="irm+pixel euclidean", distance="euclidean"),
        change(base, name="irm+pixel and last map", layers=(-4,)),
        change(base, name="irm+pixel batch 512", batch=512, people=96),
        *(change(base, name=f"irm+pixel mask {ratio}", mask_ratio=ratio) for ratio in (0.5, 0.6, 0.9)),
        change(base, name="irm+pixel patch 8", patch=8),
        change(base, name="irm+pixel patch 8 mask 0.9", patch=8, mask_ratio=0.9),
        change(base, name="irm+pixel decoder 8 deep", decoder={"decoder_depth": 8}),
        change(base, name="irm+pixel small", size="small"),
    ]


GRIDS = {"ablation": _ablation(), "gpu": _gpu()}
