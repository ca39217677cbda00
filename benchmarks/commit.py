"""What the commit protocol costs: the same shards with it and with all checks off, in turns, one run, one table.

    python benchmarks/commit.py --data ROOT [--weights RUN] [--rounds 8] [--json FILE]

*With*: facemae protect as it is - each input shard's sha256 compared, a look whether another attempt has the shard, the tar's sha256 sent
and compared with what the server holds, a conditional PUT of the manifest, the attempt's heartbeat. *Without*: the same workers and
scheduler, but the input is taken as it comes and the output goes up by a plain ``put_object``, as most writers do it; nothing says which
shards are whole. Input and output lie in SeaweedFS on this machine. The protection is ``none``, which makes the protocol's share the
largest, or FaceMAE where weights are given.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import boto3
import ray
from botocore.config import Config

from cluster.attempt import Attempt, attempting
from cluster.crew import RayCrew
from cluster.dataset import Dataset, Manifest
from cluster.inputs import input_units
from cluster.processor import Processor, Unit
from cluster.protect import ProtectProcessor, describe_protection
from cluster.scheduler import Scheduler
from cluster.seaweedfs import seaweedfs
from cluster.session import session
from cluster.worker import Opened, Outcome, Worker

Options = dict[str, object]
BUCKET = "bench"


class Unchecked(ProtectProcessor):
    """Takes the input as it comes."""

    def fetch(self, unit: Unit) -> bytes:
        """The original shard, not hashed."""
        manifest = self._input.manifest(unit.name)
        return self._input.store.get(str(manifest.file))


class UncheckedWorker(Worker):
    """Writes a shard by a plain PUT, and says that it is done."""

    def open(self) -> Opened:
        """Load the processor and make a plain client."""
        self._client = _client()
        return super().open()

    def run(self, unit: Unit) -> Outcome:
        """Fetch, compute, put."""
        fetched = self._processor.fetch(unit)
        with self._computing:
            data = self._processor.compute(unit, fetched)
        bucket, _, prefix = self._dataset.url.removeprefix("s3://").partition("/")
        self._client.put_object(Bucket=bucket, Key=f"{prefix}/shards/{unit.name}.tar", Body=data.payload)
        return Outcome(Manifest(unit.name, None, None, 0, data.samples, data.samples, 0, data.identities, "", "", 1))


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a local data set made by facemae ingest")
    parser.add_argument("--weights")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    methods: dict[str, Options] = {"facemae": {"weights": arguments.weights, "device": "cpu"}} if arguments.weights else {"none": {}}
    with tempfile.TemporaryDirectory() as folder, seaweedfs(Path(folder) / "s3") as endpoint:
        os.environ.update(endpoint.environment)
        endpoint.create_bucket(BUCKET)
        root = _upload(arguments.data)
        with session(num_cpus=1):
            rows = {method: _side_by_side(root, method, options, arguments.rounds) for method, options in methods.items()}
    for method, row in rows.items():
        print(f"{method:8} {row['seconds without']:7.2f} s without, {row['seconds with']:7.2f} s with: {100 * row['overhead']:+.1f} %")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"machine": platform.processor() or platform.machine(), "rows": rows}, indent=1) + "\n")


def _side_by_side(root: str, method: str, options: Options, rounds: int) -> dict[str, Any]:
    """Median seconds of both, and the median of the rounds' ratios less 1. Within a round the two run one after the other, in turns."""
    source = Dataset(root)
    units, _ = input_units(source)
    description = describe_protection(method, options)
    checked, plain = ProtectProcessor(root, method, options, description), Unchecked(root, method, options, description)
    times: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(rounds + 1):
        order = ("with", "without") if number % 2 else ("without", "with")
        for which in order:
            output = Dataset(f"s3://{BUCKET}/out-{method}-{which}-{number}")
            processor, kind = (checked, Worker) if which == "with" else (plain, UncheckedWorker)
            seconds = _run(processor, kind, list(units), output)
            if number:  # the first round warms the machine up
                times[which].append(seconds)
            _remove(output)
    ratios = [with_ / without for with_, without in zip(times["with"], times["without"], strict=True)]
    medians = {f"seconds {which}": statistics.median(values) for which, values in times.items()}
    return {**medians, "overhead": statistics.median(ratios) - 1, "rounds": ratios, "shards": len(units)}


def _run(processor: Processor[Any], kind: type[Worker], units: list[Unit], output: Dataset) -> float:
    """Seconds from the first worker that is ready to the last shard."""
    beating = attempting(output.store, "f") if kind is Worker else contextlib.nullcontext(Attempt("", 1))
    with beating as attempt:
        actor = ray.remote(kind).options(num_cpus=1, max_concurrency=4)

        def make() -> Any:
            return actor.remote(processor, output.url, ".tar", attempt, "f", 1)

        scheduler = Scheduler(RayCrew(make), units, _give_up, attempt=attempt, in_flight=3, max_failures=1)
        for _ in scheduler.run(1):
            pass
        finished = time.perf_counter()
        assert scheduler.ready_at is not None
        return finished - scheduler.ready_at


def _give_up(unit: Unit, errors: Any) -> Manifest:
    raise SystemExit(f"{unit.name} failed: {errors}")


def _upload(data: str) -> str:
    """Copy a local data set into the bucket."""
    root, client = Path(data), _client()
    for path in root.rglob("*"):
        if path.is_file():
            client.put_object(Bucket=BUCKET, Key=f"in/{path.relative_to(root).as_posix()}", Body=path.read_bytes())
    return f"s3://{BUCKET}/in"


def _remove(output: Dataset) -> None:
    for stored in list(output.store.list()):
        output.store.delete(stored.key)


def _client() -> Any:
    """A boto3 client without checksums of its own."""
    return boto3.client("s3", config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"))


if __name__ == "__main__":
    main()
