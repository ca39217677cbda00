"""What each worker of a training does: stream, step, checkpoint, and on rank 0 tell of it."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, cast

# before deepspeed is imported, which looks for an accelerator then
if not os.environ.get("CUDA_VISIBLE_DEVICES"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import numpy as np
import ray
import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.checkpoint import Checkpoint, Checkpoints, capture, load_optimizer, load_weights
from cluster.dataset import Dataset
from cluster.key_log import KeyLog
from cluster.store import StoreError, join_url, open_store
from cluster.stream import Stream
from cluster.telemetry import Telemetry
from cluster.train_job import TrainJob
from facemae.masking import random_mask
from facemae.model import CONFIG_FILE, WEIGHTS_FILE, MaskedAutoencoder, to_pictures
from facemae.training import Batch, ReconstructionLoss, batch_loss, learning_rate, param_groups

BETAS = (0.9, 0.95)
GRID_PICTURES = 8


def work(job: TrainJob, board: Any) -> None:
    """Train as one rank of the group that Ray Train has set up."""
    if ray.get(board.failure.remote()):
        return  # the group was restarted after an error that trying again cannot help
    for name in ("DeepSpeed", "botocore"):  # Ray Train lets everything through from INFO on
        logging.getLogger(name).setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled at start; gloo does its work
    torch.set_num_threads(job.options.cpus_per_worker)
    try:
        Trainer(job, board).run()
    except (ValueError, FloatingPointError, StoreError) as error:
        if not isinstance(error, StoreError) or error.fatal:
            ray.get(board.fail.remote(str(error)))
        raise


class Trainer:
    """One rank of a training."""

    def __init__(self, job: TrainJob, board: Any) -> None:
        self.job, self.board = job, board
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.store = open_store(job.output)
        self.checkpoints = Checkpoints(self.store, job.options.keep_checkpoints)
        start = self._newest_checkpoint()
        self.first = 0 if start is None else start.step
        self.metrics: dict[str, float] = {} if start is None else start.facts.get("metrics", {})
        self.engine = self._start_engine(start)
        recognizer = job.recognizer.differentiable(job.recipe.loss.layers) if job.recognizer else None
        self.loss = ReconstructionLoss(job.recipe.loss, recognizer and self._in_half(recognizer)).to(self.engine.device)
        self.num_patches = self.engine.module.architecture.num_patches
        self._publisher = ThreadPoolExecutor(1, "publish")
        self._publishing: Future[None] | None = None

    def run(self) -> None:
        """Train from the newest checkpoint to the end, or to where the user asks it to stop."""
        job, options = self.job, self.job.options
        name = job.recognizer.name if job.recognizer else None
        stream = Stream(Dataset(job.data), job.plan, name, self.rank, self.world_size, options.cpus_per_worker)
        telemetry = Telemetry(job, self.board, self.store, self.engine.device, self.first, self.metrics)
        keys = KeyLog(self.store, self.first, self.rank, self.world_size)
        done, stop = self.first, False
        with closing(stream.batches(self.first, job.steps)) as batches, telemetry:
            for done, batch in enumerate(batches, start=self.first + 1):
                metrics = self._step(done, batch)
                if options.log_keys:
                    keys.add(done, batch.epoch, batch.keys)
                stop = telemetry.step(done, metrics, len(batch.keys))
                if options.grid_every and done % options.grid_every == 0:
                    telemetry.grid(done, self._grid(batch))
                if stop:
                    break
                if done % options.checkpoint_every == 0 and done < job.steps:
                    self._checkpoint(done, telemetry, keys)
            tensors = self._checkpoint(done, telemetry, keys) if done > self.first else self._capture()
            self._finish_publishing()
        if self.rank == 0 and done == job.steps:
            self._publish_result(tensors, telemetry.last)
        dist.barrier()

    def _newest_checkpoint(self) -> Checkpoint | None:
        """The same one on every rank: rank 0 chooses."""
        found = self.checkpoints.latest() if self.rank == 0 else None
        step = torch.tensor([-1 if found is None else found.step], device=self._device())
        dist.broadcast(step, 0)
        if self.rank and int(step) >= 0:
            found = self.checkpoints.load(int(step))
        return found

    def _device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if self.job.options.use_gpu else torch.device("cpu")

    def _start_engine(self, start: Checkpoint | None) -> Any:
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

    def _step(self, number: int, batch: Batch) -> dict[str, Tensor]:
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
    def _grid(self, batch: Batch) -> np.ndarray:
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

    def _capture(self) -> dict[str, Tensor]:
        return capture(self.engine)

    def _checkpoint(self, step: int, telemetry: Telemetry, keys: KeyLog) -> dict[str, Tensor]:
        """Gather on all ranks, publish on rank 0 beside the next steps. What was told and consumed up to here is written before, by all
        ranks: whoever goes on from this checkpoint will not tell of these steps again."""
        telemetry.upload()
        keys.publish()
        dist.barrier()
        tensors = self._capture()
        if self.rank == 0:
            self._finish_publishing()
            epoch = step / self.job.plan.steps_per_epoch
            facts = {
                "epoch": epoch, "samples": self.job.plan.samples_before(step), "metrics": telemetry.last,
                "world_size": self.world_size, "config": self.job.config, "parent": dict(self.job.parent),
            }  # fmt: skip
            self._publishing = self._publisher.submit(self.checkpoints.save, Checkpoint(step, facts, tensors))
        return tensors

    def _finish_publishing(self) -> None:
        """Wait for the last checkpoint; an error of it is raised here."""
        if self._publishing is not None:
            self._publishing.result()
            self._publishing = None

    def _publish_result(self, tensors: dict[str, Tensor], metrics: dict[str, float]) -> None:
        """Write weights/ and then run.json, which says that training is complete."""
        model = cast(MaskedAutoencoder, timm.create_model(self.job.recipe.architecture))
        load_weights(model, Checkpoint(self.job.steps, {}, tensors))
        with tempfile.TemporaryDirectory() as folder:
            sha256 = model.save_pretrained(folder)
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                self.store.put(f"weights/{name}", (Path(folder) / name).read_bytes())
        samples = self.job.plan.samples_before(self.job.steps)
        content = {
            "schema": 1, "steps": self.job.steps, "samples": samples, "epochs": samples / self.job.plan.num_samples, "metrics": metrics,
            "weights": {"url": join_url(self.job.output, "weights"), "sha256": sha256}, "parent": dict(self.job.parent),
            "recognizer": self.job.recognizer.describe() if self.job.recognizer else None,
            "config": self.job.config, "deepspeed": self.job.deepspeed, "world_size": self.world_size,
        }  # fmt: skip
        self.store.put("run.json", (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


class _Autocast(nn.Module):
    """A network in bfloat16 mixed precision."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        with torch.autocast(images.device.type, torch.bfloat16):
            return self.network(images)
