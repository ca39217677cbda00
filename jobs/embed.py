"""``facemae embed``: unit embeddings of every image of a data set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.dataset import Dataset
from cluster.embed import EmbedProcessor
from cluster.inputs import input_units
from cluster.session import session
from cluster.stage import run_stage
from jobs.command import RayConfig, main_of
from jobs.summary import print_summary


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(RayConfig):
    """Embed every image of a data set with a recogniser, once; training and leakage read the result.

    Reads: a data set, and an ONNX recogniser (input N x 3 x 112 x 112).
    Writes: INPUT/embeddings/<recogniser>/: parquet shards of key, identity, embedding (unit length, float16).
    Next: facemae train, or facemae leakage.
    """

    input: str
    """Root of the data set."""
    recognizer: str
    """ONNX file, a path or s3://; its normalisation comes from FILE.json beside it, or from the two flags below."""
    recognizer_mean: tuple[float, float, float] | None = None
    """Mean of value/255 for each colour, where there is no sidecar file."""
    recognizer_std: tuple[float, float, float] | None = None
    """Standard deviation of value/255 for each colour, likewise."""
    device: str = "cpu"
    """cpu or cuda."""


def run(config: EmbedConfig) -> dict[str, Any]:
    """Embed, and return the summary that is printed."""
    source = Dataset(config.input)
    units, parent = input_units(source)
    processor = EmbedProcessor(config.input, config.recognizer, config.recognizer_mean, config.recognizer_std, config.device)
    output = source.embeddings(processor.name)
    with session(config.address):
        name = f"embed ({processor.name})"
        result = run_stage(processor, units, output, name=name, kind="embeddings", parent=parent, options=config.stage_options())
    return print_summary(result, output, next_step=f"facemae train --data {config.input} --recognizer {config.recognizer} --output RUN")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(EmbedConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
