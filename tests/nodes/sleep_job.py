"""A job whose workers only sleep, run as its driver: ``python -m tests.nodes.sleep_job --address A --output ROOT --diary FOLDER``.

Whoever computes a unit leaves a mark ``<unit>-<address of its node>-<random>`` in the diary, so that a test sees what ran where, and
what ran twice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import ray

from cluster.dataset import Dataset, Labels, ShardData
from cluster.processor import Processor, Unit
from cluster.session import session
from cluster.shard import Sample, ShardWriter
from cluster.stage import Interrupted, StageOptions, run_stage


class Sleeper(Processor[Unit]):
    """Sleeps over every unit; longer on a node that is said to be slow."""

    def __init__(self, diary: str, seconds: float, slow: str | None, factor: float) -> None:
        self._diary, self._seconds, self._slow, self._factor = diary, seconds, slow, factor

    def describe(self) -> dict[str, Any]:
        """Nothing of it changes a byte."""
        return {}

    def open(self, threads: int) -> None:
        """Find out where it runs."""
        self._ip = ray.util.get_node_ip_address()

    def fetch(self, unit: Unit) -> None:
        """Nothing."""

    def compute(self, unit: Unit, fetched: None) -> ShardData:
        """Sleep, and make two samples."""
        time.sleep(self._seconds * (self._factor if self._ip == self._slow else 1))
        (Path(self._diary) / f"{unit.name}-{self._ip}-{uuid.uuid4().hex[:8]}").touch()
        writer = ShardWriter()
        for number in range(2):
            writer.add(Sample(f"{unit.name}-{number}", unit.name.encode() * 20, number))
        return ShardData(writer.finish(), 2, Labels.of(writer.labels))


def main() -> int:
    """Run it. Prints the result as one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--diary", required=True)
    parser.add_argument("--units", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--slow")
    parser.add_argument("--factor", type=float, default=1.0)
    options = parser.parse_args()
    units = [Unit(f"{number:05d}", 2) for number in range(options.units)]
    processor = Sleeper(options.diary, options.seconds, options.slow, options.factor)
    stage = StageOptions(num_workers=options.workers, cpus_per_worker=options.cpus, in_flight=2)
    try:
        with session(options.address):
            result = run_stage(processor, units, Dataset(options.output), name="sleep", kind="images", options=stage)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return 143
    print(
        json.dumps(
            {"seconds": result.seconds, "startup": result.startup_seconds, "resumed": result.resumed, "failed": list(result.failed_shards)}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
