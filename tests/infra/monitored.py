"""A driver with a Ray of its own whose metrics can be scraped: it waits for a line on stdin, runs a stage that meets every trouble, and
waits for another. Arguments: Ray's temporary folder, an empty folder, the output's root."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path

import ray

from cluster.attempt import Attempt
from cluster.dataset import Dataset, ShardData
from cluster.metrics import TrainingMetrics
from cluster.processor import Unit
from cluster.stage import StageOptions, run_stage
from cluster.store import StoreError
from tests.cluster.test_stage import Maker

UNITS = [Unit(f"{number:05d}", 3) for number in range(8)]


class Unlucky(Maker):
    """One unit kills its worker once, storage does not answer for another one once, a third never works."""

    def fetch(self, unit: Unit) -> bytes:
        if unit.name == "00003" and self._first(unit):
            raise StoreError("503 SlowDown")
        return super().fetch(unit)

    def compute(self, unit: Unit, fetched: bytes) -> ShardData:
        if unit.name == "00005" and self._first(unit):
            os.kill(os.getpid(), signal.SIGKILL)
        if unit.name == "00006":
            raise ValueError("a picture from hell")
        return super().compute(unit, fetched)

    def _first(self, unit: Unit) -> bool:
        mark = Path(self.folder) / unit.name
        first = not mark.exists()
        mark.touch()
        return first


def main(folder: str, marks: str, root: str) -> None:
    """See the module."""
    # another loopback address than 127.0.0.1, which Ray rewrites to the machine's outer one
    ray.init(
        num_cpus=2,
        include_dashboard=True,
        dashboard_port=int(os.environ["DASHBOARD_PORT"]),
        _node_ip_address="127.0.0.2",
        _temp_dir=folder,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    print("ready", flush=True)
    sys.stdin.readline()
    options = StageOptions(num_workers=2, in_flight=1, max_failures=2)
    run_stage(Unlucky(folder=marks, pause=0.5), UNITS, Dataset(root), name="protect", kind="images", options=options)
    with TrainingMetrics("train", Attempt("run", 1), 100) as training:
        for step in range(1, 3):
            training.report({"step": step, "samples": 8 * step, "first_sample": 0, "metrics": {"loss": 1 / step}})
            time.sleep(1.5)
    time.sleep(5)
    print("done", flush=True)
    sys.stdin.readline()
    ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
