"""Actors as a crew, on a real Ray: what they answer, and what their end looks like."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from cluster import crew as crew_module
from cluster.crew import Answer, Crew, Lost, RayCrew
from cluster.processor import Unit
from cluster.worker import Opened, Outcome
from tests.cluster.simulated_crew import manifest_of


class Fragile:
    """An actor that does what the unit's name says."""

    def __init__(self, born_dead: bool = False) -> None:
        self._born_dead = born_dead

    def open(self) -> Opened:
        if self._born_dead:
            os._exit(1)
        return Opened(ray.get_runtime_context().get_node_id())

    def drain(self) -> None:
        pass

    def run(self, unit: Unit) -> Outcome:
        if unit.name == "die":
            os._exit(1)
        if unit.name == "raise":
            raise ValueError("a picture from hell")
        return Outcome(manifest_of(unit), idle=0.5)


def take(crew: Crew, count: int) -> list[Answer]:
    """The next answers."""
    found, deadline = list[Answer](), time.monotonic() + 120
    while len(found) < count:
        assert time.monotonic() < deadline, found
        found += crew.answers(0.5)
    return found


@pytest.fixture
def crew(ray_session: None) -> Iterator[RayCrew]:
    actor: Any = ray.remote(Fragile).options(num_cpus=0.5, max_concurrency=2)
    made = RayCrew(actor.remote)
    yield made
    made.close()


def test_what_a_worker_says_and_how_it_ends(crew: RayCrew) -> None:
    worker = crew.hire()
    (opened,) = take(crew, 1)
    node = ray.get_runtime_context().get_node_id()
    assert opened == Answer(worker, "", Opened(node))
    crew.give(worker, Unit("00001"))
    assert take(crew, 1) == [Answer(worker, "00001", Outcome(manifest_of(Unit("00001")), idle=0.5))]
    crew.give(worker, Unit("raise"))
    (answer,) = take(crew, 1)
    assert isinstance(answer.result, Outcome)
    assert answer.result.error.endswith("ValueError: a picture from hell")
    crew.give(worker, Unit("die"))
    (answer,) = take(crew, 1)
    assert isinstance(answer.result, Lost)
    assert not answer.result.with_node
    crew.dismiss(worker)
    crew.dismiss(worker)
    assert crew.answers(0.1) == []


def test_a_worker_that_dies_while_it_starts_is_lost_without_its_node(ray_session: None) -> None:
    actor: Any = ray.remote(Fragile).options(num_cpus=0)
    crew = RayCrew(lambda: actor.remote(born_dead=True))
    worker = crew.hire()
    (answer,) = take(crew, 1)
    assert (answer.worker, answer.unit) == (worker, "")
    assert isinstance(answer.result, Lost)
    assert not answer.result.with_node
    crew.close()


def test_it_looks_now_and_then_at_what_the_cluster_is_becoming(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    leaving, room = set[str](), [0]
    monkeypatch.setattr(crew_module, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(crew_module, "draining_nodes", lambda: frozenset(leaving))
    crew = RayCrew(lambda: None, lambda: room[0])
    assert crew.room() == 1, "one that waits for an autoscaler"
    assert crew.leaving() is crew.leaving()
    leaving.add("n")
    room[0] = 7
    deadline = time.monotonic() + 30
    while (crew.room(), crew.leaving()) != (7, {"n"}):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    crew.close()
