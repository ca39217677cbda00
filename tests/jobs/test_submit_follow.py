from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.submitted import Phase, RunState
from jobs.submit_follow import Ending, Follower

RUNNING, WAITING = RunState(Phase.RUNNING), RunState(Phase.WAITING, "no node yet")
SUCCEEDED, STOPPED = RunState(Phase.SUCCEEDED, "Job finished successfully"), RunState(Phase.STOPPED)
GONE = ConnectionError("http://head:8265: no Ray dashboard answers: Connection refused")


def failed(message: str) -> RunState:
    return RunState(Phase.FAILED, message)


@dataclass
class Run:
    """A run that is written down: each reading of the log is the next of ``logs``, each question the next of ``states``."""

    logs: Sequence[Sequence[str | Exception]]
    states: Sequence[RunState | Exception]
    name: str = "facemae-ingest-1"
    readings: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._states = iter([*self.states])

    def state(self) -> RunState:
        state = next(self._states, self.states[-1])
        if isinstance(state, Exception):
            raise state
        if state.phase.ended:
            self.released.set()
        return state

    def log(self) -> Iterator[str]:
        lines = self.logs[min(self.readings, len(self.logs) - 1)]
        self.readings += 1
        for line in lines:
            if isinstance(line, Exception):
                raise line
            if line == "(waits)":
                self.released.wait(30)
            else:
                yield line

    def cancel(self) -> None:
        raise AssertionError("following stops nothing")


def follow(run: Run, **times: float) -> tuple[Ending, list[str]]:
    said = list[str]()
    times = {"poll": 0.05, "quiet": 60.0, "patience": 5.0, "lag": 0.3, **times}
    return Follower(run, "facemae status s3://b/x", say=said.append, **times).follow(), said  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lines", "state", "code", "text"),
    [
        (["done"], SUCCEEDED, 0, "succeeded after"),
        (["facemae ingest: settled with exit code 3"], SUCCEEDED, 3, "exit code 3: see above"),
        (['{"message": "facemae leakage: settled with exit code 4"}'], SUCCEEDED, 4, "exit code 4: see above"),
        (["withheld"], failed("Job entrypoint command failed with exit code 4"), 4, "exit code 4: see above"),
        (["error"], failed("Job entrypoint command failed with exit code 2"), 2, "the reason is in the log above"),
        (["Killed"], failed("Job entrypoint command failed with exit code -9"), 2, "submit it again to go on"),
        (["Killed"], failed("the driver's node died"), 2, "the driver's node died"),
        (["stopped as asked"], STOPPED, 143, "was stopped"),
    ],
)
def test_the_exit_code_is_the_jobs_own(lines: list[str], state: RunState, code: int, text: str) -> None:
    ending, said = follow(Run([lines], [RUNNING, state]))
    assert (ending.code, said) == (code, lines)
    assert text in f"{ending.message}; {ending.advice}"


def test_a_mistake_in_the_configuration_is_not_to_be_submitted_again() -> None:
    ending, _ = follow(Run([["facemae ingest: error: --shard-size 0"]], [failed("Job entrypoint command failed with exit code 2")]))
    assert "again" not in ending.advice


def test_what_to_run_next_is_kept_for_the_end() -> None:
    ending, said = follow(Run([["written: s3://b/x", "next:    facemae embed --input s3://b/x"]], [SUCCEEDED]))
    assert (ending.next, said) == ("facemae embed --input s3://b/x", ["written: s3://b/x"])


def test_lines_of_a_json_log_are_shown_as_text() -> None:
    told = '{"time": "2026-01-31T12:00:01.123Z", "level": "warning", "logger": "x", "message": "failed", "shard": "00042"}'
    lines = [told, '{"level": "info"}', "{not json", "[1]"]
    _, said = follow(Run([lines], [SUCCEEDED]))
    assert said == ["12:00:01 warning: failed (shard 00042)", *lines[1:]]


def test_a_log_that_breaks_off_is_read_again_without_repeating_a_line() -> None:
    run = Run([["1", "2", ConnectionError("reset")], ["1", "2", "3", "(waits)", "4"]], [*[RUNNING] * 25, SUCCEEDED])
    ending, said = follow(run)
    assert [line for line in said if not line.startswith("facemae")] == ["1", "2", "3", "4"]
    assert sum("the log broke off" in line for line in said) == 1
    assert ending.code == 0


def test_the_log_of_another_attempt_is_shown_from_its_beginning() -> None:
    run = Run([["1", "2", ConnectionError("reset")], ["attempt 2", "2", "(waits)", "4"]], [*[RUNNING] * 25, SUCCEEDED])
    _, said = follow(run)
    assert [line for line in said if not line.startswith("facemae")] == ["1", "2", "attempt 2", "2", "4"]


def test_a_log_that_ends_with_the_head_is_no_success() -> None:
    ending, said = follow(Run([["1"]], [RUNNING, GONE]), patience=0.5)
    assert ending.code == 2
    assert "out of sight" in ending.message
    assert "Connection refused" in ending.message
    assert "facemae status s3://b/x" in ending.advice
    assert sum("no answer" in line for line in said) == 1


def test_an_answer_that_comes_back_in_time_changes_nothing() -> None:
    ending, said = follow(Run([["1", "(waits)", "2"]], [RUNNING, GONE, GONE, RUNNING, SUCCEEDED]))
    assert ending.code == 0
    assert [line for line in said if line.startswith("facemae")] == [
        f"facemae submit: no answer: {GONE}",
        "facemae submit: it answers again",
    ]


def test_a_run_that_is_deleted_is_no_success() -> None:
    ending, _ = follow(Run([["1"]], [RUNNING, LookupError("no RayJob x")]))
    assert ending.code == 2
    assert "no RayJob x" in ending.message
    ending, _ = follow(Run([[LookupError("no RayJob x")]], [RUNNING]))
    assert ending.code == 2


def test_findings_are_said_once_and_waiting_from_time_to_time() -> None:
    quota = RunState(Phase.WAITING, "no node yet", ("no quota: ask for more",))
    image = RunState(Phase.WAITING, "no node yet", ("no quota: ask for more", "image not found"))
    _, said = follow(Run([["(waits)", "1"]], [*[quota] * 8, *[image] * 8, SUCCEEDED]), quiet=0.3)
    assert said.count("facemae submit: no quota: ask for more") == 1
    assert said.count("facemae submit: image not found") == 1
    waits = [line for line in said if "waiting: no node yet (0 min)" in line]
    assert 1 <= len(waits) < 16
    assert said[-1] == "1"


def test_ctrl_c_ends_the_following_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    run, questions = Run([["1", "(waits)"]], [RUNNING]), itertools.count()
    state = run.state

    def interrupted() -> Any:
        if next(questions) == 2:
            raise KeyboardInterrupt
        return state()

    monkeypatch.setattr(run, "state", interrupted)
    ending, said = follow(run)
    run.released.set()
    assert (ending.code, said) == (130, ["1"])
    assert "goes on" in ending.message
