"""``facemae status``: how far is it?"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from cluster.status import State, Status, Watch
from cluster.status_text import brief, lines, to_json
from cluster.store import StoreError
from jobs.command import Config, UsageError, main_of

QUIET_SECONDS = 60.0
"""A folder of several sets is watched for so long after nobody is at work on any: a pipeline's next step may begin."""

LAZINESS = 4.0
"""How many times as long as a look takes the next one is waited for."""


@dataclass(frozen=True, kw_only=True)
class StatusConfig(Config):
    """How far a data set, a training run, or a folder of such (a pipeline's root) is, from its store alone: works from anywhere that may
    read it, also after the driver is gone, and needs no Ray.

    Reads: listings, dataset.json, the records of attempts, manifests where those do not say enough. Writes nothing.
    Exit code 0 complete or running, 3 complete but for shards that were given up, 4 complete and the release withheld, 2 unfinished
    without anybody at work on it, damaged, or an error.
    """

    takes_file = False

    root: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ROOT")]
    """A job's --output or a pipeline's root: a folder or s3://bucket/prefix."""
    watch: bool = False
    """Look again and again until it is complete or nobody is at work on it any more."""
    interval: float = 5.0
    """Seconds between two looks, at least four times what a look takes; a driver writes its record anew every 5 seconds."""
    json: bool = False
    """Print one JSON object (with --watch one a line, whenever something changed) in place of text."""

    def __post_init__(self) -> None:
        if isinstance(self.interval, int | float) and not self.interval > 0:
            raise UsageError(f"--interval {self.interval}: give seconds above 0")


def run(config: StatusConfig) -> dict[str, Any]:
    """Print how it stands, once or until it ends.

    Returns:
        What decides the exit code.

    Raises:
        StoreError: the root cannot be read, or holds nothing.
        ValueError: it is damaged, or unfinished without anybody at work on it.
    """
    watch = Watch(config.root, lambda text: print(text, file=sys.stderr, flush=True))
    if config.watch:
        return _verdict(_watched(watch, config))
    status = watch.look()
    print(json.dumps(to_json(status), indent=1) if config.json else "\n".join(lines(status)), flush=True)
    return _verdict(status)


def _verdict(status: Status) -> dict[str, Any]:
    """What ``main_of`` makes an exit code of."""
    if status.state in (State.DAMAGED, State.UNFINISHED):
        bad = next(part for part in status.parts if part.state is status.state)
        raise ValueError(f"{bad.url} is {bad.state}: {bad.problems[0] if bad.problems else bad.next}")
    if status.state is not State.COMPLETE:
        return {"state": str(status.state)}
    return {"state": str(status.state), "failed_shards": status.given_up, "withheld": status.withheld}


def _watched(watch: Watch, config: StatusConfig) -> Status:
    """Show every change until it ends. Returns the last status."""
    screen, quiet = _Screen(config.json), 0.0
    status: Status | None = None
    while True:
        started = time.monotonic()
        try:
            status = watch.look()
            screen.show(status)
        except StoreError as error:
            if error.fatal or status is None:
                raise
            screen.say(f"{error}: looking again")
        if status.state not in (State.RUNNING, State.UNKNOWN):
            if len({part.url.partition("/embeddings/")[0] for part in status.parts}) == 1 or quiet >= QUIET_SECONDS:
                return status
            quiet += config.interval
        else:
            quiet = 0.0
        time.sleep(max(config.interval, LAZINESS * (time.monotonic() - started)))  # a large set is not listed all the time


class _Screen:
    """Redraws on a terminal; elsewhere prints a line when something changed."""

    def __init__(self, as_json: bool) -> None:
        self._as_json, self._terminal = as_json, sys.stdout.isatty() and not as_json
        self._drawn, self._last = 0, ""

    def show(self, status: Status) -> None:
        """The status, where it differs from what was shown last."""
        if self._terminal:
            self._draw(lines(status))
            return
        shown = brief(status)
        if "\n".join(shown) == self._last:
            return
        before = self._last.splitlines()
        self._last = "\n".join(shown)
        new = [json.dumps(to_json(status))] if self._as_json else [line for line in shown if line not in before]
        print("\n".join(new), flush=True)

    def say(self, text: str) -> None:
        """Something that is no status."""
        print(text, file=sys.stderr, flush=True)
        self._drawn = 0

    def _draw(self, text: Sequence[str]) -> None:
        """Write over what was drawn last; longer lines are cut, and what does not fit the height is left out."""
        size = shutil.get_terminal_size()
        fitting = [line[: size.columns - 1] for line in text][: size.lines - 1]
        up = f"\x1b[{self._drawn}F\x1b[J" if self._drawn else ""
        print(up + "\n".join(fitting), flush=True)
        self._drawn = len(fitting)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(StatusConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
