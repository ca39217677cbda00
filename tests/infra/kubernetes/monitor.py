"""The Prometheus operator's PodMonitor: the fields that are used here, strictly, and whether it finds what it is to watch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tests.infra.kubernetes.container import selects
from tests.infra.kubernetes.crd import conforms
from tests.infra.kubernetes.pod import Pod
from tests.infra.kubernetes.problem import Found, Object, listed

API_VERSION = "monitoring.coreos.com/v1"
_TEXT: Object = {"type": "string"}
_PARTS = "".join(f"(([0-9]+){unit})?" for unit in ("y", "w", "d", "h", "m", "s", "ms"))
_DURATION: Object = {"type": "string", "pattern": f"^(0|{_PARTS})$"}
_TEXTS: Object = {"type": "array", "items": _TEXT}
_EXPRESSION: Object = {
    "type": "object",
    "required": ["key", "operator"],
    "properties": {"key": _TEXT, "operator": {"type": "string", "enum": ["In", "NotIn", "Exists", "DoesNotExist"]}, "values": _TEXTS},
}
_RELABELING: Object = {
    "type": "object",
    "properties": {
        "sourceLabels": {"type": "array", "items": {"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"}},
        "separator": _TEXT,
        "targetLabel": {"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"},
        "regex": _TEXT,
        "modulus": {"type": "integer", "format": "int64"},
        "replacement": _TEXT,
        "action": {
            "type": "string",
            "enum": ["replace", "keep", "drop", "hashmod", "labelmap", "labeldrop", "labelkeep", "lowercase", "uppercase", "keepequal"],
        },
    },
}
_ENDPOINT: Object = {
    "type": "object",
    "properties": {
        "port": _TEXT,
        "portNumber": {"type": "integer", "format": "int32", "minimum": 1, "maximum": 65535},
        "path": _TEXT,
        "scheme": {"type": "string", "enum": ["http", "https"]},
        "interval": _DURATION,
        "scrapeTimeout": _DURATION,
        "honorLabels": {"type": "boolean"},
        "honorTimestamps": {"type": "boolean"},
        "relabelings": {"type": "array", "items": _RELABELING},
        "metricRelabelings": {"type": "array", "items": _RELABELING},
    },
}
_SPEC: Object = {
    "type": "object",
    "required": ["selector", "podMetricsEndpoints"],
    "properties": {
        "jobLabel": _TEXT,
        "podTargetLabels": _TEXTS,
        "selector": {
            "type": "object",
            "properties": {
                "matchLabels": {"type": "object", "additionalProperties": _TEXT},
                "matchExpressions": {"type": "array", "items": _EXPRESSION},
            },
        },
        "namespaceSelector": {"type": "object", "properties": {"any": {"type": "boolean"}, "matchNames": _TEXTS}},
        "podMetricsEndpoints": {"type": "array", "minItems": 1, "items": _ENDPOINT},
        "sampleLimit": {"type": "integer", "format": "int64"},
    },
}
_SCHEMA: Object = {"type": "object", "required": ["spec"], "properties": {"apiVersion": _TEXT, "kind": _TEXT, "spec": _SPEC}}
_POD_LABEL = "__meta_kubernetes_pod_label_"


def check(thing: Object) -> Found:
    """What its definition would refuse, or drop."""
    yield from conforms(_SCHEMA, {key: value for key, value in thing.items() if key != "metadata"}, "")
    for path, endpoint in listed(thing.get("spec") or {}, "podMetricsEndpoints", "spec"):
        if ("port" in endpoint) == ("portNumber" in endpoint):
            yield path, "must have port or portNumber"


def watches(monitor: Object, pods: Sequence[Pod]) -> Found:
    """What keeps a monitor from watching these pods, each of them."""
    spec = monitor["spec"]
    for pod in pods:
        if not selects(spec["selector"], pod.labels):
            yield "spec.selector", f"does not select {pod.role}"
        ports = {port.get("name") for _, container in pod.containers() for port in container.get("ports") or ()}
        known = {_POD_LABEL + re.sub(r"[^a-zA-Z0-9_]", "_", label) for label in pod.labels}
        for path, endpoint in listed(spec, "podMetricsEndpoints", "spec"):
            if "port" in endpoint and endpoint["port"] not in ports:
                yield f"{path}.port", f"{pod.role} has no port {endpoint['port']!r}"
            for place, relabeling in listed(endpoint, "relabelings", path):
                for label in relabeling.get("sourceLabels") or ():
                    if label.startswith(_POD_LABEL) and label not in known:
                        yield f"{place}.sourceLabels", f"{pod.role} has no label for {label}"
