"""How a RayJob stands, from what KubeRay writes into its status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.kubernetes.refusal import line_of
from cluster.submitted import Phase

_PHASES = {
    "Running": Phase.RUNNING,
    "Suspending": Phase.RUNNING,
    "Failed": Phase.FAILED,
    "ValidationFailed": Phase.FAILED,
}
"""Of ``jobDeploymentStatus``; whatever else there is waits for something."""
_COMPLETE = {"SUCCEEDED": Phase.SUCCEEDED, "STOPPED": Phase.STOPPED, "FAILED": Phase.FAILED}
_WAITS = {
    "": "KubeRay has not taken it up yet",
    "Initializing": "its machines are being started",
    "Waiting": "KubeRay waits for a job id",
    "Retrying": "the attempt failed, its machines are cleared away for the next one",
    "Suspended": "it is suspended (spec.suspend): a queue holds it back, or somebody did",
    "Suspending": "it is being suspended: its machines are cleared away",
    "Scheduling": "it waits for its place in a queue",
    "Scheduled": "it waits for its place in a queue",
}
_FAILURES = {
    "DeadlineExceeded": "it took longer than activeDeadlineSeconds",
    "PreRunningDeadlineExceeded": "its machines were not there within preRunningDeadlineSeconds",
    "JobDeploymentStatusTransitionGracePeriodExceeded": "Ray's job ended and its submitter did not",
    "SubmissionFailed": "the pod that hands the job to Ray failed",
    "ValidationFailed": "KubeRay refuses the RayJob",
    "AppFailed": "the driver ended with an error",
}


def phase_of(rayjob: Mapping[str, Any]) -> Phase:
    """Where a RayJob stands. One that is being deleted has not ended before it is gone."""
    status = _status(rayjob)
    deployment = status.get("jobDeploymentStatus") or ""
    if deployment == "Complete":
        return _COMPLETE.get(status.get("jobStatus") or "", Phase.SUCCEEDED)
    phase = _PHASES.get(deployment, Phase.WAITING)
    if deployment == "Running" and (status.get("jobStatus") or "PENDING") == "PENDING":
        return Phase.WAITING
    return phase


def attempt_of(rayjob: Mapping[str, Any]) -> int:
    """The number of the try that runs or ran last, from 1."""
    status = _status(rayjob)
    ended = int(status.get("failed") or 0) + int(status.get("succeeded") or 0)
    over = phase_of(rayjob).ended or status.get("jobDeploymentStatus") == "Retrying"
    return max(1, ended if over else ended + 1)


def message_of(rayjob: Mapping[str, Any]) -> str:
    """One line of what it waits for, or why it ended so."""
    status = _status(rayjob)
    deployment, reason, text = (status.get(key) or "" for key in ("jobDeploymentStatus", "reason", "message"))
    if rayjob["metadata"].get("deletionTimestamp"):
        return "it is being stopped: its workers hand back what they hold, then its machines go"
    phase = phase_of(rayjob)
    if phase is Phase.FAILED:
        words = _FAILURES.get(reason, reason or "it failed")
        return f"{words}: {line_of(text)}" if text else words
    if phase is Phase.STOPPED:
        return "the job was stopped in Ray"
    if phase is Phase.WAITING and deployment == "Running":
        return "Ray has not started the driver yet"
    if deployment == "Initializing":
        return f"{_WAITS[deployment]}{_pods(status.get('rayClusterStatus') or {})}"
    if deployment in _WAITS:
        return _WAITS[deployment]
    return line_of(text)


def _pods(cluster: Mapping[str, Any]) -> str:
    """How many of the workers' pods are there, where the cluster begins with any."""
    wanted = int(cluster.get("desiredWorkerReplicas") or 0)
    return f": {int(cluster.get('availableWorkerReplicas') or 0)} of {wanted} pods for workers are there" if wanted else ""


def _status(rayjob: Mapping[str, Any]) -> Mapping[str, Any]:
    return rayjob.get("status") or {}
