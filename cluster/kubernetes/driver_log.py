"""The driver's log, read from the pod that KubeRay lets hand the job to Ray and follow it there, over all attempts."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from cluster.kubernetes.api import Api, Refused, path_of
from cluster.kubernetes.phase import attempt_of, phase_of
from cluster.kubernetes.pod_log import PodLog
from cluster.kubernetes.refusal import line_of

POLL_SECONDS = 2.0
OUTAGE_SECONDS = 600.0
"""How long the API server may be away before the log is given up."""
ENDED_POLLS = 5
"""Looks at a run that has ended until its log, still open, is given up."""
JOB_LABEL = "batch.kubernetes.io/job-name"
_SUBMITTER = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\s+(INFO|SUCC)\s+cli\.py:\d+ -- ")
"""What ``ray job submit`` and ``ray job logs`` say themselves."""
_PASSING = (400, 404, 429, 500, 502, 503, 504)

Object = dict[str, Any]
AnswerT = TypeVar("AnswerT")


class DriverLog:
    """Lines of a run's driver.

    KubeRay's submitter is a Job of the RayJob's name; its pod runs ``ray job submit`` and ``ray job logs --follow``. When that pod fails,
    the Job makes another, which gives the driver's log from its first line again: those lines are left out. A new attempt is a new
    Job, whose log begins anew.

    Args:
        api: the API server.
        namespace: the run's namespace.
        name: the run's name.
        rayjob: gives the RayJob, or None when there is none any more.
    """

    def __init__(self, api: Api, namespace: str, name: str, rayjob: Callable[[], Object | None]) -> None:
        self._api, self._namespace, self._name, self._rayjob = api, namespace, name, rayjob
        self._given = 0  # the driver's lines of this attempt

    def lines(self) -> Iterator[str]:
        """Lines, until the run has ended.

        Raises:
            ConnectionError: the API server has been away for long, or refuses.
        """
        read, job, attempt = set[str](), "", 0
        while True:
            rayjob, pods = self._asked(self._rayjob), self._asked(self._pods)
            pod = next((each for each in pods if each["metadata"]["uid"] not in read), None)
            if pod is not None:
                owner = str((pod["metadata"].get("ownerReferences") or [{}])[0].get("uid") or pod["metadata"]["uid"])
                if owner != job:
                    job, self._given = owner, 0
                    attempt = attempt_of(rayjob) if rayjob is not None else attempt + 1
                    if attempt > 1:
                        yield f"attempt {attempt}"
                read.add(pod["metadata"]["uid"])
                yield from self._of(pod)
            elif rayjob is None or phase_of(rayjob).ended:
                if not read:
                    yield f"facemae: the log of {self._name} is gone: its pod was cleared away before anybody followed it"
                return
            else:
                time.sleep(POLL_SECONDS)

    def _of(self, pod: Object) -> Iterator[str]:
        """The driver's lines from one submitter pod, of them those that an earlier pod did not give."""
        name, container = pod["metadata"]["name"], pod["spec"]["containers"][0]["name"]  # the first one is the submitter, says KubeRay
        log, seen, ended_polls = PodLog(self._api, self._namespace, name, container), _Position(), 0
        while True:
            whole = False
            try:
                yield from self._new(log.follow(), seen)
                whole = True
            except Refused as refused:
                if refused.status not in _PASSING:
                    raise
            except ConnectionError:
                pass  # asked below whether the server answers at all
            current = self._asked(lambda: self._pod(name, pod["metadata"]["uid"]))
            if current is None:
                if not whole:
                    yield f"facemae: the log breaks off here: its pod {name} is gone"
                return
            if _terminated(current):
                yield from self._end(log, seen)
                return
            rayjob = self._asked(self._rayjob)
            if rayjob is None or phase_of(rayjob).ended:
                ended_polls += 1
                if ended_polls > ENDED_POLLS:
                    yield f"facemae: the log breaks off here: the run has ended, and its pod {name} has not"
                    return
            time.sleep(POLL_SECONDS)

    def _end(self, log: PodLog, seen: _Position) -> Iterator[str]:
        """What an ended pod has left to say."""
        try:
            yield from self._new(log.rest(), seen)
        except ConnectionError as error:
            yield f"facemae: the log breaks off here: {line_of(error)}"
        else:
            if log.unreadable:
                yield f"facemae: the log breaks off here: {line_of(log.unreadable)}"

    def _new(self, lines: Iterator[str], seen: _Position) -> Iterator[str]:
        for line in lines:
            if _SUBMITTER.match(line):
                continue
            seen.lines += 1
            if seen.lines > self._given:
                self._given = seen.lines
                yield line

    def _asked(self, question: Callable[[], AnswerT]) -> AnswerT:
        """An answer, waited for while the server is away."""
        since = time.monotonic()
        while True:
            try:
                return question()
            except ConnectionError as error:
                refused = isinstance(error, Refused) and error.status not in _PASSING
                if refused or time.monotonic() - since > OUTAGE_SECONDS:
                    raise
            time.sleep(POLL_SECONDS)

    def _pods(self) -> list[Object]:
        """The submitter's pods that are not on their way out, the oldest first."""
        pods = self._api.items(path_of("pods", self._namespace), labelSelector=f"{JOB_LABEL}={self._name}")
        pods = [pod for pod in pods if not pod["metadata"].get("deletionTimestamp")]
        return sorted(pods, key=lambda pod: (pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]))

    def _pod(self, name: str, uid: str) -> Object | None:
        try:
            pod = self._api.get(path_of("pods", self._namespace, name))
        except Refused as refused:
            if refused.status != 404:
                raise
            return None
        return pod if pod["metadata"]["uid"] == uid else None


class _Position:
    """How many of the driver's lines a pod has given."""

    lines = 0


def _terminated(pod: Object) -> bool:
    status, container = pod.get("status") or {}, pod["spec"]["containers"][0]["name"]
    if status.get("phase") in ("Succeeded", "Failed"):
        return True
    states = (each.get("state") or {} for each in status.get("containerStatuses") or [] if each.get("name") == container)
    return any("terminated" in state for state in states)
