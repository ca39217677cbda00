from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from cluster.submitted import Phase, RunState
from jobs import cancel


@dataclass
class Run:
    """A run whose states are written down."""

    states: Sequence[RunState | Exception]
    name: str = "mine"
    cancelled: int = 0

    def __post_init__(self) -> None:
        self._states = iter([*self.states])

    def state(self) -> RunState:
        state = next(self._states, self.states[-1])
        if isinstance(state, Exception):
            raise state
        return state

    def log(self) -> Iterator[str]:
        yield from ()

    def cancel(self) -> None:
        self.cancelled += 1


RUNNING, STOPPED = RunState(Phase.RUNNING, "Job is currently running"), RunState(Phase.STOPPED)


@pytest.mark.parametrize(
    ("states", "code", "asked", "text"),
    [
        ([RUNNING, RUNNING, STOPPED], 0, 1, "mine is stopped; what is committed stays"),
        ([RUNNING, LookupError("no RayJob mine")], 0, 1, "mine is stopped"),
        ([RUNNING, RunState(Phase.SUCCEEDED)], 0, 1, "mine succeeded before the stop reached it"),
        ([RunState(Phase.SUCCEEDED, "all done")], 0, 0, "mine had already succeeded (all done): nothing to stop"),
        ([RunState(Phase.FAILED, "exit code 2")], 0, 0, "mine had already failed (exit code 2): nothing to stop"),
        ([STOPPED], 0, 0, "mine was already stopped: nothing to stop"),
        ([LookupError("head: no job mine there")], 2, 0, "error: head: no job mine there"),
        ([RUNNING, RUNNING], 2, 1, "error: mine has not stopped in 0.001 minutes (running (Job is currently running))"),
        ([ConnectionError("head: no answer")], 2, 0, "error: head: no answer"),
    ],
)
def test_a_run_is_stopped_and_waited_for(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    states: list[RunState | Exception],
    code: int,
    asked: int,
    text: str,
) -> None:
    run = Run(states)
    monkeypatch.setattr(cancel, "submitted_run", lambda *_, **__: run)
    monkeypatch.setattr(cancel, "POLL_SECONDS", 0.01)
    minutes = "0.001" if code == 2 else "1"
    assert cancel.main(["mine", "--to", "kubernetes", "--wait-minutes", minutes]) == code
    shown = "".join(capsys.readouterr())
    assert text in shown
    assert run.cancelled == asked


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--to", "nowhere"), "give kubernetes, http://HOST:8265"),
        (("--to", "http://127.0.0.9:1", "--namespace", "x"), "--namespace and --context are for --to kubernetes"),
        (("--to", "http://127.0.0.9:1"), "no Ray dashboard answers: [Errno 111] Connection refused"),
    ],
)
def test_what_cannot_be_asked_is_explained(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], text: str) -> None:
    assert cancel.main(["mine", *flags]) == 2
    assert text in "".join(capsys.readouterr())


def test_a_time_that_cannot_be_is_refused() -> None:
    with pytest.raises(SystemExit):
        cancel.main(["mine", "--to", "kubernetes", "--wait-minutes", "-1"])
