"""What KubeRay does with a RayJob, as far as anybody outside can see: status, pods, the submitter's log, new attempts, the end."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.cluster.kubernetes.api_server import Cluster, Object


@dataclass(frozen=True)
class Attempt:
    """One try: the driver's lines, and how it ends; None goes on until the run is deleted, and then says ``last``."""

    lines: Sequence[str]
    status: str | None = "SUCCEEDED"
    message: str = ""
    last: str = ""


class Operator:
    """Takes up every RayJob of the cluster's namespace and goes through its attempts."""

    def __init__(self, cluster: Cluster, attempts: Sequence[Attempt]) -> None:
        self.cluster, self.attempts = cluster, attempts
        self.stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.stopped.set()
        self._thread.join(20)

    def _work(self) -> None:
        with contextlib.suppress(InterruptedError):
            name = self._until(self._new)
            for number, attempt in enumerate(self.attempts):
                if not self._attempt(name, attempt, number):
                    return

    def _new(self) -> str | None:
        with self.cluster.lock:
            names = [name for (resource, _, name) in self.cluster.objects if resource == "rayjobs"]
        return names[0] if names else None

    def _until(self, question: object) -> str:
        while True:
            if answer := question():  # type: ignore[operator]
                return str(answer)
            if self.stopped.wait(0.01):
                raise InterruptedError

    def _attempt(self, name: str, attempt: Attempt, number: int) -> bool:
        """Whether another one follows."""
        cluster, pod = self.cluster, f"{name}-submitter-{number}"
        cluster.status(name, jobDeploymentStatus="Initializing", jobStatus="", rayClusterName=f"{name}-c{number}", failed=number)
        self.stopped.wait(0.05)
        cluster.submitter(name, pod, f"job-{number}", running=False)
        cluster.status(name, jobDeploymentStatus="Running", jobStatus="PENDING")
        cluster.start(pod)
        cluster.status(name, jobStatus="RUNNING")
        log = cluster.logs[pod]
        log.write("2026-11-23 07:00:01,123\tSUCC cli.py:67 -- Job 'x' submitted successfully", *attempt.lines)
        if attempt.status is None:
            self._until(lambda: self._rayjob(name)["metadata"].get("deletionTimestamp"))
            log.write(attempt.last)
            cluster.exit(pod, 143)
            self.stopped.wait(0.2)
            cluster.remove("pods", pod)
            cluster.remove("rayjobs", name)
            return False
        failed = attempt.status == "FAILED"
        cluster.exit(pod, int(failed))
        self.stopped.wait(0.2)
        if failed and number + 1 < len(self.attempts):
            cluster.status(name, jobDeploymentStatus="Retrying", jobStatus="FAILED", reason="AppFailed", failed=number + 1)
            cluster.remove("pods", pod)
            cluster.status(name, jobDeploymentStatus="", reason="")
            return True
        ended = (
            {"jobDeploymentStatus": "Failed", "reason": "AppFailed", "failed": number + 1}
            if failed
            else {"jobDeploymentStatus": "Complete"}
        )
        cluster.status(name, jobStatus=attempt.status, message=attempt.message, **ended)
        return False

    def _rayjob(self, name: str) -> Object:
        found = self.cluster.get("rayjobs", name)
        if found is None:
            raise InterruptedError
        return found


@contextlib.contextmanager
def operating(cluster: Cluster, *attempts: Attempt) -> Iterator[Operator]:
    """An operator that goes through these attempts."""
    operator = Operator(cluster, attempts)
    operator.start()
    try:
        yield operator
    finally:
        operator.stop()
