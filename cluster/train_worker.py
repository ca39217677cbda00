"""FaceMAE's part of a training: its engine, its step, its pictures and its weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import deepspeed
import numpy as np
import timm
import torch
from torch import Tensor, nn

from cluster.checkpoint import Checkpoint, load_optimizer, load_weights
from cluster.stream import Stream
from cluster.train_job import FaceMaeJob
from cluster.trainer import Trainer
from facemae.masking import random_mask
from facemae.model import MaskedAutoencoder, to_pictures
from facemae.training import Batch, ReconstructionLoss, batch_loss, learning_rate, param_groups

BETAS = (0.9, 0.95)
GRID_PICTURES = 8


class FaceMaeTrainer(Trainer[FaceMaeJob]):
    """One rank of a training of FaceMAE."""

    def __init__(self, job: FaceMaeJob, board: Any) -> None:
        super().__init__(job, board)
        recognizer = job.recognizer.differentiable(job.recipe.loss.layers) if job.recognizer else None
        self.loss = ReconstructionLoss(job.recipe.loss, recognizer and self._in_half(recognizer)).to(self.engine.device)
        self.num_patches = self.engine.module.architecture.num_patches

    def stream(self) -> Stream:
        """The originals with their embeddings, where the loss needs them."""
        return self.open_stream(self.job.recognizer.name if self.job.recognizer else None)

    def start_engine(self, start: Checkpoint | None) -> Any:
        """The masked autoencoder in DeepSpeed with AdamW."""
        recipe = self.job.recipe
        torch.manual_seed(recipe.seed)
        model = timm.create_model(recipe.architecture)
        if start is not None:
            load_weights(model, start)
        optimizer = torch.optim.AdamW(param_groups(model, recipe.weight_decay), lr=0.0, betas=BETAS)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(self.job.deepspeed), dist_init_required=False)[0]
        if engine.bfloat16_enabled():  # DeepSpeed casts the parameters; positions and pictures must follow
            for buffer in engine.module.buffers():
                buffer.data = buffer.data.bfloat16()
            engine.module.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16(), *inputs[1:]))
        load_optimizer(engine, start)
        return engine

    def _in_half(self, recognizer: nn.Module) -> nn.Module:
        return _Autocast(recognizer) if self.engine.bfloat16_enabled() or self.engine.torch_autocast_enabled() else recognizer

    def step(self, number: int, batch: Batch) -> dict[str, Tensor]:
        """Mask, reconstruct, compare, update."""
        recipe, plan = self.job.recipe, self.job.plan
        total = plan.samples_before(self.job.steps)
        scale = recipe.batch_size / 256
        rate = learning_rate(
            plan.samples_before(number), base_lr=recipe.lr * scale, min_lr=recipe.min_lr * scale, total=total, warmup=recipe.warmup * total
        )
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = rate
        value, metrics = batch_loss(
            self.engine, self.loss, batch, num_patches=self.num_patches, mask_ratio=recipe.mask_ratio, seed=recipe.seed
        )
        self.engine.backward(value)
        self.engine.step()
        return {**metrics, "lr": torch.tensor(rate)}

    @torch.no_grad()
    def grid(self, batch: Batch) -> np.ndarray:
        """uint8 (rows, columns, 3): originals, what the network sees, reconstructions. Every rank must call it (ZeRO 3 gathers)."""
        pictures = np.asarray(batch.images[:GRID_PICTURES])
        keys = [f"{batch.epoch}/{key}" for key in batch.keys[:GRID_PICTURES]]
        visible = random_mask(keys, self.num_patches, self.job.recipe.mask_ratio, self.job.recipe.seed)
        images = torch.from_numpy(pictures).to(self.engine.device).permute(0, 3, 1, 2) / 127.5 - 1
        self.engine.eval()
        drawn = to_pictures(self.engine(images, torch.from_numpy(visible).to(self.engine.device))).cpu().numpy()
        self.engine.train()
        grid = self.engine.module.architecture.grid_size
        seen = np.zeros((len(pictures), grid * grid), np.uint8)
        np.put_along_axis(seen, visible, 1, axis=1)
        patch = pictures.shape[1] // grid
        shown = seen.reshape(-1, grid, grid).repeat(patch, 1).repeat(patch, 2)[..., None]
        masked = np.where(shown, pictures, 128).astype(np.uint8)
        return np.concatenate([np.concatenate(list(row), axis=1) for row in (pictures, masked, drawn)])

    def publish_weights(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """weights/ as `MaskedAutoencoder.save_pretrained` writes them."""
        model = cast(MaskedAutoencoder, timm.create_model(self.job.recipe.architecture))
        load_weights(model, Checkpoint(self.job.steps, {}, tensors))
        with tempfile.TemporaryDirectory() as folder:
            sha256 = model.save_pretrained(folder)
            self.put_weights(Path(folder))
        return {"sha256": sha256, "recognizer": self.job.recognizer.describe() if self.job.recognizer else None}


class _Autocast(nn.Module):
    """A network in bfloat16 mixed precision."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.network(images)
