"""The whole path at size, on embeddings of which the leakage is known: stored, indexed, searched; time and memory by phase, and growth.

    python -m benchmarks.scale --images 250000 1000000 [--queries 20000] [--folder DIR] [--output benchmarks/out]

For each size: *embed*, Ray workers write shards of originals (and of as many protected ones as hold the queries) to a folder store, each
committed like any other; *build*, quantiser, cells, parts and actors; *search*, `run_search` of every query, ranks committed shard by
shard; *exact*, a sample of them against every image. A planted share of the protected images are copies of their originals, so CMC@1 is
known. Recall is over the sample: the nearest image found, and "is anything nearer than the mate" answered, as by the exact search. Memory
is the kernel's count of each process (VmHWM), begun anew with each phase. Where two sizes or more are given, cost ~ images^e is fitted;
"rates" in the JSON are those that jobs/rates.yaml wants.
Disk: three times 1.1 KB an image while an index is built, two after; a size's folder is removed before the next begins.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.embedded import IMAGES_EACH, SHARD_PEOPLE, synthetic_set
from benchmarks.machine import ROOT, machine
from benchmarks.memory import PeakMemory
from cluster.calibration import QUERIES as CALIBRATED
from cluster.dataset import Dataset
from cluster.embedded import EmbeddedSet, places, read_shard
from cluster.index import Gallery, GalleryOptions
from cluster.leakage import SAMPLE, run_search
from cluster.quantizer import ITERATIONS, SAMPLES_PER_CELL
from cluster.ranks import read_ranks
from cluster.session import session
from cluster.stage import StageOptions
from facemae.interval import wilson
from facemae.leakage import similarity
from facemae.synthetic_embeddings import SyntheticEmbeddings


@dataclass
class Phases:
    """Seconds and memory of each phase by name."""

    memory: PeakMemory
    found: dict[str, dict[str, Any]]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block."""
        self.memory.phase()
        started = time.perf_counter()
        yield
        seconds, peaks = time.perf_counter() - started, self.memory.phase()
        kind, largest = peaks.largest
        self.found[name] = {"seconds": seconds, "largest": largest, "largest process": kind, "total": peaks.total}
        self.found[name]["processes"] = peaks.by_name()
        print(
            f"  {name:8} {seconds:9.1f} s   largest process {largest / 1e6:7,.0f} MB ({kind}), all {peaks.total / 1e6:7,.0f} MB", flush=True
        )


def main() -> None:
    """Measure each size, print, fit the growth, write the JSON."""
    arguments = _arguments()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # for Ray's workers
    sizes = []
    for images in arguments.images:
        folder = Path(tempfile.mkdtemp(prefix="scale-", dir=arguments.folder))
        try:
            with PeakMemory() as memory, session(num_cpus=arguments.cpus):
                sizes.append(_measure(images, folder, memory, arguments))
        finally:
            shutil.rmtree(folder)
    growth = exponents(sizes)
    for name, exponent in growth.items():
        print(f"{name} grows as images^{exponent:.2f}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "command": " ".join(["python -m benchmarks.scale", *sys.argv[1:]]), "sizes": sizes, "growth": growth}
    (arguments.output / "scale.json").write_text(json.dumps(content, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[100_000])
    parser.add_argument("--queries", type=int, default=20_000, help="protected images that are searched for, at least a shard of 10,000")
    parser.add_argument("--sample", type=int, default=1_000, help="queries searched exactly as well")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--leak", type=float, default=0.1, help="share of protected images that are planted as copies")
    parser.add_argument("--factory", default="auto", help="index, as in facemae leakage")
    parser.add_argument("--recall", type=float, default=0.99)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the embeddings go; the system's temporary folder by default")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "out")
    return parser.parse_args()


def _measure(images: int, folder: Path, memory: PeakMemory, arguments: argparse.Namespace) -> dict[str, Any]:
    """All phases of one size."""
    people = -(-images // IMAGES_EACH)
    source = SyntheticEmbeddings(people, IMAGES_EACH, arguments.dim, leak=arguments.leak, shard_identities=min(SHARD_PEOPLE, people))
    wanted = min(source.num_shards, -(-arguments.queries // (source.shard_identities * IMAGES_EACH)))
    searched = np.unique(np.linspace(0, source.num_shards - 1, wanted).astype(int)).tolist()
    print(f"{source.num_images:,} images x {arguments.dim}, {len(searched)} of {source.num_shards} shards searched for")
    phases = Phases(memory, {})
    with phases.phase("embed"):
        originals = synthetic_set(folder / "original", source, "originals", range(source.num_shards))
        protected = synthetic_set(folder / "protected", source, "protected", searched)
    options = GalleryOptions(arguments.factory, arguments.recall, num_actors=arguments.actors)
    with Gallery(originals.dataset, arguments.dim, options) as gallery:
        with phases.phase("build"):
            gallery.load()
        disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        ranks = Dataset(str(folder / "ranks"), ".parquet")
        with phases.phase("search"):
            done = run_search(protected, originals, gallery, ranks, name="search", options=StageOptions(num_workers=1))
        vectors, mates = _sample(protected, originals, arguments.sample)
        with phases.phase("exact"):
            truth = gallery.search(vectors, 1, mates, exact=True)
        found = gallery.search(vectors, 1, mates)
    recall = {
        "nearest": float((found.scores[:, 0] == truth.scores[:, 0]).mean()),
        "mate": float(((found.nearer > 0) == (truth.nearer > 0)).mean()),
    }
    result = {"images": source.num_images, "queries": protected.samples, "sample": len(vectors), "disk": disk, "cores": arguments.cpus}
    result["phases"] = phases.found
    result |= {"index": gallery.choice.factory, "cells": gallery.choice.num_cells, "probes": gallery.num_probes}
    result |= {"scanned": float(found.scanned.mean()), "recall": recall, "leak": _recovered(ranks, source)}
    result["rates"] = _rates(result, done.seconds) if arguments.dim == 512 else {}
    print(f"  {result['index']}, {result['probes']} probed; recall {recall}; {result['leak']}")
    return result


def _sample(protected: EmbeddedSet, originals: EmbeddedSet, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Random queries, (S, D), and the similarity of each to its mate, (S, 1)."""
    rng, vectors, mates = np.random.default_rng(0), list[np.ndarray](), list[np.ndarray]()
    names = protected.dataset.names()
    for name in names:
        queries, there = read_shard(protected.dataset, name), read_shard(originals.dataset, name)
        chosen = rng.permutation(len(queries))[: -(-count // len(names))]
        vectors.append(queries.vectors[chosen])
        mates.append(similarity(queries.vectors[chosen], there.vectors[places(queries, there, name, None)[chosen]]))
    return np.concatenate(vectors), np.concatenate(mates)[:, None]


def _rates(result: Mapping[str, Any], searching: float) -> dict[str, float]:
    """What jobs/rates.yaml wants: similarities/s where nothing else is done, and what building and searching take beside them."""
    images, cells, queries, phases = result["images"], result["cells"], result["queries"], result["phases"]
    similarities = result["sample"] * images / phases["exact"]["seconds"]
    exactly = (min(SAMPLE, queries) + CALIBRATED) * images if result["probes"] < cells else 0
    compared = queries * (cells + result["scanned"]) + exactly
    rates = {"similarities": similarities, "index_search": queries / max(searching - compared / similarities, 1e-9)}
    if cells:
        trained = ITERATIONS * SAMPLES_PER_CELL * cells**2 / similarities
        rates["index_build"] = images / max(phases["build"]["seconds"] - trained - images * cells / similarities, 1e-9)
        rates["index_probes"] = result["probes"]
    return rates


def _recovered(ranks: Dataset, source: SyntheticEmbeddings) -> dict[str, Any]:
    """CMC@1 as measured, its 95 % interval, and what was planted: in these queries, and expected."""
    first, total, planted = 0, 0, 0
    for manifest in ranks.manifests():
        rows = read_ranks(ranks.read(manifest))[0]
        first, total = first + int(np.sum(rows.rank_image == 1)), total + len(rows)
        planted += int(source.shard(int(manifest.shard)).leaked.sum())
    low, high = (float(end) for end in wilson(np.array(first), total))
    return {"cmc1": first / total, "low": low, "high": high, "planted": planted / total, "expected": source.expected_cmc1}


def exponents(sizes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The e of cost ~ images^e by least squares over the logarithms: seconds to build, seconds a query (search, exact sample), bytes of the
    largest process that searches. Empty for fewer than two sizes."""
    if len({size["images"] for size in sizes}) < 2:
        return {}
    costs = {
        "build": [size["phases"]["build"]["seconds"] for size in sizes],
        "search, a query": [size["phases"]["search"]["seconds"] / size["queries"] for size in sizes],
        "exact, a query": [size["phases"]["exact"]["seconds"] / size["sample"] for size in sizes],
        "largest process": [size["phases"]["search"]["largest"] for size in sizes],
    }
    images = np.log([size["images"] for size in sizes])
    return {name: float(np.polyfit(images, np.log(values), 1)[0]) for name, values in costs.items()}


if __name__ == "__main__":
    main()
