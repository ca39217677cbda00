"""The scheduler by itself, over workers that are only simulated: what it tells, whom it spares, and what a unit costs."""

from __future__ import annotations

import cProfile
import pstats
import signal
import threading
from collections.abc import Sequence
from typing import Any

import pytest

import cluster.scheduler
from cluster.attempt import Attempt
from cluster.crew import Lost
from cluster.dataset import Manifest
from cluster.processor import Unit
from cluster.scheduler import Interrupted, Scheduler, StageError
from cluster.stage import draining
from cluster.watcher import Watcher
from cluster.worker import Outcome
from tests.cluster.simulated_crew import Act, SimulatedCrew, manifest_of


class Diary(Watcher):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def committed(self, manifest: Manifest, *, mine: bool, idle: float) -> None:
        self.lines.append(("committed", manifest.shard, mine, idle))

    def handed_out_again(self, unit: str, reason: Any, error: str) -> None:
        self.lines.append(("again", unit, reason))

    def given_up(self, unit: str, errors: Sequence[str]) -> None:
        self.lines.append(("given up", unit, len(errors)))

    def workers(self, ready: int, wanted: int) -> None:
        self.lines.append(("workers", ready, wanted))

    def worker_lost(self, node: str, *, with_node: bool) -> None:
        self.lines.append(("lost", node, with_node))

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [line[1:] for line in self.lines if line[0] == kind]


def units(number: int) -> list[Unit]:
    return [Unit(f"{name:05d}") for name in range(number)]


def scheduler(crew: SimulatedCrew, number: int, *, in_flight: int = 3, max_failures: int = 3) -> tuple[Scheduler, Diary]:
    diary = Diary()
    attempt = Attempt("run", 1)
    made = Scheduler(
        crew,
        units(number),
        lambda unit, _errors: manifest_of(unit),
        attempt=attempt,
        in_flight=in_flight,
        max_failures=max_failures,
        watcher=diary,
    )
    return made, diary


def once(name: str, result: Outcome | Lost, times: int = 1) -> Act:
    """This comes of a unit the first ``times`` times."""
    left = [times]

    def act(_worker: int, unit: Unit) -> Outcome | Lost | None:
        if unit.name != name or not left[0]:
            return None
        left[0] -= 1
        return result

    return act


def test_every_unit_is_committed_once_and_told_of() -> None:
    crew = SimulatedCrew(act=once("00002", Outcome(manifest_of(Unit("00002"), attempt=7), idle=1.5)))
    stage, diary = scheduler(crew, 10)
    assert sorted(manifest.shard for manifest in stage.run(4)) == [unit.name for unit in units(10)]
    assert sorted(line[0] for line in diary.of("committed")) == [unit.name for unit in units(10)]
    assert diary.of("committed").count(("00002", False, 1.5)) == 1, "of another attempt"
    assert diary.of("workers")[:2] == [(0, 4), (4, 4)], "that nobody is ready is said too"
    assert crew.calls["close"] == 1


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (Outcome(None, "hell"), [("00001", "charged")]),
        (Outcome(None, drained=True), [("00001", "drained")]),
        (Lost("node died", with_node=True), [("00001", "node")]),
        (Lost("crashed", with_node=False), [("00001", "charged")]),
    ],
)
def test_a_unit_that_fails_is_handed_out_again(trouble: Outcome | Lost, told: list[Any]) -> None:
    stage, diary = scheduler(SimulatedCrew(act=once("00001", trouble)), 6, in_flight=1)
    assert len(list(stage.run(2))) == 6
    assert diary.of("again") == told
    assert diary.of("given up") == []
    assert diary.of("lost") == ([("n0", trouble.with_node)] if isinstance(trouble, Lost) else [])


def test_a_crash_among_several_charges_none_of_them_until_the_culprit_crashes_alone() -> None:
    crew = SimulatedCrew(act=once("00001", Lost("crashed", with_node=False), times=2))
    stage, diary = scheduler(crew, 3)
    assert len(list(stage.run(1))) == 3
    assert sorted(diary.of("again")) == [("00001", "charged"), ("00001", "crash"), ("00002", "crash")]
    assert diary.of("given up") == []


def test_a_unit_is_given_up_in_the_end_and_the_rest_goes_on() -> None:
    stage, diary = scheduler(SimulatedCrew(act=once("00001", Outcome(None, "hell"), times=99)), 5)
    assert len(list(stage.run(2))) == 5
    assert diary.of("given up") == [("00001", 3)]
    assert len(diary.of("committed")) == 5


def test_storage_that_fails_holds_everything_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, diary = scheduler(SimulatedCrew(act=once("00001", Outcome(None, "503", transient=True))), 4, in_flight=1)
    assert len(list(stage.run(2))) == 4
    assert diary.of("again") == [("00001", "storage")]
    monkeypatch.setattr(cluster.scheduler, "STORAGE_PATIENCE", -1.0)
    stage, _ = scheduler(SimulatedCrew(act=once("00001", Outcome(None, "503", transient=True))), 4)
    with pytest.raises(StageError, match="storage has not worked"):
        list(stage.run(2))


def test_three_workers_that_die_while_starting_end_the_stage_but_not_those_that_die_with_their_node() -> None:
    class Stillborn(SimulatedCrew):
        def __init__(self, with_node: bool) -> None:
            super().__init__()
            self._with_node = with_node

        def answers(self, seconds: float) -> list[Any]:
            found = super().answers(seconds)
            fate = Lost("no memory", self._with_node)
            return [type(answer)(answer.worker, "", fate) if not answer.unit and answer.worker <= 5 else answer for answer in found]

    stage, _ = scheduler(Stillborn(with_node=False), 8)
    with pytest.raises(StageError, match="three workers in a row died while starting: no memory"):
        list(stage.run(1))
    stage, diary = scheduler(Stillborn(with_node=True), 8)
    assert len(list(stage.run(1))) == 8
    assert len(diary.of("lost")) == 5


def test_starts_that_fail_beside_a_worker_that_is_ready_do_not_end_the_stage() -> None:
    """One bad machine among good ones: whoever is hired in its place dies while it starts."""

    class Unlucky(SimulatedCrew):
        def answers(self, seconds: float) -> list[Any]:
            found = super().answers(seconds)
            dead = Lost("a bad disk", with_node=False)
            return [type(answer)(answer.worker, "", dead) if not answer.unit and answer.worker > 1 else answer for answer in found]

    stage, diary = scheduler(Unlucky(0.002), 30, in_flight=1)
    assert len(list(stage.run(2))) == 30
    assert len(diary.of("lost")) >= 3


def test_a_node_that_is_drained_gives_back_what_it_has_not_begun_and_gets_nothing_new() -> None:
    crew = SimulatedCrew(0.05, per_node=2)
    stage, diary = scheduler(crew, 40)
    done = []
    for manifest in stage.run(4):
        done.append(manifest.shard)
        if len(done) == 4:
            crew.nodes_leaving = frozenset({"n0"})
            before = len(crew.given)
    assert sorted(done) == [unit.name for unit in units(40)]
    after = {worker for worker, _ in crew.given[before + 8 :]}  # a batch of answers may still be settled before
    assert after
    assert all(crew.node_of(worker) != "n0" for worker in after)
    assert {reason for _, reason in diary.of("again")} == {"drained"}, "nothing is charged"
    assert diary.of("lost") == []
    assert crew.calls["hire"] == 6, "two are hired in their place"


def test_a_slow_unit_is_handed_to_a_second_worker_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.scheduler, "STRAGGLER_SECONDS", 0.2)

    class Slow(SimulatedCrew):
        def give(self, worker: int, unit: Unit) -> None:
            self._seconds = 60.0 if unit.name == "00000" and not self.calls["slow"] else 0.01
            self.calls["slow"] += unit.name == "00000"
            super().give(worker, unit)

    stage, diary = scheduler(Slow(), 6, in_flight=1)
    assert sorted(manifest.shard for manifest in stage.run(2)) == [unit.name for unit in units(6)]
    assert diary.of("again") == [("00000", "straggler")]


def test_as_many_workers_as_fit_also_when_the_cluster_grows() -> None:
    crew = SimulatedCrew(0.02, room=2)
    stage, diary = scheduler(crew, 30, in_flight=1)
    for number, _ in enumerate(stage.run(0)):
        if number == 5:
            crew._room = 5
    assert (2, 2) in diary.of("workers")
    assert (5, 5) in diary.of("workers")
    assert crew.calls["hire"] == 5


@pytest.mark.parametrize("ready", [True, False])
def test_sigterm_is_obeyed_at_any_time_also_before_the_first_worker_is_ready(ready: bool) -> None:
    class Waiting(SimulatedCrew):
        def answers(self, seconds: float) -> list[Any]:
            return [answer for answer in super().answers(seconds) if ready]

    crew = Waiting(0.05)
    stage, _ = scheduler(crew, 500)
    timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGTERM])
    timer.start()
    with draining(stage.stop), pytest.raises(Interrupted, match="stopped as asked"):
        list(stage.run(3))
    assert crew.calls["close"] == 1


def test_what_a_unit_costs_does_not_grow_with_the_number_of_workers() -> None:
    """Counted in function calls, so that no other load of the machine matters."""

    def calls_per_unit(workers: int) -> float:
        stage, _ = scheduler(SimulatedCrew(), 4000)
        profile = cProfile.Profile()
        profile.enable()
        assert sum(1 for _ in stage.run(workers)) == 4000
        profile.disable()
        return pstats.Stats(profile).total_calls / 4000  # type: ignore[attr-defined]

    assert calls_per_unit(1000) < 2 * calls_per_unit(10)
