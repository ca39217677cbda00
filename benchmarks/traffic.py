"""Bytes a query costs between machines, counted: our routing beside a row-sharded index that every query is sent to.

    python -m benchmarks.traffic [--images 200000 --queries 5000 --dim 512] [--shards 4 16 64] [--output benchmarks/out]

Both hold the same inverted lists and probe as many cells, so both see the same images and have the same recall; the table has a line for
each number of cells, the last of them the fewest that find the nearest of 99 % of the queries (what a leakage measurement asks needs far
fewer: docs/leakage.md). *Routed* (ours): a shard owns whole cells, neighbours together, as many images as the others; a query goes to the
owners of the cells that it probes, with their numbers. *Broadcast*: each shard holds every n-th image; each query goes to all, and each
answers with its k best. *Scattered* is routed with cells dealt out at random: what the order of the cells is worth. Counted is the payload:
vectors in half precision, probe lists, thresholds; scores, numbers, counts. Protocols add to each alike, by message.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from benchmarks.embedded import WITHIN, HeldOut
from benchmarks.machine import ROOT, machine
from cluster.index_choice import num_cells_for
from cluster.quantizer import SAMPLES_PER_CELL, Quantizer, cut
from cluster.routing import Route, request_bytes, route
from jobs.plan import NEIGHBOURS, THRESHOLDS


def routed_bytes(cells: np.ndarray, owners: np.ndarray, dim: int) -> float:
    """Bytes a query when only the owners of its cells are asked.

    Args:
        cells: int (Q, P), what each query probes, no cell twice.
        owners: int (C,), the shard of each cell.
    """
    return request_bytes(list(route(cells, owners)), dim, THRESHOLDS, NEIGHBOURS) / len(cells)


def broadcast_bytes(num_shards: int, dim: int) -> float:
    """Bytes a query that every shard answers; each finds the cells by itself."""
    everyone = [Route(shard, np.zeros(1, np.int64), np.empty((1, 0), np.int32)) for shard in range(num_shards)]
    return float(request_bytes(everyone, dim, THRESHOLDS, NEIGHBOURS))


def main() -> None:
    """Count, print the table, write the JSON and the Markdown."""
    arguments = _arguments()
    order, sizes, needed = _ordered(arguments)
    enough = int(np.quantile(needed, arguments.recall, method="inverted_cdf"))
    rows = list[dict[str, Any]]()
    for probes in sorted({*arguments.probes, enough}):
        recall = float(np.mean(needed <= probes))
        rows += [{"probes": probes, "recall": recall, **_row(order[:, :probes], sizes, num, arguments.dim)} for num in arguments.shards]
    text = table(rows)
    print(f"{arguments.images:,} images, {len(sizes)} cells\n{text}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"machine": machine(), "command": " ".join(["python -m benchmarks.traffic", *sys.argv[1:]])}
    content |= {"cells": len(sizes), "k": NEIGHBOURS, "thresholds": THRESHOLDS, "rows": rows}
    (arguments.output / "traffic.json").write_text(json.dumps(content, indent=1) + "\n")
    (arguments.output / "traffic.md").write_text(text + "\n")


def _row(cells: np.ndarray, sizes: np.ndarray, num_shards: int, dim: int) -> dict[str, Any]:
    """Bytes a query of each design, for the probed cells (Q, P) of cells that hold ``sizes`` images."""
    owners = cut(sizes, num_shards)
    scattered = np.random.default_rng(0).permutation(owners)
    routed, everywhere = routed_bytes(cells, owners, dim), broadcast_bytes(num_shards, dim)
    loads = np.bincount(owners, sizes, num_shards)
    found = {"shards": num_shards, "routed": routed, "scattered": routed_bytes(cells, scattered, dim), "broadcast": everywhere}
    return {**found, "broadcast / routed": everywhere / routed, "largest shard / mean": float(loads.max() / loads.mean())}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=5_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--cells", type=int, default=0, help="0: as cluster.index_choice has it")
    parser.add_argument("--within", type=float, default=WITHIN, help="mean cosine of two images of a person: how hard the search is")
    parser.add_argument("--recall", type=float, default=0.99)
    parser.add_argument("--probes", type=int, nargs="+", default=[1, 4, 16], help="cells probed, besides those that the recall needs")
    parser.add_argument("--shards", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "out")
    return parser.parse_args()


def _ordered(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each query's cells, the most similar first (Q, C); the images in each cell (C,); how many cells find each query's nearest (Q,)."""
    made = HeldOut.make(arguments.images, arguments.queries, arguments.dim, arguments.within)
    gallery, queries = np.concatenate(made.gallery).astype(np.float32), made.queries.astype(np.float32)
    num_cells = arguments.cells or num_cells_for(len(gallery))
    sample = np.random.default_rng(0).permutation(len(gallery))[: SAMPLES_PER_CELL * num_cells]
    centroids = Quantizer.train(gallery[np.sort(sample)], num_cells, num_parts=1).centroids.astype(np.float32)
    homes = faiss.knn(gallery, centroids, 1, metric=faiss.METRIC_INNER_PRODUCT)[1][:, 0]
    nearest = faiss.knn(queries, gallery, 1, metric=faiss.METRIC_INNER_PRODUCT)[1][:, 0]
    # the nearest is found when its cell is among those probed: the cell's place in the query's order of cells is how many that takes
    order = np.argsort(-(queries @ centroids.T), axis=1, kind="stable")
    return order, np.bincount(homes, minlength=num_cells), 1 + np.argmax(order == homes[nearest][:, None], axis=1)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| cells probed | recall@1 | shards | routed B/query | scattered | broadcast | broadcast / routed | largest shard / mean |"]
    lines.append("| --- " * 8 + "|")
    for row in rows:
        figures = " | ".join(f"{row[name]:,.0f}" for name in ("routed", "scattered", "broadcast"))
        ratios = f"{row['broadcast / routed']:.1f} | {row['largest shard / mean']:.2f}"
        lines.append(f"| {row['probes']} | {row['recall']:.3f} | {row['shards']} | {figures} | {ratios} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
