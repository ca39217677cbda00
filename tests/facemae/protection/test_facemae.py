from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from facemae.masking import random_mask
from facemae.protection import create_protection
from facemae.protection.facemae import TILE, FaceMaeProtection

# the real widths, since a GEMM chooses its kernels by them; fewer layers, for speed
FIELDS: dict[str, Any] = {"encoder_depth": 2, "decoder_depth": 1}
NUM_PICTURES = 37
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    model: Any = timm.create_model("facemae_tiny_patch16_112", **FIELDS)
    for parameter in model.parameters():  # as if trained: no bias is zero, no norm the identity
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def pictures(num_pictures: int = NUM_PICTURES) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_pictures, 112, 112, 3), dtype=np.uint8)


KEYS = [f"id{i:03d}" for i in range(NUM_PICTURES)]


def one_by_one(protection: FaceMaeProtection) -> np.ndarray:
    return np.concatenate([protection.protect(pictures()[i : i + 1], KEYS[i : i + 1]) for i in range(NUM_PICTURES)])


@DTYPES
def test_the_same_bytes_for_any_batch_order_neighbours_and_threads(weights: Path, dtype: str) -> None:
    protection = FaceMaeProtection(weights, device="cpu", dtype=dtype)
    expected = one_by_one(protection)
    assert protection.position_independent
    assert len(np.unique(expected.reshape(NUM_PICTURES, -1), axis=0)) == NUM_PICTURES
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)  # as other code in the process may
            protection = FaceMaeProtection(weights, device="cpu", dtype=dtype, threads=num_threads)
            np.testing.assert_array_equal(protection.protect(pictures(), KEYS), expected)
            for trial in range(4):
                chosen = np.random.default_rng(trial).permutation(NUM_PICTURES)[: 5 + 9 * trial]
                found = protection.protect(pictures()[chosen], [KEYS[i] for i in chosen])
                np.testing.assert_array_equal(found, expected[chosen])
    finally:
        torch.set_num_threads(before)


@DTYPES
def test_every_place_of_a_tile_gives_the_same_bits(weights: Path, dtype: str) -> None:
    """The floats themselves: rounding to bytes could hide a difference."""
    protection = FaceMaeProtection(weights, device="cpu", dtype=dtype)
    tile = TILE["cpu"]
    source, masks = torch.from_numpy(pictures(tile)), protection._masks(KEYS[:tile])
    expected = protection._reconstruct(source, masks)
    for shift in range(1, tile):
        rolled = protection._reconstruct(source.roll(shift, 0), masks.roll(shift, 0))
        assert torch.equal(rolled.roll(-shift, 0), expected)


def test_another_process_with_other_thread_settings_gives_the_same_bytes(weights: Path) -> None:
    program = """
import hashlib, sys, torch
torch.set_num_threads(3)
from tests.facemae.protection.test_facemae import KEYS, FaceMaeProtection, pictures
for dtype in ("float32", "bfloat16"):
    protection = FaceMaeProtection(sys.argv[1], device="cpu", dtype=dtype, threads=2)
    print(hashlib.sha256(protection.protect(pictures(), KEYS).tobytes()).hexdigest())
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "4"}
    root = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", program, str(weights)], env=environment, cwd=root, capture_output=True, text=True)
    here = [one_by_one(FaceMaeProtection(weights, device="cpu", dtype=dtype)) for dtype in ("float32", "bfloat16")]
    assert run.stdout.split() == [hashlib.sha256(output.tobytes()).hexdigest() for output in here], run.stderr


def test_the_output_is_the_models_rounded(weights: Path) -> None:
    protection = FaceMaeProtection(weights, device="cpu", mask_ratio=0.5, seed=9)
    images = torch.from_numpy(pictures().transpose(0, 3, 1, 2).astype(np.float64) / 127.5 - 1)
    with torch.no_grad():
        output = protection.model.double()(images, torch.from_numpy(random_mask(KEYS, 49, 0.5, 9)))
    protection.model.float()
    expected = ((output.numpy().transpose(0, 2, 3, 1) + 1) * 127.5).clip(0, 255)
    assert np.abs(protection.protect(pictures(), KEYS) - expected).max() < 0.502


def test_hidden_pixels_do_not_reach_the_output(weights: Path) -> None:
    protection = FaceMaeProtection(weights, device="cpu")
    changed = np.zeros_like(pictures())
    for picture, visible in enumerate(random_mask(KEYS, 49, 0.75, 0)):
        for y, x in zip(visible // 7 * 16, visible % 7 * 16, strict=True):
            changed[picture, y : y + 16, x : x + 16] = pictures()[picture, y : y + 16, x : x + 16]
    np.testing.assert_array_equal(protection.protect(changed, KEYS), protection.protect(pictures(), KEYS))


def test_seed_key_and_ratio_change_the_output(weights: Path) -> None:
    source, base = pictures(1), FaceMaeProtection(weights, device="cpu")
    outputs = [
        base.protect(source, ["a"]),
        base.protect(source, ["b"]),
        FaceMaeProtection(weights, device="cpu", seed=1).protect(source, ["a"]),
        FaceMaeProtection(weights, device="cpu", mask_ratio=0.6).protect(source, ["a"]),
    ]
    assert len({output.tobytes() for output in outputs}) == 4


def test_any_array_layout_is_read_and_none_is_written(weights: Path) -> None:
    protection = FaceMaeProtection(weights, device="cpu")
    source = pictures(4)
    strided = np.repeat(source, 2, axis=2)[:, :, ::2]
    frozen = source.copy()
    frozen.flags.writeable = False
    expected = protection.protect(source, KEYS[:4])
    for array in (strided, frozen):
        np.testing.assert_array_equal(protection.protect(array, KEYS[:4]), expected)
    np.testing.assert_array_equal(source, pictures(4))
    assert protection.protect(source[:0], []).shape == (0, 112, 112, 3)


def test_describe_is_json_and_names_what_decides_the_bytes(weights: Path) -> None:
    described = FaceMaeProtection(weights, mask_ratio=0.6, seed=3, device="cpu", threads=2).describe()
    assert json.loads(json.dumps(described)) == described
    sha256 = hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()
    expected = {"method": "facemae", "weights_sha256": sha256, "architecture": "custom", "mask_ratio": 0.6, "seed": 3}
    assert described.items() >= {**expected, "dtype": "float32", "tile": 16, "torch": torch.__version__}.items()
    assert described["device"].startswith("cpu ")
    assert "threads" not in described


def test_kernels_that_depend_on_the_place_are_noticed(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = FaceMaeProtection._reconstruct

    def drifting(self: FaceMaeProtection, source: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        return exact(self, source, masks) * (1 + torch.arange(len(source)).reshape(-1, 1, 1, 1) * 1e-7)

    monkeypatch.setattr(FaceMaeProtection, "_reconstruct", drifting)
    with pytest.warns(UserWarning, match="depends on its place in a tile"):
        protection = FaceMaeProtection(weights, device="cpu")
    assert protection.describe()["position_independent"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"dtype": "float16"}, "dtype is 'float16': choose one of float32, bfloat16"),
        ({"device": "tpu"}, "device is 'tpu': choose auto, cpu or cuda"),
        ({"mask_ratio": 75}, "mask_ratio is 75"),
    ],
)
def test_an_option_out_of_range_is_named(weights: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_protection("facemae", weights=weights, **options)


def test_wrong_pictures_and_weights_are_named(weights: Path) -> None:
    protection = FaceMaeProtection(weights, device="cpu")
    with pytest.raises(ValueError, match="pictures of 64 x 112 pixels, but custom draws 112 x 112"):
        protection.protect(np.zeros((1, 64, 112, 3), dtype=np.uint8), ["a"])
    with pytest.raises(ValueError, match="1 pictures with 2 keys"):
        protection.protect(pictures(1), ["a", "b"])
    with pytest.raises(FileNotFoundError, match="missing is not a folder"):
        FaceMaeProtection(weights / "missing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_without_a_device_is_refused(weights: Path) -> None:
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        FaceMaeProtection(weights, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@DTYPES
def test_cuda_gives_the_same_bytes_for_any_batch(weights: Path, dtype: str) -> None:
    protection = FaceMaeProtection(weights, device="cuda", dtype=dtype)
    expected = protection.protect(pictures(), KEYS)
    assert protection.position_independent
    chosen = np.random.default_rng(0).permutation(NUM_PICTURES)[:20]
    np.testing.assert_array_equal(protection.protect(pictures()[chosen], [KEYS[i] for i in chosen]), expected[chosen])
    difference = expected.astype(int) - FaceMaeProtection(weights, device="cpu").protect(pictures(), KEYS)
    assert np.abs(difference).mean() < 1
