"""Training of one setting, and of the recognisers that measure it; faces lie on the device as uint8."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.search.packed import PackedRecognizer
from benchmarks.search.settings import Setting
from facemae.loss import ReconstructionLoss
from facemae.masking import random_mask
from facemae.model import MaskedAutoencoder, to_pictures, to_tensor
from facemae.recognizer.compact import CompactNet
from facemae.recognizer.train import fit_recognizer
from facemae.training import Batch, batch_loss, learning_rate, param_groups

_TILE = 64
_MASK_SEED = 1
_PER_PERSON = 4
_LOOK_EVERY = 10
"""Steps between looks at the clock; never before the first: a network of no steps is no result."""


@dataclass(frozen=True)
class Faces:
    """Pictures uint8 (N, 112, 112, 3) on the device, people int64 (N,) on the CPU, embeddings float32 (2, N, D), the second mirrored."""

    pictures: Tensor
    people: np.ndarray
    embeddings: Tensor


@dataclass(frozen=True)
class Trained:
    """A network, and what its training was: pictures seen, seconds, and the mean of the last terms of the loss."""

    model: MaskedAutoencoder
    samples: int
    seconds: float
    terms: dict[str, float]


def embed(network: nn.Module, pictures: Tensor, tile: int = _TILE) -> Tensor:
    """float32 (N, D) unit rows of uint8 (N, 112, 112, 3) pictures; the network gives rows, or a list whose first is rows."""
    rows = []
    with torch.no_grad():
        for start in range(0, len(pictures), tile):
            output = network(to_tensor(pictures[start : start + tile]))
            rows.append(nn.functional.normalize((output[0] if isinstance(output, list) else output).float()))
    return torch.cat(rows)


def train(setting: Setting, start: dict[str, Tensor], faces: Faces, recognizer: PackedRecognizer, bf16: bool, until: float) -> Trained:
    """Trains a setting.

    Args:
        setting: what to train.
        start: weights to start from, see `Setting.start`.
        faces: training people.
        recognizer: of the relation loss.
        bf16: mixed precision.
        until: time.monotonic() at which to stop with what there is.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    device = faces.pictures.device
    torch.manual_seed(0)
    model = begin(setting, start).to(device).train()
    recognizer.layers = setting.layers
    loss = ReconstructionLoss(setting.loss(), recognizer).to(device)
    optimizer = torch.optim.AdamW(param_groups(model), lr=setting.lr, betas=(0.9, 0.95))
    began, terms, step = time.monotonic(), dict[str, Tensor](), 0
    steps = -(-setting.samples // setting.batch)
    for step, batch in zip(range(1, steps + 1), batches(faces, setting), strict=False):
        rate = learning_rate(step, base_lr=setting.lr, total=steps + 1, warmup=setting.warmup * steps)
        now = _learn(model, loss, optimizer, batch, rate, setting.mask_ratio, bf16)
        terms = {name: 0.95 * terms.get(name, term) + 0.05 * term for name, term in now.items()}
        if step % _LOOK_EVERY == 0 and time.monotonic() > until:
            break
    recognizer.layers = ()
    found = {name: float(term) for name, term in terms.items()}
    if not np.isfinite(list(found.values())).all():
        raise FloatingPointError(f"{setting.name}: the loss became {found}: lower lr ({setting.lr})")
    return Trained(model.eval(), step * setting.batch, time.monotonic() - began, found)


def _learn(
    model: MaskedAutoencoder,
    loss: ReconstructionLoss,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    rate: float,
    mask_ratio: float,
    bf16: bool,
) -> dict[str, Tensor]:
    """One step of training; returns the terms of the loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    num_patches = model.architecture.num_patches
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):  # type: ignore[union-attr]
        value, terms = batch_loss(model, loss, batch, num_patches=num_patches, mask_ratio=mask_ratio, seed=_MASK_SEED)
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return terms


def begin(setting: Setting, start: dict[str, Tensor]) -> MaskedAutoencoder:
    """The network before its training.

    Raises:
        ValueError: the setting starts from the bundle's weights, and there are none or they are of other sizes.
    """
    model = setting.network()
    if setting.start == "random":
        return model
    ends = ("encoder_embed", "decoder_head") if setting.start == "fresh ends" else ()
    chosen = {name: tensor for name, tensor in start.items() if not name.startswith(ends or ("-",))}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith(ends or ("-",))}
    if shapes != {name: tensor.shape for name, tensor in chosen.items()}:
        raise ValueError(
            f'{setting.name} starts from the bundle, whose weights are missing or of other sizes: pack --start, or start="random"'
        )
    model.load_state_dict(chosen, strict=False)
    return model


def batches(faces: Faces, setting: Setting) -> Iterator[Batch]:
    """Batches without end: up to four pictures of each of `setting.people` people, then any others; each mirrored by chance."""
    members = [np.flatnonzero(faces.people == person) for person in range(faces.people.max() + 1)]
    several = [rows for rows in members if len(rows) > 1] or members
    generator, step = np.random.default_rng(0), 0
    while True:
        drawn = generator.permutation(len(several))[: setting.people]
        rows = np.concatenate([generator.permutation(several[person])[:_PER_PERSON] for person in drawn])
        others = np.setdiff1d(generator.permutation(len(faces.people))[: 2 * setting.batch], rows)
        rows = np.concatenate([rows, generator.permutation(others)])[: setting.batch]
        mirrored = generator.integers(0, 2, len(rows))
        places = torch.from_numpy(rows).to(faces.pictures.device)
        flips = torch.from_numpy(mirrored).to(faces.pictures.device)
        pictures = faces.pictures[places]
        pictures = torch.where(flips.bool()[:, None, None, None], pictures.flip(2), pictures)
        yield Batch(pictures, [str(row) for row in rows], None, faces.embeddings[flips, places], step)
        step += 1


def redraw(model: MaskedAutoencoder, pictures: Tensor, mask_ratio: float) -> Tensor:
    """The protected pictures: uint8, of the same shape and on the same device."""
    drawn = []
    for start in range(0, len(pictures), _TILE):
        tile = pictures[start : start + _TILE]
        keys = [f"protected/{start + number}" for number in range(len(tile))]
        visible = torch.from_numpy(random_mask(keys, model.architecture.num_patches, mask_ratio, _MASK_SEED)).to(tile.device)
        with torch.no_grad():
            drawn.append(to_pictures(model(to_tensor(tile), visible)))
    return torch.cat(drawn)


def recognizer_of(pictures: Tensor, people: np.ndarray, samples: int, width: int, seed: int) -> CompactNet:
    """A compact recogniser trained on labelled faces: the measure of what a set is worth, and an attacker."""
    torch.manual_seed(seed)
    net = CompactNet(dim=128, width=width, block="residual")
    batch = min(128, max(2, len(pictures)))
    steps = max(1, samples // batch)
    generator, host = np.random.default_rng(seed), pictures.cpu().numpy()

    def draw() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while True:
            rows = generator.integers(0, len(host), batch)
            yield host[rows], people[rows]

    fit_recognizer(net, draw(), int(people.max()) + 1, steps, lr=0.1, warmup=steps // 10, seed=seed, device=pictures.device)
    return net
