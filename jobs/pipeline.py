"""``facemae pipeline``: from faces to a protected data set with a measured leakage, from one YAML file."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cluster.session import session
from cluster.store import join_url
from facemae.recognizer.pixels import PIXELS
from jobs import embed, ingest, leakage, pretrain, protect, report, train, verify
from jobs.command import Config, UsageError, from_mapping, main_of

JobT = TypeVar("JobT", bound=Config)
TrainingT = TypeVar("TrainingT", pretrain.PretrainConfig, train.TrainConfig)
Section = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(Config):
    """Ingest, train, protect, embed, measure, report: every step resumes where it was, so run the same command again after a stop.

    Reads: a YAML file whose sections hold the flags of the jobs of the same name (roots are filled in). Names and types are
    checked before the first step starts.
    Writes: ROOT/training, ROOT/original, ROOT/run, ROOT/protected, and in FOLDER the recognisers that it trains, the leakage tables and
    report.html. Both are folders or s3://; on a cluster both are s3://, since no worker sees this machine's folders.
    Next: open FOLDER/leakage/report.html.
    """

    root: str
    """Where the data sets go: a folder or s3://bucket/prefix."""
    folder: str = "facemae-results"
    """Where recognisers, tables and the report go: a folder or s3://bucket/prefix."""
    recognizer: str
    """ONNX file (a path or s3://) inside the relation loss, or the name of a section of pretrain."""
    attackers: list[str]
    """ONNX files (paths or s3://) that attack, or names of sections of pretrain. Never the recogniser of the loss."""
    training: Section = field(default_factory=dict)
    """facemae ingest of the people that FaceMAE learns from."""
    original: Section = field(default_factory=dict)
    """facemae ingest of the people to protect."""
    pretrain: dict[str, Section] = field(default_factory=dict)
    """facemae pretrain of recognisers, by name, on the training people."""
    embed: Section = field(default_factory=dict)
    """facemae embed of the training people by the recogniser in the loss."""
    train: Section = field(default_factory=dict)
    """facemae train."""
    protect: Section = field(default_factory=dict)
    """facemae protect."""
    leakage: Section = field(default_factory=dict)
    """facemae leakage."""
    report: Section = field(default_factory=dict)
    """facemae report."""
    address: str | None = None
    """Address of a running Ray cluster; without one a local Ray is started."""
    num_workers: int = 0
    """Workers of every step; 0 takes as many as fit. A training takes the most up to this that divide its lanes."""


def run(config: PipelineConfig) -> dict[str, Any]:
    """Run every step. Returns the summaries by step."""
    steps = plan(config)
    done: dict[str, Any] = {}
    with session(config.address):
        for number, (name, job, settings) in enumerate(steps, 1):
            print(f"\n[{number}/{len(steps)}] {name}", flush=True)
            done[name] = job.run(settings)
    failed = [shard for summary in done.values() if isinstance(summary, Mapping) for shard in summary.get("failed_shards", ())]
    withheld = next((summary["withheld"] for summary in done.values() if isinstance(summary, Mapping) and summary.get("withheld")), None)
    return {**done, "failed_shards": failed, "withheld": withheld, "next": done["report"]["next"]}


def plan(config: PipelineConfig) -> list[tuple[str, Any, Config]]:
    """The steps as (name, job module, its config), all checked.

    Raises:
        UsageError: a section holds an unknown or wrong field, or asks for workers that do not divide its lanes; or the recogniser of the
            loss attacks too.
    """
    if config.recognizer in config.attackers:
        raise UsageError(f"{config.recognizer} sits in the loss and attacks too: it would measure what was trained to please it")
    for name in (config.recognizer, *config.attackers):
        if not name.endswith(".onnx") and name != PIXELS and name not in config.pretrain:
            known = ", ".join(config.pretrain) or "none"
            raise UsageError(f"{name!r} is neither an ONNX file nor the name of a section of pretrain ({known})")
    training, original, protected = (join_url(config.root, name) for name in ("training", "original", "protected"))
    weights, results = join_url(config.root, "run"), join_url(config.folder, "leakage")
    inside, *attackers = (_recognizer(config, name) for name in (config.recognizer, *config.attackers))
    ray, pair = {"num_workers": config.num_workers}, {"original": original, "protected": protected}

    lineage = weights if config.protect.get("method", "facemae") in ("facemae", "mae") else None
    rekey = config.protect.get("rekey")

    def job(module: Any, kind: type[JobT], section: Mapping[str, Any], where: str, **roots: Any) -> tuple[str, Any, JobT]:
        clash = sorted((set(roots) - set(ray)) & set(section))
        if clash:
            raise UsageError(f"section {where}: {clash[0]!r} is filled in by the pipeline: remove it")
        return where, module, from_mapping(kind, {**roots, **section}, where=f"section {where}", complete=True)

    def training_of(module: Any, kind: type[TrainingT], section: Mapping[str, Any], where: str, **roots: Any) -> tuple[str, Any, TrainingT]:
        name, module, settings = job(module, kind, section, where, **roots)
        return name, module, _dividing(settings, config.num_workers, f"section {where}")

    steps: list[tuple[str, Any, Config]] = [
        job(ingest, ingest.IngestConfig, config.training, "training", output=training, **ray),
        *(
            training_of(pretrain, pretrain.PretrainConfig, section, f"pretrain {name}", data=training, output=_run_of(config, name))
            for name, section in config.pretrain.items()
        ),
        job(embed, embed.EmbedConfig, config.embed, "embed", input=training, recognizer=inside, **ray),
        training_of(train, train.TrainConfig, config.train, "train", data=training, recognizer=inside, output=weights),
        job(ingest, ingest.IngestConfig, config.original, "original", output=original, **ray),
        job(protect, protect.ProtectConfig, config.protect, "protect", input=original, output=protected, weights=lineage, **ray),
        job(leakage, leakage.LeakageConfig, config.leakage, "leakage", **pair, recognizer=attackers, output=results, rekey=rekey, **ray),
        job(report, report.ReportConfig, config.report, "report", output=results, weights=lineage, rekey=rekey),
        job(verify, verify.VerifyConfig, {}, "verify original", root=original),
        job(verify, verify.VerifyConfig, {}, "verify protected", root=protected),
    ]
    return steps


def _recognizer(config: PipelineConfig, name: str) -> str:
    """The ONNX file behind a name of the pretrain section, or the file itself."""
    return f"{_run_of(config, name)}/weights/recognizer.onnx" if name in config.pretrain else name


def _run_of(config: PipelineConfig, name: str) -> str:
    """Where a recogniser of the pretrain section is trained."""
    return join_url(config.folder, "recognizers", name)


def _dividing(settings: TrainingT, most: int, where: str) -> TrainingT:
    """The training with workers that divide its lanes: its own number, which must, or the most up to ``most`` (0: as many as fit)."""
    lanes, given = settings.lanes, settings.num_workers
    if lanes < 1:
        raise UsageError(f"{where}: lanes is {lanes}: give 1 or more")
    if given and lanes % given:
        fits = max(n for n in range(1, lanes + 1) if lanes % n == 0 and n <= given)
        raise UsageError(f"{where}: {given} workers do not divide {lanes} lanes: give num_workers: {fits}, or lanes: {given}")
    if given or not most:
        return settings
    return dataclasses.replace(settings, num_workers=max(n for n in range(1, min(most, lanes) + 1) if lanes % n == 0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(PipelineConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
