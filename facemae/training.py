"""How FaceMAE is trained: its loss and a loop for one process.

Instance relation matching replaces MAE's pixel error (arXiv 2205.11090): the distances between the reconstructions of a
batch, in a face recogniser's feature space, must match the distances between the real faces. Weights, distance and layers
were not published: they are options here, and the defaults are our reading.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from facemae.masking import random_mask
from facemae.model import MaskedAutoencoder, to_tensor
from facemae.relation import gather_rows, relation_loss

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
    distance: str = "cosine"
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        weights = (self.relation, self.pixel, self.instance)
        if min(weights) < 0 or max(weights) == 0:
            raise ValueError(f"weights (relation, pixel, instance) are {weights}: give none below 0 and one above 0")
        kinds = ("mse", "l1", "ssim", "perceptual")
        if self.pixel_kind not in kinds:
            raise ValueError(f"pixel_kind is {self.pixel_kind!r}: choose one of {', '.join(kinds)}")
        if self.distance not in ("cosine", "euclidean"):
            raise ValueError(f"distance is {self.distance!r}: choose cosine or euclidean")
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
        recognizer: frozen module, (N, 3, S, S) in [-1, 1] -> [unit embedding (N, D), one unit feature per config layer].
            It stays in evaluation mode and its parameters get no gradient.

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

    def forward(
        self, images: Tensor, reconstruction: Tensor, real_embeddings: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compares reconstructions with the real pictures.

        The first return value is for `backward` under DDP or DeepSpeed, which *average* gradients over the W ranks. The
        relation term depends on every rank's rows, each rank has the gradient of its own rows only, and the sum over
        ranks is the true gradient: hence the factor W. The other terms are means over local rows; W * local / global
        rows makes their average the mean over the global batch, also where ranks hold unequal batches.

        Args:
            images: float32 (N, 3, S, S) in [-1, 1].
            reconstruction: float (N, 3, S, S), not clamped. The recogniser sees it clamped to [-1, 1], as it will be
                deployed, with the gradient passed straight through (our reading).
            real_embeddings: float (N, D) unit rows of `images` by the same recogniser, computed once beforehand.

        Returns:
            The loss to differentiate, and detached scalars: "loss" (the weighted sum, without those factors) and each
            term that counts: "relation" (global), "pixel", "instance" (of the local rows).

        Raises:
            ValueError: `real_embeddings` are missing where a term needs them, or of another shape than the recogniser's.
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
        config, terms = self.config, {}
        if config.relation:
            pairs = [(gather_rows(r), gather_rows(f)) for r, f in zip(real, fake, strict=True)]
            terms["relation"] = torch.stack([relation_loss(r, f, config.distance) for r, f in pairs]).mean()
        if config.perceptual:
            distances = [(r - f).square().sum(1).mean() for r, f in zip(real[1:], fake[1:], strict=True)]
            terms["pixel"] = torch.stack(distances).mean()
        elif config.pixel:
            terms["pixel"] = {"mse": functional.mse_loss, "l1": functional.l1_loss, "ssim": ssim_loss}[
                config.pixel_kind
            ](output, images)
        if config.instance:
            terms["instance"] = (1.0 - (real[0] * fake[0]).sum(1)).mean()
        return terms

    def _features(
        self, images: Tensor, reconstruction: Tensor, real_embeddings: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Embedding and layers of the reconstructions and of the real pictures: two lists of float32 (N, D_i)."""
        if self.recognizer is None or not self.config.needs_recognizer:
            return [], []
        clamped = reconstruction + (reconstruction.clamp(-1.0, 1.0) - reconstruction).detach()
        fake = [feature.float() for feature in self.recognizer(clamped)]
        if real_embeddings is None or real_embeddings.shape != fake[0].shape:
            found = None if real_embeddings is None else tuple(real_embeddings.shape)
            raise ValueError(f"real_embeddings are {found}: give {tuple(fake[0].shape)}, from the loss's recogniser")
        if len(fake) != 1 + len(self.config.layers):
            raise ValueError(f"the recogniser gives {len(fake) - 1} layers, but the loss names {self.config.layers}")
        with torch.no_grad():
            layers = [feature.float() for feature in self.recognizer(images)[1:]] if self.config.layers else []
        return fake, [real_embeddings.float(), *layers]


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


class Batch(NamedTuple):
    """N samples. The keys and the epoch choose the masks.

    Attributes:
        images: uint8 (N, H, W, 3) pictures, array or tensor, or a float32 tensor (N, 3, H, W) in [-1, 1].
        keys: N sample keys.
        identities: int64 (N,), or None: no loss here reads them; a sampler balances batches by them.
        embeddings: float32 (N, D) unit rows of the loss's recogniser, or None where no term needs them.
        epoch: passes over the data before this one.
    """

    images: np.ndarray | Tensor
    keys: Sequence[str]
    identities: np.ndarray | Tensor | None = None
    embeddings: np.ndarray | Tensor | None = None
    epoch: int = 0


def batch_loss(
    model: nn.Module, loss: ReconstructionLoss, batch: Batch, *, num_patches: int, mask_ratio: float, seed: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Masks, reconstructs and compares one batch; the step of every training loop, DDP and DeepSpeed wrappers included.

    Args:
        model: a `MaskedAutoencoder`, or a wrapper that calls it.
        loss: on the model's device.
        batch: see `Batch`; moved to the model's device.
        num_patches: of the model's architecture.
        mask_ratio: hidden share of the patches.
        seed: of the masks, whose keys are f"{epoch}/{key}".

    Returns:
        What `ReconstructionLoss.forward` returns.
    """
    device = next(model.parameters()).device
    images = torch.as_tensor(batch.images).to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        images = to_tensor(images)
    keys = [f"{batch.epoch}/{key}" for key in batch.keys]
    visible = torch.from_numpy(random_mask(keys, num_patches, mask_ratio, seed)).to(device)
    real = None if batch.embeddings is None else torch.as_tensor(batch.embeddings).to(device)
    return loss(images, model(images, visible), real)


def param_groups(model: nn.Module, weight_decay: float = 0.05) -> list[dict[str, Any]]:
    """Splits the trainable parameters: biases, norms and tokens get no weight decay (MAE, arXiv 2111.06377)."""
    exempt = model.no_weight_decay() if isinstance(model, MaskedAutoencoder) else set()
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def learning_rate(step: float, *, base_lr: float, total: float, warmup: float = 0.0, min_lr: float = 0.0) -> float:
    """Returns the learning rate: linear from 0 to `base_lr` over `warmup`, then half a cosine down to `min_lr` at `total`.

    Args:
        step: how far training is, in any unit that `total` and `warmup` share (steps, samples seen).
        base_lr: the peak.
        total: where training ends; beyond it the rate stays at `min_lr`.
        warmup: length of the linear rise.
        min_lr: the end.
    """
    if step < warmup:
        return base_lr * step / warmup
    progress = min(1.0, (step - warmup) / max(total - warmup, 1e-12))
    return min_lr + (base_lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def fit(
    model: MaskedAutoencoder,
    loss: ReconstructionLoss,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float = 1e-3,
    min_lr: float = 0.0,
    warmup: int = 0,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.95),
    clip_grad: float | None = None,
    mask_ratio: float = 0.75,
    seed: int = 0,
    device: str | torch.device = "cpu",
    bf16: bool | None = None,
    on_step: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> int:
    """Trains in this process with AdamW; `cluster` holds the distributed loop.

    Args:
        model: trained in place, moved to `device`.
        loss: what to minimise, moved to `device`.
        batches: consumed until `steps` are done or they end.
        steps: optimiser steps; also the length of the learning-rate schedule.
        lr, min_lr, warmup: see `learning_rate`, in steps. Step i of 1..steps uses its value at i.
        weight_decay, betas: of AdamW; see `param_groups`.
        clip_grad: largest norm of the gradient, or None.
        mask_ratio, seed: see `batch_loss`.
        device: "cpu", "cuda", ...
        bf16: mixed precision by autocast; None: on CUDA only.
        on_step: called after each step with its number, from 1, and the loss's metrics plus "lr".

    Returns:
        Steps done: fewer than `steps` where the batches ended.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    model.to(device).train()
    loss.to(device).train()
    device = torch.device(device)
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay), lr=lr, betas=betas)
    options = dict(num_patches=model.architecture.num_patches, mask_ratio=mask_ratio, seed=seed)
    half = device.type == "cuda" if bf16 is None else bf16
    done = 0
    for done, batch in zip(range(1, steps + 1), batches, strict=False):
        rate = learning_rate(done, base_lr=lr, total=steps, warmup=warmup, min_lr=min_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            value, metrics = batch_loss(model, loss, batch, **options)
        if not torch.isfinite(value):
            raise FloatingPointError(f"the loss is {value.item()} at step {done}: lower lr or set clip_grad")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if clip_grad is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        optimizer.step()
        if on_step is not None:
            on_step(done, {**metrics, "lr": torch.tensor(rate)})
    model.eval()
    return done


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _share_of_rows(images: Tensor) -> float | Tensor:
    """This rank's share of the global batch's rows."""
    if _world_size() == 1:
        return 1.0
    total = torch.tensor(float(len(images)), device=images.device)
    dist.all_reduce(total)
    return len(images) / total
