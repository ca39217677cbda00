from __future__ import annotations

import json
import warnings
from hashlib import sha256

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from facemae.recognizer.compact import CompactNet
from facemae.recognizer.export import export_onnx
from facemae.recognizer.onnx import OnnxRecognizer


@pytest.mark.parametrize("block", ["plain", "residual", "separable"])
def test_onnxruntime_gives_what_torch_gives(tmp_path, block):
    torch.manual_seed(0)
    net = CompactNet(dim=16, width=8, block=block)
    net(torch.rand(8, 3, 112, 112))
    path = tmp_path / "net.onnx"
    export_onnx(net, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for num_images in (1, 2, 5):
        images = torch.rand(num_images, 3, 112, 112) * 2 - 1
        with torch.no_grad():
            expected = net.eval()(images).numpy()
        np.testing.assert_allclose(session.run(["embedding"], {"input": images.numpy()})[0], expected, atol=1e-4)
    OnnxRecognizer.load(path).differentiable()  # raises unless it converts back to the same network


def compare_with_onnxruntime(net, path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for num_images in (1, 3):
        images = torch.rand(num_images, 3, 112, 112) * 2 - 1
        with torch.no_grad():
            expected = net(images).numpy()
        result = session.run(["embedding"], {"input": images.numpy()})[0]
        assert result.shape == (num_images, 32)
        np.testing.assert_allclose(result, expected, atol=1e-4)
        assert np.abs(expected).mean() > 1e-2  # so that 1e-4 says something


@pytest.mark.parametrize("name", ["iresnet18", "timm/test_vit", "timm/test_resnet"])
def test_every_kind_of_backbone(exported, name):
    compare_with_onnxruntime(*exported(name))


@pytest.mark.parametrize("name", ["mobilefacenet", "timm/vit_tiny_patch16_224", "timm/mobilenetv3_small_050"])
def test_more_backbones(long, exported, name):
    net, path = exported(name)
    compare_with_onnxruntime(net, path)
    OnnxRecognizer.load(path).differentiable()


def test_sidecar_and_hash(compact_net, tmp_path):
    path = tmp_path / "net.onnx"
    digest = export_onnx(compact_net, path, name="small", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    assert digest == sha256(path.read_bytes()).hexdigest()
    expected = {"name": "small", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "sha256": digest}
    assert json.loads((tmp_path / "net.json").read_text()) == expected
    assert {file.name for file in tmp_path.iterdir()} == {"net.onnx", "net.json"}


def test_same_weights_same_bytes_and_nothing_of_this_machine(compact_net, tmp_path):
    digests = {export_onnx(compact_net, tmp_path / f"{copy}.onnx") for copy in "ab"}
    assert len(digests) == 1
    content = (tmp_path / "a.onnx").read_bytes()
    assert b".py" not in content
    assert b"/facemae" not in content
    onnx.checker.check_model(onnx.load(tmp_path / "a.onnx"))


def test_quiet_and_the_mode_is_kept(tmp_path, capfd):
    net = CompactNet(dim=16, width=4).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(net, tmp_path / "net.onnx")
    assert net.training
    assert capfd.readouterr() == ("", "")


def test_bad_arguments_are_refused(compact_net, tmp_path):
    with pytest.raises(ValueError, match=r"net\.pt: .*FILE\.onnx"):
        export_onnx(compact_net, tmp_path / "net.pt")
    with pytest.raises(ValueError, match="std must be three floats"):
        export_onnx(compact_net, tmp_path / "net.onnx", std=(127.5, 127.5, 127.5))
    assert not list(tmp_path.iterdir())
