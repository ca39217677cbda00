"""The masked autoencoder: a timm vision transformer that sees a few patches of a face and draws all of them.

Layout from MAE (He et al., arXiv 2111.06377), which FaceMAE trains with another loss (arXiv 2205.11090). No sizes were
published; our reading: 112-pixel faces, patches of 8 or 16, no class token (nothing would read it: the loss sees only
pixels), and hidden patches are dropped before the first layer, so that no hidden pixel can influence the output.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import LayerNorm, build_sincos2d_pos_embed
from timm.models import register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from facemae.weights import CONFIG_FILE, WEIGHTS_FILE, check_sha256, load_weights, read_config, save_weights


@dataclass(frozen=True)
class Architecture:
    """Sizes of a masked autoencoder.

    Raises:
        ValueError: the patches do not tile the picture, or a width does not divide into its heads and 4 (2-D sin-cos).
    """

    name: str
    encoder_dim: int
    encoder_depth: int
    encoder_heads: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    patch_size: int = 16
    img_size: int = 112
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.patch_size < 1 or self.img_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not tile a picture of {self.img_size} pixels")
        for part, dim, heads in (
            ("encoder", self.encoder_dim, self.encoder_heads),
            ("decoder", self.decoder_dim, self.decoder_heads),
        ):
            if dim % heads or dim % 4:
                raise ValueError(f"{part}_dim {dim} must be a multiple of {part}_heads {heads} and of 4")

    @property
    def grid_size(self) -> int:
        """Patches along a side."""
        return self.img_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one picture."""
        return self.grid_size**2


class MaskedAutoencoder(nn.Module):
    """Encodes the visible patches alone and decodes every patch (MAE, arXiv 2111.06377).

    Output pixels come from the decoder for all patches; a visible patch is never pasted back (our reading of FaceMAE).
    """

    encoder_pos: Tensor
    decoder_pos: Tensor
    weights_sha256: str | None = None  # of the file last saved or loaded

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        patch_dim = 3 * a.patch_size**2
        self.encoder_embed = nn.Linear(patch_dim, a.encoder_dim)
        self.encoder_blocks = _blocks(a.encoder_dim, a.encoder_depth, a.encoder_heads, a.mlp_ratio)
        self.encoder_norm = LayerNorm(a.encoder_dim)
        self.decoder_embed = nn.Linear(a.encoder_dim, a.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, a.decoder_dim))
        self.decoder_blocks = _blocks(a.decoder_dim, a.decoder_depth, a.decoder_heads, a.mlp_ratio)
        self.decoder_norm = LayerNorm(a.decoder_dim)
        self.decoder_head = nn.Linear(a.decoder_dim, patch_dim)
        # fixed and computed from the sizes, so not among the weights
        grid = [a.grid_size, a.grid_size]
        self.register_buffer("encoder_pos", build_sincos2d_pos_embed(grid, a.encoder_dim)[None], persistent=False)
        self.register_buffer("decoder_pos", build_sincos2d_pos_embed(grid, a.decoder_dim)[None], persistent=False)
        self.apply(_init_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, visible: Tensor) -> Tensor:
        """Reconstructs whole pictures from their visible patches.

        Args:
            images: float (N, 3, S, S) in [-1, 1]. Hidden patches are never read.
            visible: int64 (N, V) indices of the visible patches, row by row from the top left.

        Returns:
            float (N, 3, S, S), not clamped: all patches from the decoder.

        Raises:
            ValueError: the pictures have another size than the model.
        """
        size = self.architecture.img_size
        if images.shape[1:] != (3, size, size):
            name, found = self.architecture.name, tuple(images.shape)
            raise ValueError(f"images are {found}, but {name} draws {size} x {size} pixels: give (N, 3, {size}, {size})")
        tokens = self.encode(images, visible)
        return self._unpatchify(self.decode(tokens, visible))

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Returns features (N, V, encoder_dim) of the visible patches; arguments as in `forward`."""
        patches = torch.take_along_dim(self._patchify(images), visible[:, :, None], dim=1)
        tokens = self.encoder_embed(patches) + self.encoder_pos[0, visible]
        return self.encoder_norm(self.encoder_blocks(tokens))

    def decode(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Returns pixels (N, P, patch_size^2 * 3) of all patches from the visible ones' features (N, V, encoder_dim)."""
        known = self.decoder_embed(tokens)
        num_pictures, num_patches, dim = len(tokens), self.architecture.num_patches, self.architecture.decoder_dim
        everything = self.mask_token.to(known.dtype).expand(num_pictures, num_patches, dim)
        everything = everything.scatter(1, visible[:, :, None].expand(-1, -1, dim), known)
        return self.decoder_head(self.decoder_norm(self.decoder_blocks(everything + self.decoder_pos)))

    def no_weight_decay(self) -> set[str]:
        """Returns the parameters that weight decay must leave alone beside biases and norms (a timm convention)."""
        return {"mask_token"}

    def _patchify(self, images: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, P, patch_size^2 * 3), channels last within a patch."""
        grid, patch = self.architecture.grid_size, self.architecture.patch_size
        patches = images.reshape(-1, 3, grid, patch, grid, patch).permute(0, 2, 4, 3, 5, 1)
        return patches.reshape(-1, grid * grid, patch * patch * 3)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """(N, P, patch_size^2 * 3) -> (N, 3, S, S)."""
        grid, patch = self.architecture.grid_size, self.architecture.patch_size
        images = patches.reshape(-1, grid, grid, patch, patch, 3).permute(0, 5, 1, 3, 2, 4)
        return images.reshape(-1, 3, grid * patch, grid * patch)

    def save_pretrained(self, folder: str | Path) -> str:
        """Writes model.safetensors and, last, config.json: the architecture and the sha256 of the weights.

        Returns:
            The sha256 of model.safetensors, in hex.
        """
        sizes = dataclasses.asdict(self.architecture)
        self.weights_sha256 = save_weights(Path(folder), self, {"architecture": sizes.pop("name"), **sizes})
        return self.weights_sha256

    @classmethod
    def from_pretrained(cls, folder: str | Path, expected_sha256: str | None = None) -> MaskedAutoencoder:
        """Loads a folder written by `save_pretrained`, on the CPU and in evaluation mode.

        Args:
            folder: holds model.safetensors and config.json.
            expected_sha256: what the weights must hash to, on top of what config.json says.

        Raises:
            FileNotFoundError: the folder is missing or is not a weights folder.
            ValueError: config.json is not ours, a sha256 differs, or the weights belong to another architecture.
        """
        folder = Path(folder)
        architecture, recorded = _read_architecture(folder)
        actual = check_sha256(folder / WEIGHTS_FILE, {CONFIG_FILE: recorded, "the caller": expected_sha256})
        model = cls(architecture)
        load_weights(folder, model, architecture.name)
        model.weights_sha256 = actual
        return model.eval()


def to_tensor(pictures: Tensor) -> Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in [-1, 1]: value / 127.5 - 1, left channels last in memory."""
    return pictures.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_pictures(images: Tensor) -> Tensor:
    """float (N, 3, H, W), clamped to [-1, 1] -> uint8 (N, H, W, 3), rounded to nearest (half to even)."""
    values = (images.float() + 1.0).mul_(127.5).clamp_(0.0, 255.0).round_()
    return values.to(torch.uint8).permute(0, 2, 3, 1)


def _blocks(dim: int, depth: int, heads: int, mlp_ratio: float) -> nn.Sequential:
    return nn.Sequential(*(Block(dim, heads, mlp_ratio, qkv_bias=True) for _ in range(depth)))


def _init_linear(module: nn.Module) -> None:
    """MAE's initialisation: xavier uniform weights, zero biases; LayerNorm starts at identity by itself."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def _read_architecture(folder: Path) -> tuple[Architecture, str]:
    """What config.json says: the architecture and the sha256 of the weights."""
    try:
        config = read_config(folder, "save_pretrained")
        sha256 = config.pop("sha256")
        if "architecture" not in config:
            raise ValueError("it names no architecture; a recogniser of facemae pretrain, perhaps? Give the output of facemae train")
        return Architecture(name=config.pop("architecture"), **config), sha256
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} does not describe a masked autoencoder: {type(error).__name__}: {error}") from error


# dim, depth, heads of the encoder, then of the decoder: MAE's base and large, and two smaller ones of our own
SIZES: dict[str, tuple[int, int, int, int, int, int]] = {
    "tiny": (192, 6, 3, 128, 4, 4),
    "small": (384, 12, 6, 256, 4, 8),
    "base": (768, 12, 12, 512, 8, 16),
    "large": (1024, 24, 16, 512, 8, 16),
}


def _register(size: str, patch_size: int) -> None:
    """Registers facemae_SIZE_patchP_112 with timm: `timm.create_model(name, **fields)` builds it with random weights."""

    def entrypoint(pretrained: bool = False, **overrides: Any) -> MaskedAutoencoder:
        for unused in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm passes them to every entry
            overrides.pop(unused, None)
        if pretrained:
            raise ValueError(f"{name} has no published weights: train it and use MaskedAutoencoder.from_pretrained")
        changes = {"name": "custom", **overrides} if overrides else {}
        return MaskedAutoencoder(dataclasses.replace(architecture, **changes))

    name = f"facemae_{size}_patch{patch_size}_112"
    architecture = Architecture(name, *SIZES[size], patch_size=patch_size)
    entrypoint.__name__ = name
    register_model(entrypoint)


for _size in SIZES:
    for _patch_size in (8, 16):
        _register(_size, _patch_size)
