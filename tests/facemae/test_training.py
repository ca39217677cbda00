from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from facemae.loss import LossConfig, ReconstructionLoss
from facemae.model import Architecture, MaskedAutoencoder, to_tensor
from facemae.training import Batch, batch_loss, fit, learning_rate, param_groups

MICRO = Architecture("micro", 48, 2, 2, 32, 1, 2, patch_size=8, img_size=32)


class StubRecognizer(nn.Module):
    """Differentiable unit embeddings: a fixed random projection of the blurred picture."""

    projection: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(192, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [functional.normalize(functional.avg_pool2d(images, 4).flatten(1) @ self.projection)]


def new_model() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(MICRO)


def pictures(num_pictures: int = 8) -> np.ndarray:
    """Smooth colour gradients, each different: easy enough to learn in a few steps."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:32, 0:32] / 31
    corners = generator.uniform(0, 255, (4, num_pictures, 1, 1, 3))
    weights = [((1 - y) * (1 - x)), ((1 - y) * x), (y * (1 - x)), (y * x)]
    return sum(w[None, :, :, None] * c for w, c in zip(weights, corners, strict=True)).astype(np.uint8)


def batches(source: np.ndarray, steps: int) -> Iterator[Batch]:
    embeddings = StubRecognizer()(to_tensor(torch.from_numpy(source)))[0].numpy()
    keys = [str(i) for i in range(len(source))]
    for epoch in range(steps):
        yield Batch(source, keys, np.arange(len(source)), embeddings, epoch)


def losses_of(preset: str, steps: int = 60, **options: Any) -> list[float]:
    history: list[float] = []
    loss = ReconstructionLoss(LossConfig.preset(preset), StubRecognizer())
    done = fit(new_model(), loss, batches(pictures(), steps), steps=steps, on_step=lambda _, m: history.append(m["loss"].item()), **options)
    assert done == len(history) == steps
    return history


@pytest.mark.parametrize("preset", ["mse", "irm", "irm+pixel", "irm+instance"])
def test_a_few_steps_reduce_every_loss(preset: str) -> None:
    history = losses_of(preset, lr=3e-3, warmup=5, clip_grad=1.0)
    assert np.mean(history[-5:]) < 0.4 * np.mean(history[:5])


def test_bfloat16_trains_too() -> None:
    history = losses_of("mse", lr=3e-3, bf16=True)
    assert np.mean(history[-5:]) < 0.4 * np.mean(history[:5])
    assert history[:3] != losses_of("mse", steps=3, lr=3e-3, bf16=False)


def test_training_repeats_itself_and_the_seed_changes_the_masks() -> None:
    first, second, other = losses_of("mse", 5), losses_of("mse", 5), losses_of("mse", 5, seed=1)
    assert first == second
    assert first[0] != other[0]


def test_gradients_are_clipped() -> None:
    model = new_model()
    fit(model, ReconstructionLoss(LossConfig.preset("mse")), batches(pictures(), 1), steps=1, clip_grad=1e-3)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_fit_stops_with_the_batches_and_takes_none_too_many() -> None:
    loss, source = ReconstructionLoss(LossConfig.preset("mse")), batches(pictures(2), 3)
    assert fit(new_model(), loss, source, steps=2) == 2
    assert next(source).epoch == 2
    assert fit(new_model(), loss, batches(pictures(2), 3), steps=9) == 3
    assert fit(new_model(), loss, [], steps=9) == 0


def test_fit_leaves_the_model_ready_for_use_and_reports_the_rate() -> None:
    model, rates = new_model(), []
    loss = ReconstructionLoss(LossConfig.preset("mse"))
    fit(model, loss, batches(pictures(2), 4), steps=4, lr=1.0e-3, warmup=2, on_step=lambda i, m: rates.append((i, m["lr"].item())))
    assert not model.training
    assert rates == [(i, pytest.approx(learning_rate(i, base_lr=1e-3, total=5, warmup=2))) for i in (1, 2, 3, 4)]


def test_a_loss_that_is_not_finite_stops_the_training() -> None:
    images = torch.full((1, 3, 32, 32), torch.inf)
    with pytest.raises(FloatingPointError, match="at step 1: lower lr"):
        fit(new_model(), ReconstructionLoss(LossConfig.preset("mse")), [Batch(images, ["a"])], steps=1)


@torch.no_grad()
def test_pictures_and_tensors_give_one_loss_and_the_epoch_another() -> None:
    model, loss = new_model(), ReconstructionLoss(LossConfig.preset("mse"))
    keys, source = ["a", "b"], torch.from_numpy(pictures(2))

    def value(images: np.ndarray | Tensor, epoch: int) -> float:
        return batch_loss(model, loss, Batch(images, keys, epoch=epoch), num_patches=16, mask_ratio=0.75, seed=0)[0].item()

    assert value(source.numpy(), 0) == value(source, 0) == value(to_tensor(source), 0)
    assert value(source, 0) != value(source, 1)


def test_biases_norms_and_tokens_have_no_weight_decay() -> None:
    model = new_model()
    model.encoder_embed.weight.requires_grad_(False)
    decayed, plain = param_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed_names, plain_names = ({names[id(p)] for p in group["params"]} for group in (decayed, plain))
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert decayed_names | plain_names == set(names.values()) - {"encoder_embed.weight"}
    assert "mask_token" in plain_names
    assert "encoder_norm.weight" in plain_names
    assert all(name.endswith("weight") and "norm" not in name for name in decayed_names)
    assert all(name.endswith("bias") or "norm" in name or name == "mask_token" for name in plain_names)


@pytest.mark.parametrize(("step", "rate"), [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1), (999, 0.1)])
def test_the_rate_rises_in_a_line_and_falls_in_half_a_cosine(step: int, rate: float) -> None:
    assert learning_rate(step, base_lr=1.0, total=110, warmup=10, min_lr=0.1) == pytest.approx(rate)


@given(st.floats(0, 1e9), st.floats(1, 1e9), st.floats(0, 1), st.floats(0, 1))
def test_the_rate_stays_in_its_bounds(step: float, total: float, warmup_share: float, min_share: float) -> None:
    rate = learning_rate(step, base_lr=2.0, total=total, warmup=warmup_share * total, min_lr=2.0 * min_share)
    lowest = 0.0 if step < warmup_share * total else 2.0 * min_share
    assert lowest - 1e-12 <= rate <= 2.0 + 1e-12
    assert math.isfinite(rate)
