"""Training of FaceMAE (arXiv 2205.11090): the parts that every training loop shares, and a loop for one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from facemae.loss import LossConfig, ReconstructionLoss
from facemae.masking import random_mask
from facemae.model import MaskedAutoencoder, to_tensor

__all__ = ["Batch", "LossConfig", "ReconstructionLoss", "batch_loss", "fit", "learning_rate", "param_groups"]


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
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def learning_rate(step: float, *, base_lr: float, total: float, warmup: float = 0.0, min_lr: float = 0.0) -> float:
    """Returns the learning rate: linear from 0 to `base_lr` over `warmup`, then half a cosine to `min_lr` at `total`.

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
        lr, min_lr, warmup: see `learning_rate`, in steps. Step i of 1..steps uses its value at i of steps + 1, so that
            neither the first nor the last step is wasted on a rate of zero.
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
    num_patches = model.architecture.num_patches
    half = device.type == "cuda" if bf16 is None else bf16
    done = 0
    for done, batch in zip(range(1, steps + 1), batches, strict=False):
        rate = learning_rate(done, base_lr=lr, total=steps + 1, warmup=warmup, min_lr=min_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            value, metrics = batch_loss(model, loss, batch, num_patches=num_patches, mask_ratio=mask_ratio, seed=seed)
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
