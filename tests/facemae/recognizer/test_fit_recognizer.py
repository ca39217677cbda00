from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from facemae.recognizer.compact import CompactNet
from facemae.recognizer.margin import AdaFace, ArcFace, CosFace, MarginHead
from facemae.recognizer.train import fit_recognizer

NUM_PEOPLE = 40  # the last 10 are never trained on


def blobs(people: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A person is three coloured discs; each picture has its own light and stray disc: uint8 (N, 112, 112, 3)."""
    y, x = np.mgrid[:112, :112]
    pictures = rng.normal(0, 40, (len(people), 112, 112, 3)) + rng.uniform(60, 200, (len(people), 1, 1, 3))
    for picture, person in zip(pictures, people, strict=True):
        traits = np.random.default_rng(int(person))
        for source in (traits, traits, traits, rng):
            center, colour = source.uniform(20, 92, 2), source.uniform(-60, 60, 3)
            picture[(y - center[0]) ** 2 + (x - center[1]) ** 2 < 20**2] += colour
    return pictures.clip(0, 255).astype(np.uint8)


def batches(num_classes: int, batch_size: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    people = np.repeat(np.arange(num_classes), 8)
    pictures = blobs(people, rng)
    while True:
        chosen = rng.permutation(len(people))[:batch_size]
        yield pictures[chosen], people[chosen]


def verification_auc(net) -> float:
    """Chance that a pair of one person is nearer than a pair of two, for people the network never saw."""
    people = np.repeat(np.arange(NUM_PEOPLE - 10, NUM_PEOPLE), 4)
    images = torch.from_numpy(blobs(people, np.random.default_rng(1))).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        rows = functional.normalize(net.eval()(images)).numpy()
    cosines, same = rows @ rows.T, people[:, None] == people
    genuine, impostor = cosines[same & ~np.eye(len(people), dtype=bool)], cosines[~same]
    return float(np.mean(genuine[:, None] > impostor))


@pytest.mark.parametrize("block", ["residual", "plain"])
def test_training_separates_people_never_seen(block):
    torch.manual_seed(0)
    net = CompactNet(dim=32, width=16, block=block)
    before = verification_auc(net)
    losses = []
    head = fit_recognizer(
        net,
        batches(NUM_PEOPLE - 10, 64),
        NUM_PEOPLE - 10,
        steps=80,
        lr=0.1,
        warmup=10,
        flip=False,  # a mirrored person is another one here
        head=MarginHead(32, NUM_PEOPLE - 10, CosFace(margin=0.2, scale=32)),
        on_step=lambda step, loss, rate: losses.append(loss),
    )
    after = verification_auc(net)
    assert isinstance(head.margin, CosFace)
    assert not net.training
    assert np.mean(losses[-5:]) < 0.2 * np.mean(losses[:5])
    assert after > 0.82
    assert after > before + 0.15


def small_run(**options):
    torch.manual_seed(0)
    net = CompactNet(dim=8, width=4)
    trace = []
    options = {"num_classes": 6, "steps": 4, "on_step": lambda *step: trace.append(step)} | options
    head = fit_recognizer(net, options.pop("batches", batches(6, 8)), **options)
    return net, head, trace


def test_same_seed_same_weights():
    weights = [small_run(seed=seed)[0].head[2].weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_learning_rate_rises_then_falls_to_zero():
    _, _, trace = small_run(lr=0.2, warmup=1)
    assert [step for step, _, _ in trace] == [0, 1, 2, 3]
    expected = [0.2 * 0.5 * 1.0, 0.2 * 0.75**2, 0.2 * 0.5**2, 0.2 * 0.25**2]
    np.testing.assert_allclose([rate for _, _, rate in trace], expected)


@pytest.mark.parametrize("margin", [ArcFace, AdaFace])
def test_any_margin_head(margin):
    head = MarginHead(8, 6, margin()).eval()
    before = head.weight.detach().clone()
    assert small_run(head=head)[1] is head
    assert not torch.equal(head.weight, before)
    assert head.training


def test_errors_name_step_and_remedy():
    pictures, people = next(batches(6, 8))
    with pytest.raises(ValueError, match="ended after 1 of 4 steps"):
        small_run(batches=[(pictures, people)])
    with pytest.raises(ValueError, match=r"step 0 has classes .* expected 0 \.\. 2"):
        small_run(num_classes=3, batches=[(pictures, people)] * 4)
    with pytest.raises(ValueError, match=r"loss is nan at step \d of 4: lower lr"):
        small_run(lr=1e30, clip_norm=1e30, batches=[(pictures, people)] * 4)
