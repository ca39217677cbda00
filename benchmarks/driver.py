"""What a stage's driver costs: CPU a shard with many workers, memory, Ray's object store; and the listing and resume of a large output.

    python -m benchmarks.driver [--shards 26000] [--actors 16] [--parts simulated actors resume] [--output DIR]

*simulated*: the scheduler with its watchers over workers that only sleep and are no processes; the CPU is that of the whole process,
the simulation's own included. *actors*: the same over real Ray actors that sleep, with the stage's metrics; the CPU is that of the driver's
process with all of Ray's threads in it. In both the work is 500 shards a second, whatever the number of workers. *resume*: an output of
that many shards in SeaweedFS on this machine (a data object and a manifest each), its listing, the reading of all manifests, and a whole
stage that finds nothing left to do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private.internal_api import memory_summary

from benchmarks.machine import machine
from cluster.attempt import Attempt
from cluster.crew import Crew, RayCrew
from cluster.dataset import Dataset, Labels, Manifest, ShardData, fingerprint
from cluster.metrics import StageMetrics
from cluster.processor import Processor, Unit
from cluster.progress import Progress
from cluster.pulse import Pulse
from cluster.scheduler import Scheduler
from cluster.seaweedfs import seaweedfs
from cluster.session import session
from cluster.shard import sha256_hex
from cluster.stage import run_stage
from cluster.watcher import Watcher, Watchers
from cluster.worker import Opened, Outcome
from tests.cluster.simulated_crew import SimulatedCrew, manifest_of

RATE = 500.0
"""Shards a second of all workers together."""
BUCKET = "bench"
THREADS = 16


class Sleeper:
    """An actor that answers as a worker does, and only sleeps."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def open(self) -> Opened:
        """Ready."""
        return Opened(ray.get_runtime_context().get_node_id())

    def drain(self) -> None:
        """Nothing."""

    def run(self, unit: Unit) -> Outcome:
        """Sleep, and send back a manifest of ordinary size."""
        time.sleep(self._seconds)
        return Outcome(full_manifest(unit, "f"))


class Nothing(Processor[Unit]):
    """Has no work to do."""

    def describe(self) -> dict[str, Any]:
        """No configuration."""
        return {}

    def fetch(self, unit: Unit) -> None:
        """Never called."""

    def compute(self, unit: Unit, fetched: None) -> ShardData:
        """Fails: a resume that computes anything is none."""
        raise AssertionError(f"shard {unit.name} is committed, and was begun again")


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=26_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--actors", type=int, default=16)
    parser.add_argument("--parts", nargs="+", default=["simulated", "actors", "resume"], choices=["simulated", "actors", "resume"])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "shards": arguments.shards}
    if "simulated" in arguments.parts:
        result["simulated"] = [simulated(arguments.shards, workers) for workers in arguments.workers]
    if "actors" in arguments.parts:
        result["actors"] = [actors(arguments.shards, arguments.actors)]
    if "resume" in arguments.parts:
        result["resume"] = resume(arguments.shards)
    _print(result)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "driver.json").write_text(json.dumps(result, indent=1) + "\n")


def simulated(shards: int, workers: int) -> dict[str, Any]:
    """The scheduler over workers that are no processes."""
    return measure(SimulatedCrew(workers / RATE), shards, workers)


def actors(shards: int, workers: int) -> dict[str, Any]:
    """The scheduler over Ray actors."""
    with session(num_cpus=1):
        kind: Any = ray.remote(Sleeper).options(num_cpus=0, max_concurrency=4)
        before = _plasma()
        found = measure(RayCrew(lambda: kind.remote(workers / RATE)), shards, workers, [StageMetrics("driver", Attempt("run", 1), shards)])
        return {**found, "object store before, bytes": before, "object store after, bytes": _plasma()}


def measure(crew: Crew, shards: int, workers: int, more: Sequence[Watcher] = ()) -> dict[str, Any]:
    """Run all shards. CPU is counted from the first commit on, memory looked at after a tenth of the shards and at the end."""
    units = [Unit(f"{number:05d}", 10_000) for number in range(shards)]
    with Progress("driver", units, ()) as progress:
        watchers = Watchers([progress, Pulse("driver", units, ()), *more])
        stage = Scheduler(
            crew, units, lambda unit, _: manifest_of(unit), attempt=Attempt("run", 1), in_flight=3, max_failures=3, watcher=watchers
        )
        begun, started, first, warm = 0.0, 0.0, 0, 0
        for number, _ in enumerate(stage.run(workers)):
            if number == shards // 10:
                begun, started, first, warm = _cpu(), time.perf_counter(), number, _rss()
        cpu, seconds, rss = _cpu() - begun, time.perf_counter() - started, _rss()
    done = shards - first - 1
    return {
        "workers": workers,
        "CPU a shard, ms": round(1000 * cpu / done, 3),
        "shards a second": round(done / seconds, 1),
        "RSS after a tenth, MB": round(warm / 1e6, 1),
        "RSS at the end, MB": round(rss / 1e6, 1),
    }


def resume(shards: int) -> dict[str, Any]:
    """Seconds to list, to read all manifests, and to find in a whole stage that nothing is left."""
    with tempfile.TemporaryDirectory() as folder, seaweedfs(Path(folder) / "s3") as endpoint, _environment(endpoint.environment):
        endpoint.create_bucket(BUCKET)
        output = Dataset(f"s3://{BUCKET}/out")
        units = [Unit(f"{number:05d}", 10_000) for number in range(shards)]
        mark = fingerprint({"config": {}, "units": [(unit.name, unit.num_samples) for unit in units], "parent": None})
        steps: dict[str, Callable[[], Any]] = {
            "writing": lambda: _fill(output, units, mark),
            "listing": output.names,
            "reading": output.manifests,
            "resume": lambda: run_stage(Nothing(), units, output, name="nothing", kind="images"),
        }
        found: dict[str, Any] = {}
        for name, step in steps.items():
            begun, started = _cpu(), time.perf_counter()
            step()
            found |= {f"{name}, s": round(time.perf_counter() - started, 2), f"{name}, CPU s": round(_cpu() - begun, 2)}
        return found


def full_manifest(unit: Unit, mark: str) -> Manifest:
    """A manifest as a protection writes it, of data that is the unit's name."""
    data = unit.name.encode()
    digest = sha256_hex(data)
    file = f"shards/{unit.name}-{digest[:12]}.tar"
    seconds = {"fetch": 1.2345, "compute": 12.3456, "publish": 0.1234}
    return Manifest(unit.name, file, digest, len(data), 10_000, 10_000, 0, Labels(100, 0, 99), mark, "0123456789ab", 1, seconds)


def _fill(output: Dataset, units: Sequence[Unit], mark: str) -> None:
    def put(unit: Unit) -> None:
        manifest = full_manifest(unit, mark)
        output.store.put(str(manifest.file), unit.name.encode())
        output.store.put(f"manifests/{unit.name}.json", manifest.to_bytes(), if_absent=True)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(put, units):
            pass


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _cpu() -> float:
    """Seconds of CPU of this process, user and system, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _rss() -> int:
    return int(psutil.Process().memory_info().rss)


def _plasma() -> int:
    """Bytes in Ray's object store."""
    found = re.search(r"Plasma memory usage (\d+) MiB", memory_summary(ray.get_runtime_context().gcs_address, stats_only=True))
    return int(found.group(1)) << 20 if found else 0


def _print(result: Mapping[str, Any]) -> None:
    for kind in ("simulated", "actors"):
        for row in result.get(kind, []):
            print(f"{kind:10}", "  ".join(f"{name} {value}" for name, value in row.items()))
    if "resume" in result:
        print(f"{result['shards']} shards in S3:", "  ".join(f"{name} {value}" for name, value in result["resume"].items()))


if __name__ == "__main__":
    main()
