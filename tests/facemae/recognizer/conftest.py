from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facemae.recognizer.backbone import Backbone, create_backbone
from facemae.recognizer.compact import CompactNet
from facemae.recognizer.export import export_onnx


@pytest.fixture(scope="session")
def compact_net() -> CompactNet:
    """An untrained network whose batch norms have seen data, in eval mode."""
    torch.manual_seed(0)
    net = CompactNet(dim=32, width=8)
    with torch.no_grad():
        for _ in range(5):
            net(torch.rand(8, 3, 112, 112) * 2 - 1)
    return net.eval()


@pytest.fixture(scope="session")
def compact_file(compact_net, tmp_path_factory) -> Path:
    """FILE.onnx of `compact_net`, with a normalisation of its own in FILE.json."""
    path = tmp_path_factory.mktemp("recognizer") / "compact.onnx"
    export_onnx(compact_net, path, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    return path


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Callable[[str], tuple[Backbone, Path]]:
    """A backbone by its name, batch norms settled, in eval mode, and its FILE.onnx; each is made once."""

    @functools.cache
    def export(name: str) -> tuple[Backbone, Path]:
        net = create_backbone(name, dim=32, seed=1)
        for module in net.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0  # takes over the statistics of the one batch that comes
        with torch.no_grad():
            net(torch.rand(8, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1)
        path = tmp_path_factory.mktemp("exported") / "net.onnx"
        export_onnx(net.eval(), path)
        return net, path

    return export


@pytest.fixture(scope="session")
def noise_pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (21, 112, 112, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """Where the real faces and recognisers are."""
    folder = Path(os.environ.get("FACEMAE_SHARED", Path(__file__).parents[4] / "shared"))
    if not (folder / "models").is_dir() or not (folder / "faces").is_dir():
        pytest.skip(f"no real faces and recognisers in {folder}: set FACEMAE_SHARED")
    return folder


@pytest.fixture(scope="session")
def face_pictures(shared_folder) -> np.ndarray:
    """40 real faces: 20 people, two pictures each."""
    people = sorted(folder for folder in (shared_folder / "faces" / "lfw").iterdir() if len(list(folder.iterdir())) > 1)
    files = [file for folder in people[:20] for file in sorted(folder.iterdir())[:2]]
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
