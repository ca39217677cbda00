from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import nn

from facemae.recognizer.onnx import OnnxRecognizer
from tests.facemae.recognizer.graphs import graph_file, mean_colour

HALF = (0.5, 0.5, 0.5)


def to_images(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def recognizer(compact_file):
    return OnnxRecognizer.load(compact_file)


def test_same_embedding_as_onnxruntime(recognizer, noise_pictures):
    outputs = recognizer.differentiable()(to_images(noise_pictures))
    assert len(outputs) == 1
    np.testing.assert_allclose(outputs[0].numpy(), recognizer.embed(noise_pictures), atol=1e-5)


def test_gradient_reaches_the_images_alone(recognizer, noise_pictures):
    frozen = recognizer.differentiable()
    images = to_images(noise_pictures[:2]).requires_grad_()
    frozen(images)[0][:, 0].sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    # A small step along the gradient does what the gradient says.
    step = 1e-2 * images.grad / images.grad.norm()
    with torch.no_grad():
        gain = frozen(images + step)[0][:, 0].sum() - frozen(images - step)[0][:, 0].sum()
    assert float(gain) == pytest.approx(2 * float((images.grad * step).sum()), rel=0.05)


def test_always_in_eval_mode(tmp_path, noise_pictures):
    """A graph that keeps its batch norm; in train mode its output would depend on the batch."""
    norm = helper.make_node("BatchNormalization", ["input", "scale", "bias", "mean", "var"], ["normed"], name="norm")
    nodes = [norm, *mean_colour()]
    nodes[1].input[0] = "normed"
    values = [np.array(v, np.float32) for v in ([1, 2, 3], [0.1, 0.2, 0.3], [0, 0.1, 0.2], [1, 4, 9])]
    weights = dict(zip(("scale", "bias", "mean", "var"), values, strict=True))
    recognizer = OnnxRecognizer.load(graph_file(tmp_path / "norm.onnx", nodes, **weights), HALF, HALF)
    parent = nn.Sequential(recognizer.differentiable())
    parent.train()
    assert not any(module.training for module in parent[0].modules())
    np.testing.assert_allclose(parent(to_images(noise_pictures))[0].numpy(), recognizer.embed(noise_pictures), atol=1e-5)


def test_layers_against_onnxruntime(compact_file, recognizer, noise_pictures):
    """The inner values read off the same graph by onnxruntime."""
    model = onnx.load(compact_file)
    layers = [next(n.output[0] for n in model.graph.node if n.op_type == kind) for kind in ("Add", "PRelu")]
    model.graph.output.extend(onnx.ValueInfoProto(name=layer) for layer in layers)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    normalised = (noise_pictures / 255.0 - np.array(recognizer.mean)) / np.array(recognizer.std)
    values = session.run(layers, {"input": normalised.transpose(0, 3, 1, 2).astype(np.float32)})
    embedding, *features = recognizer.differentiable(layers)(to_images(noise_pictures))
    np.testing.assert_allclose(embedding.numpy(), recognizer.embed(noise_pictures), atol=1e-5)
    assert len(features) == 2
    for feature, value in zip(features, values, strict=True):
        expected = value.reshape(len(value), -1)
        np.testing.assert_allclose(feature.numpy(), expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_an_unknown_layer_lists_those_there_are(recognizer):
    with pytest.raises(ValueError, match=r"compact\.onnx: no layer 'nowhere'\. There are: .*prelu.*embedding"):
        recognizer.differentiable(["nowhere"])


def test_float32_rows_under_autocast(recognizer, noise_pictures):
    frozen = recognizer.differentiable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = frozen(to_images(noise_pictures))[0]
    assert rows.dtype == torch.float32
    np.testing.assert_allclose(rows.norm(dim=1).numpy(), 1, atol=1e-5)


def test_a_graph_that_does_not_convert_names_file_reason_and_remedy(tmp_path):
    clip = helper.make_node("Clip", ["input", "low", ""], ["clipped"], name="clip")
    nodes = [clip, *mean_colour()]
    nodes[1].input[0] = "clipped"
    path = graph_file(tmp_path / "clip.onnx", nodes, low=np.array(-0.9, np.float32))
    recognizer = OnnxRecognizer.load(path, HALF, HALF)
    with pytest.raises(ValueError, match=r"clip\.onnx: onnx2torch cannot convert .*another recogniser for the loss"):
        recognizer.differentiable()


def test_habits_of_torch_exporters_convert(tmp_path, noise_pictures):
    """A weight on its way to a Conv by an Identity, a PRelu slope (1, C, 1, 1), a Reshape with allowzero."""
    nodes = [
        helper.make_node("Identity", ["bias"], ["same_bias"]),
        helper.make_node("Conv", ["input", "kernel", "same_bias"], ["convolved"], strides=[8, 8]),
        helper.make_node("PRelu", ["convolved", "slope"], ["bent"]),
        helper.make_node("Reshape", ["bent", "shape"], ["embedding"], allowzero=1),
    ]
    rng = np.random.default_rng(0)
    weights = {"kernel": rng.normal(size=(2, 3, 8, 8)).astype(np.float32), "bias": np.array([1, 2], np.float32)}
    weights["slope"] = np.array([0.1, 0.3], np.float32).reshape(1, 2, 1, 1)
    path = graph_file(tmp_path / "habits.onnx", nodes, shape=np.array([-1, 2 * 14 * 14]), **weights)
    recognizer = OnnxRecognizer.load(path, HALF, HALF)
    rows = recognizer.differentiable()(to_images(noise_pictures))[0]
    np.testing.assert_allclose(rows.numpy(), recognizer.embed(noise_pictures), atol=1e-5)


def test_a_wrong_conversion_is_noticed(recognizer, monkeypatch):
    class Other(nn.Module):
        def forward(self, images):
            return (images.mean((2, 3)).repeat(1, 11)[:, :32],)

    monkeypatch.setattr("facemae.recognizer.frozen.convert_graph", lambda *_: Other())
    with pytest.raises(ValueError, match=r"compact\.onnx: .*differs from onnxruntime"):
        recognizer.differentiable()


@pytest.mark.faces
def test_mobilefacenet_inside_a_loss(shared_folder, face_pictures):
    path = shared_folder / "models" / "mobilefacenet_ms1m.onnx"
    recognizer = OnnxRecognizer.load(path, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    images = to_images(face_pictures).requires_grad_()
    embeddings, features = recognizer.differentiable(["/features/features.3/Add_output_0"])(images)
    assert features.shape[0] == len(face_pictures)
    np.testing.assert_allclose(embeddings.detach().numpy(), recognizer.embed(face_pictures), atol=1e-4)
    (embeddings[::2] * embeddings[1::2]).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.faces
def test_edgeface_embeds_but_does_not_convert(shared_folder):
    recognizer = OnnxRecognizer.load(shared_folder / "models" / "edgeface_xxs.onnx", HALF, HALF)
    with pytest.raises(ValueError, match=r"edgeface_xxs\.onnx: .*Dynamic value of min/max.*another recogniser"):
        recognizer.differentiable()
