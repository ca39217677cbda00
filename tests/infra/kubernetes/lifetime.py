"""How a pod is watched and ended: probes, hooks, and the time that is granted."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.infra.kubernetes.pod import Pod
from tests.infra.kubernetes.problem import Found, Object

GRACE = 30
"""Seconds that Kubernetes grants where nothing is said."""

_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
_HANDLERS = ("exec", "httpGet", "tcpSocket", "grpc", "sleep")
_LEAST = {"initialDelaySeconds": 0, "timeoutSeconds": 1, "periodSeconds": 1, "successThreshold": 1, "failureThreshold": 1}
_DEFAULT = {"timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1}
_DRAIN = re.compile(r"--grace[\s=]+(\d+(?:\.\d+)?)")
_SLEEP = re.compile(r"\bsleep\s+(\d+)")


def check(pod: Pod) -> Found:
    """Probes and hooks of all containers of a pod."""
    grace = pod.spec.get("terminationGracePeriodSeconds", GRACE)
    if not isinstance(grace, int) or grace < 0:
        yield f"{pod.spec_path}.terminationGracePeriodSeconds", f"{grace!r} is no number of seconds"
        return
    for where, container in pod.containers():
        for name in _PROBES:
            if isinstance(probe := container.get(name), dict):
                yield from _probe(f"{where}.{name}", name, probe, container, grace)
        for name, handler in (container.get("lifecycle") or {}).items():
            if not isinstance(handler, dict):
                continue
            yield from _handler(f"{where}.lifecycle.{name}", handler, container)
            if name == "preStop":
                yield from _pre_stop(f"{where}.lifecycle.preStop", handler, grace)


def _handler(path: str, handler: Object, container: Object) -> Found:
    found = [key for key in _HANDLERS if key in handler]
    if len(found) != 1:
        yield path, f"must have one of {', '.join(_HANDLERS)}, has {len(found)}"
    named = {port.get("name") for port in container.get("ports") or ()} | {"metrics"}
    for key in ("httpGet", "tcpSocket", "grpc"):
        port = (handler.get(key) or {}).get("port")
        if isinstance(port, str) and port not in named:
            yield f"{path}.{key}.port", f"the container has no port {port!r}"
        if isinstance(port, int) and not 0 < port < 65536:
            yield f"{path}.{key}.port", f"{port} is no port: 1 to 65535"
    if "exec" in handler and not (handler["exec"] or {}).get("command"):
        yield f"{path}.exec.command", "is empty"


def _probe(path: str, name: str, probe: Object, container: Object, grace: int) -> Found:
    yield from _handler(path, probe, container)
    for key, least in _LEAST.items():
        if key in probe and not (isinstance(probe[key], int) and probe[key] >= least):
            yield f"{path}.{key}", f"{probe[key]!r} is below {least}"
            return
    seen = _DEFAULT | probe
    if name != "readinessProbe" and seen["successThreshold"] != 1:
        yield f"{path}.successThreshold", "must be 1"
    if seen["timeoutSeconds"] > seen["periodSeconds"]:
        yield f"{path}.timeoutSeconds", f"{seen['timeoutSeconds']} s is longer than the period, {seen['periodSeconds']} s"
    if "terminationGracePeriodSeconds" in probe:
        if name == "readinessProbe":
            yield f"{path}.terminationGracePeriodSeconds", "not for a readiness probe"
        elif not 0 < probe["terminationGracePeriodSeconds"] <= grace:
            yield f"{path}.terminationGracePeriodSeconds", f"exceeds the pod's, {grace} s"


def _pre_stop(path: str, handler: Object, grace: int) -> Found:
    for what, seconds in _waits(handler):
        if seconds >= grace:
            yield path, f"{what} may take {seconds:g} s, terminationGracePeriodSeconds grants {grace} s: it must be longer"


def _waits(handler: Object) -> Iterator[tuple[str, float]]:
    yield "sleep", float((handler.get("sleep") or {}).get("seconds", 0))
    command = " ".join(map(str, (handler.get("exec") or {}).get("command") or ()))
    for shape, what in ((_DRAIN, "--grace"), (_SLEEP, "sleep")):
        yield from ((what, float(found)) for found in shape.findall(command))
