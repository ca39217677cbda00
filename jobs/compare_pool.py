"""The trainings of a comparison as Ray tasks side by side: each is recorded when it is done, and one that fails costs itself alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

from cluster.scheduler import Interrupted
from cluster.stage import draining
from jobs.compare_cell import Trial

MAX_RETRIES = 3
"""Of a task whose process or machine died. It goes on from its checkpoint."""
POLL_SECONDS = 1.0

Start = Callable[[Trial], Any]
Done = Callable[[Trial, dict[str, Any]], str]


def run_trials(trials: Sequence[Trial], start: Start, done: Done, recorded: int = 0) -> dict[str, str]:
    """Run all trials. Ray must be connected.

    Args:
        trials: in the order in which they are handed to Ray.
        start: hands a trial to Ray and returns its reference; what it raises costs this trial alone.
        done: records the outcome of a trial and says it in a few words.
        recorded: trials that an earlier run recorded, for the display.

    Returns:
        Why a trial failed, by its key, for those that did.

    Raises:
        Interrupted: SIGTERM or SIGINT; what is done was recorded, the others' checkpoints stay.
    """
    failed: dict[str, str] = {}
    stop = threading.Event()
    bar = tqdm(
        desc="pretrain, evaluate",
        total=recorded + len(trials),
        initial=recorded,
        unit=" recognisers",
        mininterval=0.5 if sys.stderr.isatty() else 5.0,
    )
    with bar, draining(stop):
        running = _started(trials, start, failed)
        bar.update(len(failed))
        while running:
            if stop.is_set():
                _cancel(list(running))
                raise Interrupted(
                    f"stopped as asked: {len(running)} of {recorded + len(trials)} recognisers are left; run the same command again"
                )
            for reference in ray.wait(list(running), timeout=POLL_SECONDS)[0]:
                trial = running.pop(reference)
                try:
                    said = done(trial, ray.get(reference))
                except RayError as error:
                    said = failed[trial.key] = _reason(error)
                bar.update()
                tqdm.write(f"{trial.cell}, seed {trial.seed}: {said}")
    return failed


def _started(trials: Sequence[Trial], start: Start, failed: dict[str, str]) -> dict[Any, Trial]:
    """Reference -> trial of all that could be started."""
    running: dict[Any, Trial] = {}
    for trial in trials:
        try:
            running[start(trial)] = trial
        except (ValueError, RuntimeError, OSError) as error:
            failed[trial.key] = _line(error)
            tqdm.write(f"{trial.cell}, seed {trial.seed}: {failed[trial.key]}")
    return running


def _cancel(references: Sequence[Any]) -> None:
    for reference in references:
        ray.cancel(reference, force=True)


def _reason(error: RayError) -> str:
    """What went wrong in a task, in one line."""
    return _line(error.cause if isinstance(error, RayTaskError) else error)


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no word of why'}"
