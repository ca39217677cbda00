"""A cluster for all cases that only lose or add workers' nodes, and the table of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.nodes import Cluster, nodes
from tests.nodes.run import Run

UNITS = 40
FIGURES: dict[str, str] = {}


@pytest.fixture(scope="session")
def fleet() -> Iterator[Cluster]:
    """A head without a CPU and two nodes with two each."""
    with nodes([0, 2, 2]) as running:
        yield running


@pytest.fixture
def run(fleet: Cluster, tmp_path: Path) -> Run:
    """A run of the test's own, on at least two nodes; those that a test before it took are replaced."""
    while len(fleet.nodes) < 3:
        fleet.add(2)
    return Run(fleet, tmp_path)


@pytest.fixture(scope="session")
def undisturbed(fleet: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """The digests that one worker on one node makes."""
    run = Run(fleet, tmp_path_factory.mktemp("undisturbed")).begin(units=UNITS, seconds=0, workers=1)
    run.end()
    assert len(run.by_node()) == 1
    return run.bytes_of_all()


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Write down what a case measured."""
    return lambda text: FIGURES.__setitem__(request.node.name, text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if FIGURES:
        terminalreporter.section("many nodes")
        for name, text in FIGURES.items():
            terminalreporter.write_line(f"{name:70} {text}")
