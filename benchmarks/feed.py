"""Does the data keep up? The same training step fed by shards, and by a tensor in memory, in one run.

    python -m benchmarks.feed --data DATA [--backbone mobilefacenet --batch 128 --rounds 7 --steps 10] [--device cuda]

The step is that of `facemae pretrain`: augmentation on the device, backbone, Partial FC, SGD, in one process and without
DeepSpeed. *Shards* is the stream that pretraining reads (fetch, sha256, tar, JPEG in threads beside the step); *memory* are the
first batches of the same stream, decoded before. Rounds of both alternate; a round's rate leaves out its first SETTLE steps, for
which the stream had worked ahead while memory's turn was. The ratio is the median of the rounds' ratios; the goal is 0.95.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import machine
from cluster.dataset import Dataset
from cluster.order import Plan, read_counts
from cluster.pretrain_job import count_classes
from cluster.stream import Stream
from facemae.recognizer.augment import AugmentConfig, augment
from facemae.recognizer.backbone import create_backbone
from facemae.recognizer.margin import CosFace
from facemae.recognizer.partial_fc import PartialFC
from facemae.training import Batch

LANES = 4
SETTLE = 3
AUGMENT = AugmentConfig(crop=0.1, erase=0.1, color=0.1)


def main() -> None:
    """Measure, print one line a source, write the JSON."""
    options = _options()
    torch.set_num_threads(options.threads)
    dataset = Dataset(options.data)
    plan = Plan(read_counts(dataset), options.batch, images_per_identity=1, lanes=LANES)
    stream, step = Stream(dataset, plan, threads=options.decoders), _Step(options, count_classes(dataset))
    with closing(stream.batches(0, options.held)) as batches:
        held = list(batches)
    rates: dict[str, list[float]] = {"shards": [], "memory": []}
    each, memory = SETTLE + options.steps, cycle(held)
    with closing(stream.batches(options.held, options.held + options.rounds * each)) as batches:
        for _ in range(options.rounds):
            rates["shards"].append(_rate(islice(batches, each), step))
            rates["memory"].append(_rate(islice(memory, each), step))
    ratio = statistics.median(shards / memory for shards, memory in zip(rates["shards"], rates["memory"], strict=True))
    for name, values in rates.items():
        print(f"{name:7} {statistics.median(values):8.0f} images/s  ({min(values):.0f} to {max(values):.0f})")
    print(f"shards / memory: {ratio:.3f} (goal 0.95)")
    options.output.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "options": {k: str(v) for k, v in vars(options).items()}, "images_per_second": rates, "ratio": ratio}
    (options.output / "feed.json").write_text(json.dumps(content, indent=1) + "\n")


def _rate(batches: Iterable[Batch], step: _Step) -> float:
    """Images a second, without the first steps."""
    source: Iterator[Batch] = iter(batches)
    for batch in islice(source, SETTLE):
        step(batch)
    started, images = time.perf_counter(), 0
    for batch in source:
        step(batch)
        images += len(batch.keys)
    return images / (time.perf_counter() - started)


class _Step:
    """One training step of a recogniser; waits until it is done."""

    def __init__(self, options: argparse.Namespace, num_classes: int) -> None:
        self.device = torch.device(options.device)
        self.net = create_backbone(options.backbone, options.dim).to(self.device)
        self.head = PartialFC(options.dim, num_classes, CosFace()).to(self.device)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.count = 0

    def __call__(self, batch: Batch) -> None:
        self.count += 1
        images = augment(torch.as_tensor(batch.images).to(self.device), batch.keys, batch.epoch, 0, AUGMENT)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            embeddings = self.net(images.contiguous(memory_format=torch.channels_last))
        self.optimizer.zero_grad(set_to_none=True)
        self.head(embeddings, torch.as_tensor(batch.identities).to(self.device), self.count).backward()
        self.optimizer.step()
        self.head.update(0.01)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="root of a data set, local or s3://")
    parser.add_argument("--backbone", default="mobilefacenet")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="measured steps of a round")
    parser.add_argument("--held", type=int, default=8, help="batches held in memory")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--decoders", type=int, default=1, help="threads that decode")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
