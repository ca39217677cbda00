"""``facemae protect --repair``: a measured set with what is traced protected again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cluster.adaptive import QueryMap
from cluster.dataset import Dataset, Manifest
from cluster.embedded import EmbeddedSet
from cluster.index import Gallery
from cluster.inputs import input_units, require_apart
from cluster.measurement import Measurement
from cluster.processor import Unit
from cluster.protect import describe_variants
from cluster.recognizer_file import Recognizer, open_recognizer, read_model_url
from cluster.repair import Attacker, Repair, RepairProcessor
from cluster.secret import key_map_of
from cluster.session import session
from cluster.shard import sha256_hex
from cluster.stage import run_stage
from cluster.store import join_url
from facemae.protection.noise_source import SECRET_SEED
from facemae.recognizer.pixels import PIXELS
from jobs.summary import print_summary

if TYPE_CHECKING:
    from jobs.protect import ProtectConfig

MAX_RANK = 10
METHOD_FIELDS = ("method", "strength", "mask_ratio", "seed", "options")
ROUND_FIELDS = ("seed", SECRET_SEED, "strength", "mask_ratio")


def repair(config: ProtectConfig, root: str) -> dict[str, Any]:
    """Repair the set that was measured below ``root``, and return the summary that is printed.

    Raises:
        ValueError: a flag contradicts the measured set, an attacker's file is missing, or the weights are others.
        StoreError, StageError: see ``Measurement`` and ``run_stage``.
    """
    if not 1 <= config.repair_rank <= MAX_RANK:
        raise ValueError(f"--repair-rank {config.repair_rank}: give 1 to {MAX_RANK}")
    measurement = Measurement.open(root)
    protected, output = measurement.protected(), Dataset(config.output)
    for other in (config.input, protected.url, measurement.url):
        require_apart(other, config.output)
    parent = _parent(config, measurement)
    lineage = protected.description()["lineage"]["config"]
    config = settled(config, lineage["protection"], protected.url)
    recognizers = _recognizers(config, measurement)
    units = [Unit(manifest.shard, manifest.samples_in) for manifest in protected.manifests()]
    new_key = key_map_of(lineage, config.rekey, protected.url)
    with session(config.address), ExitStack() as galleries:
        attackers = list(_attackers(config, measurement, recognizers, galleries))
        plan = _plan(config, measurement, lineage, attackers)
        plan = replace(plan, rekey=(config.rekey, new_key.check)) if config.rekey and new_key else plan
        if {unit.name for unit in units} - set(output.names()):
            for attacker in attackers:
                attacker.gallery.load()  # before any worker starts, so that a bad gallery is one clear error
        options = config.stage_options()
        result = run_stage(RepairProcessor(plan), units, output, name="repair", kind="images", parent=parent, options=options)
    print("\n".join(_lines(output.manifests(), plan)))
    return print_summary(result, output, next_step=_next_step(config, root))


def _parent(config: ProtectConfig, measurement: Measurement) -> dict[str, Any]:
    """The lineage entry of the originals. Raises ValueError when --input is another set."""
    _, parent = input_units(Dataset(config.input))
    if parent["fingerprint"] != measurement.report["original"]["fingerprint"]:
        raise ValueError(
            f"{config.input} is not the original set of {measurement.url}/leakage.json ({measurement.report['original']['url']}): give that"
        )
    if config.rekey is not None:
        del parent["url"]  # would tell where the originals are
    return parent


def settled(config: ProtectConfig, protection: Mapping[str, Any], where: str) -> ProtectConfig:
    """The configuration with method, strength and seed of the measured set. Raises ValueError where a flag says something else. A seed that
    the set keeps secret is the one that was given."""
    if "mask_ratio" in protection and config.mask_ratio is None:
        config = replace(config, mask_ratio=config.strength, strength=None)
    defaults = type(config)(input=config.input, output=config.output)
    for name in METHOD_FIELDS:
        given, default = getattr(config, name), getattr(defaults, name)
        if name == "seed" and SECRET_SEED in protection:
            continue
        if given not in (default, protection.get(name, default)):
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} {given}, but {where} was made with {protection.get(name)}: leave --{flag} out, a repair takes the set's"
            )
    return replace(config, **{name: protection[name] for name in METHOD_FIELDS if name in protection})


def _recognizers(config: ProtectConfig, measurement: Measurement) -> list[Recognizer]:
    """The attackers' networks, in the order of the report. Raises ValueError when one is not among --recognizer."""
    files = {sha256_hex(read_model_url(file)): file for file in [PIXELS, *config.recognizer]}  # pixels needs no file
    needed = {each["recognizer"]["name"]: each["recognizer"]["sha256"] for each in measurement.attackers}
    missing = [name for name, sha256 in needed.items() if sha256 not in files]
    if missing:
        raise ValueError(f"--recognizer lacks {', '.join(missing)}: a repair needs the very files that {measurement.url} was measured with")
    described = [attacker["recognizer"] for attacker in measurement.attackers]
    return [open_recognizer(files[each["sha256"]], each["mean"], each["std"], each["name"]) for each in described]


def _attackers(
    config: ProtectConfig, measurement: Measurement, recognizers: Sequence[Recognizer], galleries: ExitStack
) -> Iterator[Attacker]:
    """Every attacker of the measurement, adaptive ones included, with its gallery."""
    held = dict[str, tuple[str, Gallery]]()
    for part, recognizer in zip(measurement.attackers, recognizers, strict=True):
        if recognizer.sha256 not in held:  # an adaptive attacker searches the same originals as the network it is made of
            originals = EmbeddedSet.open(config.input, part["recognizer"]["name"]).dataset
            held[recognizer.sha256] = originals.url, galleries.enter_context(Gallery(originals, recognizer.dim))
        adaptive = part["adaptive"]
        query_map = QueryMap(join_url(measurement.url, adaptive["file"]), adaptive["sha256"]) if adaptive else None
        yield Attacker(recognizer, measurement.ranks(part).url, *held[recognizer.sha256], query_map)


def _plan(config: ProtectConfig, measurement: Measurement, lineage: Mapping[str, Any], attackers: Sequence[Attacker]) -> Repair:
    """What is done, and the lineage that says so. Raises ValueError when weights or secret seed are not those of the measured set."""
    from jobs.protect import method_options

    options, before = method_options(config), lineage.get("repair")
    skip = before["skip"] + len(before["rounds"]) if before else 0
    base, *variants = describe_variants(config.method, options, config.gpus_per_worker, skip)
    made = lineage["protection"]
    if base.get("weights_sha256") != made.get("weights_sha256"):
        found, wanted = base.get("weights_sha256"), made.get("weights_sha256")
        raise ValueError(f"--weights {config.weights} has sha256 {found}, the measured set was made with {wanted}: give these")
    if base.get(SECRET_SEED) != made.get(SECRET_SEED):
        raise ValueError("--secret-seed (or --seed) is not the one that the measured set was made with: give that")
    record = {
        "of": measurement.report["protected"]["fingerprint"],
        "leakage": measurement.sha256,
        "attackers": [{**part["recognizer"], "name": part["name"], "adaptive": _map_of(part)} for part in measurement.attackers],
        "rank": config.repair_rank,
        "protection": base,
        "skip": skip,
        "rounds": [{name: each[name] for name in ROUND_FIELDS if name in each} for each in variants],
        "before": before,
    }
    roots = config.input, measurement.protected().url
    return Repair(*roots, config.method, options, skip, attackers, config.repair_rank, {**lineage, "repair": record}, device=config.device)


def _map_of(part: Mapping[str, Any]) -> str | None:
    """The sha256 of an adaptive attacker's maps."""
    return part["adaptive"]["sha256"] if part["adaptive"] else None


def _lines(manifests: Sequence[Manifest], plan: Repair) -> Iterator[str]:
    """What became of the exposed images."""
    counts: Counter[str] = sum((Counter(manifest.counts) for manifest in manifests), Counter())
    rounds = plan.config["repair"]["rounds"]
    attackers = " or ".join(each["name"] for each in plan.config["repair"]["attackers"])
    yield f"{counts['exposed']} images were traced (rank {plan.rank} or better by {attackers}), {counts['copied']} copied as they were"
    for number, each in enumerate(rounds, 1):
        if repaired := counts[f"repaired_{number:02d}"]:
            told = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in each.items())
            yield f"  {repaired} repaired in round {number} ({told})"
    given_up = counts["exposed"] - sum(count for name, count in counts.items() if name.startswith("repaired_"))
    if given_up:
        tried = f"traced in every one of {len(rounds)} rounds, or their originals no longer decode"
        yield f"  {given_up} in quarantine: {tried if rounds else f'{plan.method} has nothing to vary'}"


def _next_step(config: ProtectConfig, root: str) -> str:
    again = f" --rekey {config.rekey}" if config.rekey else ""
    files = " ".join(config.recognizer)
    command = (
        f"facemae leakage --original {config.input} --protected {config.output} --recognizer {files} ANOTHER.onnx --output {root}-repaired"
    )
    return f"{command}{again}\n         (ANOTHER: an attacker that took no part here; what these trace was selected against)"
