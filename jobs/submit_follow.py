"""Follows a submitted run: its log, what it waits for, what ails it, and how it ended."""

from __future__ import annotations

import json
import queue
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.submitted import Phase, RunState, SubmittedRun
from jobs.command import SETTLED

POLL_SECONDS = 5.0
"""Between two questions how the run stands."""
QUIET_SECONDS = 60.0
"""Without a line, after which a run that has not begun says what it waits for; and between two such lines."""
PATIENCE = 120.0
"""How long nothing may answer before the run is given up as out of sight. It goes on or not, unseen."""
LAG_SECONDS = 20.0
"""The end of a log comes before the state says so, or the other way round."""
OWN_CODES = frozenset((2, 3, 4, 130, 143))
"""Exit codes of a job of ours (``jobs.command.main_of``)."""
_EXIT = re.compile(r"exit code:? (-?[0-9]+)")
_BAR = re.compile(r"[0-9]+%\|")
_NEXT = re.compile(r"^next: +(?P<command>\S.*)")


@dataclass(frozen=True)
class Ending:
    """How a run ended.

    Attributes:
        code: of ``facemae submit``: the job's own; 2 failed or lost from sight, 130 no longer followed, 143 stopped.
        message: one line of what happened.
        advice: one line of what to do; empty where the log says it.
        next: what the job itself said to run next.
    """

    code: int
    message: str
    advice: str = ""
    next: str = ""


@dataclass
class Follower:
    """Prints a run's log and what else is known of it until it ends.

    Args:
        run: the run.
        again: the command that follows up: ``facemae status ROOT``.
        poll, quiet, patience, lag: seconds, see the constants.
        say: prints a line.
        clock: seconds.
    """

    run: SubmittedRun
    again: str
    poll: float = POLL_SECONDS
    quiet: float = QUIET_SECONDS
    patience: float = PATIENCE
    lag: float = LAG_SECONDS
    say: Callable[[str], None] = field(default_factory=lambda: _Screen())
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._told = set[str]()
        self._seen, self._first, self._settled, self._next = 0, "", 0, ""
        self._state: RunState | None = None
        self._answered = self._spoke = self._started = self._breath = self.clock()
        self._lost = ""

    def follow(self) -> Ending:
        """Until the run has ended, or nothing answers any more."""
        try:
            self._ask()
            while True:
                reader = _Reader(self.run, self._seen, self._first)
                ending = self._read(reader)
                if ending is not None:
                    return ending
                if not self._lost:
                    self._tell("the log broke off and the run goes on: reading it again")
        except KeyboardInterrupt:
            return Ending(130, f"no longer followed: the run {self.run.name} goes on", f"look with {self.again}")

    def _read(self, reader: _Reader) -> Ending | None:
        """One reading of the log. Returns None when it broke off and may be read again."""
        asked, ended, closed = -1e9, None, None
        while True:
            line = reader.next(timeout=min(self.poll, 0.5))
            if line is not None:
                self._line(line)
                ended = self.clock() if ended is not None else None
                continue
            now = self.clock()
            if now - asked >= self.poll or (reader.closed and closed is None):
                self._ask()
                asked = self.clock()
            if now - self._answered > self.patience:
                return Ending(
                    2, f"{self.run.name} is out of sight: {self._lost}", f"whether it goes on is not known: look with {self.again}"
                )
            state = self._state
            if state is not None and state.phase.ended:
                ended = now if ended is None else ended
                if reader.closed or now - ended > self.lag:
                    return self._ending(state)
            elif reader.gone:
                return Ending(2, f"{self.run.name} is gone: {reader.gone}", f"what is committed stays: look with {self.again}")
            elif reader.closed:
                closed = now if closed is None else closed
                if now - closed > self.lag and not self._lost:
                    return None

    def _ask(self) -> None:
        """How it stands; findings are said once each, a wait from time to time."""
        try:
            self._state = self.run.state()
        except ConnectionError as error:
            if not self._lost:
                self._tell(f"no answer: {error}")
            self._lost = str(error)
            return
        except LookupError as error:
            self._state = RunState(Phase.FAILED, f"it is gone: {error}")
            return
        self._answered = now = self.clock()
        if self._lost:
            self._tell("it answers again")
        self._lost = ""
        for finding in self._state.findings:
            if finding not in self._told:
                self._told.add(finding)
                self._tell(finding)
        if self._state.phase is Phase.WAITING and now - max(self._spoke, self._breath) >= self.quiet:
            self._breath = now
            minutes = int((now - self._started) // 60)
            self._tell(f"waiting: {self._state.message or 'it has not begun'} ({minutes} min)")

    def _line(self, line: str) -> None:
        self._first, self._seen, self._spoke = self._first or line, self._seen + 1, self.clock()
        self._answered = self._spoke
        if found := SETTLED.search(line):
            self._settled = int(found["code"])
        if found := _NEXT.search(line):
            self._next = found["command"]  # said at the very end, as a job does that runs here
            return
        self.say(_plain(line))

    def _tell(self, text: str) -> None:
        self.say(f"facemae submit: {text}")

    def _ending(self, state: RunState) -> Ending:
        minutes = f"{(self.clock() - self._started) / 60:.1f} min"
        if state.phase is Phase.STOPPED:
            return Ending(143, f"{self.run.name} was stopped after {minutes}: what is committed stays", "submit it again to go on")
        if state.phase is Phase.SUCCEEDED:
            if self._settled:
                return Ending(
                    self._settled, f"{self.run.name} ended after {minutes} with exit code {self._settled}: see above", "", self._next
                )
            return Ending(0, f"{self.run.name} succeeded after {minutes}", "", self._next)
        found = _EXIT.search(state.message)
        code = int(found[1]) if found else None
        if code in OWN_CODES - {2}:
            return Ending(code or 2, f"{self.run.name} ended after {minutes} with exit code {code}: see above", "", self._next)
        failed = f"{self.run.name} failed after {minutes}: {state.message or 'no reason is given'}"
        if code in (1, 2):  # the job said itself what is wrong: trying the same again would end the same
            return Ending(2, failed, f"the reason is in the log above; {self.again} says what is done")
        return Ending(2, failed, "what is committed stays: submit it again to go on")


def _plain(line: str) -> str:
    """A line of a JSON log (FACEMAE_LOG=json) as a person reads it; every other line as it is."""
    if not line.startswith("{"):
        return line
    try:
        record = json.loads(line)
    except ValueError:
        return line
    if not isinstance(record, dict) or not {"level", "message"} <= set(record):
        return line
    shard = f" (shard {record['shard']})" if record.get("shard") else ""
    return f"{str(record.get('time', ''))[11:19]} {record['level']}: {record['message']}{shard}".lstrip()


class _Reader:
    """A run's log on a thread of its own, which may wait for a line for hours; without the lines that were seen, if it begins as they did.

    Attributes:
        closed: whether the log has ended or broken off.
        gone: why there is no such run any more.
    """

    def __init__(self, run: SubmittedRun, seen: int, first: str) -> None:
        self.closed, self.gone = False, ""
        self._lines = queue.Queue[str | None]()
        threading.Thread(target=self._read, args=(run, seen, first), daemon=True).start()

    def next(self, timeout: float) -> str | None:
        """The next line, or None when there is none in time."""
        if self.closed:
            time.sleep(timeout)
            return None
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            return None
        self.closed = line is None
        return line

    def _read(self, run: SubmittedRun, seen: int, first: str) -> None:
        try:
            for number, line in enumerate(run.log()):
                seen = 0 if number == 0 and line != first else seen  # another try's log, whose lines are all new
                if number >= seen:
                    self._lines.put(line)
        except LookupError as error:
            self.gone = str(error)
        except ConnectionError:
            pass  # the state says whether that matters
        finally:
            self._lines.put(None)


class _Screen:
    """Prints lines; a progress bar stays on one line where somebody watches a terminal."""

    def __init__(self) -> None:
        self._bar = False

    def __call__(self, line: str) -> None:
        """Print one line."""
        bar = bool(_BAR.search(line)) and sys.stdout.isatty()
        start = "\r\x1b[K" if self._bar else ""
        print(f"{start}{line}", end="" if bar else "\n", flush=True)
        self._bar = bar
