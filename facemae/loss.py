"""What FaceMAE minimises: instance relation matching, and the terms that it is compared with.

Instance relation matching replaces MAE's pixel error (arXiv 2205.11090): in a face recogniser's feature space, the
distances between the reconstructions of a batch must match the distances between the real faces. Weights, distance and
layers were not published: they are options here, and the defaults are our reading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from facemae.relation import Distance, gather_rows, relation_loss


def ssim_loss(output: Tensor, images: Tensor) -> Tensor:
    """Returns 1 - mean SSIM (Wang et al. 2004: Gaussian window 11, sigma 1.5) of two float (N, C, H, W) in [-1, 1]."""
    channels, stability = images.shape[1], ((0.01 * 2) ** 2, (0.03 * 2) ** 2)
    line = torch.exp(-(torch.arange(-5.0, 6.0, device=images.device) ** 2) / (2 * 1.5**2))
    window = (torch.outer(line, line) / line.sum() ** 2).expand(channels, 1, 11, 11)

    def blur(values: Tensor) -> Tensor:
        return functional.conv2d(values, window, groups=channels)

    mean_x, mean_y = blur(images), blur(output)
    var_x, var_y = blur(images**2) - mean_x**2, blur(output**2) - mean_y**2
    covariance = blur(images * output) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + stability[0]) / (mean_x**2 + mean_y**2 + stability[0])
    structure = (2 * covariance + stability[1]) / (var_x + var_y + stability[1])
    return 1.0 - (luminance * structure).mean()


PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": functional.mse_loss,
    "l1": functional.l1_loss,
    "ssim": ssim_loss,
}
PRESETS: dict[str, dict[str, float]] = {
    "irm": {"relation": 1.0},
    "mse": {"relation": 0.0, "pixel": 1.0},
    "irm+pixel": {"relation": 1.0, "pixel": 1.0},
    "irm+instance": {"relation": 1.0, "instance": 1.0},
}


@dataclass(frozen=True)
class LossConfig:
    """Weights and kinds of the loss terms: relation * L_IRM + pixel * L_pixel + instance * L_instance.

    Attributes:
        relation: weight of mean_ij (G_ij - G^_ij)^2 over the global batch.
        pixel: weight of the pixel term over all patches, visible ones too (our reading: all come from the decoder).
        instance: weight of mean_i (1 - z_i . z^_i). A large one brings the identity of each picture back.
        pixel_kind: "mse", "l1", "ssim" (1 - SSIM) or "perceptual" (squared distance of the unit features of `layers`).
        distance: "cosine" or "euclidean", between embeddings.
        layers: further layers of the recogniser; the relation term is the mean over the embedding and these layers.

    Raises:
        ValueError: a weight is negative, all are zero, or a kind is unknown.
    """

    relation: float = 1.0
    pixel: float = 0.0
    instance: float = 0.0
    pixel_kind: str = "mse"
    distance: Distance = "cosine"
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        weights = (self.relation, self.pixel, self.instance)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(f"weights (relation, pixel, instance) are {weights}: give none below 0 and one above 0")
        kinds = (*PIXEL_LOSSES, "perceptual")
        if self.pixel_kind not in kinds:
            raise ValueError(f"pixel_kind is {self.pixel_kind!r}: choose one of {', '.join(kinds)}")
        if self.distance not in get_args(Distance):
            raise ValueError(f"distance is {self.distance!r}: choose one of {', '.join(get_args(Distance))}")
        if self.perceptual and not self.layers:
            raise ValueError('pixel_kind "perceptual" compares layers of the recogniser: name them in layers')

    @classmethod
    def preset(cls, name: str, **changes: Any) -> LossConfig:
        """Returns "irm", "mse", "irm+pixel" or "irm+instance" (the ablation), with `changes` to its fields.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown loss preset {name!r}: choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @property
    def perceptual(self) -> bool:
        """Whether the pixel term is computed in the recogniser's layers."""
        return self.pixel > 0 and self.pixel_kind == "perceptual"

    @property
    def needs_recognizer(self) -> bool:
        """Whether any term looks at recogniser features."""
        return self.relation > 0 or self.instance > 0 or self.perceptual


class ReconstructionLoss(nn.Module):
    """The training loss, over the global batch of all ranks.

    Args:
        config: weights and kinds of the terms.
        recognizer: frozen module, (N, 3, S, S) in [-1, 1] -> [unit embedding (N, D), one unit feature per
            layer of the config]. It stays in evaluation mode and its parameters get no gradient.

    Raises:
        ValueError: a term needs a recogniser and none is given.
    """

    def __init__(self, config: LossConfig, recognizer: nn.Module | None = None) -> None:
        super().__init__()
        if config.needs_recognizer and recognizer is None:
            raise ValueError(f"{config} looks at recogniser features: give a recognizer, or LossConfig.preset('mse')")
        self.config = config
        self.recognizer = recognizer.requires_grad_(False).eval() if recognizer is not None else None

    def train(self, mode: bool = True) -> ReconstructionLoss:
        """Switches the mode; the recogniser stays in evaluation mode."""
        super().train(mode)
        if self.recognizer is not None:
            self.recognizer.eval()
        return self

    def forward(self, images: Tensor, reconstruction: Tensor, real_embeddings: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compares reconstructions with the real pictures.

        The first return value is for `backward` under DDP or DeepSpeed, which *average* gradients over the W ranks. The
        relation term depends on every rank's rows, each rank has the gradient of its own rows only, and the sum over
        ranks is the true gradient: hence the factor W. The other terms are means over local rows; W * local / global
        rows makes their average the mean over the global batch, also where ranks hold unequal batches.

        Args:
            images: float32 (N, 3, S, S) in [-1, 1], at least one on every rank.
            reconstruction: float (N, 3, S, S), not clamped. The recogniser sees it clamped to [-1, 1], as it will be
                deployed, with the gradient passed straight through (our reading).
            real_embeddings: float (N, D) unit rows of `images` by the same recogniser, computed once beforehand.

        Returns:
            The loss to differentiate, and detached scalars: "loss" (the weighted sum, without those factors) and each
            term that counts: "relation" (global), "pixel", "instance" (of the local rows).

        Raises:
            ValueError: `real_embeddings` are missing where a term needs them, or their shape is not the recogniser's.
        """
        # half precision is for the networks: the recogniser runs under the caller's autocast, the terms do not
        fake, real = self._features(images, reconstruction, real_embeddings)
        with torch.autocast(images.device.type, enabled=False):
            terms = self._terms(images, reconstruction.float(), fake, real)
        world_size, share = _world_size(), _share_of_rows(images)
        weights = {name: getattr(self.config, name) for name in terms}
        factors = {name: world_size if name == "relation" else world_size * share for name in terms}
        loss = torch.stack([weights[name] * factors[name] * term for name, term in terms.items()]).sum()
        metrics = {name: term.detach() for name, term in terms.items()}
        metrics["loss"] = torch.stack([weights[name] * term for name, term in metrics.items()]).sum()
        return loss, metrics

    def _terms(self, images: Tensor, output: Tensor, fake: list[Tensor], real: list[Tensor]) -> dict[str, Tensor]:
        config = self.config
        terms: dict[str, Tensor] = {}
        if config.relation:
            pairs = [(gather_rows(r), gather_rows(f)) for r, f in zip(real, fake, strict=True)]
            terms["relation"] = torch.stack([relation_loss(r, f, config.distance) for r, f in pairs]).mean()
        if config.perceptual:
            distances = [(r - f).square().sum(1).mean() for r, f in zip(real[1:], fake[1:], strict=True)]
            terms["pixel"] = torch.stack(distances).mean()
        elif config.pixel:
            terms["pixel"] = PIXEL_LOSSES[config.pixel_kind](output, images)
        if config.instance:
            terms["instance"] = (1.0 - (real[0] * fake[0]).sum(1)).mean()
        return terms

    def _features(self, images: Tensor, output: Tensor, real_embeddings: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Embedding and layers of the reconstructions and of the real pictures: two lists of float32 (N, D_i)."""
        if self.recognizer is None or not self.config.needs_recognizer:
            return [], []
        clamped = output + (output.clamp(-1.0, 1.0) - output).detach()
        fake = [feature.float() for feature in self.recognizer(clamped)]
        if real_embeddings is None or real_embeddings.shape != fake[0].shape:
            found = None if real_embeddings is None else tuple(real_embeddings.shape)
            raise ValueError(f"real_embeddings are {found}: give {tuple(fake[0].shape)}, from the loss's recogniser")
        if len(fake) != 1 + len(self.config.layers):
            raise ValueError(f"the recogniser gives {len(fake) - 1} layers, but the loss names {self.config.layers}")
        with torch.no_grad():
            layers = [feature.float() for feature in self.recognizer(images)[1:]] if self.config.layers else []
        return fake, [real_embeddings.detach().float(), *layers]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _share_of_rows(images: Tensor) -> float | Tensor:
    """This rank's share of the global batch's rows."""
    if _world_size() == 1:
        return 1.0
    total = torch.tensor(float(len(images)), device=images.device)
    dist.all_reduce(total)
    return len(images) / total
