from __future__ import annotations

import pytest
import torch

from facemae.recognizer.backbone import create_backbone

SMALL = ["iresnet18", "mobilefacenet", "compact-plain-8", "timm/vit_tiny_patch16_224", "timm/mobilenetv3_small_050"]


def num_parameters(name: str, dim: int = 512) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in create_backbone(name, dim).parameters())


@pytest.mark.parametrize(
    ("name", "published"), [("iresnet18", 24.0e6), ("iresnet34", 34.1e6), ("iresnet50", 43.6e6), ("iresnet100", 65.2e6)]
)
def test_iresnet_is_as_large_as_published(name, published):
    assert num_parameters(name) == pytest.approx(published, abs=0.05e6)


def test_mobilefacenet_is_as_large_as_published():
    assert num_parameters("mobilefacenet", 128) == pytest.approx(0.99e6, abs=0.015e6)


@pytest.mark.parametrize("name", SMALL)
def test_embeds_and_learns(name):
    net = create_backbone(name, dim=24, seed=1)
    assert (net.name, net.dim, net.training) == (name, 24, True)
    rows = net(torch.rand(4, 3, 112, 112) * 2 - 1)
    assert rows.shape == (4, 24)
    assert rows.dtype == torch.float32
    rows.square().mean().backward()
    missing = [name for name, parameter in net.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not missing
    with torch.no_grad():
        images = torch.rand(2, 3, 112, 112)
        torch.testing.assert_close(net.eval()(images)[:1], net(images[:1]), rtol=1e-3, atol=1e-4)  # no mixing of pictures


@pytest.mark.parametrize("name", ["compact-separable-4", "timm/mobilenetv3_small_050"])
def test_weights_depend_on_the_seed_alone(name):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = create_backbone(name, 8, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = create_backbone(name, 8, seed=3).state_dict(), create_backbone(name, 8, seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_feature_maps_of_iresnet():
    """Nothing is pooled before the first block, every stage halves the side."""
    net = create_backbone("iresnet18", 16).network
    shapes = []
    for stage in net.stages:
        stage.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:])))
    with torch.no_grad():
        assert net.eval().stem(torch.zeros(1, 3, 112, 112)).shape == (1, 64, 112, 112)
        net(torch.zeros(1, 3, 112, 112))
    assert shapes == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]


def test_compact_names():
    sizes = {
        name: num_parameters(name, 32) for name in ("compact", "compact-residual-32", "compact-16", "compact-plain", "compact-separable")
    }
    assert sizes["compact"] == sizes["compact-residual-32"]
    assert len(set(sizes.values())) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", r"unknown backbone 'resnet50': give one of iresnet18, .*mobilefacenet, compact\[-plain\|.*timm/NAME"),
        ("compact-wide", "unknown backbone 'compact-wide'"),
        ("compact-7", "width must be an even number"),
        ("timm/vit_tiny_patch16_242", r"timm has no network 'vit_tiny_patch16_242'; near: .*vit_tiny_patch16_224"),
        ("timm/hf-hub:someone/net", "timm has no network 'hf-hub:someone/net'"),
        ("timm/efficientformer_l1", "timm/efficientformer_l1 does not take 112 x 112 pictures"),
    ],
)
def test_errors_name_the_known_and_the_reason(name, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(name)
    with pytest.raises(ValueError, match="dim is 0"):
        create_backbone("compact", dim=0)
