"""What a training tells: metrics over all ranks, the driver's progress line, TensorBoard and pictures in the run's folder."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from cluster.store import Store
from cluster.train_job import TrainJob

UPLOAD_SECONDS = 60.0


class Telemetry:
    """Sums up metrics between reports. Every rank has one, and all must call it at the same steps; only rank 0 writes.

    Args:
        first: steps done before.
        last: the metrics that were reported last before them.

    Attributes:
        last: the last reported metrics.
    """

    def __init__(self, job: TrainJob, board: Any, store: Store, device: torch.device, first: int, last: Mapping[str, float]) -> None:
        self._job, self._board, self._store, self._device = job, board, store, device
        self._writes = dist.get_rank() == 0
        self._first, self._since, self._reported = first, time.perf_counter(), first
        self._sums: dict[str, Tensor] = {}
        self._rows = 0
        self._answer: Any = None
        self.last: dict[str, float] = dict(last)
        self._events: Any = None
        self._uploaded = time.perf_counter()
        if self._writes:
            self._answer = self._board.report.remote(self._progress(first))  # the line shows where the run goes on

    def step(self, step: int, metrics: dict[str, Tensor], rows: int) -> bool:
        """Take one step's metrics of this rank's rows; report when it is time. Returns whether the user asked to stop."""
        self._rows += rows
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=self._device)) + value.to(self._device) * rows
        if step % self._job.options.log_every and step != self._job.steps:
            return False
        return self._report(step)

    def grid(self, step: int, picture: np.ndarray) -> None:
        """Write a picture, uint8 (H, W, 3), to grids/ and TensorBoard."""
        if not self._writes:
            return
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        self._store.put(f"grids/{step:08d}.png", file.getvalue())
        self._tensorboard().image("original, masked, reconstruction", file.getvalue(), picture.shape, step)

    def _report(self, step: int) -> bool:
        """Mean metrics of all ranks to TensorBoard and the driver."""
        wish = float(bool(ray.get(self._answer))) if self._answer is not None else 0.0  # what the driver said last time
        names = sorted(self._sums)
        flat = torch.stack(
            [torch.tensor(value, device=self._device) for value in (wish, float(self._rows))] + [self._sums[n] for n in names]
        )
        dist.all_reduce(flat)
        stop, rows, *sums = flat.tolist()
        self.last = {name: value / rows for name, value in zip(names, sums, strict=True)}
        if not math.isfinite(self.last["loss"]):
            raise FloatingPointError(f"the loss is {self.last['loss']} at step {step}: lower --lr, or clip gradients (--deepspeed)")
        now = time.perf_counter()
        rate = rows / (now - self._since)
        self._sums, self._rows, self._since = {}, 0, now
        if self._writes:
            self._answer = self._board.report.remote(self._progress(step))
            for name, value in {**self.last, "images_per_second": rate}.items():
                self._tensorboard().scalar(f"train/{name}", value, step)
            if now - self._uploaded > UPLOAD_SECONDS:
                self.upload()
        return bool(stop)

    def _progress(self, step: int) -> dict[str, Any]:
        plan = self._job.plan
        samples = {"samples": plan.samples_before(step), "first_sample": plan.samples_before(self._first)}
        return {"step": step, **samples, "metrics": self.last}

    def _tensorboard(self) -> Any:
        if self._events is None:
            from cluster.event_log import EventLog

            self._events = EventLog(self._first)
        return self._events

    def upload(self) -> None:
        """Replace this process's event file in the store: object storage cannot append."""
        if not self._writes:
            return
        name, data = self._tensorboard().take()
        self._store.put(f"tensorboard/{name}", data)
        self._uploaded = time.perf_counter()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._events is not None:
            self.upload()
