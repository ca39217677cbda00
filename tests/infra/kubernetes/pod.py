"""The pods that an object stands for: those it templates, with the labels that their controllers add."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.infra.kubernetes.problem import Object, join, listed

TEMPLATES = {
    "Deployment": "spec.template",
    "StatefulSet": "spec.template",
    "DaemonSet": "spec.template",
    "Job": "spec.template",
    "CronJob": "spec.jobTemplate.spec.template",
    "Pod": "",
}
RAY = {"ray.io/is-ray-node": "yes", "app.kubernetes.io/name": "kuberay", "app.kubernetes.io/created-by": "kuberay-operator"}


@dataclass(frozen=True)
class Pod:
    """A pod's template.

    Attributes:
        path: where the template is in its object.
        role: ``head``, ``worker``, ``submitter``, or the kind of its controller.
        template: metadata and spec.
        labels: those it will have; None for a value that is known only at run time.
        group: the object of its Ray group; empty for others.
        autoscaler: the options of the container that KubeRay adds to a head; None for others.
    """

    path: str
    role: str
    template: Object
    labels: Mapping[str, str | None]
    group: Object
    autoscaler: Object | None = None

    @property
    def spec(self) -> Object:
        """The pod's spec."""
        return self.template.get("spec") or {}

    @property
    def spec_path(self) -> str:
        """Where the spec is."""
        return join(self.path, "spec")

    @property
    def is_ray(self) -> bool:
        """Whether a raylet runs in it."""
        return self.role in ("head", "worker")

    def containers(self) -> Iterator[tuple[str, Object]]:
        """Containers and init containers, with their paths."""
        yield from listed(self.spec, "initContainers", self.spec_path)
        yield from listed(self.spec, "containers", self.spec_path)

    def all_containers(self) -> Iterator[tuple[str, Object]]:
        """The same, and the autoscaler's options, which become a container of the head."""
        yield from self.containers()
        if self.autoscaler is not None:
            yield self.path.replace("headGroupSpec.template", "autoscalerOptions"), self.autoscaler


def ray_cluster(thing: Object) -> tuple[str, Object] | None:
    """Path and spec of the RayCluster that an object asks for; None where it asks for none."""
    spec = thing.get("spec") or {}
    if thing.get("kind") == "RayCluster":
        return "spec", spec
    if thing.get("kind") == "RayJob" and isinstance(spec.get("rayClusterSpec"), dict):
        return "spec.rayClusterSpec", spec["rayClusterSpec"]
    return None


def pods(thing: Object) -> list[Pod]:
    """The pods of one object."""
    kind = thing.get("kind", "")
    if kind in TEMPLATES:
        template: Object = thing
        for key in filter(None, TEMPLATES[kind].split(".")):
            template = template.get(key) or {}
        return [Pod(TEMPLATES[kind], kind, template, labels_of(template), {})]
    found: list[Pod] = []
    cluster = ray_cluster(thing)
    if cluster is not None:
        found += _ray_pods(thing, *cluster)
    submitter = (thing.get("spec") or {}).get("submitterPodTemplate")
    if kind == "RayJob" and isinstance(submitter, dict):
        added = {"ray.io/originated-from-cr-name": thing["metadata"].get("name"), "ray.io/originated-from-crd": "RayJob"}
        found.append(Pod("spec.submitterPodTemplate", "submitter", submitter, added | labels_of(submitter), {}))
    return found


def _ray_pods(thing: Object, path: str, spec: Object) -> Iterator[Pod]:
    name = thing["metadata"].get("name") if thing["kind"] == "RayCluster" else None
    scaled = bool(spec.get("enableInTreeAutoscaling"))
    head = spec.get("headGroupSpec") or {}
    for role, group, place in (
        ("head", head, join(path, "headGroupSpec")),
        *(("worker", group, place) for place, group in listed(spec, "workerGroupSpecs", path)),
    ):
        template = group.get("template") or {}
        added = {
            "ray.io/cluster": name,
            "ray.io/node-type": role,
            "ray.io/group": "headgroup" if role == "head" else group.get("groupName"),
            "ray.io/identifier": None,
        }
        options = (spec.get("autoscalerOptions") or {}) if role == "head" and scaled else None
        yield Pod(join(place, "template"), role, template, RAY | added | labels_of(template), group, options)


def labels_of(thing: Object) -> dict[str, str | None]:
    """The labels of an object or a template."""
    return dict((thing.get("metadata") or {}).get("labels") or {})
