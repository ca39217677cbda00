"""``facemae cancel``: stops a submitted run, and waits until it has."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import tyro

from cluster.submitted import Phase, RunState, SubmittedRun
from jobs.command import Config, UsageError, main_of

POLL_SECONDS = 2.0
ENDED = {Phase.SUCCEEDED: "had already succeeded", Phase.FAILED: "had already failed", Phase.STOPPED: "was already stopped"}


@dataclass(frozen=True, kw_only=True)
class CancelConfig(Config):
    """Stop a submitted run. Its driver hands back what is in hand; what is committed stays, and the same job submitted again goes on.

    Waits until the run has ended. Exit code 0 when it has, whether it was stopped now or had ended before; 2 when it has not in time.
    Next: facemae status ROOT, facemae submit.
    """

    takes_file: ClassVar[bool] = False

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """Of the run, as facemae submit printed it."""
    to: str
    """Where it runs: kubernetes, http(s)://HOST:8265 or ray://HOST:10001."""
    namespace: str | None = None
    """On Kubernetes: its namespace, by default facemae."""
    context: str | None = None
    """On Kubernetes: a context of the kubeconfig, by default its current one."""
    wait_minutes: float = 15.0
    """How long to wait for the end; the run stops all the same when that is not enough."""

    def __post_init__(self) -> None:
        if isinstance(self.wait_minutes, int | float) and not 0 <= self.wait_minutes < 10_000:
            raise UsageError(f"--wait-minutes {self.wait_minutes}: give 0 or more minutes")


def run(config: CancelConfig) -> dict[str, Any]:
    """Stop the run and wait.

    Raises:
        UsageError: there is no such run.
        ConnectionError: it cannot be asked, or has not ended in time.
    """
    submitted = submitted_run(config.name, config.to, namespace=config.namespace, context=config.context)
    try:
        before = submitted.state()
        if before.phase.ended:
            print(f"{config.name} {ENDED[before.phase]}{_why(before)}: nothing to stop")
            return {}
        submitted.cancel()
        print(f"{config.name} is asked to stop: its workers finish what is in their hands", flush=True)
        after = _wait(submitted, 60 * config.wait_minutes)
    except LookupError as error:
        raise UsageError(str(error.args[0] if error.args else error)) from None
    if after.phase is Phase.STOPPED:
        print(f"{config.name} is stopped; what is committed stays")
    else:  # it came to its own end before the stop reached it
        print(f"{config.name} {after.phase}{_why(after)} before the stop reached it")
    return {}


def submitted_run(name: str, to: str, *, namespace: str | None = None, context: str | None = None) -> SubmittedRun:
    """The run of that name. Raises UsageError, ConnectionError."""
    if to == "kubernetes":
        from cluster.kubernetes.run import KubernetesRun

        return KubernetesRun(name, namespace=namespace or "facemae", context=context)
    from cluster.job_api import RayJobRun

    if namespace is not None or context is not None:
        raise UsageError("--namespace and --context are for --to kubernetes: leave them out")
    return RayJobRun(to, name)


def _wait(submitted: SubmittedRun, seconds: float) -> RunState:
    """The state in which it ended. Raises ConnectionError when it has not in time."""
    deadline, told = time.monotonic() + seconds, ""
    while True:
        try:
            state = submitted.state()
        except LookupError:  # a RayJob is deleted to stop it, where it cannot be suspended
            return RunState(Phase.STOPPED)
        if state.phase.ended:
            return state
        if time.monotonic() >= deadline:
            raise ConnectionError(
                f"{submitted.name} has not stopped in {seconds / 60:g} minutes ({state.phase}{_why(state)}): it was asked to, and stops "
                "when its workers have finished what is in their hands; run the same command again to wait longer"
            )
        if state.message and state.message != told:
            told = state.message
            print(f"  {told}", flush=True)
        time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))


def _why(state: RunState) -> str:
    return f" ({state.message})" if state.message else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(CancelConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
