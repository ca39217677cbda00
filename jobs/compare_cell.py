"""One cell of a comparison, a (protection, strength): what is done, what determines it, and what is recorded of it.

FOLDER/cells/<name>/leakage.json     what every attacker finds, with the settings that it depends on
FOLDER/cells/<name>/seed-<s>.json    the verification of the recogniser that seed s gave, likewise
FOLDER/cells/<name>/leakage/         the measurement itself, as facemae leakage writes it
FOLDER/cells/<name>/seed-<s>/        the evaluation itself, as facemae evaluate writes it, and log.txt
ROOT/protected/<name>-<digest>       the protected set; the digest is of the settings, so that other settings are another set
ROOT/runs/<name>-<digest>/seed-<s>   the recogniser, as facemae pretrain writes it
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.measurement import Measurement
from cluster.scheduler import StageError
from cluster.shard import sha256_hex
from cluster.store import NotFound, Store, join_url
from facemae.protection import protection_class
from jobs import evaluate, leakage, pretrain, protect
from jobs.compare_row import Row, Traced

Settings = dict[str, Any]
SHOWN = 3
"""Changed settings that a message names."""


@dataclass(frozen=True)
class Trial:
    """One seed of a cell: a recogniser trained on its protected set, and verified.

    Attributes:
        cell, seed: whose it is.
        pretrain, evaluate: what is run.
        settings: what determines the outcome.
    """

    cell: str
    seed: int
    pretrain: pretrain.PretrainConfig
    evaluate: evaluate.EvaluateConfig
    settings: Settings

    @property
    def key(self) -> str:
        """Of its record."""
        return f"cells/{self.cell}/seed-{self.seed}.json"


@dataclass(frozen=True)
class Cell:
    """One (protection, strength).

    Attributes:
        name: distinct, and a folder's name.
        protect, leakage: what is run.
        settings: what determines the leakage.
        trials: one for each seed.
    """

    name: str
    protect: protect.ProtectConfig
    leakage: leakage.LeakageConfig
    settings: Settings
    trials: tuple[Trial, ...]

    @property
    def key(self) -> str:
        """Of its record."""
        return f"cells/{self.name}/leakage.json"


def make_protected(cell: Cell) -> None:
    """Protect the data set, or find that it is done.

    Raises:
        StageError: a shard was given up: the cells would not be of the same images.
        Interrupted, StoreError, ValueError: as ``facemae protect``.
    """
    _require_whole(protect.run(cell.protect), "protect")


def measure(cell: Cell) -> dict[str, Any]:
    """Attack the protected set. Returns what is recorded: every attacker's shares at rank 1, the worst one first.

    Raises:
        StageError: a shard was given up.
        Interrupted, StoreError, ValueError: as ``facemae leakage``.
    """
    start = time.monotonic()
    _require_whole(leakage.run(cell.leakage), "leakage")
    report = Measurement.open(cell.leakage.output).report
    attackers = [
        {
            "name": found["name"],
            "adaptive": bool(found["adaptive"]),
            **{mate: _first(found["leakage"][mate]) for mate in ("image", "identity")},
            "utility": None if found["adaptive"] else _first(found["utility"]["identity"]),
        }
        for found in report["attackers"]
    ]
    counts = {role: {name: report[role][name] for name in ("samples", "identities", "fingerprint")} for role in ("original", "protected")}
    return {"attackers": attackers, "search": report["search"], **counts, "seconds": round(time.monotonic() - start, 1)}


def train_and_verify(job: Any, config: evaluate.EvaluateConfig) -> dict[str, Any]:
    """Train a recogniser and verify it, in the calling process (a Ray task); what the two jobs print goes to ``log.txt``.

    Args:
        job: what ``prepare`` made of a trial.
        config: of the evaluation; its recogniser is the one that the training writes.

    Returns:
        What is recorded: training, protocols (name -> figures) and seconds.
    """
    from cluster.pretrain import pretrain_alone  # what trains is not loaded by who only draws a table

    start, folder = time.monotonic(), Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    with _printing_to(folder / "log.txt"):
        training = pretrain_alone(job)
        trained = time.monotonic()
        report = evaluate.run(config)
    seconds = {"training": round(trained - start, 1), "evaluation": round(time.monotonic() - trained, 1)}
    return {"protocols": protocols_of(report), "training": training, "seconds": seconds}


def protocols_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> figures of every verification in what ``facemae evaluate`` returned for one recogniser: those that have an accuracy."""
    wanted = ("kind", "accuracy", "std", "pairs", "pairs_left_out", "tar_at_far", "auc", "eer")
    verified = [found for found in report["results"] if found.get("accuracy") is not None]
    return {found["protocol"]: {name: found[name] for name in wanted if name in found} for found in verified}


def strength_of(config: protect.ProtectConfig) -> float | None:
    """Where the dial of a protection stands, its own default where nothing was said; None where it has none."""
    given = config.mask_ratio if config.strength is None else config.strength
    dial = protection_class(config.method).dial
    return dial.default if given is None and dial is not None else given


def row_of(cell: Cell, store: Store, failed: list[str], commands: list[str]) -> Row:
    """The cell's row, from what is recorded."""
    found = recorded(store, cell.key, cell.settings) or {"attackers": []}
    by = {kind: [_traced(a["name"], a[kind]) for a in found["attackers"] if a[kind]] for kind in ("image", "identity", "utility")}
    errors: dict[str, dict[int, float]] = {}
    for trial in cell.trials:
        content = recorded(store, trial.key, trial.settings) or {"protocols": {}}
        for name, figures in content["protocols"].items():
            errors.setdefault(name, {})[trial.seed] = 100 * (1 - figures["accuracy"])
    return Row(
        cell.name, cell.protect.method, strength_of(cell.protect), by["image"], by["identity"], by["utility"], errors, commands, failed
    )


def recorded(store: Store, key: str, settings: Settings) -> dict[str, Any] | None:
    """What a record holds, where it was made with these settings; None where there is none, or of other settings."""
    found = _read(store, key)
    return found if found is not None and found["fingerprint"] == fingerprint(settings) else None


def changed(store: Store, key: str, settings: Settings) -> str:
    """What is other in these settings than in those of the record, in words; empty where there is no record or nothing is."""
    found = _read(store, key)
    if found is None or found["fingerprint"] == fingerprint(settings):
        return ""
    old, new = _flat(found["settings"]), _flat(settings)
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"{name} ({old.get(name)} -> {new.get(name)})" for name in names[:SHOWN]) + more


def keep(store: Store, key: str, settings: Settings, content: Mapping[str, Any]) -> None:
    """Record a result, whole or not at all."""
    found = {"fingerprint": fingerprint(settings), "settings": settings, **content}
    store.put(key, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())


def fingerprint(settings: Settings) -> str:
    """Sha256 of settings, whatever their order."""
    return sha256_hex(json.dumps(settings, sort_keys=True, allow_nan=False).encode())


def _read(store: Store, key: str) -> dict[str, Any] | None:
    try:
        found = json.loads(store.get(key))
        return found if {"fingerprint", "settings"} <= set(found) else None
    except (NotFound, ValueError, TypeError):
        return None  # none, or cut short by hand: done again


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found


def _first(curve: Mapping[str, Any] | None) -> dict[str, float] | None:
    return None if curve is None else {"cmc1": curve["cmc"][0], "low": curve["low"][0], "high": curve["high"][0]}


def _traced(attacker: str, found: Mapping[str, float]) -> Traced:
    return Traced(attacker, found["cmc1"], found["low"], found["high"])


def _require_whole(summary: Mapping[str, Any], what: str) -> None:
    if failed := summary["failed_shards"]:
        raise StageError(f"{what}: {len(failed)} shards were given up (first: {failed[0]}): its manifest says why")


@contextlib.contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """What this process prints, and its children (a compiler that looks for a library, say), goes to the end of a file."""
    kept = [os.dup(number) for number in (1, 2)]
    try:
        with path.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            for number in (1, 2):
                os.dup2(log.fileno(), number)
            yield
    finally:
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)


def recognizer_of(run: str) -> str:
    """The ONNX file that a training writes."""
    return join_url(run, "weights", "recognizer.onnx")
