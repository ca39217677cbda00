"""How long ``facemae status`` takes on a large set: the first look, and the next ones.

    python -m benchmarks.status [--shards 26000] [--output FOLDER]

A SeaweedFS server on this machine gets the manifests of an unfinished set, as one attempt would have committed them, and its record. Then
the same set is looked at: with the attempt's tally, which spares the manifests, and without it, as in a set of an earlier version or
after a driver that died in mid-commit, when every manifest is read once; a second look of each, after 100 more shards. What the driver
lists when it goes on, and reads at its end, stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from cluster.attempt import RUNNING, Record
from cluster.dataset import Dataset, Labels, Manifest
from cluster.processor import Unit
from cluster.pulse import Pulse
from cluster.seaweedfs import seaweedfs
from cluster.status import DatasetStatus, Status, Watch

BUCKET, SAMPLES, NEW = "bench", 10_000, 100
RECORD = Record("run", 1, "f", RUNNING, 1, "2026-01-01T00:00:00Z")
Cost = tuple[float, float]
"""Seconds that passed, and seconds of CPU time of this process, which other programs on the machine change less."""


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=26_000)
    parser.add_argument("--output", help="folder for status.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, seaweedfs(Path(folder)) as endpoint:
        os.environ.update(endpoint.environment)
        endpoint.create_bucket(BUCKET)
        rows = _measured(Dataset(f"s3://{BUCKET}/set"), arguments.shards)
    for name, (seconds, cpu) in rows.items():
        print(f"{name:60} {seconds:7.2f} s, of them {cpu:6.2f} s of this program's own CPU time")
    if arguments.output:
        figures = {name: {"seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3)} for name, (seconds, cpu) in rows.items()}
        content = {"machine": machine(), "shards": arguments.shards, "rows": figures}
        Path(arguments.output).mkdir(parents=True, exist_ok=True)
        (Path(arguments.output) / "status.json").write_text(json.dumps(content, indent=1) + "\n")


def _measured(dataset: Dataset, shards: int) -> dict[str, Cost]:
    units = [Unit(f"{number:05d}", SAMPLES) for number in range(shards + 2 * NEW)]
    pulse = Pulse("protect", units, [])
    pulse.workers(1000, 1000)
    _commit(dataset, units[:shards], pulse)
    told, untold = Watch(dataset.url), Watch(dataset.url)
    rows = {"listing the manifests": _timed(dataset.names)}
    rows["first look, by the attempt's tally"] = _look(told, shards)
    _commit(dataset, units[shards : shards + NEW], pulse)
    rows[f"next look, {NEW} shards later"] = _look(told, shards + NEW)
    _put(dataset, replace(RECORD, tally=None))
    rows["first look, every manifest read"] = _look(untold, shards + NEW)
    _commit(dataset, units[shards + NEW :], pulse)
    _put(dataset, replace(RECORD, tally=None))
    rows[f"next look, {NEW} shards later, only theirs read"] = _look(untold, shards + 2 * NEW)
    rows["the driver's reading of every manifest at its end"] = _timed(dataset.manifests)
    return rows


def _commit(dataset: Dataset, units: Sequence[Unit], pulse: Pulse) -> None:
    manifests = [
        Manifest(
            unit.name, f"shards/{unit.name}-0123456789ab.tar", "0" * 64, 123456789, SAMPLES, SAMPLES - 1, 1, Labels(100, 0, 99), "f" * 64,
            "run", 1, {"fetch": 1.0, "compute": 2.0, "publish": 3.0}, {"kept_bytes": 123456},
        )
        for unit in units
    ]  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(dataset.publish, manifests))
    for manifest in manifests:
        pulse.committed(manifest, mine=True, idle=0.0)
    _put(dataset, replace(RECORD, tally=pulse.tally()))


def _put(dataset: Dataset, record: Record) -> None:
    dataset.store.put("attempts/00001.json", record.to_bytes())


def _look(watch: Watch, shards: int) -> Cost:
    """What a look costs, which must see everything."""
    looks = list[Status]()
    cost = _timed(lambda: looks.append(watch.look()))
    (found,) = looks[0].parts
    assert isinstance(found, DatasetStatus)
    assert (found.shards, found.samples, found.quarantined) == (shards, shards * (SAMPLES - 1), shards), found
    return cost


def _timed(act: Callable[[], Any]) -> Cost:
    started, cpu = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - started, time.process_time() - cpu


if __name__ == "__main__":
    main()
