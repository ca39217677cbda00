"""What each worker of a training does, whatever is trained: stream, step, checkpoint, and on rank 0 tell of it."""

from __future__ import annotations

import json
import logging
import os
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any, Generic, TypeVar

# before deepspeed is imported, which looks for an accelerator then
if not os.environ.get("CUDA_VISIBLE_DEVICES"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.checkpoint import Checkpoint, Checkpoints, capture
from cluster.dataset import Dataset
from cluster.key_log import KeyLog
from cluster.log import follow
from cluster.store import StoreError, join_url, open_store
from cluster.stream import Stream
from cluster.telemetry import Telemetry
from cluster.train_job import TrainJob
from facemae.training import Batch
from facemae.weights import CONFIG_FILE

JobT = TypeVar("JobT", bound=TrainJob)


def work(job: TrainJob, board: Any) -> None:
    """Train as one rank of the process group that is set up."""
    follow()
    if ray.get(board.failure.remote()):
        return  # the group was restarted after an error that trying again cannot help
    for name in ("botocore", "onnxscript", "onnx_ir"):  # Ray Train lets everything through from INFO on
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of optimisers that its authors have not tried: our tests have
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled at start; gloo does its work
    torch.set_num_threads(job.options.cpus_per_worker)
    module, _, name = job.trainer.partition(":")
    try:
        getattr(import_module(module), name)(job, board).run()
    except (ValueError, FloatingPointError, StoreError) as error:
        if not isinstance(error, StoreError) or error.fatal:
            ray.get(board.fail.remote(str(error)))
        raise


class Trainer(ABC, Generic[JobT]):
    """One rank of a training.

    Attributes:
        first: steps done before.
        engine: DeepSpeed's, around the network.
    """

    def __init__(self, job: JobT, board: Any) -> None:
        self.job, self.board = job, board
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.store = open_store(job.output)
        self.checkpoints = Checkpoints(self.store, job.options.keep_checkpoints)
        start = self._newest_checkpoint()  # not kept: it is three times the weights
        self.first = 0 if start is None else start.step
        self.metrics: dict[str, float] = {} if start is None else start.facts.get("metrics", {})
        self.engine = self.start_engine(start)
        self._publisher = ThreadPoolExecutor(1, "publish")
        self._publishing: Future[None] | None = None

    @abstractmethod
    def start_engine(self, start: Checkpoint | None) -> Any:
        """The network and its optimiser in DeepSpeed, as they were at ``start``. Every rank calls it."""

    @abstractmethod
    def step(self, number: int, batch: Batch) -> dict[str, Tensor]:
        """One optimiser step, counted from 1. Returns metrics, "loss" among them."""

    @abstractmethod
    def publish_weights(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Write weights/ on rank 0. Returns what run.json says of them: "sha256", and anything else."""

    def stream(self) -> Stream:
        """This rank's batches."""
        return self.open_stream()

    def grid(self, batch: Batch) -> np.ndarray | None:
        """A picture of what is trained, uint8 (H, W, 3); None: nothing to see. Every rank must call it (ZeRO 3 gathers)."""
        return None

    def capture(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds whole, on rank 0. Every rank must call it."""
        return capture(self.engine)

    def publish_parts(self, step: int) -> list[dict[str, Any]]:
        """Write this rank's ranges of tables that no process holds whole (cluster/centers.py), and return what names them."""
        return []

    def run(self) -> None:
        """Train from the newest checkpoint to the end, or to where the user asks it to stop."""
        job, options = self.job, self.job.options
        telemetry = Telemetry(job, self.board, self.store, self.engine.device, self.first, self.metrics)
        keys = KeyLog(self.store, self.first, self.rank, self.world_size)
        done, stop = self.first, False
        with closing(self.stream().batches(self.first, job.steps)) as batches, telemetry:
            for done, batch in enumerate(batches, start=self.first + 1):
                metrics = self.step(done, batch)
                if options.log_keys:
                    keys.add(done, batch.epoch, batch.keys)
                stop = telemetry.step(done, metrics, len(batch.keys))
                if options.grid_every and done % options.grid_every == 0 and (picture := self.grid(batch)) is not None:
                    telemetry.grid(done, picture)
                if stop:
                    break
                if done % options.checkpoint_every == 0 and done < job.steps:
                    self._checkpoint(done, telemetry, keys)
            tensors = self._checkpoint(done, telemetry, keys) if done > self.first else self.capture()
            self._finish_publishing()
        if self.rank == 0 and done == job.steps:
            self._publish_result(tensors, telemetry.last)
        dist.barrier()

    def open_stream(self, embeddings: str | None = None) -> Stream:
        """This rank's part of the data, with the embeddings of the recogniser of that name."""
        dataset, threads = Dataset(self.job.data), self.job.options.cpus_per_worker
        return Stream(dataset, self.job.plan, embeddings, self.rank, self.world_size, threads)

    def put_weights(self, folder: Path) -> None:
        """Copy the files of a local folder into weights/, the one that describes the others last."""
        for path in sorted(folder.iterdir(), key=lambda path: (path.name == CONFIG_FILE, path.name)):
            self.store.put(f"weights/{path.name}", path.read_bytes())

    def device(self) -> torch.device:
        """Where this rank computes, before there is an engine."""
        return torch.device("cuda", torch.cuda.current_device()) if self.job.options.use_gpu else torch.device("cpu")

    def _newest_checkpoint(self) -> Checkpoint | None:
        """The same one on every rank: rank 0 chooses."""
        found = self.checkpoints.latest() if self.rank == 0 else None
        step = torch.tensor([-1 if found is None else found.step], device=self.device())
        dist.broadcast(step, 0)
        if self.rank and int(step) >= 0:
            found = self.checkpoints.load(int(step))
        return found

    def _checkpoint(self, step: int, telemetry: Telemetry, keys: KeyLog) -> dict[str, Tensor]:
        """Gather on all ranks, publish on rank 0 beside the next steps. What was told and consumed up to here is written before, by all
        ranks: whoever goes on from this checkpoint will not tell of these steps again."""
        telemetry.upload()
        keys.publish()
        parts = [list[dict[str, Any]]()] * self.world_size
        dist.all_gather_object(parts, self.publish_parts(step))  # and nobody goes on before all have written
        tensors = self.capture()
        if self.rank == 0:
            self._finish_publishing()
            epoch = step / self.job.plan.steps_per_epoch
            facts = {
                "epoch": epoch, "samples": self.job.plan.samples_before(step), "metrics": telemetry.last,
                "world_size": self.world_size, "config": self.job.config, "parent": dict(self.job.parent),
                **({"parts": [part for each in parts for part in each]} if any(parts) else {}),
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
        made = self.publish_weights(tensors)
        samples = self.job.plan.samples_before(self.job.steps)
        content = {
            "schema": 1, "steps": self.job.steps, "samples": samples, "epochs": samples / self.job.plan.num_samples, "metrics": metrics,
            "weights": {"url": join_url(self.job.output, "weights"), "sha256": made.pop("sha256")}, "parent": dict(self.job.parent),
            "config": self.job.config, "deepspeed": self.job.deepspeed, "world_size": self.world_size, **made,
        }  # fmt: skip
        self.store.put("run.json", (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
