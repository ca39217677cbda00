"""The job inside of a submission, read and checked as the job itself would, before anything is sent."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import yaml

from cluster.kubernetes.nodes import Nodes
from cluster.secret import SecretError, carries_credentials, require_reference
from jobs.command import Config, UsageError, from_mapping, load_mapping
from jobs.embed import EmbedConfig

JOBS = ("ingest", "train", "protect", "embed", "leakage", "report", "verify", "pipeline", "pretrain", "evaluate", "plan")
"""What can be submitted. demo, status, submit and cancel belong to the machine where they are typed; compare keeps its records in a folder
there."""
READS = frozenset(
    (
        *("source", "input", "data", "original", "protected", "weights", "recognizer", "init", "deepspeed", "beside", "repair"),
        *("bin", "pairs", "images", "cfp", "identification", "distractors", "templates", "template_pairs", "template_gallery", "attackers"),
    )
)
WRITES = frozenset(("output", "root", "folder"))
"""Fields that name places."""
SECRETS = re.compile(r"rekey|secret|password|passwd|token|credential|access_?key|api_?key|private_?key", re.IGNORECASE)
LARGEST_SEED = 2**64
"""A seed of more bits was made to be secret, and everything that is submitted can be read by others."""
_S3 = re.compile(r"s3://[^/\s]+(/.*)?")
Step = tuple[str, str, Config]
"""Its section ("" for a job that is no pipeline), its job and its configuration."""


@dataclass(frozen=True)
class InnerJob:
    """A job that is to be submitted.

    Attributes:
        name: of the job.
        content: of its YAML file, with what the submission fills in.
        config: the same, typed.
        steps: the job itself, or the steps of a pipeline.
    """

    name: str
    content: Mapping[str, Any]
    config: Config
    steps: tuple[Step, ...]

    @property
    def yaml(self) -> str:
        """The file that travels: without comments, which may say what others must not read."""
        return yaml.safe_dump(dict(self.content), sort_keys=False, allow_unicode=True, width=140)

    @property
    def root(self) -> str | None:
        """Where its work can be seen to grow, for ``facemae status``."""
        names = ("input",) if isinstance(self.config, EmbedConfig) else ("output", "root")
        return next((str(value) for name in names if (value := getattr(self.config, name, None))), None)


def read_job(name: str, file: str) -> InnerJob:
    """Read and check a job's file.

    Raises:
        UsageError: no such job, a field that is unknown, wrong, missing or a secret, or a place that other machines do not reach.
    """
    if name not in JOBS:
        raise UsageError(f"no job {name!r} can be submitted; those that can are {', '.join(JOBS)}")
    content = load_mapping(file)
    require_no_secrets(content, file)
    return _checked(name, content, file)


def require_no_secrets(content: Mapping[str, Any], where: str) -> None:
    """Refuse what nobody else may read in a configuration that others can. Raises UsageError, which does not repeat it."""
    for field, value in _values(content):
        names = field.split(".")
        free = names[:1] == ["pretrain"]  # the names of its sections are the user's
        last, secret = names[-1], next((n for n, name in enumerate(names) if SECRETS.search(name) and not (free and n == 1)), None)
        field = field if secret is None else ".".join(names[: secret + 1])  # what lies below may be the secret itself
        if "@" in field:
            raise UsageError(f"{where}: the name of a field holds an @, as a user or password would (it is not repeated here)")
        if isinstance(value, str) and carries_credentials(value):
            raise UsageError(
                f"{where}: {field} holds a user or password (it is not repeated here), and a submitted file can be read by others: "
                "leave it out, credentials come from the environment there"
            )
        if secret is not None and value is not None:
            try:
                require_reference(str(value), f"{where}: {field}: a secret")
            except SecretError as error:
                raise UsageError(f"{error}, and a submitted file can be read by others") from None
        if last == "seed" and isinstance(value, int) and abs(value) >= LARGEST_SEED:
            raise UsageError(
                f"{where}: {field} has more than 64 bits, so it was made to be secret (it is not repeated here), and a submitted file can "
                "be read by others: give secret_seed: env:NAME"
            )


def with_workers(job: InnerJob, nodes: Nodes, preset: str, where: str) -> InnerJob:
    """The job with the number of workers that its pods hold, where none is given: pods come as workers ask for them.

    Raises:
        UsageError: a worker fits no pod, more are asked for than fit, or the number does not divide the lanes of a training.
    """
    content = copy.deepcopy(dict(job.content))
    for section, _, config in job.steps:
        fits = _require_fit(config, nodes, preset, _place(where, section))
        given = getattr(config, "num_workers", None)
        if given is None:
            continue
        if given > fits:
            raise UsageError(
                f"{_place(where, section)}: num_workers: {given}, and {fits} fit into the pods of --preset {preset}: give --pods, another "
                "preset, or fewer workers"
            )
        if not given:
            _section(content, section)["num_workers"] = _largest_divisor(getattr(config, "lanes", None), fits)
    return _checked(job.name, content, where)


def warnings(job: InnerJob, nodes: Nodes, preset: str) -> Iterator[str]:
    """What is no mistake, and costs money or waits for something."""
    gpus = any(group.gpus for group in nodes.groups)
    asks = [getattr(config, name, 0) for _, _, config in job.steps for name in ("gpus_per_worker", "gpus_per_gallery_actor")]
    if not any(hasattr(config, "num_workers") for _, _, config in job.steps):
        yield f"{job.name} has no workers, it runs on the head alone: no pod of --preset {preset} will come"
    elif gpus and not any(asks):
        yield f"the pods of --preset {preset} have GPUs, and the job asks for none: give gpus_per_worker: 1"
    for section, name, config in job.steps:
        if getattr(config, "device", None) == "cpu" and getattr(config, "gpus_per_worker", 0):
            yield f"{section or name}: gpus_per_worker is above 0 and device: cpu: the GPUs would idle"


def references(job: InnerJob) -> list[str]:
    """The environment variables that the job reads secrets from."""
    found = [value for field, value in _values(job.content) if SECRETS.search(field.rpartition(".")[2]) and isinstance(value, str)]
    return sorted({value.removeprefix("env:") for value in found if value.startswith("env:")})


def _checked(name: str, content: Mapping[str, Any], where: str) -> InnerJob:
    module = importlib.import_module(f"jobs.{name}")
    kind: type[Config] = next(iter(get_type_hints(module.run).values()))
    config = from_mapping(kind, content, where=where, complete=True)
    if getattr(config, "address", None):
        raise UsageError(f"{where}: address: a submitted job finds the Ray that it runs on: remove it")
    if name == "pipeline":
        _require_reachable(config, WRITES, where)
        steps = tuple((section, step.__name__.rpartition(".")[2], settings) for section, step, settings in module.plan(config))
    else:
        steps = (("", name, config),)
    for section, step, settings in steps:
        _require_reachable(settings, READS | WRITES, _place(where, section))
        _require_lanes(settings, _place(where, section))
        if step == "protect" and getattr(settings, "secret_seed", None) is None:  # which only those machines can read
            importlib.import_module("jobs.protect").method_options(settings)
    return InnerJob(name, content, config, steps)


def _place(where: str, section: str) -> str:
    return f"{where}: section {section}" if section else where


def _require_reachable(config: Config, names: frozenset[str], where: str) -> None:
    """Refuse places that only this machine has, and an output that lies in an input or holds one."""
    read = list[tuple[str, str]]()
    for field in dataclasses.fields(config):
        given = getattr(config, field.name)
        for value in [given] if isinstance(given, str) else given if isinstance(given, list | tuple) else []:
            if field.name not in names or not isinstance(value, str):
                continue
            if field.name in WRITES and not _S3.fullmatch(value):
                raise UsageError(
                    f"{where}: {field.name}: {value or 'a folder'} would go with the machine that writes it: give s3://bucket/prefix"
                )
            if field.name in READS and not _S3.fullmatch(value) and not value.startswith("synthetic:") and value != "pixels":
                raise UsageError(
                    f"{where}: {field.name}: other machines do not reach {value}: put it into the store and give s3://bucket/..."
                )
            read += [(field.name, value)] if field.name in READS else []
    output = getattr(config, "output", None)
    for name, value in read if output else ():
        here, there = f"{value.rstrip('/')}/", f"{str(output).rstrip('/')}/"
        if here.startswith(there) or (there.startswith(here) and name not in ("weights", "init")):
            raise UsageError(f"{where}: output {output} and {name} {value} lie in each other: choose an output beside it")


def _require_lanes(config: Config, where: str) -> None:
    lanes, given = getattr(config, "lanes", None), getattr(config, "num_workers", 0)
    if lanes and given and lanes % given:
        best = _largest_divisor(lanes, given)
        raise UsageError(f"{where}: num_workers: {given} does not divide lanes: {lanes}: give {best}, or other lanes from the start")


def _require_fit(config: Config, nodes: Nodes, preset: str, where: str) -> int:
    """How many workers fit. Raises UsageError when one of them, or one of its other actors, fits no pod."""
    for kind in ("worker", "gallery_actor"):
        cpus, gpus = (getattr(config, f"{unit}_per_{kind}", 0) for unit in ("cpus", "gpus"))
        if (cpus or gpus) and not nodes.fitting_workers(math.ceil(cpus), gpus):
            most = ", ".join(f"{group.cpus} cores and {group.gpus} GPUs" for group in nodes.groups)
            raise UsageError(
                f"{where}: cpus_per_{kind}: {cpus:g} and gpus_per_{kind}: {gpus:g} fit no pod of --preset {preset} ({most}): ask for "
                "less, or take another preset"
            )
    return nodes.fitting_workers(getattr(config, "cpus_per_worker", 1), getattr(config, "gpus_per_worker", 0.0))


def _largest_divisor(lanes: int | None, fits: int) -> int:
    """The workers of a training: they must divide its lanes."""
    return fits if lanes is None else max(n for n in range(1, min(lanes, max(fits, 1)) + 1) if lanes % n == 0)


def _section(content: dict[str, Any], name: str) -> dict[str, Any]:
    """The part of the file that holds a step's own fields."""
    if not name:
        return content
    outer, _, inner = name.partition(" ")
    found: dict[str, Any] = content.setdefault(outer, {})
    return found if not inner else found.setdefault(inner, {})


def _values(content: Any, field: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value, by its dotted name."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _values(value, f"{field}.{name}" if field else str(name))
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _values(value, field)
    else:
        yield field, content
