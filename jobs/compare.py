"""``facemae compare``: privacy against utility for every (protection, strength), in one table and one picture."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray

from cluster.scheduler import StageError
from cluster.session import session
from cluster.store import Store, StoreError, open_store, require_conditional_put
from jobs import pretrain
from jobs.command import Config, main_of
from jobs.compare_cell import Cell, Trial, changed, keep, make_protected, measure, recorded, row_of, train_and_verify
from jobs.compare_claim import claim
from jobs.compare_origin import Origin, joined, origin_here
from jobs.compare_plan import commands, plan
from jobs.compare_plot import picture
from jobs.compare_pool import MAX_RETRIES, run_trials
from jobs.compare_results import write_page
from jobs.compare_row import Record
from jobs.compare_table import failures, markdown, to_csv

Section = dict[str, Any]
CELL_ERRORS = (StageError, StoreError, ValueError, FileNotFoundError)
"""What costs one cell, and not the run."""

CALLS_PER_PROCESS = 1
"""Trainings of one worker process: nothing of one, memory of the GPU least of all, stays behind for the next."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
    """Protect a data set in every way asked for, measure the leakage of each, and verify recognisers trained on it on sets they never saw.

    Reads: a data set made by ingest, ONNX recognisers that attack, and the lists and images of the verification.
    Writes: the protected sets and the recognisers below ROOT, and in the local FOLDER compare.md, compare.csv, compare.json and pareto.png.
    What is recorded is not done again, unless the settings that it depends on were changed; then the message says which.
    With --results it only draws a page from recorded ones. Protections, pretrain, evaluate and leakage stand in --config alone.
    Next: copy FOLDER/compare.json to where your results are kept, and make the page of all of them with --results.
    """

    root: str = ""
    """Where the protected sets and the recognisers go: a folder or s3://bucket/prefix."""
    folder: str = "facemae-compare"
    """Local folder for records, tables and the picture."""
    data: str = ""
    """Root of the original data set (facemae ingest)."""
    attackers: list[str] = field(default_factory=list)
    """ONNX files of two recognisers or more, which no protection was trained against; `pixels`, and the adaptive attacker of each, come
    with them."""
    protections: list[Section] = field(default_factory=list)
    """What to compare, each a mapping of the fields of facemae protect: method, strength (a number or a list of them), weights, seed, ...;
    and `name`, which stands in the table. The method none, the real set, is always there."""
    pretrain: Section = field(default_factory=dict)
    """facemae pretrain: the recipe, the same for every cell."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Of the recognisers: each cell is trained once with each."""
    evaluate: Section = field(default_factory=dict)
    """facemae evaluate: lists and images that neither a protection nor a recogniser has seen."""
    leakage: Section = field(default_factory=dict)
    """facemae leakage."""
    title: str = "Privacy against utility"
    """Heading of the results."""
    hardware: str = ""
    """What measured it, in words; nothing asks the driver's machine."""
    notes: list[str] = field(default_factory=list)
    """What limits the results, for the page."""
    address: str | None = None
    """Address of a running Ray cluster; without one a local Ray is started."""
    num_workers: int = 0
    """Workers of protect and leakage; 0 takes as many as fit."""
    cpus_per_pretrain: int = 1
    """CPU cores of one training."""
    gpus_per_pretrain: float = 0.0
    """GPUs of one training; fractions share a GPU."""
    results: list[str] = field(default_factory=list)
    """Recorded results (compare.json files, by any name) to make a page of, and nothing else."""
    output: str = "results.md"
    """With --results: the page; its pictures go to images/ beside it."""


def run(config: CompareConfig) -> dict[str, Any]:
    """Compare, or draw recorded results. Returns where the files are, and which cells failed."""
    if config.results:
        written = write_page(config.results, config.output)
        print("\n".join(f"written: {path}" for path in written))
        return {"written": written, "failed_cells": []}
    cells, store = plan(config), open_store(config.folder)
    for place in (open_store(config.root), store):  # what cannot be written to is found before the work
        require_conditional_put(place)
    failed: dict[str, str] = {}
    origin = origin_here(config.hardware, config.address)
    _tell_changes(cells, store)
    with session(config.address):
        for number, cell in enumerate(cells, 1):
            _protect_and_measure(cell, store, origin, f"[{number}/{len(cells)}] {cell.name}", failed)
        failed |= _train_and_verify(config, [cell for cell in cells if cell.key not in failed], store, origin)
    record = _record(config, cells, store, failed)
    written = _write(record, store)
    _say(record, written)
    next_step = f"facemae compare --results {config.folder}/compare.json --output results.md"
    return {"written": written, "failed_cells": [row.name for row in record.rows if row.failed], "next": next_step}


def _tell_changes(cells: Sequence[Cell], store: Store) -> None:
    for cell in cells:
        for part, settings in ((cell.key, cell.settings), *((trial.key, trial.settings) for trial in cell.trials)):
            if what := changed(store, part, settings):
                print(f"{part} is done again, as other settings made it: {what}")


def _protect_and_measure(cell: Cell, store: Store, origin: Origin, title: str, failed: dict[str, str]) -> None:
    """What of a cell comes before the trainings, unless it is recorded; an error costs this cell."""
    measured = recorded(store, cell.key, cell.settings) is not None
    if measured and all(recorded(store, trial.key, trial.settings) for trial in cell.trials):
        print(f"{title}: recorded")
        return
    print(f"\n{title}", flush=True)
    try:
        make_protected(cell)
        if not measured:
            keep(store, cell.key, cell.settings, {**measure(cell), "origin": origin})
    except CELL_ERRORS as error:
        failed[cell.key] = f"{type(error).__name__}: {error}"
        print(f"{title} failed: {error}", file=sys.stderr)


def _train_and_verify(config: CompareConfig, cells: Sequence[Cell], store: Store, origin: Origin) -> dict[str, str]:
    """Every training that is not recorded, side by side. Returns why one failed, by its key."""
    trials = [trial for cell in cells for trial in cell.trials]
    left = [trial for trial in trials if recorded(store, trial.key, trial.settings) is None]
    if not left:
        return {}
    _tell_of_missing_resources(config)
    resources = {"num_cpus": config.cpus_per_pretrain, "num_gpus": config.gpus_per_pretrain}
    task = ray.remote(max_calls=CALLS_PER_PROCESS)(train_and_verify).options(max_retries=MAX_RETRIES, **resources)
    return run_trials(left, partial(_start, task), partial(_done, store, origin), len(trials) - len(left))


def _start(task: Any, trial: Trial) -> Any:
    return task.remote(pretrain.prepare(trial.pretrain), trial.evaluate)


def _done(store: Store, origin: Origin, trial: Trial, content: Mapping[str, Any]) -> str:
    keep(store, trial.key, trial.settings, {**content, "origin": origin})
    errors = (f"{name} {100 * (1 - figures['accuracy']):.2f} %" for name, figures in content["protocols"].items())
    return f"error {', '.join(errors) or 'none: no list with folds'} ({sum(content['seconds'].values()):.0f} s)"


def _tell_of_missing_resources(config: CompareConfig) -> None:
    """A line where no training fits the cluster as it is: it may grow, or wait for ever."""
    here, wanted = ray.cluster_resources(), {"CPU": float(config.cpus_per_pretrain), "GPU": config.gpus_per_pretrain}
    for name, number in wanted.items():
        if here.get(name, 0) < number:
            print(f"waiting for a cluster with {number:g} {name}: it has {here.get(name, 0):g} (cpus_per_pretrain, gpus_per_pretrain)")


def _record(config: CompareConfig, cells: Sequence[Cell], store: Store, failed: Mapping[str, str]) -> Record:
    """What is recorded of all cells."""
    rows = []
    for cell in cells:
        reasons = [failed[cell.key]] if cell.key in failed else []
        reasons += [f"seed {trial.seed}: {failed[trial.key]}" for trial in cell.trials if trial.key in failed]
        rows.append(row_of(cell, store, reasons, commands(cell)))
    parts = [part for cell in cells for part in ((cell.key, cell.settings), *((trial.key, trial.settings) for trial in cell.trials))]
    found = [content for part in parts if (content := recorded(store, *part))]
    origin = joined(content["origin"] for content in found)
    sets = (content["original"] for content in found if "original" in content)
    data = next((f"{each['samples']:,} images of {each['identities']:,} people protected and trained on" for each in sets), "")
    trial = cells[0].trials[0]
    return Record(
        title=config.title,
        hardware=origin["hardware"],
        date=origin["date"],
        commit=origin["commit"],
        seeds=list(config.seeds),
        data=data,
        recipe=trial.settings["pretrain"],
        evaluation=trial.settings["evaluate"],
        commands=["facemae compare --config compare.yaml"],
        rows=rows,
        notes=list(config.notes),
    )


def _write(record: Record, store: Store) -> list[str]:
    """The table three times, and the picture where there is something to draw."""
    files = {
        "compare.md": f"# {record.title}\n\n{_words(record)}".encode(),
        "compare.csv": to_csv(record).encode(),
        "compare.json": record.to_bytes(),
    }
    files |= {f"pareto{suffix}.png": picture(view) for _, suffix, view in record.views() if view.drawn}
    for name, content in files.items():
        store.put(name, content)
    return [f"{store.url}/{name}" for name in files]


def _words(record: Record) -> str:
    """Table and claim, by all attackers and by recognisers alone."""
    return "\n".join(f"## {heading}\n\n{markdown(view)}\n{claim(view)}" for heading, _, view in record.views())


def _say(record: Record, written: Sequence[str]) -> None:
    print(f"\n{_words(record)}")
    for line in failures(record):
        print(f"failed: {line}")
    if failures(record):
        print("the same command again does what failed, and nothing else")
    print("\n".join(f"written: {path}" for path in written))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(CompareConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
