"""Ours beside what one would use instead, on the same embeddings, at the same recall, with equal threads: one run, one table.

    python -m benchmarks.index [--images 200000 --dim 512 --queries 20000] [--autofaiss-python VENV/bin/python] [--output benchmarks/out]

Each method runs in a process of its own (benchmarks/index_methods.py). They are built one after another and then search all queries in
turns, round by round; a ratio is the median of the rounds' ratios. `exact` gives the truth; it and `ours exact`, which are compared with
each other, run once. Queries are images of the gallery's people that were held out; recall@1 is the share of queries whose nearest, by
exact search, is found first. Memory is what the kernel counted at its highest (VmHWM), of the largest process and of all that the method
started; ours counts the workers that build the index and Ray's own processes too. autofaiss needs faiss-cpu and numpy of its own:

    python -m venv VENV && VENV/bin/pip install autofaiss "pyarrow<22" "setuptools<81"
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.embedded import WITHIN, HeldOut, write_shards
from benchmarks.index_methods import Options
from benchmarks.machine import ROOT, machine
from benchmarks.memory import PeakMemory

EXACT = ("exact", "ours exact")
APPROXIMATE = ("ours", "ivfflat", "big_batch", "autofaiss")


@dataclass
class Row:
    """What one method did.

    Attributes:
        build, tune: seconds; ``searches``: seconds of each round.
        recall: recall@1 over all queries. ``setting``: what it chose.
        largest, total: bytes at the peak, of its largest process and of all; ``processes``: of each kind.
    """

    build: float
    tune: float
    setting: str
    searches: list[float] = field(default_factory=list)
    recall: float = 0.0
    largest: int = 0
    total: int = 0
    processes: dict[str, list[int]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The median round."""
        return statistics.median(self.searches)


class Child:
    """A method's process, and the watch on its memory."""

    def __init__(self, name: str, python: str, folder: Path, options: Options) -> None:
        command = [python, "-m", "benchmarks.index_methods", name, str(folder), json.dumps(asdict(options))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(1 if name.startswith("ours") else options.threads), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.memory = PeakMemory(self.process.pid).__enter__()
        self.row = Row(**self._answer(name))

    def search(self) -> None:
        """One round."""
        assert self.process.stdin is not None
        self.process.stdin.write("search\n")
        self.process.stdin.flush()
        answer = self._answer("search")
        self.row.searches.append(answer["search"])
        self.row.recall = answer["recall"]

    def close(self) -> None:
        """Read the peaks, end the process."""
        peaks = self.memory.phase()
        self.row.largest, self.row.total, self.row.processes = peaks.largest[1], peaks.total, peaks.by_name()
        self.memory.__exit__(None, None, None)
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self, what: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return dict(json.loads(line.removeprefix("RESULT ")))
        raise SystemExit(f"{what}: its process ended with {self.process.wait()}; what it said is above")


def main() -> None:
    """Measure, print the table, write the JSON and the Markdown."""
    arguments = _arguments()
    options = Options(threads=arguments.threads, recall=arguments.recall, cells=arguments.cells)
    with _folder(arguments.folder) as folder:
        _make(folder, HeldOut.make(arguments.images, arguments.queries, arguments.dim, arguments.within))
        rows = _measure(folder, options, arguments.autofaiss_python, arguments.rounds)
    text = table(rows, arguments.queries)
    print(text)
    arguments.output.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "command": " ".join(["python -m benchmarks.index", *sys.argv[1:]]), "rows": _json(rows)}
    (arguments.output / "index.json").write_text(json.dumps(content, indent=1) + "\n")
    (arguments.output / "index.md").write_text(text + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--within", type=float, default=WITHIN, help="mean cosine of two images of a person: how hard the search is")
    parser.add_argument("--recall", type=float, default=0.99)
    parser.add_argument("--cells", type=int, default=0, help="of ours and of FAISS's; 0: as each has it by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--autofaiss-python", help="python of an environment with autofaiss; without it, it is left out")
    parser.add_argument("--folder", type=Path, help="where the embeddings go, 3 KB an image; a temporary folder by default")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "out")
    return parser.parse_args()


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    if given:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def _make(folder: Path, made: HeldOut) -> None:
    """The gallery as .npy and as a data set, and the queries."""
    np.save(folder / "gallery.npy", np.concatenate(made.gallery))
    np.save(folder / "queries.npy", made.queries)
    write_shards(str(folder / "shards"), made.gallery)


def _measure(folder: Path, options: Options, autofaiss: str | None, rounds: int) -> dict[str, Row]:
    """The exact ones once, then all others in turns; the order turns round with the rounds."""
    alone = {name: _alone(name, folder, options) for name in EXACT}
    names = [name for name in APPROXIMATE if name != "autofaiss" or autofaiss]
    if not autofaiss:
        print("autofaiss: left out, no --autofaiss-python given (see --help)")
    children: dict[str, Child] = {}
    with ExitStack() as stack:
        for name in names:
            children[name] = Child(name, (autofaiss or "") if name == "autofaiss" else sys.executable, folder, options)
            stack.callback(children[name].close)
            print(f"built {name}: {children[name].row.build:.1f} s, {children[name].row.setting}", flush=True)
        for number in range(rounds):
            for name in names if number % 2 == 0 else names[::-1]:
                children[name].search()
    return {**{name: child.row for name, child in children.items()}, **alone}


def _alone(name: str, folder: Path, options: Options) -> Row:
    child = Child(name, sys.executable, folder, options)
    child.search()
    child.close()
    return child.row


def ratios(rows: dict[str, Row], name: str) -> dict[str, float]:
    """Ours over the peer: queries/s (more is better), build seconds and memory of the largest process (less is better)."""
    ours, peer = rows["ours exact" if name in EXACT else "ours"], rows[name]
    return {
        "queries/s": statistics.median(theirs / mine for theirs, mine in zip(peer.searches, ours.searches, strict=True)),
        "build": ours.build / peer.build if peer.build > 0.01 else float("nan"),
        "largest process": ours.largest / peer.largest,
    }


def table(rows: dict[str, Row], queries: int) -> str:
    """The rows and the ratios as Markdown."""
    lines = [
        "| method | what it chose | build s | queries/s | recall@1 | largest process MB | all processes MB | ours / it: queries/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        ratio = "" if name.startswith("ours") else f"{ratios(rows, name)['queries/s']:.2f}"
        figures = f"{row.build:.1f} | {queries / row.seconds:,.0f} | {row.recall:.4f} | {row.largest / 1e6:,.0f} | {row.total / 1e6:,.0f}"
        lines.append(f"| {name} | {row.setting} | {figures} | {ratio} |")
    return "\n".join(lines)


def _json(rows: dict[str, Row]) -> dict[str, Any]:
    return {name: {**asdict(row), **({} if name.startswith("ours") else {"ours / it": ratios(rows, name)})} for name, row in rows.items()}


if __name__ == "__main__":
    main()
