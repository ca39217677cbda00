"""One run of the sleeping job on a cluster, watched through the marks that its workers leave."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.dataset import Dataset
from cluster.verify import verify
from tests.faults.nodes import Cluster

END_SECONDS = 400


@dataclass
class Run:
    """A job under way. ``folder`` holds its output, and its diary."""

    cluster: Cluster
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def root(self) -> str:
        """The output."""
        return str(self.folder / "out")

    def begin(self, **options: Any) -> Run:
        """Start its driver; once more for another attempt."""
        (self.folder / "diary").mkdir(parents=True, exist_ok=True)
        places = ["--address", self.cluster.address, "--output", self.root, "--diary", str(self.folder / "diary")]
        flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        self.processes.append(self.cluster.run(["-m", "tests.nodes.sleep_job", *places, *flags]))
        return self

    def marks(self) -> list[tuple[str, str]]:
        """Unit and node of everything that was computed so far."""
        names = sorted(path.name for path in (self.folder / "diary").iterdir())
        return [(name.split("-")[0], name.split("-")[1]) for name in names]

    def by_node(self) -> Counter[str]:
        """How many units each node computed."""
        return Counter(node for _, node in self.marks())

    def until(self, condition: Callable[[], Any], seconds: float = END_SECONDS) -> None:
        """Wait for something while the driver lives."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.processes[-1].poll() is None, self.log()
            assert time.monotonic() < deadline, f"it did not come to that:\n{self.log()}"
            time.sleep(0.05)

    def end(self, code: int = 0) -> dict[str, Any]:
        """Wait for the driver. Returns what it printed."""
        assert self.processes[-1].wait(END_SECONDS) == code, self.log()
        lines = [line for line in self.log().splitlines() if line.startswith("{")]
        return json.loads(lines[-1]) if lines else {}

    def log(self) -> str:
        """What the last driver has printed so far."""
        return self.cluster.log_of(self.processes[-1])

    def bytes_of_all(self) -> dict[str, str | None]:
        """The digest of every shard."""
        return {manifest.shard: manifest.sha256 for manifest in Dataset(self.root).manifests()}

    def require(self, units: int, undisturbed: dict[str, str | None]) -> None:
        """Every unit once, none charged, none given up, the same bytes as ever."""
        assert verify(self.root).ok
        assert len(undisturbed) == units
        assert self.bytes_of_all() == undisturbed
        for process in self.processes:
            log = self.cluster.log_of(process)
            assert "failed (1 of" not in log, log


def drain(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m cluster.drain`` with the cluster's token."""
    command = [*cluster.enter(cluster.ip), sys.executable, "-m", "cluster.drain", *arguments]
    return subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=END_SECONDS)
