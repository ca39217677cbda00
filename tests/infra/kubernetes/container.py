"""What no schema sees of a pod's containers: volumes and mounts, ports, variables, resources."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from tests.infra.kubernetes.names import key_problem, label_problem, name_problem
from tests.infra.kubernetes.pod import Pod
from tests.infra.kubernetes.problem import Found, Object, join, listed, twice
from tests.infra.kubernetes.quantity import quantity

_VARIABLE = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]*[a-z0-9])?")
METRICS_PORT = 8080
"""KubeRay adds it to every Ray container, by the name metrics."""


def check(pod: Pod) -> Found:
    """Everything about the containers of one pod."""
    spec, path = pod.spec, pod.spec_path
    if not spec.get("containers"):
        yield join(path, "containers"), "at least one container is needed"
    yield from twice(pod.containers(), "name", "the container")
    yield from twice(listed(spec, "volumes", path), "name", "the volume")
    yield from _volumes(pod)
    yield from _disk(pod)
    for where, container in pod.containers():
        if reason := name_problem(container.get("name"), "dns-1123"):
            yield f"{where}.name", reason
        yield from twice(listed(container, "env", where), "name", "the variable")
        for place, variable in listed(container, "env", where):
            yield from _variable(place, variable)
    mounted = set()
    for where, container in pod.all_containers():
        yield from resources(container, where)
        yield from twice(listed(container, "volumeMounts", where), "mountPath", "the mount")
        for place, mount in listed(container, "volumeMounts", where):
            mounted.add(mount.get("name"))
            yield from _mount(place, mount, pod)
    yield from _ports(pod)
    for where, volume in listed(spec, "volumes", path):
        if volume.get("name") not in mounted:
            yield f"{where}.name", f"nothing mounts {volume.get('name')!r}"
    yield from _placement(pod)


def _variable(path: str, variable: Object) -> Found:
    name, value = variable.get("name"), variable.get("value")
    if not _VARIABLE.fullmatch(str(name)):
        yield f"{path}.name", f"{name!r} is no variable's name"
    if value is not None and not isinstance(value, str):
        yield f"{path}.value", f"{value!r} is no string: quote it"
    if "value" in variable and "valueFrom" in variable:
        yield path, "has both value and valueFrom"
    if "valueFrom" in variable and len(variable["valueFrom"]) != 1:
        yield f"{path}.valueFrom", "must name exactly one source"


def _mount(path: str, mount: Object, pod: Pod) -> Found:
    if mount.get("name") not in {volume.get("name") for volume in pod.spec.get("volumes") or ()}:
        yield f"{path}.name", f"no volume {mount.get('name')!r} in this pod"
    if not str(mount.get("mountPath", "")).startswith("/"):
        yield f"{path}.mountPath", f"{mount.get('mountPath')!r} does not start with /"


def _volumes(pod: Pod) -> Found:
    limits = [quantity(((container.get("resources") or {}).get("limits") or {}).get("memory")) for _, container in pod.containers()]
    for where, volume in listed(pod.spec, "volumes", pod.spec_path):
        if reason := name_problem(volume.get("name"), "dns-1123"):
            yield f"{where}.name", reason
        if len(sources := set(volume) - {"name"}) != 1:
            yield where, f"has {len(sources)} sources: one is needed"
        empty = volume.get("emptyDir")
        if not isinstance(empty, dict):
            continue
        size = quantity(empty["sizeLimit"]) if "sizeLimit" in empty else None
        if "sizeLimit" in empty and size is None:
            yield f"{where}.emptyDir.sizeLimit", f"{empty['sizeLimit']!r} is no quantity"
        if empty.get("medium") == "Memory":
            most = max((limit for limit in limits if limit is not None), default=None)
            if "sizeLimit" not in empty:
                yield f"{where}.emptyDir.sizeLimit", "memory without a limit: it may take the node's"
            elif size is not None and most is not None and size > most:
                yield f"{where}.emptyDir.sizeLimit", f"{empty['sizeLimit']} of memory is more than any container of the pod may have"


def _disk(pod: Pod) -> Found:
    """The kubelet evicts a pod whose folders on disk, together, outgrow what its containers may have."""
    limits = [((container.get("resources") or {}).get("limits") or {}).get("ephemeral-storage") for _, container in pod.containers()]
    folders = [volume.get("emptyDir") for _, volume in listed(pod.spec, "volumes", pod.spec_path)]
    sizes = [quantity(folder["sizeLimit"]) for folder in folders if folder and folder.get("medium") != "Memory" and "sizeLimit" in folder]
    known = [amount for limit in limits if (amount := quantity(limit)) is not None]
    if known and sum(size for size in sizes if size is not None) > sum(known):
        yield f"{pod.spec_path}.volumes", f"folders of {sum(filter(None, sizes)) / 2**30:g} GiB, more than limits.ephemeral-storage"


def _ports(pod: Pod) -> Found:
    names: dict[str, str] = {}
    for where, container in pod.containers():
        taken: dict[tuple[object, str], str] = {}
        for place, port in listed(container, "ports", where):
            number, name = port.get("containerPort"), port.get("name")
            for key in ("containerPort", "hostPort"):
                if key in port and not (isinstance(port[key], int) and 0 < port[key] < 65536):
                    yield f"{place}.{key}", f"{port[key]!r} is no port: 1 to 65535"
            identity = (number, port.get("protocol", "TCP"))
            if identity in taken:
                yield f"{place}.containerPort", f"{number} is there twice, see {taken[identity]}"
            taken.setdefault(identity, place)
            if name is None:
                continue
            if not _PORT_NAME.fullmatch(str(name)):
                yield f"{place}.name", f"{name!r} is no port's name: at most 15 small letters, digits and -, with a letter"
            if name in names:
                yield f"{place}.name", f"the port {name!r} is there twice, see {names[name]}"
            names.setdefault(name, place)
            if pod.is_ray and name == "metrics" and number != METRICS_PORT and pod.role == "worker":
                yield f"{place}.containerPort", f"KubeRay makes {METRICS_PORT} of the port metrics"


def resources(container: Object, path: str) -> Found:
    """Requests and limits: quantities, whole devices, no request above its limit."""
    given = container.get("resources") or {}
    for key in ("requests", "limits"):
        for name, value in (given.get(key) or {}).items():
            where, amount = f"{path}.resources.{key}.{name}", quantity(value)
            if reason := key_problem(name):
                yield where, reason
            if amount is None:
                yield where, f"{value!r} is no quantity"
            elif amount < 0:
                yield where, f"{value} is negative"
            elif "/" in name and amount != int(amount):
                yield where, f"{value}: devices come whole"
            elif name in ("memory", "ephemeral-storage") and amount < 2**20:
                yield where, f"{value} is less than a MiB: a suffix is missing"
    limits = given.get("limits") or {}
    for name, value in (given.get("requests") or {}).items():
        request, limit = quantity(value), quantity(limits.get(name))
        if request is not None and limit is not None and request > limit:
            yield f"{path}.resources.requests.{name}", f"{value} is more than the limit, {limits[name]}"
        if "/" in name and limits.get(name) != value:
            yield f"{path}.resources.requests.{name}", f"{value}: of a device request and limit must be equal"


def _placement(pod: Pod) -> Found:
    spec, path = pod.spec, pod.spec_path
    for key, value in (spec.get("nodeSelector") or {}).items():
        if reason := label_problem(key, value):
            yield f"{path}.nodeSelector.{key}", reason
    for where, toleration in listed(spec, "tolerations", path):
        if toleration.get("operator", "Equal") not in ("Exists", "Equal"):
            yield f"{where}.operator", f"{toleration['operator']!r} is none of Exists, Equal"
        if toleration.get("operator", "Equal") == "Exists" and toleration.get("value"):
            yield f"{where}.value", "not with the operator Exists"
        if not toleration.get("key") and toleration.get("operator", "Equal") != "Exists":
            yield f"{where}.key", "an empty key needs the operator Exists"
        if "tolerationSeconds" in toleration and toleration.get("effect") != "NoExecute":
            yield f"{where}.tolerationSeconds", "is for the effect NoExecute"
    for where, spread in listed(spec, "topologySpreadConstraints", path):
        if spread.get("maxSkew", 0) < 1:
            yield f"{where}.maxSkew", "is below 1"
        if "labelSelector" not in spread:
            yield f"{where}.labelSelector", "without one no pod is counted"
        elif not selects(spread["labelSelector"], pod.labels):
            yield f"{where}.labelSelector", "does not select the pod that it is to spread"


def selects(selector: Object | None, labels: Mapping[str, str | None]) -> bool:
    """Whether a label selector may select something with these labels; a label whose value is not known yet may have any."""
    held = dict(labels)
    if any(key not in held or held[key] not in (value, None) for key, value in ((selector or {}).get("matchLabels") or {}).items()):
        return False
    return all(_holds(expression, held) for expression in _expressions(selector))


def _expressions(selector: Object | None) -> Iterator[Object]:
    yield from (selector or {}).get("matchExpressions") or ()


def _holds(expression: Object, labels: dict[str, str | None]) -> bool:
    key, operator, values = expression.get("key", ""), expression.get("operator"), expression.get("values") or ()
    if operator == "Exists":
        return key in labels
    if operator == "DoesNotExist":
        return key not in labels
    if operator == "In":
        return key in labels and (labels[key] is None or labels[key] in values)
    return key not in labels or labels[key] is None or labels[key] not in values
