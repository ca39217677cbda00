from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from facemae.recognizer.margin import ArcFace, CosFace


def reference_logits(head, embeddings, labels, harden):
    """Class by class in float64."""
    centres = head.weight.detach().double().numpy()
    rows = embeddings.double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    centres = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    logits = rows @ centres.T
    for row, label in enumerate(labels):
        logits[row, label] = harden(logits[row, label])
    return head.scale * logits


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return 5 * torch.randn(9, 16, generator=generator), torch.randint(0, 6, (9,), generator=generator)


def test_cosface_against_its_formula(batch):
    head = CosFace(16, 6, scale=30.0, margin=0.35)
    expected = reference_logits(head, *batch, lambda cosine: cosine - 0.35)
    np.testing.assert_allclose(head(*batch).detach().numpy(), expected, atol=1e-4)


def test_arcface_against_its_formula(batch):
    head = ArcFace(16, 6, scale=30.0, margin=0.5)
    expected = reference_logits(head, *batch, lambda cosine: np.cos(np.arccos(cosine) + 0.5))
    np.testing.assert_allclose(head(*batch).detach().numpy(), expected, atol=1e-4)


def test_arcface_never_rewards_a_larger_angle():
    """cos(theta + margin) alone would rise again past pi - margin."""
    angles = torch.linspace(0.01, 3.13, 500, dtype=torch.float64).unsqueeze(1)
    hardened = ArcFace(4, 2).harden(angles.cos()).squeeze(1)
    assert (hardened.diff() < 0).all()


@pytest.mark.parametrize("head", [CosFace(4, 3), ArcFace(4, 3)])
def test_finite_gradient_on_and_opposite_a_centre(head):
    rows = torch.stack([head.weight[0], -head.weight[0]]).detach().requires_grad_()
    functional.cross_entropy(head(rows, torch.tensor([0, 0])), torch.tensor([0, 0])).backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()


def test_float32_under_autocast(batch):
    head = CosFace(16, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(*batch)
    torch.testing.assert_close(logits, head(*batch), rtol=0, atol=0)


def test_centres_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = CosFace(8, 5, seed=3).weight
    torch.manual_seed(2)
    torch.testing.assert_close(CosFace(8, 5, seed=3).weight, first, rtol=0, atol=0)
    assert not torch.equal(CosFace(8, 5, seed=4).weight, first)
