"""Fields that take one of few words, which Kubernetes' schema lists in prose only; and other kinds' own rules."""

from __future__ import annotations

import ipaddress
import re

from tests.infra.kubernetes.problem import Found, Object, join, listed, walk
from tests.infra.kubernetes.quantity import quantity

ACCESS_MODES = ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
_PULL = ("Always", "IfNotPresent", "Never")
_RESTART = ("Always", "OnFailure", "Never")
_WORDS: dict[str, tuple[str, ...]] = {
    "restartPolicy": _RESTART,
    "imagePullPolicy": _PULL,
    "protocol": ("TCP", "UDP", "SCTP"),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
    "whenUnsatisfiable": ("DoNotSchedule", "ScheduleAnyway"),
    "dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    "preemptionPolicy": ("PreemptLowerPriority", "Never"),
    "terminationMessagePolicy": ("File", "FallbackToLogsOnError"),
    "concurrencyPolicy": ("Allow", "Forbid", "Replace"),
    "podManagementPolicy": ("OrderedReady", "Parallel"),
    "medium": ("", "Memory", "HugePages", "HugePages-2Mi", "HugePages-1Gi"),
    "volumeMode": ("Filesystem", "Block"),
    "fsGroupChangePolicy": ("OnRootMismatch", "Always"),
    "operator": ("Exists", "Equal", "In", "NotIn", "DoesNotExist", "Gt", "Lt"),
}
_LISTS: dict[str, tuple[str, ...]] = {"accessModes": ACCESS_MODES, "policyTypes": ("Ingress", "Egress")}
_CONFIG_KEY = re.compile(r"[-._a-zA-Z0-9]{1,253}")
MAX_CONFIG = 1024 * 1024
HIGHEST_PRIORITY = 10**9


def check(thing: Object) -> Found:
    """Words that are none of those allowed, and what one kind alone demands."""
    for path, value in walk({key: value for key, value in thing.items() if key not in ("data", "stringData", "metadata")}):
        if not isinstance(value, dict) or re.search(r"(matchLabels|labels|annotations|nodeSelector|rayStartParams)$", path):
            continue
        for key in value.keys() & _WORDS.keys():
            if isinstance(value[key], str) and value[key] not in _WORDS[key]:
                yield join(path, key), f"{value[key]!r} is none of {', '.join(_WORDS[key])}"
        for key in value.keys() & _LISTS.keys():
            for number, word in enumerate(value[key] or ()):
                if word not in _LISTS[key]:
                    yield f"{join(path, key)}[{number}]", f"{word!r} is none of {', '.join(_LISTS[key])}"
    if rule := _KINDS.get(str(thing.get("kind"))):
        yield from rule(thing)


def _claim(spec: Object, path: str) -> Found:
    if not spec.get("accessModes"):
        yield f"{path}.accessModes", "is required"
    size = ((spec.get("resources") or {}).get("requests") or {}).get("storage")
    amount = quantity(size)
    if amount is None or amount <= 0:
        yield f"{path}.resources.requests.storage", f"{size!r} is no size"


def _stateful_set(thing: Object) -> Found:
    for where, claim in listed(thing.get("spec") or {}, "volumeClaimTemplates", "spec"):
        yield from _claim(claim.get("spec") or {}, f"{where}.spec")
    yield from _controller(thing)


def _controller(thing: Object) -> Found:
    spec = thing.get("spec") or {}
    template = spec.get("template") or {}
    wanted = ((spec.get("selector") or {}).get("matchLabels")) or {}
    labels = (template.get("metadata") or {}).get("labels") or {}
    if not wanted or any(labels.get(key) != value for key, value in wanted.items()):
        yield "spec.selector", "does not select the pods of spec.template"
    if (template.get("spec") or {}).get("restartPolicy", "Always") != "Always":
        yield "spec.template.spec.restartPolicy", f"Always, for a {thing['kind']}"


def _job(thing: Object) -> Found:
    spec = thing.get("spec") or {}
    template = ((spec.get("template") or {}).get("spec")) or {}
    if template.get("restartPolicy") not in ("Never", "OnFailure"):
        yield "spec.template.spec.restartPolicy", "Never or OnFailure, for a Job"


def _config_map(thing: Object) -> Found:
    both = set(thing.get("data") or {}) & set(thing.get("binaryData") or {})
    for key in (thing.get("data") or {}).keys() | (thing.get("binaryData") or {}).keys():
        if not _CONFIG_KEY.fullmatch(str(key)) or key in both:
            yield f"data.{key}", "is no key: letters, digits, -, _ and ., once"
    if sum(len(str(value).encode()) for value in (thing.get("data") or {}).values()) > MAX_CONFIG:
        yield "data", f"more than {MAX_CONFIG} bytes"


def _priority_class(thing: Object) -> Found:
    value = thing.get("value")
    if not isinstance(value, int) or value > HIGHEST_PRIORITY:
        yield "value", f"{value!r} is above {HIGHEST_PRIORITY}, which is the system's"
    if str(thing["metadata"].get("name")).startswith("system-"):
        yield "metadata.name", "system- is the system's"


def _service(thing: Object) -> Found:
    spec = thing.get("spec") or {}
    for where, port in listed(spec, "ports", "spec"):
        for key in ("port", "targetPort", "nodePort"):
            if isinstance(port.get(key), int) and not 0 < port[key] < 65536:
                yield f"{where}.{key}", f"{port[key]} is no port: 1 to 65535"
        if len(spec["ports"]) > 1 and not port.get("name"):
            yield f"{where}.name", "is required where there are several ports"
    if spec.get("type", "ClusterIP") not in ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"):
        yield "spec.type", f"{spec['type']!r} is no type of a Service"


def _network_policy(thing: Object) -> Found:
    spec = thing.get("spec") or {}
    for way, word in (("ingress", "Ingress"), ("egress", "Egress")):
        if way in spec and word not in spec.get("policyTypes", ("Ingress", "Egress")):
            yield f"spec.{way}", f"does nothing: policyTypes lacks {word}"
        for where, rule in listed(spec, way, "spec"):
            for place, port in listed(rule, "ports", where):
                yield from _policy_port(place, port)
            for place, peer in listed(rule, "from" if way == "ingress" else "to", where):
                yield from _peer(place, peer)


def _policy_port(path: str, port: Object) -> Found:
    first, last = port.get("port"), port.get("endPort")
    for key, number in (("port", first), ("endPort", last)):
        if isinstance(number, int) and not 0 < number < 65536:
            yield f"{path}.{key}", f"{number} is no port: 1 to 65535"
    if last is not None and (not isinstance(first, int) or last < first):
        yield f"{path}.endPort", f"{last} is below port, {first}"


def _peer(path: str, peer: Object) -> Found:
    if not peer or ("ipBlock" in peer and len(peer) > 1):
        yield path, "must be an ipBlock, or selectors of pods and namespaces"
    block = peer.get("ipBlock")
    if block is None:
        return
    try:
        whole = ipaddress.ip_network(str(block.get("cidr")))
        inner = [ipaddress.ip_network(str(part)) for part in block.get("except") or ()]
    except ValueError as error:
        yield f"{path}.ipBlock", str(error)
        return
    for part in inner:
        if part.version != whole.version or not part.subnet_of(whole):  # type: ignore[arg-type]
            yield f"{path}.ipBlock.except", f"{part} is not within {whole}"


_KINDS = {
    "PersistentVolumeClaim": lambda thing: _claim(thing.get("spec") or {}, "spec"),
    "StatefulSet": _stateful_set,
    "Deployment": _controller,
    "Job": _job,
    "ConfigMap": _config_map,
    "PriorityClass": _priority_class,
    "Service": _service,
    "NetworkPolicy": _network_policy,
}
