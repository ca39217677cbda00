from __future__ import annotations

import pytest
import torch

from facemae.recognizer.compact import CompactNet

BLOCKS = ["plain", "residual", "separable"]


@pytest.mark.parametrize("block", BLOCKS)
def test_embeds_each_image_by_itself(block):
    torch.manual_seed(0)
    net = CompactNet(dim=24, width=8, block=block).eval()
    images = torch.rand(3, 3, 112, 112) * 2 - 1
    with torch.no_grad():
        rows = net(images)
        alone = net(images[1:2])
    assert rows.shape == (3, 24)
    torch.testing.assert_close(rows[1:2], alone, atol=1e-5, rtol=1e-5)
    assert (rows[0] - rows[1]).abs().max() > 1e-4


def test_blocks_and_widths_are_different_networks():
    def shapes(**options):
        return [tuple(parameter.shape) for parameter in CompactNet(**options).parameters()]

    variants = [shapes(block=block, width=width) for block in BLOCKS for width in (16, 32)]
    assert all(a != b for i, a in enumerate(variants) for b in variants[:i])


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"'transformer'.*plain, residual, separable"):
        CompactNet(block="transformer")  # type: ignore[arg-type]
    for width in (0, 31):
        with pytest.raises(ValueError, match=rf"width .* not {width}"):
            CompactNet(width=width)
