"""A Ray session of a job, and the signals that reach it."""

from __future__ import annotations

import subprocess
import sys

JOB = """
import os, signal, sys, time
from cluster.session import session
from jobs.command import Config, main_of

def run(config):
    with session(num_cpus=1):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

sys.exit(main_of(Config, run, []))
"""


def test_sigterm_where_no_stage_drains_is_a_stop_too() -> None:
    done = subprocess.run([sys.executable, "-c", JOB], capture_output=True, text=True, timeout=120)
    assert done.returncode == 143, done.stderr
    assert "stopped as asked; run the same command to go on" in done.stderr
