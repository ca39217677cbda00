"""FaceMAE as a protection: every picture is redrawn from a quarter of its patches (arXiv 2205.11090).

How the bytes stay the same whatever the batch: the network always runs on tiles of one fixed size (the last one padded
by repeating its last picture), so every picture meets the same kernels. On the CPU each tile runs on one torch thread,
and several tiles run side by side in a small thread pool; on CUDA TF32 is off and deterministic algorithms are on.
Whether a picture's place in a tile or its neighbours matter all the same is tried once, on the machine itself, and told
by `describe`. The promise is for one build of torch on one kind of processor: another may round differently.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from facemae.masking import count_visible, random_mask
from facemae.model import MaskedAutoencoder, to_pictures, to_tensor
from facemae.protection.dial import Dial
from facemae.protection.protocol import check_batch

TILE = {"cpu": 16, "cuda": 256}
NUM_SEEDS = 4
"""Rounds of a repair that only change the seed."""
RATIO_STEP, MAX_RATIO = 0.05, 0.95
"""What each later round hides more, and the most."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FaceMaeProtection:
    """Reconstructs pictures with trained masked-autoencoder weights.

    Args:
        weights: folder written by `MaskedAutoencoder.save_pretrained`.
        mask_ratio: hidden share of the patches, in [0, 1).
        seed: chooses the masks, together with each picture's key.
        device: "cpu", "cuda" or "auto" (CUDA where there is one).
        threads: tiles computed side by side on the CPU; changes the speed alone.
        dtype: "float32", or "bfloat16" for mixed precision (autocast): faster, other bytes, so part of `describe`.

    Process-wide effects: on the CPU torch's own threads are set to 1 by every `protect`; on CUDA deterministic
    algorithms are turned on and TF32 off, for good.

    Raises:
        FileNotFoundError, ValueError: see `MaskedAutoencoder.from_pretrained`; an option is out of range.
    """

    name = "facemae"
    dial: Dial | None = Dial("hidden share of the patches", 0, 1, 0.75, open_high=True, option="mask_ratio")

    def __init__(
        self,
        weights: str | Path,
        mask_ratio: float = 0.75,
        seed: int = 0,
        device: str = "auto",
        threads: int = 1,
        dtype: str = "float32",
    ) -> None:
        if threads < 1:
            raise ValueError(f"threads is {threads}: give 1 or more")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
        self.device = _choose_device(device)
        if self.device.type == "cuda":
            _make_cuda_deterministic()
        self.mask_ratio, self.seed, self.dtype = mask_ratio, seed, dtype
        self.tile = TILE[self.device.type]
        self.model = MaskedAutoencoder.from_pretrained(weights).to(self.device)
        count_visible(self.model.architecture.num_patches, mask_ratio)  # an impossible ratio fails here, not in a stage
        on_cpu = self.device.type == "cpu"
        self._pool = ThreadPoolExecutor(threads, "facemae") if on_cpu and threads > 1 else None
        self.position_independent = self._try_positions()
        if not self.position_independent:
            warnings.warn(
                f"on {_device_name(self.device)} with {dtype}, a picture's output depends on its place in a tile: "
                "the same picture may differ in a few last bits between batches",
                stacklevel=2,
            )

    def describe(self) -> dict[str, Any]:
        """Returns what determines the output: weights, options and what computes them. `threads` is not among it."""
        return {
            "method": self.name,
            "weights_sha256": self.model.weights_sha256,
            "architecture": self.model.architecture.name,
            "mask_ratio": self.mask_ratio,
            "seed": self.seed,
            "dtype": self.dtype,
            "tile": self.tile,
            "device": _device_name(self.device),
            "torch": torch.__version__,
            "position_independent": self.position_independent,
        }

    def protect(self, pictures: np.ndarray, keys: Sequence[str]) -> np.ndarray:
        """Redraws every picture from its visible patches; see `Protection.protect`.

        Args:
            pictures: uint8 (N, S, S, 3) RGB of the model's size S.
            keys: N sample keys: they choose the masks.

        Returns:
            uint8 (N, S, S, 3) RGB. No visible patch is pasted back.

        Raises:
            ValueError: the pictures are not of this form or size, or not as many as the keys.
        """
        check_batch(pictures, keys)
        architecture = self.model.architecture
        if pictures.shape[1:3] != (architecture.img_size, architecture.img_size):
            raise ValueError(
                f"pictures of {pictures.shape[1]} x {pictures.shape[2]} pixels, but {architecture.name} draws "
                f"{architecture.img_size} x {architecture.img_size}: crop or resize them first"
            )
        source = torch.from_numpy(np.require(pictures, requirements=["C", "W"])).to(self.device)
        output = torch.empty_like(source)
        self._run_tiles(source, self._masks(keys), output)
        return output.cpu().numpy()

    def variants(self, skip: int = 0) -> list[FaceMaeProtection]:
        """Other masks from the same weights: first other seeds, then more hidden as well; see `Protection.variants`."""
        steps = int((MAX_RATIO - self.mask_ratio) / RATIO_STEP + 1e-9)
        ratios = [self.mask_ratio] * NUM_SEEDS + [round(self.mask_ratio + RATIO_STEP * step, 6) for step in range(1, steps + 1)]
        found = []
        for number, ratio in enumerate(ratios, skip + 1):
            other = copy.copy(self)  # the weights are shared
            other.seed, other.mask_ratio = self.seed + number, ratio
            found.append(other)
        return found

    def _masks(self, keys: Sequence[str]) -> Tensor:
        """The visible patches, int64 (N, V), of the pictures with these keys."""
        masks = random_mask(keys, self.model.architecture.num_patches, self.mask_ratio, self.seed)
        return torch.from_numpy(masks).to(self.device)

    def _run_tiles(self, source: Tensor, visible: Tensor, output: Tensor) -> None:
        """Fills `output`, uint8 (N, S, S, 3), tile by tile; on CUDA nothing waits before the last tile is queued."""

        def run(start: int) -> None:
            rows = slice(start, start + self.tile)
            tile = self._reconstruct(_pad(source[rows], self.tile), _pad(visible[rows], self.tile))
            output[rows] = to_pictures(tile)[: len(source) - start]

        starts = range(0, len(source), self.tile)
        for _ in self._pool.map(run, starts) if self._pool else map(run, starts):
            pass

    @torch.inference_mode()
    def _reconstruct(self, pictures: Tensor, visible: Tensor) -> Tensor:
        """One full tile: uint8 (T, S, S, 3), int64 (T, V) -> float (T, 3, S, S)."""
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # in every tile, since new threads, and other code, start from the process's count
        with torch.autocast(self.device.type, DTYPES[self.dtype], enabled=self.dtype != "float32"):
            return self.model(to_tensor(pictures), visible)

    def _try_positions(self) -> bool:
        """Tells whether one picture comes out the same, bit for bit, at every place of a tile and beside any others."""
        architecture, generator = self.model.architecture, torch.Generator().manual_seed(0)
        shape = (self.tile, architecture.img_size, architecture.img_size, 3)
        others = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(self.device)
        masks = self._masks([f"{row}" for row in range(self.tile)])
        alone = self._reconstruct(others[:1].expand(shape), masks[:1].expand_as(masks))
        among = self._reconstruct(others, masks)
        return bool((alone == among[:1]).all())


def _pad(rows: Tensor, length: int) -> Tensor:
    missing = length - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


def _choose_device(device: str) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}: choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('device is "cuda", but torch finds no CUDA device here: choose cpu or auto')
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _make_cuda_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("highest")


def _device_name(device: torch.device) -> str:
    """The processor, as far as it decides the last bit: the GPU's model or the CPU's vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"
