"""The nonlinear part of an adaptive attacker's map: a hidden layer beside a linear map, trained to tell the originals of a batch apart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

HIDDEN = 1024
BATCH = 256
EPOCHS = 30
MAX_STEPS = 1500
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.01
TEMPERATURE = 0.05


def add_network(
    linear: Mapping[str, np.ndarray], protected: np.ndarray, originals: np.ndarray, identities: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """Add relu(x U + b) V to a linear map, which stays as it is; V begins at zero, so training begins at the linear map.

    Args:
        linear: "linear" (D, D) and "offset" (D,).
        protected, originals: float16 (N, D), unit rows.
        identities: int64 (N,).
        seed: of the weights and the batches.

    Returns:
        The tensors of an "mlp" map, float32.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/network".encode()).digest()[:7], "little"))
    x, y, labels = (torch.from_numpy(rows) for rows in (protected, originals, identities))
    weight, offset = (torch.from_numpy(linear[name]) for name in ("linear", "offset"))
    center, spread, size = _scales(x, weight, offset)
    weight, offset = weight / size, offset / size  # estimates of about unit length, as the originals are
    dim = x.shape[1]
    hidden, bias = torch.randn(dim, HIDDEN, generator=generator), torch.randn(HIDDEN, generator=generator)
    trained = [tensor.requires_grad_() for tensor in (hidden, bias, torch.zeros(HIDDEN, dim))]
    steps = min(MAX_STEPS, EPOCHS * -(-len(x) // BATCH))
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (min(BATCH, len(x)),), generator=generator)
        given = x[rows].float()
        added = functional.relu((given - center) / spread @ trained[0] + trained[1]) @ trained[2]
        optimizer.zero_grad()
        contrast(given @ weight + offset + added, y[rows].float(), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    hidden, bias, out = (tensor.detach() for tensor in trained)
    found = {"linear": weight, "offset": offset, "hidden": hidden / spread, "bias": bias - center / spread @ hidden, "out": out}
    return {name: tensor.numpy() for name, tensor in found.items()}


def contrast(estimates: Tensor, originals: Tensor, identities: Tensor) -> Tensor:
    """How badly each estimate finds its own original among those of the batch's other people: cross entropy of the cosines over
    TEMPERATURE (InfoNCE, arXiv 1807.03748).

    Args:
        estimates: float (B, D).
        originals: float (B, D), unit rows.
        identities: int64 (B,); other images of the same person take no part.

    Returns:
        A scalar.
    """
    scores = functional.normalize(estimates) @ originals.T / TEMPERATURE
    same = (identities[:, None] == identities) & ~torch.eye(len(identities), dtype=torch.bool)
    return functional.cross_entropy(scores.masked_fill(same, -torch.inf), torch.arange(len(identities)))


def _scales(x: Tensor, weight: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean row (D,) and root mean squared distance from it, and the mean length of the linear estimates; a block at a time."""
    blocks = x.split(8192)
    center = torch.stack([rows.double().sum(0) for rows in blocks]).sum(0).div(len(x)).float()
    spread = torch.stack([(rows.float() - center).square().sum() for rows in blocks]).sum().div(len(x)).sqrt()
    size = torch.stack([(rows.float() @ weight + offset).norm(dim=1).sum() for rows in blocks]).sum() / len(x)
    return center, spread.clamp(min=1e-6), size.clamp(min=1e-12)
