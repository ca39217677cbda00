from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from facemae.recognizer.margin import AdaFace, ArcFace, CosFace, MarginHead, create_margin


def reference_logits(head, embeddings, labels, harden):
    """Class by class in float64; `harden` gets the cosine and the length."""
    centers = head.weight.detach().double().numpy()
    rows = embeddings.double().numpy()
    lengths = np.linalg.norm(rows, axis=1)
    rows = rows / lengths[:, None]
    centers = centers / np.linalg.norm(centers, axis=1, keepdims=True)
    logits = rows @ centers.T
    for row, label in enumerate(labels):
        logits[row, label] = harden(logits[row, label], lengths[row])
    return head.margin.scale * logits


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(0.2, 3, 9).unsqueeze(1)
    return lengths * torch.randn(9, 16, generator=generator), torch.randint(0, 6, (9,), generator=generator)


def test_cosface_against_its_formula(batch):
    head = MarginHead(16, 6, CosFace(margin=0.35, scale=30.0))
    expected = reference_logits(head, *batch, lambda cosine, _: cosine - 0.35)
    np.testing.assert_allclose(head(*batch).detach().numpy(), expected, atol=1e-4)


def test_arcface_against_its_formula(batch):
    head = MarginHead(16, 6, ArcFace(margin=0.5, scale=30.0))
    expected = reference_logits(head, *batch, lambda cosine, _: np.cos(np.arccos(cosine) + 0.5))
    np.testing.assert_allclose(head(*batch).detach().numpy(), expected, atol=1e-4)


def test_adaface_against_its_formula(batch):
    """Statistics that move with each of three batches, then stand still in eval mode."""
    margin = AdaFace(margin=0.3, scale=30.0, h=0.5, t_alpha=0.4)
    head = MarginHead(16, 6, margin)
    mean, std = 20.0, 100.0
    for growth, training in ((1, True), (7, True), (2, True), (9, False)):
        embeddings = growth * batch[0]
        lengths = np.linalg.norm(embeddings.double().numpy(), axis=1).clip(0.001, 100)
        if training:
            mean, std = 0.6 * mean + 0.4 * lengths.mean(), 0.6 * std + 0.4 * lengths.std(ddof=1)

        def harden(cosine, length, mean=mean, std=std):
            scaler = np.clip((np.clip(length, 0.001, 100) - mean) / (std + 1e-3) * 0.5, -1, 1)
            angle = np.clip(np.arccos(cosine) - 0.3 * scaler, 1e-3, np.pi - 1e-3)
            return np.cos(angle) - (0.3 + 0.3 * scaler)

        logits = head.train(training)(embeddings, batch[1])
        np.testing.assert_allclose(logits.detach().numpy(), reference_logits(head, embeddings, batch[1], harden), atol=1e-3)
        np.testing.assert_allclose([margin.mean.item(), margin.std.item()], [mean, std], rtol=1e-5)


def test_adaface_is_arcface_in_the_worst_pictures_and_shifted_cosface_in_average_ones():
    margin = AdaFace(margin=0.4).eval()
    cosines = torch.linspace(-0.8, 0.9, 7)
    margin.mean.fill_(20)
    margin.std.fill_(1)
    torch.testing.assert_close(margin(cosines, torch.full((7,), 0.5)), ArcFace(margin=0.4)(cosines, cosines))
    torch.testing.assert_close(margin(cosines, torch.full((7,), 20.0)), CosFace(margin=0.4)(cosines, cosines))


def test_adaface_keeps_its_statistics_from_gradients_and_single_rows():
    margin = AdaFace()
    norms = torch.tensor([3.0, 5.0], requires_grad=True)
    cosines = torch.tensor([0.1, 0.2], requires_grad=True)
    margin(cosines, norms).sum().backward()
    assert norms.grad is None
    assert cosines.grad is not None
    assert set(margin.state_dict()) == {"mean", "std"}
    before = margin.std.clone()
    assert margin(torch.tensor([0.1]), torch.tensor([3.0])).isfinite().all()
    assert torch.equal(margin.std, before)


def test_arcface_never_rewards_a_larger_angle():
    """cos(theta + margin) alone would rise again past pi - margin."""
    angles = torch.linspace(0.01, 3.13, 500, dtype=torch.float64)
    hardened = ArcFace()(angles.cos(), angles)
    assert (hardened.diff() < 0).all()


@pytest.mark.parametrize("name", ["cosface", "arcface", "adaface"])
def test_finite_gradient_on_and_opposite_a_center(name):
    head = MarginHead(4, 3, create_margin(name))
    rows = torch.stack([head.weight[0], -head.weight[0]]).detach().requires_grad_()
    functional.cross_entropy(head(rows, torch.tensor([0, 0])), torch.tensor([0, 0])).backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()
    assert head.weight.grad is not None
    assert head.weight.grad.isfinite().all()


def test_float32_under_autocast(batch):
    head = MarginHead(16, 6, CosFace())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(*batch)
    torch.testing.assert_close(logits, head(*batch), rtol=0, atol=0)


def test_centers_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = MarginHead(8, 5, CosFace(), seed=3).weight
    torch.manual_seed(2)
    torch.testing.assert_close(MarginHead(8, 5, CosFace(), seed=3).weight, first, rtol=0, atol=0)
    assert not torch.equal(MarginHead(8, 5, CosFace(), seed=4).weight, first)


def test_margins_by_name():
    made = create_margin("adaface", margin=0.3, scale=None, h=0.2)
    assert isinstance(made, AdaFace)
    assert (made.margin, made.scale, made.h, made.t_alpha) == (0.3, 64.0, 0.2, 0.01)
    assert create_margin("arcface").margin == 0.5
    with pytest.raises(ValueError, match=r"unknown margin 'sphereface': give one of cosface, arcface, adaface"):
        create_margin("sphereface")
    with pytest.raises(ValueError, match="CosFace: margin must be 0 or more"):
        create_margin("cosface", margin=-0.1)
    with pytest.raises(ValueError, match="t_alpha"):
        create_margin("adaface", t_alpha=0.0)
