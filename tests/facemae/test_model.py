from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from facemae.masking import random_mask
from facemae.model import Architecture, MaskedAutoencoder, to_pictures, to_tensor

MICRO = Architecture("micro", 32, 2, 2, 16, 1, 2, patch_size=4, img_size=16)


@pytest.fixture
def model() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(MICRO).eval()


def batch(num_pictures: int = 3, architecture: Architecture = MICRO) -> tuple[Tensor, Tensor]:
    size = architecture.img_size
    images = torch.rand(num_pictures, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    keys = [str(i) for i in range(num_pictures)]
    return images, torch.from_numpy(random_mask(keys, architecture.num_patches, 0.75, 0))


def pixel_mask(visible: Tensor, architecture: Architecture = MICRO) -> Tensor:
    """bool (N, 1, S, S): True where a visible patch lies."""
    size, patch = architecture.img_size, architecture.patch_size
    mask = torch.zeros(len(visible), 1, size, size, dtype=torch.bool)
    for picture, patches in enumerate(visible.tolist()):
        for index in patches:
            y, x = divmod(index, architecture.grid_size)
            mask[picture, 0, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] = True
    return mask


def reference_forward(model: MaskedAutoencoder, image: Tensor, visible: list[int]) -> Tensor:
    """One picture, patch by patch, tokens put together in a list."""
    a = model.architecture
    cells = [(y, x) for y in range(0, a.img_size, a.patch_size) for x in range(0, a.img_size, a.patch_size)]
    tokens = []
    for index in visible:
        y, x = cells[index]
        pixels = [image[c, y + i, x + j] for i in range(a.patch_size) for j in range(a.patch_size) for c in range(3)]
        tokens.append(model.encoder_embed(torch.stack(pixels)) + model.encoder_pos[0, index])
    encoded = model.decoder_embed(model.encoder_norm(model.encoder_blocks(torch.stack(tokens)[None])))[0]
    known = dict(zip(visible, encoded, strict=True))
    everything = [known.get(i, model.mask_token[0, 0]) + model.decoder_pos[0, i] for i in range(len(cells))]
    drawn = model.decoder_head(model.decoder_norm(model.decoder_blocks(torch.stack(everything)[None])))[0]
    output = torch.empty_like(image)
    for (y, x), values in zip(cells, drawn, strict=True):
        values = values.reshape(a.patch_size, a.patch_size, 3)
        for c in range(3):
            output[c, y : y + a.patch_size, x : x + a.patch_size] = values[:, :, c]
    return output


@torch.no_grad()
def test_forward_equals_the_patch_by_patch_reference(model: MaskedAutoencoder) -> None:
    images, visible = batch()
    expected = torch.stack([reference_forward(model, *pair) for pair in zip(images, visible.tolist(), strict=True)])
    torch.testing.assert_close(model(images, visible), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_hidden_pixels_change_nothing_and_visible_ones_do(model: MaskedAutoencoder) -> None:
    images, visible = batch()
    seen, output = pixel_mask(visible), model(images, visible)
    assert torch.equal(model(torch.where(seen, images, torch.nan), visible), output)
    assert not torch.equal(model(torch.where(seen, -images, images), visible), output)


@torch.no_grad()
def test_visible_patches_are_not_pasted_back(model: MaskedAutoencoder) -> None:
    images, visible = batch()
    model.decoder_head.weight.zero_()
    assert torch.equal(model(images, visible), torch.zeros_like(images))


@torch.no_grad()
def test_the_order_of_visible_patches_does_not_matter(model: MaskedAutoencoder) -> None:
    images, visible = batch()
    torch.testing.assert_close(model(images, visible.flip(1)), model(images, visible), rtol=1e-4, atol=1e-5)


def test_positions_are_two_dimensional_sines_and_cosines(model: MaskedAutoencoder) -> None:
    dim, grid = MICRO.encoder_dim, MICRO.grid_size
    frequencies = 1 / 10000 ** (np.arange(dim // 4) / (dim // 4))
    for index in range(grid * grid):
        angles = [coordinate * frequencies for coordinate in divmod(index, grid)]
        expected = np.stack([np.sin(angles), np.cos(angles)]).ravel()
        found = model.encoder_pos[0, index].numpy()
        np.testing.assert_allclose(np.sort(found), np.sort(expected), atol=1e-5)
    assert len(torch.unique(model.encoder_pos[0], dim=0)) == grid * grid


def test_weights_start_as_in_mae() -> None:
    model: Any = timm.create_model("facemae_tiny_patch16_112")
    weight = model.encoder_blocks[0].mlp.fc1.weight
    bound = (6 / sum(weight.shape)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert 0.015 < model.mask_token.std() < 0.025
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    ("size", "parameters"),
    # blocks 12 d^2 + 13 d, embeddings, norms, the projection to the decoder and the head, patch 16
    [("tiny", (192, 6, 128, 4)), ("small", (384, 12, 256, 4)), ("base", (768, 12, 512, 8)), ("large", (1024, 24, 512, 8))],
)
@pytest.mark.parametrize("patch", [8, 16])
def test_registered_sizes(size: str, parameters: tuple[int, int, int, int], patch: int) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model(f"facemae_{size}_patch{patch}_112")
    (e, e_depth, d, d_depth), pixels = parameters, 3 * patch**2
    blocks = e_depth * (12 * e * e + 13 * e) + d_depth * (12 * d * d + 13 * d)
    expected = blocks + (pixels + 1) * e + 2 * e + (e + 1) * d + d + 2 * d + (d + 1) * pixels
    assert sum(p.numel() for p in model.parameters()) == expected
    assert model.architecture.num_patches == (112 // patch) ** 2
    assert model.architecture.name == f"facemae_{size}_patch{patch}_112"


def test_create_model_takes_other_fields_and_refuses_pretrained() -> None:
    model: Any = timm.create_model("facemae_tiny_patch16_112", encoder_depth=1, img_size=32)
    assert (model.architecture.name, len(model.encoder_blocks), model.architecture.num_patches) == ("custom", 1, 4)
    with pytest.raises(ValueError, match="no published weights"):
        timm.create_model("facemae_tiny_patch16_112", pretrained=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"patch_size": 5}, "does not tile"), ({"encoder_heads": 5}, "encoder_dim 32"), ({"decoder_dim": 6}, "decoder_dim 6")],
)
def test_impossible_sizes_are_named(change: dict[str, int], message: str) -> None:
    sizes = {"encoder_dim": 32, "encoder_depth": 1, "encoder_heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    with pytest.raises(ValueError, match=message):
        Architecture("wrong", **{**sizes, **change})


def test_pictures_of_another_size_are_refused(model: MaskedAutoencoder) -> None:
    with pytest.raises(ValueError, match=r"images are \(1, 3, 8, 8\), but micro draws 16 x 16"):
        model(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, dtype=torch.int64))


def test_pictures_survive_the_way_through_tensors() -> None:
    pictures = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    images = to_tensor(pictures)
    assert images.shape == (1, 3, 16, 16)
    assert torch.equal(images[0, 1, 2, 3], pictures[0, 2, 3, 1] / 127.5 - 1)
    assert (images.min(), images.max()) == (-1, 1)
    assert torch.equal(to_pictures(images), pictures)
    assert to_pictures(torch.tensor([-9.0, 0.6 / 127.5 - 1, 9.0]).reshape(1, 3, 1, 1)).flatten().tolist() == [0, 1, 255]


class TestPretrained:
    @pytest.fixture
    def folder(self, model: MaskedAutoencoder, tmp_path: Path) -> Path:
        model.save_pretrained(tmp_path / "weights")
        return tmp_path / "weights"

    @torch.no_grad()
    def test_a_saved_model_comes_back(self, model: MaskedAutoencoder, folder: Path) -> None:
        loaded = MaskedAutoencoder.from_pretrained(folder)
        images, visible = batch()
        assert loaded.architecture == MICRO
        assert not loaded.training
        assert torch.equal(loaded(images, visible), model(images, visible))

    def test_the_sha256_is_that_of_the_file_and_of_the_weights_alone(self, model: MaskedAutoencoder, folder: Path, tmp_path: Path) -> None:
        sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert model.save_pretrained(tmp_path / "again") == sha256 == model.weights_sha256
        assert json.loads((folder / "config.json").read_text())["sha256"] == sha256
        assert MaskedAutoencoder.from_pretrained(folder, expected_sha256=sha256).weights_sha256 == sha256
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]

    def test_other_weights_than_expected(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="the caller expects 0123"):
            MaskedAutoencoder.from_pretrained(folder, expected_sha256="0123")

    def test_a_flipped_bit(self, folder: Path) -> None:
        content = bytearray((folder / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"model.safetensors has sha256 .* config.json expects"):
            MaskedAutoencoder.from_pretrained(folder)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_folder_without_one_of_the_files(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"weights holds no {name}"):
            MaskedAutoencoder.from_pretrained(folder)

    def test_a_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
            MaskedAutoencoder.from_pretrained(tmp_path / "nowhere")

    @pytest.mark.parametrize("content", ["{", "[]", '{"sha256": ""}', '{"architecture": "x", "sha256": "", "wings": 2}'])
    def test_a_config_of_something_else(self, folder: Path, content: str) -> None:
        (folder / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config.json does not describe a masked autoencoder"):
            MaskedAutoencoder.from_pretrained(folder)

    def rewrite(self, folder: Path, tensors: dict[str, Tensor] | bytes) -> None:
        """Replaces the weights and records their sha256."""
        if isinstance(tensors, bytes):
            (folder / "model.safetensors").write_bytes(tensors)
        else:
            save_file(tensors, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        config["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        (folder / "config.json").write_text(json.dumps(config))

    def test_weights_of_another_architecture(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        for changed, message in (
            ({**tensors, "mask_token": torch.zeros(1, 1, 8)}, r"micro .* tensor mask_token is \(1, 1, 8\), expected \(1, 1, 16\)"),
            ({**tensors, "cls_token": torch.zeros(4)}, r"tensor cls_token is \(4,\), expected absent"),
            ({k: v for k, v in tensors.items() if k != "mask_token"}, r"tensor mask_token is absent, expected \(1, 1, 16\)"),
        ):
            self.rewrite(folder, changed)
            with pytest.raises(ValueError, match=message):
                MaskedAutoencoder.from_pretrained(folder)

    def test_a_file_that_is_no_safetensors(self, folder: Path) -> None:
        self.rewrite(folder, b"\x80\x04not tensors")
        with pytest.raises(ValueError, match="is not a safetensors file"):
            MaskedAutoencoder.from_pretrained(folder)
