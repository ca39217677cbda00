from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from facemae.loss import PRESETS, LossConfig, ReconstructionLoss, ssim_loss


class StubRecognizer(nn.Module):
    """A small convolution network with the interface of a frozen recogniser; float64 like the tests that use it."""

    def __init__(self, num_layers: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.num_layers = num_layers
        self.first = nn.Parameter(torch.randn(4, 3, 4, 4, generator=generator, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(6, 4 * 4 * 4, generator=generator, dtype=torch.float64))
        self.norm = nn.BatchNorm2d(4, affine=False).double()

    def forward(self, images: Tensor) -> list[Tensor]:
        inner = self.norm(functional.conv2d(images.to(self.first.dtype), self.first, stride=4)).tanh()
        features = [inner.flatten(1) @ self.second.T, inner.flatten(1), images.flatten(1).to(inner.dtype) + 1.5]
        return [functional.normalize(feature) for feature in features[: 1 + self.num_layers]]


def batch(num_pictures: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, output = torch.rand(2, num_pictures, 3, 16, 16, generator=generator) * 2 - 1
    return images, output * 1.3


def value(config: LossConfig, num_layers: int = 0) -> tuple[float, dict[str, float]]:
    """The loss of the standard batch."""
    images, output = batch()
    recognizer = StubRecognizer(num_layers)
    real = recognizer.eval()(images)[0]
    loss, metrics = ReconstructionLoss(config, recognizer)(images, output, real)
    return loss.item(), {name: metric.item() for name, metric in metrics.items()}


def unit_features(num_layers: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    images, output = batch()
    recognizer = StubRecognizer(num_layers).eval()
    with torch.no_grad():
        return [z.numpy() for z in recognizer(images)], [z.numpy() for z in recognizer(output.clamp(-1, 1))]


def reference_relation(real: np.ndarray, fake: np.ndarray, distance: str) -> float:
    total = np.float64(0)
    for i in range(len(real)):
        for j in range(len(real)):
            gaps = [(1 - z[i] @ z[j]) if distance == "cosine" else np.linalg.norm(z[i] - z[j]) for z in (real, fake)]
            total += (gaps[0] - gaps[1]) ** 2
    return total / len(real) ** 2


def test_pixel_terms_are_over_all_pixels() -> None:
    images, output = (tensor.numpy().astype(np.float64) for tensor in batch())
    assert value(LossConfig.preset("mse"))[0] == pytest.approx(np.mean((images - output) ** 2), rel=1e-5)
    assert value(LossConfig.preset("mse", pixel_kind="l1"))[0] == pytest.approx(np.mean(np.abs(images - output)), rel=1e-5)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("num_layers", [0, 2])
def test_the_relation_term_is_the_mean_over_embedding_and_layers(distance: Literal["cosine", "euclidean"], num_layers: int) -> None:
    config = LossConfig(distance=distance, layers=("inner", "pixels")[:num_layers])
    pairs = zip(*unit_features(num_layers), strict=True)
    expected = np.mean([reference_relation(real, fake, distance) for real, fake in pairs])
    assert value(config, num_layers)[0] == pytest.approx(expected, rel=1e-4)


def test_instance_and_perceptual_terms() -> None:
    real, fake = unit_features(2)
    instance = np.mean([1 - r @ f for r, f in zip(real[0], fake[0], strict=True)])
    assert value(LossConfig(relation=0, instance=1))[0] == pytest.approx(instance, rel=1e-5)
    perceptual = np.mean([np.sum((r - f) ** 2, axis=1).mean() for r, f in zip(real[1:], fake[1:], strict=True)])
    config = LossConfig.preset("mse", pixel_kind="perceptual", layers=("inner", "pixels"))
    assert value(config, 2)[0] == pytest.approx(perceptual, rel=1e-5)


def test_terms_are_weighted_and_reported() -> None:
    loss, metrics = value(LossConfig(relation=2.0, pixel=0.5, instance=0.25))
    alone = (LossConfig(), LossConfig.preset("mse"), LossConfig(relation=0.0, instance=1.0))
    parts = [value(config)[0] for config in alone]
    assert [metrics["relation"], metrics["pixel"], metrics["instance"]] == pytest.approx(parts)
    assert loss == metrics["loss"] == pytest.approx(2 * parts[0] + 0.5 * parts[1] + 0.25 * parts[2])


def test_perfect_reconstructions_cost_nothing() -> None:
    images, _ = batch()
    recognizer = StubRecognizer()
    for name in PRESETS:
        for kind in ("mse", "l1", "ssim"):
            loss = ReconstructionLoss(LossConfig.preset(name, pixel_kind=kind), recognizer)
            assert abs(loss(images, images, recognizer(images)[0])[0].item()) < 1e-6


def test_ssim_equals_the_window_by_window_reference() -> None:
    images, output = (tensor.numpy().astype(np.float64) for tensor in batch(2))
    weights = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    window = np.outer(weights, weights) / weights.sum() ** 2
    values = []
    for x, y in zip(images.reshape(-1, 16, 16), output.reshape(-1, 16, 16), strict=True):
        for top in range(6):
            for left in range(6):
                a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
                mean_a, mean_b = np.sum(window * a), np.sum(window * b)
                var_a, var_b = np.sum(window * (a - mean_a) ** 2), np.sum(window * (b - mean_b) ** 2)
                covariance = np.sum(window * (a - mean_a) * (b - mean_b))
                numerator = (2 * mean_a * mean_b + 0.0004) * (2 * covariance + 0.0036)
                values.append(numerator / ((mean_a**2 + mean_b**2 + 0.0004) * (var_a + var_b + 0.0036)))
    found = ssim_loss(torch.from_numpy(output).float(), torch.from_numpy(images).float())
    assert found.item() == pytest.approx(1 - np.mean(values), abs=1e-5)


def test_the_recogniser_is_frozen_and_stays_in_evaluation_mode() -> None:
    images, output = batch()
    recognizer = StubRecognizer()
    loss = ReconstructionLoss(LossConfig(), recognizer).train()
    output.requires_grad_()
    loss(images, output, recognizer(images)[0])[0].backward()
    assert output.grad is not None
    assert output.grad.abs().sum() > 0
    assert not recognizer.training
    assert all(parameter.grad is None for parameter in recognizer.parameters())
    assert recognizer.norm.running_mean is not None
    assert not recognizer.norm.running_mean.any()


def test_the_recogniser_sees_clamped_pixels_and_the_gradient_passes_through() -> None:
    images, output = batch()
    real = StubRecognizer().eval()(images)[0]
    gradients, losses = [], []
    for reconstruction in (output, output.clamp(-1, 1)):
        reconstruction = reconstruction.clone().requires_grad_()
        loss = ReconstructionLoss(LossConfig(), StubRecognizer())(images, reconstruction, real)[0]
        loss.backward()
        losses.append(loss.item())
        assert reconstruction.grad is not None
        gradients.append(reconstruction.grad)
    assert losses[0] == losses[1]
    assert torch.equal(gradients[0], gradients[1])


def test_half_precision_is_for_the_networks_alone() -> None:
    images, output = batch()
    exact = value(LossConfig.preset("irm+pixel"))[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = ReconstructionLoss(LossConfig.preset("irm+pixel"), StubRecognizer())(images, output, StubRecognizer().eval()(images)[0])[1]
    assert found["pixel"].item() == exact["pixel"]
    assert found["relation"].item() == pytest.approx(exact["relation"], rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"relation": -1.0}, "give none below 0"),
        ({"relation": 0.0}, "one above 0"),
        ({"pixel_kind": "l3"}, "pixel_kind is 'l3': choose one of mse, l1, ssim, perceptual"),
        ({"distance": "manhattan"}, "choose one of cosine, euclidean"),
        ({"pixel": 1.0, "pixel_kind": "perceptual"}, "name them in layers"),
    ],
)
def test_an_impossible_config_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**fields)


def test_what_is_missing_is_named() -> None:
    images, output = batch()
    with pytest.raises(ValueError, match="unknown loss preset 'gan': choose one of irm, mse"):
        LossConfig.preset("gan")
    with pytest.raises(ValueError, match="give a recognizer"):
        ReconstructionLoss(LossConfig())
    loss = ReconstructionLoss(LossConfig(), StubRecognizer())
    with pytest.raises(ValueError, match=r"real_embeddings are None: give \(5, 6\)"):
        loss(images, output)
    with pytest.raises(ValueError, match=r"real_embeddings are \(5, 7\): give \(5, 6\)"):
        loss(images, output, torch.zeros(5, 7))
    with pytest.raises(ValueError, match=r"gives 0 layers, but the loss names \('inner',\)"):
        ReconstructionLoss(LossConfig(layers=("inner",)), StubRecognizer())(images, output, StubRecognizer().eval()(images)[0])
    assert ReconstructionLoss(LossConfig.preset("mse"))(images, output)[1].keys() == {"pixel", "loss"}


CONFIG = LossConfig(relation=1.0, pixel=0.7, instance=0.3, layers=("inner",))


def gradient_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Gradient of the loss of `images` as the optimiser of `model`, wrapped or not, would see it."""
    recognizer = StubRecognizer(num_layers=1)
    loss = ReconstructionLoss(CONFIG, recognizer)
    loss(images, model(images), recognizer(images)[0])[0].backward()
    found = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    gradients = {name: gradient for name, gradient in found.items() if gradient is not None}
    assert gradients.keys() == found.keys()
    return gradients


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1))


def compare_with_one_process(rank: int, folder: str, splits: list[list[int]]) -> None:
    """Runs in every rank: DDP on this rank's rows against one process on all of them."""
    torch.set_num_threads(1)
    images, _ = batch(sum(splits[0]))
    expected = gradient_of(small_model(), images)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for split in splits:
        found = gradient_of(DistributedDataParallel(small_model()), images.split(split)[rank])
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=f"{split} {name}")
    dist.barrier()
    # A gloo thread may still be letting go of a Python object that the backward pass left in its work item. It needs the
    # interpreter's lock for that, and aborts the process (torch 2.15, Python 3.11) if the interpreter is shutting down.
    os._exit(0)


def test_two_ranks_get_the_gradient_of_the_global_batch(tmp_path: Path) -> None:
    splits = [[4, 4], [6, 2], [1, 7]]
    torch.multiprocessing.spawn(compare_with_one_process, (str(tmp_path), splits), nprocs=2)
