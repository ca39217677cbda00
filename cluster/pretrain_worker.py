"""The recogniser's part of a training: the backbone in DeepSpeed, the class centres split over the ranks."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor

from cluster.centers import load_rows, save_rows
from cluster.checkpoint import Checkpoint, load_optimizer, load_weights
from cluster.pretrain_job import PretrainJob
from cluster.recognizer_file import local_recognizer
from cluster.trainer import Trainer
from cluster.weights import local_weights
from facemae.recognizer.augment import augment
from facemae.recognizer.backbone import create_backbone
from facemae.recognizer.export import export_onnx
from facemae.recognizer.margin import create_margin
from facemae.recognizer.partial_fc import PartialFC
from facemae.recognizer.pretrained import load_backbone, save_backbone
from facemae.recognizer.train import polynomial_rate
from facemae.training import Batch

ONNX_FILE = "recognizer.onnx"


class RecognizerTrainer(Trainer[PretrainJob]):
    """One rank of a pretraining: a share of the pictures, and a share of the class centres (Partial FC, arXiv 2203.15565)."""

    def start_engine(self, start: Checkpoint | None) -> Any:
        """The backbone in DeepSpeed with SGD; and beside it the head, which DeepSpeed must not average."""
        recipe, model = self.job.recipe, self._backbone()
        if start is not None:
            load_weights(model, start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(self.job.deepspeed), dist_init_required=False)[0]
        load_optimizer(engine, start)
        self.head = self._start_head(start, engine.device)
        return engine

    def step(self, number: int, batch: Batch) -> dict[str, Tensor]:
        """Augment, embed, classify, update backbone and centres."""
        recipe, device = self.job.recipe, self.engine.device
        rate = polynomial_rate(number - 1, self.job.steps, recipe.lr, round(recipe.warmup * self.job.steps))
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = rate
        pictures = torch.as_tensor(batch.images).to(device, non_blocking=True)
        images = augment(pictures, batch.keys, batch.epoch, recipe.seed, recipe.augment)
        embeddings = self.engine(images.contiguous(memory_format=torch.channels_last))
        loss = self.head(embeddings, torch.as_tensor(batch.identities).to(device), number)
        self.engine.backward(loss)
        self.engine.step()
        self.head.update(rate, recipe.momentum, recipe.weight_decay)
        return {"loss": loss.detach(), "lr": torch.tensor(rate)}

    def capture(self) -> dict[str, Tensor]:
        """The backbone, and what the margin has learnt of the batches; the centres are in parts."""
        tensors = super().capture()
        if self.rank == 0:
            tensors.update({f"margin/{name}": buffer.cpu().clone() for name, buffer in self.head.margin.named_buffers()})
        return tensors

    def publish_parts(self, step: int) -> list[dict[str, Any]]:
        """This rank's centres and their momentum."""
        start, centers, momentum = self.head.rows()
        return save_rows(self.store, step, start, {"weight": centers, "momentum": momentum})

    def publish_weights(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """weights/: the backbone as safetensors and as ONNX, with its sidecar."""
        model = self._backbone()
        load_weights(model, Checkpoint(self.job.steps, {}, tensors))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            sha256 = save_backbone(model.eval(), folder)
            onnx_sha256 = export_onnx(model, folder / ONNX_FILE, name=self.job.output.rstrip("/").rpartition("/")[2])
            self.put_weights(folder)
        return {"sha256": sha256, "recognizer": {"file": f"weights/{ONNX_FILE}", "sha256": onnx_sha256, "dim": model.dim}}

    def _backbone(self) -> Any:
        recipe = self.job.recipe
        if recipe.init is None:
            return create_backbone(recipe.backbone, recipe.dim, recipe.seed)
        if recipe.init.endswith(".onnx"):
            with local_recognizer(recipe.init, recipe.init_sha256) as file:
                return load_backbone(file, recipe.dim)
        with local_weights(recipe.init) as folder:
            return load_backbone(folder, recipe.dim)

    def _start_head(self, start: Checkpoint | None, device: torch.device) -> PartialFC:
        recipe = self.job.recipe
        margin = create_margin(recipe.margin, margin=recipe.margin_value, scale=recipe.scale)
        head = PartialFC(recipe.dim, recipe.num_classes, margin, recipe.rate, recipe.seed).to(device)
        if start is not None:
            for name, buffer in margin.named_buffers():
                buffer.copy_(start.tensors[f"margin/{name}"])
            mine, centers, _ = head.rows()
            for first, tables in load_rows(self.store, start.facts["parts"], mine, mine + len(centers)):
                head.load_rows(first, tables["weight"], tables["momentum"])
        return head
