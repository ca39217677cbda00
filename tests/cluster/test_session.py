"""A Ray session of a job, and the signals that reach it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import ray

from cluster.session import session

JOB = """
import os, signal, sys, time
import ray
from cluster.session import session
from jobs.command import Config, main_of

def stop():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)

class Stopping:
    def __reduce__(self):
        return stop, ()

def run(config):
    with session(num_cpus=1):
        {where}

sys.exit(main_of(Config, run, []))
"""


@pytest.mark.parametrize("where", ["stop()", "ray.get(ray.put(Stopping()))"], ids=["in Python", "in Ray's C code"])
def test_sigterm_where_no_stage_drains_is_a_stop_too(where: str) -> None:
    done = subprocess.run([sys.executable, "-c", JOB.replace("{where}", where)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 143, done.stderr
    assert "stopped as asked; run the same command to go on" in done.stderr


def test_a_ray_that_does_not_start_in_time_is_an_error_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_options: object) -> None:
        raise Exception("The current node timed out during startup.\nSee the logs.")  # as Ray does

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConnectionError, match=r"did not start: The current node timed out during startup\.; run the same"), session():
        pass
