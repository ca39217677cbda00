from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open

from facemae.recognizer.backbone import create_backbone
from facemae.recognizer.margin import CosFace, MarginHead
from facemae.recognizer.onnx import OnnxRecognizer
from facemae.recognizer.pretrained import OnnxBackbone, load_backbone, save_backbone
from facemae.recognizer.train import fit_recognizer


def embed(net, pictures: np.ndarray) -> np.ndarray:
    """Unit rows for uint8 (N, 112, 112, 3)."""
    with torch.no_grad():
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
        return torch.nn.functional.normalize(net.eval()(images)).numpy()


def train(net, pictures: np.ndarray, steps: int = 3) -> list[float]:
    losses: list[float] = []
    head = MarginHead(net.dim, 4, CosFace(margin=0.1, scale=16))
    batch = pictures[:8], np.arange(len(pictures[:8])) % 4
    fit_recognizer(net, [batch] * steps, 4, steps, lr=2e-4, flip=False, head=head, on_step=lambda _step, loss, _lr: losses.append(loss))
    return losses


@pytest.fixture
def saved(tmp_path):
    net = create_backbone("compact-plain-8", dim=16, seed=2)
    net(torch.rand(4, 3, 112, 112))
    return net, tmp_path / "weights", save_backbone(net, tmp_path / "weights")


def test_round_trip(saved, noise_pictures):
    net, folder, sha256 = saved
    facts = json.loads((folder / "config.json").read_text())
    assert facts == {"backbone": "compact-plain-8", "dim": 16, "sha256": sha256}
    loaded = load_backbone(folder, dim=16)
    assert (loaded.name, loaded.dim, loaded.training) == ("compact-plain-8", 16, False)
    np.testing.assert_array_equal(embed(loaded, noise_pictures), embed(net, noise_pictures))
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "config.json"}
    assert save_backbone(loaded, folder.parent / "again") == sha256


def test_half_precision_is_stored_as_float32_and_counters_as_integers(saved, tmp_path):
    net, _, _ = saved
    save_backbone(net.to(torch.bfloat16), tmp_path / "half")
    with safe_open(tmp_path / "half" / "model.safetensors", "pt") as file:
        kinds = {name.rsplit(".", 1)[1]: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert kinds.pop("num_batches_tracked") == torch.int64
    assert set(kinds.values()) == {torch.float32}


def test_a_changed_byte_is_refused(saved):
    folder = saved[1]
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors has sha256 .* but config\.json expects .*copy the whole folder"):
        load_backbone(folder)


def test_folders_that_are_not_ours(saved, tmp_path):
    _, folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder: .*save_backbone"):
        load_backbone(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="its embeddings have 16 numbers, not 512: give dim 16"):
        load_backbone(folder, dim=512)
    for content, message in (
        ("{", r"config\.json does not describe a backbone"),
        ("[]", r"config\.json does not describe a backbone"),
        (json.dumps({"architecture": "facemae_tiny_patch8_112", "sha256": "0"}), "does not describe a backbone: KeyError.'backbone'"),
        (json.dumps(config | {"backbone": "compact-plain-16"}), r"another architecture than compact-plain-16 in config\.json: tensor"),
        (json.dumps(config | {"backbone": "resnet"}), "unknown backbone 'resnet'"),
        (json.dumps(config | {"backbone": "onnx/net"}), "does not describe a backbone: KeyError.'mean'"),
    ):
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_backbone(folder)


@pytest.mark.parametrize("name", ["iresnet18", "timm/test_vit", "timm/test_resnet"])
def test_an_exported_backbone_loads_and_learns(exported, noise_pictures, name):
    net, path = exported(name)
    pictures = noise_pictures[:4]
    loaded = load_backbone(path, dim=32)
    np.testing.assert_allclose(embed(loaded, pictures), embed(net, pictures), atol=1e-4)
    num_before = sum(parameter.numel() for parameter in net.parameters())
    num_after = sum(parameter.numel() for parameter in loaded.parameters() if parameter.requires_grad)
    assert num_after > 0.98 * num_before  # batch norms are folded, nothing else is lost
    losses = train(loaded, pictures, steps=2)
    assert losses[-1] < losses[0]
    assert not [key for key, parameter in loaded.named_parameters() if parameter.grad is None]


def test_a_trained_onnx_network_is_saved_with_its_graph(compact_file, noise_pictures, tmp_path):
    """Its sidecar has a normalisation of its own, which is inside the network and travels along."""
    loaded = load_backbone(compact_file)
    assert isinstance(loaded, OnnxBackbone)
    np.testing.assert_allclose(embed(loaded, noise_pictures), OnnxRecognizer.load(compact_file).embed(noise_pictures), atol=1e-4)
    train(loaded, noise_pictures)
    save_backbone(loaded, tmp_path / "weights")
    again = load_backbone(tmp_path / "weights")
    assert again.name == loaded.name == "onnx/compact"
    np.testing.assert_array_equal(embed(again, noise_pictures), embed(loaded, noise_pictures))
    (tmp_path / "weights" / "graph.onnx").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"graph\.onnx has sha256"):
        load_backbone(tmp_path / "weights")


def test_the_normalisation_is_never_guessed(compact_file, tmp_path):
    shutil.copy(compact_file, tmp_path / "lonely.onnx")
    with pytest.raises(ValueError, match=r"lonely\.onnx: the normalisation of this recogniser is not known"):
        load_backbone(tmp_path / "lonely.onnx")
    with pytest.raises(FileNotFoundError):
        load_backbone(tmp_path / "absent.onnx")


def with_sidecar(path, folder, mean, std):
    shutil.copy(path, folder / path.name)
    (folder / path.name).with_suffix(".json").write_text(json.dumps({"name": path.stem, "mean": mean, "std": std}))
    return folder / path.name


@pytest.mark.faces
def test_mobilefacenet_can_be_trained_on(shared_folder, face_pictures, tmp_path):
    """A foreign file: MobileFaceNet trained on MS1M, by another exporter."""
    source = shared_folder / "models" / "mobilefacenet_ms1m.onnx"
    path = with_sidecar(source, tmp_path, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    net = load_backbone(path, dim=128)
    np.testing.assert_allclose(embed(net, face_pictures), OnnxRecognizer.load(path).embed(face_pictures), atol=1e-4)
    losses = train(net, face_pictures)
    assert losses[-1] < losses[0]


@pytest.mark.faces
def test_edgeface_cannot(shared_folder, tmp_path):
    path = with_sidecar(shared_folder / "models" / "edgeface_xxs.onnx", tmp_path, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"edgeface_xxs\.onnx: onnx2torch cannot convert .*gives no gradients.*another recogniser"):
        load_backbone(path)
