"""``facemae protect``: every image of a data set through a protection."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.dataset import Dataset
from cluster.inputs import input_units, require_apart
from cluster.protect import ProtectProcessor, describe_protection, require_same_keys
from cluster.session import session
from cluster.stage import run_stage
from jobs.command import RayConfig, main_of
from jobs.repair import repair
from jobs.summary import print_summary


@dataclass(frozen=True, kw_only=True)
class ProtectConfig(RayConfig):
    """Protect every image of a data set. The output holds key, label and new pixels, and nothing else of the original.

    Reads: a data set made by ingest, and for --method facemae the weights of a training run.
    Writes: a data set with the same shard names, keys and labels. The same input, weights and seed give the same bytes on any number
    of workers. A run that was stopped goes on with the shards that are not committed.
    With --repair it reads a measurement besides (facemae leakage) and writes the set that was measured, what is traced protected again.
    Next: facemae leakage.
    """

    input: str
    """Root of the original data set."""
    output: str
    """Root of the protected data set."""
    method: str = "facemae"
    """The protection: facemae, or none (decode and encode only, for measurements)."""
    weights: str | None = None
    """A training run or weights folder (model.safetensors + config.json), for facemae."""
    mask_ratio: float = 0.75
    """Share of patches hidden from the network."""
    seed: int = 0
    """Masks are a function of seed and key alone."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where the worker has one."""
    batch_size: int = 64
    """Images handed to the device at once; changes no byte of the output."""
    rekey: str | None = None
    """For a release: replace every key by HMAC-SHA256 under the secret at env:NAME or file:PATH (driver and workers each read it)."""
    repair: str | None = None
    """Root of a measurement: copy its protected set, and protect what is traced again until no attacker traces it, adaptive ones with the
    maps that they had. Method, seed and mask ratio come from the measured set."""
    repair_rank: int = 1
    """An image counts as traced when an attacker has its original at this rank or better; 1 to 10."""
    recognizer: list[str] = field(default_factory=list)
    """For --repair: the ONNX files of all attackers of the measurement."""


def run(config: ProtectConfig) -> dict[str, Any]:
    """Protect or repair, and return the summary that is printed."""
    if config.repair is not None:
        return repair(config, config.repair)
    if config.recognizer:
        raise ValueError("--recognizer names the attackers of a --repair: give that too, or leave it out")
    require_apart(config.input, config.output)
    source, output = Dataset(config.input), Dataset(config.output)
    units, parent = input_units(source)
    options = method_options(config)
    if config.rekey is not None:
        require_same_keys(source, output, config.rekey)
        del parent["url"]  # would tell where the originals are
    with session(config.address):
        description = describe_protection(config.method, options, config.gpus_per_worker)
        processor = ProtectProcessor(config.input, config.method, options, description, config.batch_size, config.rekey)
        name = f"protect ({config.method})"
        result = run_stage(processor, units, output, name=name, kind="images", parent=parent, options=config.stage_options())
    next_step = f"facemae leakage --original {config.input} --protected {config.output} --recognizer ATTACKER.onnx --output leakage"
    next_step += f" --rekey {config.rekey}" if config.rekey else ""
    return print_summary(result, output, next_step=next_step)


def method_options(config: ProtectConfig) -> dict[str, Any]:
    """The options of the chosen method."""
    if config.method != "facemae":
        return {}
    if config.weights is None:
        raise ValueError("--method facemae needs --weights: the output of facemae train")
    options = {"weights": config.weights, "mask_ratio": config.mask_ratio, "seed": config.seed}
    return {**options, "device": config.device, "threads": config.cpus_per_worker}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(ProtectConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
