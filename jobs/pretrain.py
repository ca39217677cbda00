"""``facemae pretrain``: a small recogniser from a data set, as ONNX."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from cluster.dataset import Dataset
from cluster.stream import Plan, Stream, read_counts
from facemae.recognizer.compact import CompactNet
from facemae.recognizer.export import export_onnx
from facemae.recognizer.margin import CosFace, MarginHead
from facemae.recognizer.train import fit_recognizer
from jobs.command import Config, main_of


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(Config):
    """Train a compact recogniser (CosFace) on one machine and write it as ONNX with its sidecar file.

    Reads: a data set. Writes: OUTPUT (FILE.onnx) and FILE.json beside it. Networks of another --block and --width make errors of their
    own, so that one can serve the relation loss and another, independent one attack.
    Next: facemae embed, facemae train.
    """

    data: str
    """Root of the data set."""
    output: str
    """FILE.onnx."""
    block: Literal["plain", "residual", "separable"] = "residual"
    """What the network's stages are made of."""
    width: int = 32
    """Channels after the first stage, an even number."""
    dim: int = 128
    """Length of an embedding."""
    steps: int = 600
    """Training steps."""
    batch_size: int = 128
    """Images a step."""
    lr: float = 0.1
    """Highest learning rate."""
    seed: int = 0
    """Of the network's start, the order and the flips."""
    threads: int = 1
    """CPU threads."""
    device: str = "cpu"
    """cpu or cuda."""


def run(config: PretrainConfig) -> dict[str, Any]:
    """Train and export; an ONNX file that is already there is kept, so that a pipeline can go on."""
    output = Path(config.output)
    if output.exists():
        print(f"{output} is already there: kept")
        return {"output": str(output)}
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    dataset = Dataset(config.data)
    num_classes = 1 + max(manifest.identities.last for manifest in dataset.manifests())
    net = CompactNet(config.dim, config.width, config.block)
    plan = Plan(read_counts(dataset), config.batch_size, images_per_identity=2, lanes=min(4, config.batch_size // 2), seed=config.seed)
    stream = Stream(dataset, plan)
    batches = ((np.asarray(batch.images), np.asarray(batch.identities)) for batch in stream.batches(0, config.steps))
    with tqdm(total=config.steps, desc=f"pretrain ({output.stem})", unit=" steps", mininterval=0.5 if sys.stderr.isatty() else 5) as bar:

        def show(step: int, loss: float, _lr: float) -> None:
            bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)
            bar.update()

        # a softer margin than large networks take: these see each person a few dozen times
        head = MarginHead(config.dim, num_classes, CosFace(margin=0.2, scale=32.0), config.seed)
        fit = partial(fit_recognizer, lr=config.lr, warmup=config.steps // 8, seed=config.seed, device=config.device, on_step=show)
        fit(net, batches, num_classes, config.steps, head=head)
    output.parent.mkdir(parents=True, exist_ok=True)
    export_onnx(net.cpu(), output)
    print(f"written: {output} and {output.with_suffix('.json')}\nnext:    facemae embed --input {config.data} --recognizer {output}")
    return {"output": str(output)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(PretrainConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
