"""Partial FC beside the full softmax of plain torch: time of a step and memory, by number of classes, in one run.

    python -m benchmarks.partial_fc [--classes 100000 1000000 2000000] [--batch 64 --dim 512] [--ranks 1] [--output benchmarks/out]

*Full* is what one would write: a Parameter, normalised, F.cross_entropy over scaled cosines with the CosFace margin, torch.optim.SGD.
*Partial* is ours. A step is forward, backward and update; the time is the median of the steps after the first, by the clock and in the
processor's seconds, which other work on the machine disturbs less: on the CPU the ratios are those. Each method runs in a process of its
own, one after another. Memory is the most that the process held (on CUDA: that torch allocated) above what it held before
the head was made. *Floor* is what the centres and their momentum take, which no rate makes less; what a step adds is the rest. With
several ranks (gloo, on the CPU) ours is split over as many processes: the time is the slowest's, memory the largest's; full has one.
What would take more memory than --memory is skipped, and said.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from benchmarks.machine import ROOT, machine
from benchmarks.memory import peak_bytes
from facemae.recognizer.margin import CosFace
from facemae.recognizer.partial_fc import PartialFC

Step = Callable[[torch.Tensor, torch.Tensor, int], None]
Row = dict[str, Any]
FLOAT = 4
LR = 0.1


def main() -> None:
    """Measure each method at each size, print the table, write the JSON and the Markdown."""
    options = _options()
    if options.method is not None:
        print(json.dumps(measure(options)))
        return
    rows = list[Row]()
    for num_classes in options.classes:
        rows += _side_by_side(num_classes, options)
        _write(rows, options)  # after each size: the largest may be stopped
    print(table(rows))


def _write(rows: list[Row], options: argparse.Namespace) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "command": " ".join(["python -m benchmarks.partial_fc", *sys.argv[1:]])}
    content |= {"threads": torch.get_num_threads(), "device": options.device, "batch": options.batch, "dim": options.dim}
    content |= {"ranks": options.ranks, "rows": rows}
    (options.output / "partial_fc.json").write_text(json.dumps(content, indent=1) + "\n")
    (options.output / "partial_fc.md").write_text(table(rows) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[100_000, 1_000_000, 2_000_000])
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.2, 0.1])
    parser.add_argument("--batch", type=int, default=64, help="of all ranks together")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=1, help="processes that ours is split over, on the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", type=float, help="GB that all processes of a method may take; 60 %% of what is free by default")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "out")
    parser.add_argument("--method", type=float, help=argparse.SUPPRESS)  # in a child: the rate, 0 for full
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ranks > 1 and options.device != "cpu":
        parser.error("--ranks is for the CPU: one process uses one GPU here")
    return options


def _side_by_side(num_classes: int, options: argparse.Namespace) -> list[Row]:
    """The rows of one size; ratios are to full, or to ours at rate 1 where full did not fit."""
    rows = []
    for rate in (0.0, *options.rates):
        row: Row = {"classes": num_classes, "method": f"partial, rate {rate:g}" if rate else "full"}
        needed, allowed = estimate(num_classes, rate, options) / 1e9, options.memory or 0.6 * _free(options.device) / 1e9
        if needed > allowed:
            row["skipped"] = f"would take about {needed:.1f} GB, {allowed:.1f} GB may be used"
            print(f"{num_classes:,} classes, {row['method']}: {row['skipped']}", flush=True)
        else:
            row |= _run(num_classes, rate, options)
            print(f"{num_classes:,} classes, {row['method']}: {row['seconds']:.3f} s, {row['bytes'] / 1e9:.2f} GB", flush=True)
        rows.append(row)
    base = next((row for row in rows if "skipped" not in row), None)
    for row in rows:
        if base is not None and "skipped" not in row:
            row["to"] = base["method"]
            clock = "processor" if options.device == "cpu" else "seconds"
            row["time ratio"], row["bytes ratio"] = row[clock] / base[clock], row["bytes"] / base["bytes"]
    return rows


def estimate(num_classes: int, rate: float, options: argparse.Namespace) -> float:
    """Bytes at the peak. Full (rate 0) was seen to take eight times its weight (gradient, momentum, and what autograd and SGD copy)."""
    per_class, logits = options.dim * FLOAT, options.batch * FLOAT
    return num_classes * ((8 * per_class + 4 * logits) if rate == 0 else (2 * per_class + rate * logits))


def _free(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def _run(num_classes: int, rate: float, options: argparse.Namespace) -> Row:
    """One method in processes of its own: the slowest's time and the largest's memory."""
    ranks = options.ranks if rate else 1
    command = [
        sys.executable,
        "-m",
        "benchmarks.partial_fc",
        "--method",
        str(rate),
        "--classes",
        str(num_classes),
        "--device",
        options.device,
    ]
    for name in ("batch", "dim", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    with tempfile.TemporaryDirectory() as folder:
        if ranks > 1:
            command += ["--rendezvous", f"file://{folder}/group", "--ranks", str(ranks)]
        children = [subprocess.Popen([*command, "--rank", str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for rank in range(ranks)]
        answers = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"{' '.join(command)} ended with {[child.returncode for child in children]}: see its error above")
    found = [json.loads(answer.splitlines()[-1]) for answer in answers]
    return {name: max(row[name] for row in found) for name in ("seconds", "processor", "bytes", "floor")} | {"load": os.getloadavg()[0]}


def measure(options: argparse.Namespace) -> Row:
    """In a child: the median seconds of a step and the bytes of one rank."""
    (num_classes,) = options.classes
    if options.rendezvous:
        dist.init_process_group("gloo", init_method=options.rendezvous, rank=options.rank, world_size=options.ranks)
    device, generator = torch.device(options.device), torch.Generator().manual_seed(0)
    full_step(2, 4, device)(
        torch.randn(2, 2, device=device).requires_grad_(), torch.zeros(2, dtype=torch.int64, device=device), 0
    )  # loads code
    before = _begin(device)
    head = partial_step(options.dim, num_classes, options.method, device) if options.method else full_step(options.dim, num_classes, device)
    seconds, processor = list[float](), list[float]()
    for number in range(options.steps):
        embeddings, labels = torch.randn(options.batch, options.dim, generator=generator), torch.randint(num_classes, (options.batch,))
        mine = slice(options.rank * options.batch // options.ranks, (options.rank + 1) * options.batch // options.ranks)
        rows, labels = embeddings[mine].to(device).requires_grad_(), labels[mine].to(device)
        _wait(device)
        started, worked = time.perf_counter(), time.process_time()
        head(rows, labels, number)
        _wait(device)
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - worked)
    found = {"seconds": statistics.median(seconds[1:]), "processor": statistics.median(processor[1:])}
    found |= {"bytes": _peak(device) - before, "floor": 2 * num_classes * options.dim * FLOAT}
    if options.rendezvous:
        dist.barrier()
        found["floor"] //= options.ranks
    return found


def full_step(dim: int, num_classes: int, device: torch.device, margin: float = 0.4, scale: float = 64.0) -> Step:
    """Forward, backward and update of the full softmax with the CosFace margin, in plain torch."""
    weight = nn.Parameter(torch.empty(num_classes, dim, device=device).normal_(std=0.01))
    optimizer = torch.optim.SGD([weight], lr=LR, momentum=0.9, weight_decay=5e-4)

    def step(embeddings: torch.Tensor, labels: torch.Tensor, number: int) -> None:
        logits = functional.linear(functional.normalize(embeddings), functional.normalize(weight))
        logits[torch.arange(len(labels), device=device), labels] -= margin
        loss = functional.cross_entropy(scale * logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def partial_step(dim: int, num_classes: int, rate: float, device: torch.device) -> Step:
    """Forward, backward and update of ours."""
    head = PartialFC(dim, num_classes, CosFace(), rate).to(device)

    def step(embeddings: torch.Tensor, labels: torch.Tensor, number: int) -> None:
        head(embeddings, labels, number).backward()
        head.update(LR)

    return step


def _begin(device: torch.device) -> int:
    """Set the peak back to what is held now, and return that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_bytes(os.getpid())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(rows: list[Row]) -> str:
    """Markdown, a line for each method and size."""
    lines = ["| classes | method | s/step | CPU s/step | of | memory GB | of | floor GB | a step adds GB |", "|" + " --- |" * 9]
    for row in rows:
        start = f"| {row['classes']:,} | {row['method']} | "
        if "skipped" in row:
            lines.append(f"{start}skipped: {row['skipped']} | | | | | | |")
            continue
        taken, floor = row["bytes"] / 1e9, row["floor"] / 1e9
        ratios = [f"{row[name]:.2f} x {row['to']}" for name in ("time ratio", "bytes ratio")]
        times = f"{row['seconds']:.3f} | {row['processor']:.3f}"
        lines.append(f"{start}{times} | {ratios[0]} | {taken:.2f} | {ratios[1]} | {floor:.2f} | {taken - floor:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
