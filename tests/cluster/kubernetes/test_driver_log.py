"""The driver's log, followed through breaks, new pods and new attempts, line for line."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cluster.kubernetes.run import KubernetesRun
from tests.cluster.kubernetes.api_server import Cluster, Refusal
from tests.cluster.kubernetes.objects import rayjob

PREAMBLE = [
    "2026-11-23 07:00:00,123\tINFO cli.py:39 -- Job submission server address: http://run-x7k2p-head-svc.faces.svc.cluster.local:8265",
    "2026-11-23 07:00:01,123\tSUCC cli.py:67 -- Job 'run-8fq2x' submitted successfully",
    "2026-11-23 07:00:01,124\tINFO cli.py:345 -- Tailing logs until the job exits (disable with --no-wait):",
]


class Reader:
    """Follows a run's log on a thread of its own."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for line in KubernetesRun("run").log():
                self.lines.append(line)
        except Exception as error:
            self.error = error

    def wait(self, lines: int) -> None:
        until(lambda: len(self.lines) >= lines or not self._thread.is_alive())

    def join(self) -> list[str]:
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.lines


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def reader(cluster: Cluster) -> Iterator[Reader]:
    cluster.put("rayjobs", rayjob(jobDeploymentStatus="Running", jobStatus="RUNNING"))
    yield Reader()
    if cluster.get("rayjobs", "run"):
        end(cluster)
        for log in cluster.logs.values():
            log.ended = True


def end(cluster: Cluster) -> None:
    cluster.status("run", jobDeploymentStatus="Complete", jobStatus="SUCCEEDED", succeeded=1)


def test_the_drivers_lines_come_as_they_are_written(cluster: Cluster, reader: Reader) -> None:
    log = cluster.submitter("run", "run-a", running=False)
    until(lambda: any("/log" in request for request in cluster.requests))  # refused: it waits to start
    cluster.start("run-a")
    log.write(*PREAMBLE, "one", "", "two ü")
    reader.wait(3)
    assert reader.lines == ["one", "", "two ü"]
    log.tail = "the last one, without an end"
    cluster.exit("run-a")
    end(cluster)
    assert reader.join() == ["one", "", "two ü", "the last one, without an end"]


@pytest.mark.parametrize("cuts", [[0], [150], [333, 40, 0, 260], [900, 901, 902, 903]])
def test_a_torn_stream_is_taken_up_again_without_loss_or_doubling(cluster: Cluster, cuts: list[int | None]) -> None:
    """Many lines share a second, some a time stamp, and one is even written three times at the same moment."""
    cluster.put("rayjobs", rayjob(jobDeploymentStatus="Running", jobStatus="RUNNING"))
    log = cluster.submitter("run", "run-a")
    start = datetime.datetime(2026, 11, 23, 7, 0, 0, tzinfo=datetime.UTC)
    expected = []
    for index in range(60):
        line = "the same" if index in (20, 21, 22) else f"line {index}"
        log.write(line, at=start + datetime.timedelta(seconds=(index - index % 5) * 0.13 if index not in (20, 21, 22) else 2.6))
        expected.append(line)
    log.cuts += cuts
    reader = Reader()
    reader.wait(60)
    cluster.exit("run-a")
    end(cluster)
    assert reader.join() == expected
    assert log.streams > len(cuts)
    assert any("sinceTime" in request for request in cluster.requests)


def test_lines_written_while_the_stream_was_torn(cluster: Cluster, reader: Reader) -> None:
    log = cluster.submitter("run", "run-a")
    log.cuts += [None]
    log.write("before")
    reader.wait(1)
    cluster.refusals += [("/log", Refusal(502, "x", "error dialing backend"))]
    log.ended = True  # the server ends the stream in peace, as at a time limit; the container runs on
    until(lambda: log.streams >= 2)
    log.ended = False
    log.write("after")
    reader.wait(2)
    cluster.exit("run-a")
    end(cluster)
    assert reader.join() == ["before", "after"]


def test_a_new_pod_of_the_same_attempt_repeats_nothing(cluster: Cluster, reader: Reader) -> None:
    cluster.submitter("run", "run-a").write(*PREAMBLE, "one", "two")
    reader.wait(2)
    cluster.exit("run-a", code=1)
    cluster.submitter("run", "run-b").write(PREAMBLE[0], "one", "two", "three")
    reader.wait(3)
    cluster.exit("run-b")
    end(cluster)
    assert reader.join() == ["one", "two", "three"]


def test_a_new_attempt_is_said_and_its_log_begins_anew(cluster: Cluster, reader: Reader) -> None:
    cluster.submitter("run", "run-a").write(*PREAMBLE, "one", "two")
    reader.wait(2)
    cluster.exit("run-a", code=1)
    cluster.status("run", jobDeploymentStatus="Retrying", jobStatus="FAILED", failed=1)
    cluster.remove("pods", "run-a")
    cluster.status("run", jobDeploymentStatus="Running", jobStatus="RUNNING")
    cluster.submitter("run", "run-b", "job-2").write("one", "three")
    reader.wait(5)
    cluster.exit("run-b")
    end(cluster)
    assert reader.join() == ["one", "two", "attempt 2", "one", "three"]


def test_a_log_that_breaks_off_is_said(cluster: Cluster, reader: Reader) -> None:
    log = cluster.submitter("run", "run-a")
    log.cuts += [60, 0, 0]
    log.write("one", "two")
    until(lambda: log.streams >= 1)
    cluster.remove("pods", "run-a")
    end(cluster)
    lines = reader.join()
    assert lines[-1] == "facemae: the log breaks off here: its pod run-a is gone"


def test_a_node_that_cannot_read_the_log_is_said(cluster: Cluster, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    log = cluster.submitter("run", "run-a")
    log.write("one")
    reader.wait(1)
    cluster.always.append(("/log", Refusal(500, "InternalError", "Get https://10.0.0.7:10250/containerLogs: dial tcp: i/o timeout")))
    cluster.exit("run-a")
    end(cluster)
    lines = reader.join()
    assert lines[0] == "one"
    assert lines[-1].startswith("facemae: the log breaks off here: ")
    assert "i/o timeout" in lines[-1]


def test_a_run_that_has_ended_while_its_pod_goes_on(cluster: Cluster, reader: Reader) -> None:
    log = cluster.submitter("run", "run-a")
    log.write("one")
    reader.wait(1)
    log.cuts += [0] * 50
    cluster.status("run", jobDeploymentStatus="Failed", reason="DeadlineExceeded", failed=1)
    log.ended = True  # the stream ends, the container does not
    assert reader.join() == ["one", "facemae: the log breaks off here: the run has ended, and its pod run-a has not"]


def test_a_log_that_is_gone_is_said(cluster: Cluster) -> None:
    cluster.put("rayjobs", rayjob(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED"))
    assert list(KubernetesRun("run").log()) == ["facemae: the log of run is gone: its pod was cleared away before anybody followed it"]


def test_a_run_that_is_deleted_ends_its_log(cluster: Cluster, reader: Reader) -> None:
    cluster.submitter("run", "run-a").write("one")
    reader.wait(1)
    cluster.exit("run-a", 143)
    cluster.remove("pods", "run-a")
    cluster.remove("rayjobs", "run")
    assert reader.join()[0] == "one"
    with pytest.raises(LookupError):
        KubernetesRun("run").log()


def test_a_log_that_may_not_be_read(cluster: Cluster, reader: Reader) -> None:
    text = 'pods "run-a" is forbidden: User "ci" cannot get resource "pods/log" in API group "" in the namespace "faces"'
    cluster.always.append(("/log", Refusal(403, "Forbidden", text)))
    cluster.submitter("run", "run-a")
    with pytest.raises(ConnectionError, match="ci may not get pods/log in namespace faces"):
        reader.join()


def test_silence_opens_the_stream_anew(cluster: Cluster, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.kubernetes import pod_log

    monkeypatch.setattr(pod_log, "SILENCE_SECONDS", 0.2)
    log = cluster.submitter("run", "run-a")
    log.write("one")
    until(lambda: log.streams >= 3)
    log.write("two")
    reader.wait(2)
    cluster.exit("run-a")
    end(cluster)
    assert reader.join() == ["one", "two"]


def test_an_api_server_that_is_away_for_a_while(cluster: Cluster, reader: Reader) -> None:
    log = cluster.submitter("run", "run-a")
    log.write("one")
    reader.wait(1)
    away = (".", Refusal(503, "ServiceUnavailable", "apiserver is shutting down", retry_after=0))
    cluster.always.append(away)
    log.cuts += [0]
    log.ended = True  # ends the stream
    until(lambda: sum("/pods/run-a" in request for request in cluster.requests) >= 12)  # more than one question is asked in vain
    log.ended = False
    log.write("two")
    cluster.always.remove(away)
    reader.wait(2)
    cluster.exit("run-a")
    end(cluster)
    assert reader.join() == ["one", "two"]
