"""From a configuration to the cells of a comparison: every job's configuration checked, and the settings that determine each result."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.dataset import Dataset
from cluster.inputs import require_apart
from cluster.protect import describe_protection, require_people
from cluster.store import join_url
from facemae.protection.noise_source import SECRET_SEED
from facemae.recognizer.pixels import PIXELS
from jobs.attack import embedders_of
from jobs.command import RayConfig, UsageError, from_mapping
from jobs.compare_cell import Cell, Settings, Trial, fingerprint, recognizer_of
from jobs.compare_files import absolute, digests, located, weights_digest
from jobs.compare_row import REFERENCE
from jobs.evaluate import EvaluateConfig
from jobs.evaluate_lists import open_protocols
from jobs.leakage import LeakageConfig
from jobs.pretrain import PretrainConfig, require_recipe
from jobs.protect import ProtectConfig, method_options

if TYPE_CHECKING:
    from jobs.compare import CompareConfig

_RAY = {field.name for field in dataclasses.fields(RayConfig)}
FILLED = {
    "protections": {"input", "output", "rekey", "repair", "repair_rank", "recognizer"},
    "leakage": {"original", "protected", "recognizer", "output", "rekey", "beside", "max_cmc1", "max_identity_cmc1"},
    "pretrain": {*_RAY, "data", "output", "seed"},
    "evaluate": {"recognizer", "output"},
}
"""Fields of a section that the comparison fills in, or that have no place in one."""
NEUTRAL = {
    "protections": {*_RAY, *FILLED["protections"], "device", "batch_size"},
    "leakage": {*_RAY, *FILLED["leakage"], "device", "gallery_actors", "cpus_per_gallery_actor", "gpus_per_gallery_actor"},
    "pretrain": {*FILLED["pretrain"], "checkpoint_every", "keep_checkpoints", "log_every", "log_keys"},
    "evaluate": {*_RAY, *FILLED["evaluate"], "device", "batch_size", "threads"},
}
"""Fields that change no figure: not among the settings of a result."""
DIGITS = 8
"""Of a digest in a folder's name."""


def plan(config: CompareConfig) -> list[Cell]:
    """All cells, the reference first.

    Raises:
        UsageError: a section holds an unknown or wrong field, two cells have one name, or a field is missing.
        ValueError, FileNotFoundError, StoreError: a recogniser, weights, list or data set cannot be read.
    """
    _check_fields(config)
    config = _located(config)
    source = Dataset(config.data).description()["lineage"]["fingerprint"]
    require_apart(config.data, config.root)
    protections = list(_protections(config.protections))
    names = [name for name, _ in protections]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"protections: two cells are named {twice[0]!r}: give one of them a `name`")
    attackers = _attackers(config)
    evaluation = _section(EvaluateConfig, "evaluate", config.evaluate, {"recognizer": ["recognizer.onnx"], "output": "."})
    _check_lists(evaluation)
    verified = digests(_settings(evaluation, "evaluate"), "evaluate")
    return [_cell(config, name, section, source, attackers, verified) for name, section in protections]


def _located(config: CompareConfig) -> CompareConfig:
    """The configuration with absolute paths."""
    root, folder, data = map(absolute, (config.root, config.folder, config.data))
    attackers = [file if file == PIXELS else absolute(file) for file in config.attackers]
    return dataclasses.replace(config, root=root, folder=folder, data=data, attackers=attackers)


def _cell(config: CompareConfig, name: str, section: Mapping[str, Any], source: str, attackers: list[Any], verified: Settings) -> Cell:
    ray, cells = {"num_workers": config.num_workers}, Path(config.folder) / "cells" / name
    draft = _section(ProtectConfig, "protections", section, {"input": config.data, "output": "", **ray}, where=f"protections {name}")
    description = _checked(name, draft)
    made = {**_settings(draft, "protections"), "data": source}
    if SECRET_SEED in description:  # whoever has it takes the noise away again: records are shown around
        made["seed"] = description[SECRET_SEED]
        made.pop("secret_seed", None)
    if draft.weights is not None:
        made["weights"] = weights_digest(draft.weights)
    protected = join_url(config.root, "protected", f"{name}-{fingerprint(made)[:DIGITS]}")
    roots = {"original": config.data, "protected": protected, "recognizer": config.attackers, "output": str(cells / "leakage")}
    leakage = _section(LeakageConfig, "leakage", config.leakage, {**roots, **ray})
    measured = {"protect": made, "attackers": attackers, "leakage": _settings(leakage, "leakage")}
    trials = tuple(_trial(config, name, seed, protected, made, verified) for seed in config.seeds)
    return Cell(name, dataclasses.replace(draft, output=protected), leakage, measured, trials)


def _checked(name: str, config: ProtectConfig) -> Settings:
    """The description of a cell's protection. What `facemae protect` would refuse is refused now, without Ray: an unknown method, a
    strength out of range, weights of another kind, too few people for it."""
    try:
        description = describe_protection(config.method, method_options(config))
        require_people(Dataset(config.input), description)
    except ValueError as error:
        raise UsageError(f"protections, {name}: {error}") from None
    return description


def _trial(config: CompareConfig, name: str, seed: int, protected: str, made: Settings, verified: Settings) -> Trial:
    ray = {"num_workers": 1, "cpus_per_worker": config.cpus_per_pretrain, "gpus_per_worker": float(config.gpus_per_pretrain > 0)}
    draft = _section(PretrainConfig, "pretrain", config.pretrain, {"data": protected, "output": "", "seed": seed, **ray})
    require_recipe(draft)
    trained = {"protect": made, "pretrain": _recipe(draft)}
    run = join_url(config.root, "runs", f"{name}-{fingerprint(trained)[:DIGITS]}", f"seed-{seed}")
    folder = str(Path(config.folder) / "cells" / name / f"seed-{seed}")
    evaluation = _section(EvaluateConfig, "evaluate", config.evaluate, {"recognizer": [recognizer_of(run)], "output": folder})
    settings = {**trained, "seed": seed, "evaluate": verified}
    return Trial(name, seed, dataclasses.replace(draft, output=run), evaluation, settings)


def _recipe(config: PretrainConfig) -> Settings:
    """The settings of a training; the files that it starts from by their digests."""
    found = _settings(config, "pretrain")
    return digests(found, "pretrain")


def _protections(sections: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and section of every cell: each strength of each entry, and the reference where no entry is it."""
    if not any(section.get("method") == REFERENCE for section in sections):
        yield REFERENCE, {"method": REFERENCE}
    for number, given in enumerate(sections, 1):
        section = dict(given)
        name, strengths = section.pop("name", section.get("method")), section.pop("strength", None)
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.=-]*", name):
            raise UsageError(f"protections, entry {number}: `method` (and `name`) must be of letters, digits and _ . = -, not {name!r}")
        many = isinstance(strengths, list)
        if many and not strengths:
            raise UsageError(f"protections, {name}: the list of strengths is empty: give a number or leave it out for the method's default")
        for strength in strengths if many else [strengths]:
            if strength is None:
                yield name, section
            elif isinstance(strength, bool) or not isinstance(strength, int | float):
                raise UsageError(f"protections, {name}: strength is {strength!r}: give a number or a list of numbers")
            else:
                # a single strength under a name of its own needs no figure behind it
                yield f"{name}-{strength:g}" if many or "name" not in given else name, {**section, "strength": strength}


def _attackers(config: CompareConfig) -> list[Any]:
    """What each attacker is: its network and normalisation. Two at least: a protection may be blind to one of them."""
    section = {"original": config.data, "protected": config.data, "recognizer": config.attackers, "output": ""}
    found = embedders_of(_section(LeakageConfig, "leakage", config.leakage, section))
    return [embedder["original"].describe()["recognizer"] for embedder in found]


def _section(kind: Any, section: str, given: Mapping[str, Any], filled: Mapping[str, Any], where: str = "") -> Any:
    """One job's configuration. Raises UsageError, naming the section and field, for what is wrong in it."""
    where = where or f"section {section}"
    if clash := sorted(set(given) & FILLED[section]):
        raise UsageError(f"{where}: {clash[0]!r} is filled in by the comparison, or has no place in one: remove it")
    return from_mapping(kind, {**filled, **located(given, section)}, where=where, complete=True)


def _settings(config: Any, section: str) -> Settings:
    """The fields that determine a result; what is None is as if it were not there, so that a new field changes no digest."""
    found = json.loads(json.dumps(dataclasses.asdict(config)))  # as it is read back from a record: tuples are lists
    return {name: value for name, value in found.items() if name not in NEUTRAL[section] and value is not None}


def _check_fields(config: CompareConfig) -> None:
    missing = [name for name in ("root", "data", "attackers", "protections", "evaluate") if not getattr(config, name)]
    if missing:
        raise UsageError(f"missing in --config FILE.yaml: {', '.join(missing)} (docs/compare.md says what each takes)")
    if len(set(config.attackers) - {PIXELS}) < 2:
        raise UsageError(f"attackers: {config.attackers[0]} alone: give two recognisers or more, a protection may be blind to one")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise UsageError(f"seeds: {config.seeds}: give one or more, each once")


def _check_lists(config: EvaluateConfig) -> None:
    """Raise what ``facemae evaluate`` would, for a list or images that are not there: now, and not after the first training."""
    for protocol in open_protocols(config):
        if protocol.absent and not config.skip_missing:
            raise UsageError(
                f"section evaluate: {protocol.name} names {len(protocol.absent)} absent images, the first: {protocol.absent[0]}"
            )


def commands(cell: Cell) -> list[str]:
    """What makes the cell's row by hand. Roots stand as DATA, PROTECTED, RUN and OUT, files by their names alone."""
    shown = {cell.protect.input: "DATA", cell.protect.output: "PROTECTED", cell.leakage.output: "OUT"}
    first, seeds = cell.trials[0], ", ".join(str(trial.seed) for trial in cell.trials)
    onnx = recognizer_of(first.pretrain.output)
    shown |= {first.pretrain.output: "RUN", onnx: "RUN/weights/recognizer.onnx", first.evaluate.output: "OUT"}
    pretrain = _command("pretrain", dataclasses.replace(first.pretrain, seed=0), shown)  # 0 is the default, which is not shown
    protect = _command("protect", cell.protect, shown)
    if isinstance(cell.settings["protect"].get("seed"), str):
        protect = re.sub(r" --(secret-)?seed .*?(?= --|$)", r" --\1seed SECRET", protect)
    return [
        protect,
        _command("leakage", cell.leakage, shown),
        f"{pretrain} --seed SEED  # SEED: {seeds}",
        _command("evaluate", first.evaluate, shown),
    ]


def _command(job: str, config: Any, shown: Mapping[str, str]) -> str:
    """A job's command line with the fields that are not at their defaults."""
    words = [f"facemae {job}"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if value == default or field.name in _RAY:
            continue
        name = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(name if value else f"--no-{field.name.replace('_', '-')}")
        else:
            words += [name, *_shown(value if isinstance(value, list | tuple) else [value], shown)]
    return " ".join(words)


def _shown(values: Iterable[Any], shown: Mapping[str, str]) -> Iterator[str]:
    for value in values:
        text = str(value)
        yield shown.get(text, text.rstrip("/").rpartition("/")[2] if "/" in text else text)
