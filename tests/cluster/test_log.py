"""Log lines: one JSON object each when asked for, with run, attempt and shard, from this process and from Ray's workers."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.dataset import Dataset, ShardData
from cluster.log import VARIABLE, about, follow, ray_options, set_up
from cluster.processor import Unit
from tests.cluster.test_stage import UNITS, Maker


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JSON in this process, and all as it was afterwards."""
    monkeypatch.setenv(VARIABLE, "json")
    loggers = [logging.getLogger(name) for name in (None, "ray", "cluster", "jobs", "facemae", "py.warnings")]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    follow()
    yield
    logging.captureWarnings(False)
    for logger, handlers, level, propagate in before:
        logger.handlers, logger.level, logger.propagate = handlers, level, propagate
        logger.manager._clear_cache()  # type: ignore[attr-defined]


def _lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


@pytest.mark.usefixtures("as_json")
def test_every_record_is_one_object_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("cluster.test")
    with about(run="r", attempt=2), about(shard="00042"):
        log.info("two\nlines and %s", {"a": "mapping"})
    log.warning("of this one", extra={"shard": "00007"})
    log.debug("nobody asked")
    logging.getLogger("urllib3").info("nor for this")
    warnings.warn("a library's warning", stacklevel=1)
    try:
        raise ValueError("what went wrong")
    except ValueError:
        log.exception("an error")
    first, second, third, last = _lines(capsys)
    assert (first["message"], first["level"], first["logger"]) == ("two\nlines and {'a': 'mapping'}", "info", "cluster.test")
    assert (first["run"], first["attempt"], first["shard"], first["pid"]) == ("r", 2, "00042", os.getpid())
    assert str(first["time"]).endswith("Z")
    assert second["shard"] == "00007"
    assert "run" not in second
    assert "a library's warning" in str(third["message"])
    assert "ValueError: what went wrong" in str(last["exception"])


@pytest.mark.usefixtures("as_json")
def test_a_thread_tells_of_its_own_shard_only(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with about(shard="other"):
            barrier.wait()
            logging.getLogger("cluster.test").info("there")

    barrier = threading.Barrier(2)
    thread = threading.Thread(target=work)
    thread.start()
    with about(shard="mine"):
        barrier.wait()
        logging.getLogger("cluster.test").info("here")
    thread.join()
    assert {(line["message"], line["shard"]) for line in _lines(capsys)} == {("here", "mine"), ("there", "other")}


@pytest.mark.usefixtures("as_json")
def test_a_password_in_a_url_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("cluster.test").warning("no answer from %s", "https://user:secret@host/bucket, s3://bucket/a@b")
    (line,) = _lines(capsys)
    assert line["message"] == "no answer from https://***@host/bucket, s3://bucket/a@b"


def test_nothing_changes_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    before = logging.getLogger().handlers[:]
    set_up()
    assert logging.getLogger().handlers == before
    assert ray_options() == {"logging_level": logging.ERROR}


def test_an_unknown_format_is_refused_in_one_line() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "jobs", "verify", "nowhere"],
        env={**os.environ, VARIABLE: "xml"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (run.returncode, run.stderr) == (2, "facemae: FACEMAE_LOG=xml: say json or text\n")


class Talkative(Maker):
    """Warns of every unit, and cannot do one of them."""

    def compute(self, unit: Unit, fetched: bytes) -> ShardData:
        logging.getLogger("cluster.test").warning("a worker's line")
        if unit.name == "00002":
            raise ValueError("a picture from hell")
        return super().compute(unit, fetched)


def test_driver_and_workers_of_a_stage_write_nothing_but_objects(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        from cluster.log import set_up
        set_up()
        from cluster.session import session
        from cluster.stage import StageError
        from tests.cluster.test_log import Talkative
        from tests.cluster.test_stage import _run
        with session(num_cpus=2):
            _run({str(tmp_path / "root")!r}, Talkative(), max_failures=2)
            import time
            time.sleep(2)  # Ray brings the workers' last lines
    """)
    environment = {**os.environ, VARIABLE: "json", "RAY_ADDRESS": "", "RAY_raylet_start_wait_time_s": "120"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    (attempt,) = Dataset(str(tmp_path / "root")).manifests()[:1]
    assert {(line.get("run"), line.get("attempt")) for line in lines} == {(attempt.run, 1)}
    spoken = [line for line in lines if line["message"] == "a worker's line"]
    assert {line["shard"] for line in spoken} == {unit.name for unit in UNITS}
    failed = [line for line in lines if "a picture from hell" in line["message"]]
    assert {(line["logger"], line["shard"]) for line in failed} == {("cluster.scheduler", "00002")}
    assert {line["pid"] for line in failed}.isdisjoint(line["pid"] for line in spoken)
    assert any(line["message"].startswith("test: 6 of 6 shards") for line in lines)
