"""Protect, end to end, beside its parts and beside the same work in Ray Data: one run, one machine, one table.

    python benchmarks/protect.py --data ROOT --weights RUN [--workers 2] [--json FILE]

Rows: JPEG decode + encode alone and the model alone (pictures in memory, as many threads as workers), `facemae protect` with a protection
that costs nothing and with FaceMAE, and both written with Ray Data's read_webdataset, map_batches and write_webdataset. Rates of whole
jobs count from the first worker that is ready; for Ray Data, whose workers start inside the run, both jobs are also given with start-up.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import ray

from cluster.dataset import Dataset
from cluster.inputs import input_units
from cluster.picture import decode, encode
from cluster.protect import ProtectProcessor, describe_protection, load_protection
from cluster.session import session
from cluster.shard import Sample, read_samples
from cluster.stage import StageOptions, run_stage

Options = dict[str, object]


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a local data set made by facemae ingest")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    methods: dict[str, Options] = {"none": {}, "facemae": {"weights": arguments.weights, "device": "cpu"}}
    rows: dict[str, float] = {}
    samples = _samples(arguments.data, 4096)
    rows["decode + encode alone"] = _codec_alone(samples, arguments.workers)
    rows["model alone"] = _model_alone(samples, methods["facemae"], arguments.workers)
    with session(num_cpus=arguments.workers):
        for method, options in methods.items():
            rows[f"facemae {method}"], rows[f"facemae {method}, with start-up"] = _ours(arguments.data, method, options, arguments.workers)
        for method, options in methods.items():
            rows[f"ray data {method}, with start-up"] = _ray_data(arguments.data, method, options, arguments.workers)
    ratios = {
        "facemae / model alone (goal 0.9)": rows["facemae facemae"] / rows["model alone"],
        "none / decode + encode alone (goal 0.7)": rows["facemae none"] / rows["decode + encode alone"],
        **{
            f"{method} / ray data, both with start-up (goal 2)": rows[f"facemae {method}, with start-up"]
            / rows[f"ray data {method}, with start-up"]
            for method in methods
        },
    }
    for name, rate in rows.items():
        print(f"{name:40} {rate:8.0f} images/s")
    for name, ratio in ratios.items():
        print(f"{name:60} {ratio:5.2f}")
    if arguments.json:
        machine = f"{platform.processor() or platform.machine()}, {arguments.workers} workers"
        Path(arguments.json).write_text(json.dumps({"machine": machine, "images_per_second": rows, "ratios": ratios}, indent=1) + "\n")


def _samples(root: str, limit: int) -> list[Sample]:
    dataset, found = Dataset(root), list[Sample]()
    for manifest in dataset.manifests():
        found += [sample for sample in read_samples(dataset.read(manifest)) if isinstance(sample, Sample)]
        if len(found) >= limit:
            break
    return found[:limit]


def _rate(count: int, work: Callable[[], object]) -> float:
    """The best of three: what the machine can do when nothing else disturbs it."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return count / min(times)


def _codec_alone(samples: Sequence[Sample], workers: int) -> float:
    def recode(part: Sequence[Sample]) -> None:
        for sample in part:
            encode(decode(sample.image))

    parts = [samples[i::workers] for i in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        return _rate(len(samples), lambda: list(pool.map(recode, parts)))


def _model_alone(samples: Sequence[Sample], options: Options, workers: int) -> float:
    part = samples[:1024]
    pictures, keys = np.stack([decode(sample.image) for sample in part]), [sample.key for sample in part]
    protection = load_protection("facemae", {**options, "threads": workers})
    return _rate(len(part), lambda: protection.protect(pictures, keys))


def _ours(root: str, method: str, options: Options, workers: int) -> tuple[float, float]:
    """Images/s without and with start-up."""
    source = Dataset(root)
    units, parent = input_units(source)
    folder = tempfile.mkdtemp()
    try:
        started = time.perf_counter()
        processor = ProtectProcessor(root, method, options, describe_protection(method, options))
        stage = StageOptions(num_workers=workers)
        result = run_stage(processor, units, Dataset(folder), name=f"facemae {method}", kind="images", parent=parent, options=stage)
        return result.samples / result.seconds, result.samples / (time.perf_counter() - started)
    finally:
        shutil.rmtree(folder)


class _RayDataProtect:
    """What a user would write: a callable class for map_batches."""

    def __init__(self, method: str, options: Options) -> None:
        self.protection = load_protection(method, options)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pictures = np.stack(list(batch["jpg"]))
        batch["jpg"] = self.protection.protect(pictures, [str(key) for key in batch["__key__"]])
        return {name: batch[name] for name in ("__key__", "jpg", "cls")}


def _ray_data(root: str, method: str, options: Options, workers: int) -> float:
    """Images/s with start-up: the job as Ray Data's documentation would have it."""
    shards = sorted(str(path) for path in (Path(root) / "shards").glob("*.tar"))
    count = Dataset(root).description()["samples"]
    folder = tempfile.mkdtemp()
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        started = time.perf_counter()
        data = ray.data.read_webdataset(shards, suffixes=["jpg", "cls"])
        # half a core an actor: readers and writers are tasks that need CPU too, and actors on every core would starve them for good
        pool = ray.data.ActorPoolStrategy(size=workers)
        data = data.map_batches(_RayDataProtect, fn_constructor_args=(method, options), batch_size=64, compute=pool, num_cpus=0.5)
        data.write_webdataset(folder)
        seconds = time.perf_counter() - started
        _require_all(folder, count)
        return count / seconds
    finally:
        shutil.rmtree(folder)


def _require_all(folder: str, count: int) -> None:
    found = sum(1 for path in Path(folder).glob("*.tar") for _ in read_samples(path.read_bytes()))
    if found != count:
        raise SystemExit(f"Ray Data wrote {found} of {count} samples")


if __name__ == "__main__":
    main()
