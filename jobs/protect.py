"""``facemae protect``: every image of a data set through a protection."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.dataset import Dataset
from cluster.inputs import input_units, require_apart
from cluster.protect import ProtectProcessor, describe_protection, require_people, require_same_keys
from cluster.secret import MAKE_ONE, SeedReference, require_reference
from cluster.session import session
from cluster.stage import run_stage
from cluster.store import NotFound, open_store
from facemae.protection import Dial, protection_class
from facemae.protection.noise_source import MIN_SEED_BITS
from jobs.command import RayConfig, UsageError, main_of
from jobs.repair import repair
from jobs.summary import print_summary


@dataclass(frozen=True, kw_only=True)
class ProtectConfig(RayConfig):
    """Protect every image of a data set. The output holds key, label and new pixels, and nothing else of the original.

    Reads: a data set made by ingest, and for --method facemae or mae the weights of a training run.
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
    """The protection: facemae; to compare with it mae, blur, pixelate, noise, random_mask, fixed_mask, k_same, pixel_dp
    (docs/protections.md); or none (decode and encode only, for measurements)."""
    strength: float | None = None
    """How strong; without it the method's default. facemae, mae, random_mask: share of the patches that is hidden, 0 to below 1 (0.75).
    blur: sigma in pixels, to 112 (4). pixelate: block in pixels, 2 to 112 (8). noise: sigma of 255 (50). fixed_mask: scale of the
    rectangles over eyes and mouth, to 2 (1). k_same: people in an average, 2 to 1000 (5). pixel_dp: epsilon, to 1000, smaller is stronger
    (0.5). none has none."""
    options: dict[str, int] = field(default_factory=dict)
    """Further options of the method, as NAME VALUE: random_mask: patch_size (16). pixel_dp: neighborhood (16), block (16)."""
    weights: str | None = None
    """A training run or weights folder (model.safetensors + config.json), for facemae, and for mae one of facemae train --loss mse."""
    mask_ratio: float | None = None
    """Another name of --strength, for facemae and mae alone."""
    seed: int = 0
    """Masks and noise are a function of seed and key alone. Noise (noise, pixel_dp) is no better than its seed is secret: for a release
    give --secret-seed instead."""
    secret_seed: str | None = None
    """For noise and pixel_dp: draw the seed from the secret at env:NAME or file:PATH (driver and workers each read it)."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where the worker has one."""
    batch_size: int = 64
    """Images handed to the device at once; changes no byte of the output."""
    rekey: str | None = None
    """For a release: replace every key by HMAC-SHA256 under the secret at env:NAME or file:PATH (driver and workers each read it)."""
    repair: str | None = None
    """Root of a measurement: copy its protected set, and protect what is traced again until no attacker traces it, adaptive ones with the
    maps that they had. Method, strength and seed come from the measured set (not the secret seed of noise: give --secret-seed again)."""
    repair_rank: int = 1
    """An image counts as traced when an attacker has its original at this rank or better; 1 to 10."""
    recognizer: list[str] = field(default_factory=list)
    """For --repair: the ONNX files of all attackers of the measurement, paths or s3://."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # tyro's place holder for a value still to come is neither
        if isinstance(self.seed, int) and abs(self.seed).bit_length() >= MIN_SEED_BITS:
            raise UsageError(
                f"--seed has {MIN_SEED_BITS} bits or more, which is a secret (it is not repeated here) and would reach files and command "
                f"lines: put one in the environment or in a file of all machines and give --secret-seed env:NAME or file:PATH; {MAKE_ONE}"
            )
        for flag, reference in (("--secret-seed", self.secret_seed), ("--rekey", self.rekey)):
            if isinstance(reference, str):
                require_reference(reference, f"{flag}: the secret")

    def check(self) -> None:
        """See Config."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: give 1 or more")


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
    if config.method == "mae":
        require_pixel_loss(options["weights"])
    if config.rekey is not None:
        require_same_keys(source, output, config.rekey)
        del parent["url"]  # would tell where the originals are
    with session(config.address):
        description = describe_protection(config.method, options, config.gpus_per_worker)
        require_people(source, description)
        processor = ProtectProcessor(config.input, config.method, options, description, config.batch_size, config.rekey)
        name = f"protect ({config.method})"
        result = run_stage(processor, units, output, name=name, kind="images", parent=parent, options=config.stage_options())
    if warning := description.get("warning"):
        print(f"warning: {warning}; such a set is never released")
    next_step = f"facemae leakage --original {config.input} --protected {config.output} --recognizer ATTACKER.onnx --output leakage"
    next_step += f" --rekey {config.rekey}" if config.rekey else ""
    return print_summary(result, output, next_step=next_step)


def method_options(config: ProtectConfig) -> dict[str, Any]:
    """The options of the chosen method: of the flags those that it knows. Raises ValueError for one that is missing or wrong."""
    kind = protection_class(config.method)
    known = inspect.signature(kind).parameters
    if "weights" in known and config.weights is None:
        raise ValueError(f"--method {config.method} needs --weights: the output of facemae train")
    ignored = [name for name, value in (("weights", config.weights), ("seed", config.seed)) if value and name not in known]
    if ignored:
        raise ValueError(f"--{ignored[0]}: {config.method} has none, leave it out")
    given = {"weights": config.weights, "seed": config.seed, "device": config.device, "threads": config.cpus_per_worker}
    options: dict[str, Any] = {name: value for name, value in given.items() if name in known} | _strength(config, kind.dial)
    if config.secret_seed is not None:
        if config.seed or options.pop("seed", None) is None:
            reason = "--seed is given too: leave one of them out" if config.seed else f"{config.method} has no seed, leave it out"
            raise ValueError(f"--secret-seed: {reason}")
        options["secret_seed"] = SeedReference.of(config.secret_seed)
    wrong = sorted(name for name in config.options if name in options or name not in known)
    if wrong:
        free = [name for name, parameter in known.items() if name not in options and parameter.annotation in (int, "int")]
        raise ValueError(f"--options {wrong[0]}: {config.method} takes {', '.join(free) or 'none'} there")
    return {**options, **config.options}


def _strength(config: ProtectConfig, dial: Dial | None) -> dict[str, float]:
    """The strength under the name by which the method's class takes it."""
    if config.strength is not None and config.mask_ratio is not None:
        raise ValueError("--strength and --mask-ratio are the same: give one of them")
    if config.mask_ratio is not None and (dial is None or dial.option != "mask_ratio"):
        raise ValueError(f"--mask-ratio is for facemae and mae: {config.method} takes --strength" if dial else "none takes no --mask-ratio")
    value = config.mask_ratio if config.strength is None else config.strength
    if dial is None:
        if value is not None:
            raise ValueError(f"--strength {value:g}: the method {config.method} has no strength, leave it out")
        return {}
    return {dial.option: dial.checked(config.method, value)}


def require_pixel_loss(weights: str) -> None:
    """Raise ValueError where a training run says that its loss was not the pixels' squared error; a weights folder does not say."""
    try:
        recipe = json.loads(open_store(weights).get("run.json"))["config"]
        others = recipe["loss.relation"] or recipe["loss.instance"] or recipe["loss.pixel_kind"] != "mse"
    except (NotFound, ValueError, KeyError, TypeError):
        return
    if others:
        raise ValueError(f"{weights} was not trained with --loss mse, and mae is what the pixels alone give: protect with --method facemae")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(ProtectConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
