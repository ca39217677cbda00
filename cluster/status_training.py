"""How far a training is: by the tally of its attempt, its newest checkpoint, or the run.json that it ends with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.attempt import RUNNING
from cluster.status_part import AttemptStatus, PartStatus, State, advice, attempt_status, read_records, state_without_result
from cluster.store import NotFound, Store
from cluster.training_pulse import TrainingTally


@dataclass(frozen=True, kw_only=True)
class TrainingStatus(PartStatus):
    """A training run.

    Attributes:
        step, steps: done, and in all; None where nobody says.
        samples, samples_total: seen, and of the whole training; None likewise.
        metrics: the last means that are known.
        checkpoint: step of the newest one, None where there is none yet.
        samples_per_second, seconds_left: lately, while it runs.
        waiting: seconds for which the workers have been starting; None otherwise.
    """

    step: int | None
    steps: int | None
    samples: int | None
    samples_total: int | None
    metrics: Mapping[str, float]
    checkpoint: int | None
    samples_per_second: float | None = None
    seconds_left: float | None = None
    waiting: float | None = None


def look_at_training(store: Store, entries: set[str]) -> TrainingStatus:
    """How a training stands. ``entries``: what lies directly below its root."""
    found = read_records(store)
    attempts = None
    if found is not None:
        attempts = [attempt_status(store, record, TrainingTally.of(record.tally)) for record in found.values()]
    checkpoint, facts = _newest_checkpoint(store) if "checkpoints/" in entries else (None, {})
    result, problem = _result(store) if "run.json" in entries else (None, "")
    tally = next((attempt.tally for attempt in reversed(attempts or []) if attempt.tally is not None), None)
    running = any(attempt.state == RUNNING for attempt in attempts or ())
    if result is not None:
        return _finished(store.url, result, attempts, checkpoint)
    known = tally if running else None  # what a dead attempt did after its last checkpoint is done again
    step = known.step if known and known.step is not None else facts.get("step", 0 if attempts else None)
    samples = known.samples if known and known.samples is not None else facts.get("samples", 0 if attempts else None)
    rate = known.samples_per_second if known else None
    total = tally.samples_total if tally else None
    return TrainingStatus(
        url=store.url,
        kind=tally.training if tally else "training",
        state=State.DAMAGED if problem and not running else state_without_result(attempts),
        attempts=attempts,
        problems=[problem] if problem else [],
        next=_advice(store.url, attempts, checkpoint),
        step=step,
        steps=tally.steps if tally else None,
        samples=samples,
        samples_total=total,
        metrics=known.metrics if known and known.metrics else _metrics(facts),
        checkpoint=checkpoint,
        samples_per_second=rate,
        seconds_left=(total - samples) / rate if rate and total is not None and samples is not None else None,
        waiting=known.waiting if known else None,
    )


def _finished(
    url: str, result: Mapping[str, Any], attempts: list[AttemptStatus[TrainingTally]] | None, checkpoint: int | None
) -> TrainingStatus:
    recognizer = "recognizer" in result and isinstance(result["recognizer"], dict) and "file" in result["recognizer"]
    after = f"facemae evaluate --recognizer {url}/{result['recognizer']['file']} ..." if recognizer else f"facemae verify {url}"
    return TrainingStatus(
        url=url,
        kind="pretrain" if recognizer else "train",
        state=State.COMPLETE,
        attempts=attempts,
        next=after,
        step=result["steps"],
        steps=result["steps"],
        samples=result.get("samples"),
        samples_total=result.get("samples"),
        metrics=_metrics(result),
        checkpoint=checkpoint,
    )


def _advice(url: str, attempts: list[AttemptStatus[TrainingTally]] | None, checkpoint: int | None) -> str:
    if attempts == []:  # begun by an earlier version, which kept no record
        return "whether anybody trains it is not known, there is no record of attempts: if not, run the same command again"
    return advice(attempts, url, "the first step" if checkpoint is None else f"the checkpoint of step {checkpoint}")


def _newest_checkpoint(store: Store) -> tuple[int | None, dict[str, Any]]:
    """Step and content of the newest committed checkpoint; its data is not looked at."""
    names = (name.removesuffix(".json") for name in store.entries("checkpoints/") if name.endswith(".json"))
    for step in sorted((int(name) for name in names if name.isdigit()), reverse=True):
        try:
            content = json.loads(store.get(f"checkpoints/{step:08d}.json"))
        except (NotFound, ValueError):
            continue  # replaced since, or damaged: training passes over it too
        if isinstance(content, dict):
            return step, content
    return None, {}


def _result(store: Store) -> tuple[dict[str, Any] | None, str]:
    """The content of run.json, or why there is none."""
    try:
        content = json.loads(store.get("run.json"))
        if isinstance(content, dict) and isinstance(content["steps"], int) and isinstance(content["weights"], dict):
            return content, ""
    except NotFound:
        return None, ""
    except (ValueError, KeyError):
        pass
    remedy = "delete it and run the same command again, which writes it from the last checkpoint"
    return None, f"{store.url}/run.json is damaged: {remedy}"


def _metrics(content: Mapping[str, Any]) -> dict[str, float]:
    metrics = content.get("metrics")
    return {str(name): value for name, value in metrics.items() if isinstance(value, int | float)} if isinstance(metrics, dict) else {}
