"""A RayJob on a Kubernetes cluster: hand it over, ask how it stands, follow its log, stop it.

Written against KubeRay 1.7 and tried against a server of the tests that speaks the API server's protocol; no real cluster has run it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from cluster.kubernetes.api import Api, Refused, path_of
from cluster.kubernetes.diagnosis import findings
from cluster.kubernetes.driver_log import JOB_LABEL, DriverLog
from cluster.kubernetes.phase import attempt_of, message_of, phase_of
from cluster.submitted import Phase, RunState

Manifest = dict[str, Any]
CREATED = {"ConfigMap": "configmaps", "RayJob": "rayjobs"}
"""The kinds that ``apply`` creates, with the resource of each."""


def apply(manifests: Sequence[Manifest], *, context: str | None = None, namespace: str | None = None) -> list[str]:
    """Create a run's RayJob and its ConfigMaps. All are checked by the server first (a dry run), so that nothing half done stays; the
    ConfigMaps belong to the RayJob and go with it.

    Args:
        manifests: plain objects, as they would stand in YAML: one RayJob and any number of ConfigMaps.
        context: of the kubeconfig; its current one where None.
        namespace: for objects that name none; the context's where None.

    Returns:
        What was created, in the order of ``manifests``: ``rayjob.ray.io/NAME``.

    Raises:
        ValueError: the name exists already, the manifests are not what can be created here, or there is no usable kubeconfig.
        ConnectionError: the API server does not answer, or refuses; the message says why and what to do.
    """
    rayjob, maps = _sorted(manifests)
    api = Api(context, namespace or rayjob["metadata"].get("namespace"))
    objects = [copy.deepcopy(each) for each in (rayjob, *maps)]
    for each in objects:
        each["metadata"].setdefault("namespace", api.namespace)
    if len({each["metadata"]["namespace"] for each in objects}) > 1:
        raise ValueError("the RayJob and its ConfigMaps are for different namespaces: they must share one")
    _require_free(api, objects[0])
    for each in objects:
        _create(api, each, dry_run=True)
    made = _create(api, objects[0])
    try:
        for each in objects[1:]:
            each["metadata"]["ownerReferences"] = [_owner(made)]
            _create(api, each)
    except BaseException:  # an interrupt too: a RayJob without its ConfigMap would wait for ever
        api.delete(_path(made), propagation="Background", uid=made["metadata"]["uid"])
        raise
    return [f"{each['kind'].lower()}{'.ray.io' if each['kind'] == 'RayJob' else ''}/{each['metadata']['name']}" for each in manifests]


class KubernetesRun:
    """A RayJob, as ``cluster.submitted.SubmittedRun``.

    Args:
        name: the RayJob's name.
        namespace: its namespace; the context's where None.
        context: of the kubeconfig; its current one where None.

    Raises:
        ValueError: there is no usable kubeconfig.
    """

    def __init__(self, name: str, *, namespace: str | None = None, context: str | None = None) -> None:
        self.name = name
        self._api = Api(context, namespace)
        self.namespace = self._api.namespace
        self._last: RunState | None = None

    def state(self) -> RunState:
        """See SubmittedRun. While it is being stopped it has not ended. One that this object saw before, and that is gone now, was
        stopped, or stands where it ended."""
        rayjob = self._rayjob()
        if rayjob is None and self._last is not None:
            if not self._last.phase.ended:
                self._last = RunState(Phase.STOPPED, "its RayJob was deleted", attempt=self._last.attempt)
            return self._last
        rayjob = rayjob or self._present()
        phase = phase_of(rayjob)
        self._last = RunState(phase, message_of(rayjob), self._findings(rayjob, phase), attempt_of(rayjob))
        return self._last

    def log(self) -> Iterator[str]:
        """See SubmittedRun. Waits while there is no line yet; goes on across attempts (a line says ``attempt 2``); ends when the run has
        ended. Where lines are missing, a line that begins with ``facemae: the log`` says so. Raises LookupError where there is no run."""
        self._present()
        return DriverLog(self._api, self.namespace, self.name, self._rayjob).lines()

    def cancel(self) -> None:
        """See SubmittedRun. Deletes the RayJob; one that has ended is left as it is, with its log.

        Suspending it instead would keep the object, but KubeRay 1.7 then deletes the pods without a word to the driver. On deletion
        its finalizer has Ray stop the job first: the driver gets SIGTERM, takes nothing new and lets its workers hand back, for as long
        as RAY_JOB_STOP_WAIT_TIME_S of the head's container says. The pods go at the same time, the head's after the driver
        (``cluster.driver_end``), the workers' after their drain (``cluster.drain``). Committed shards stay, and the same submission goes
        on from them. The deletion is a foreground one: the RayJob is there until its pods are gone.

        Raises:
            LookupError: there is no such RayJob.
        """
        rayjob = self._present()
        if phase_of(rayjob).ended or rayjob["metadata"].get("deletionTimestamp"):
            return
        try:
            self._api.delete(_path(rayjob), propagation="Foreground", uid=rayjob["metadata"]["uid"])
        except Refused as refused:
            if refused.status not in (404, 409):  # gone in the meantime, or replaced by one of the same name
                raise

    def _present(self) -> Manifest:
        rayjob = self._rayjob()
        if rayjob is None:
            raise LookupError(f"there is no run {self.name} in namespace {self.namespace} of {self._api.server}")
        return rayjob

    def _rayjob(self) -> Manifest | None:
        return _found(self._api, self.namespace, self.name)

    def _findings(self, rayjob: Manifest, phase: Phase) -> tuple[str, ...]:
        """What is wrong. What may not be looked at is a finding too, and no error."""
        if phase in (Phase.SUCCEEDED, Phase.STOPPED) or rayjob["metadata"].get("deletionTimestamp"):
            return ()
        cluster = (rayjob.get("status") or {}).get("rayClusterName")
        pods, events, denied = list[Manifest](), list[Manifest](), list[str]()
        selectors = [f"{JOB_LABEL}={self.name}", *([f"ray.io/cluster={cluster}"] if cluster else [])]
        wanted = [(pods, "pods", {"labelSelector": selector}) for selector in selectors]
        kinds = ("type=Warning", "reason=NotTriggerScaleUp", "reason=TriggeredScaleUp")
        wanted += [(events, "events", {"fieldSelector": kind}) for kind in kinds]
        for into, resource, query in wanted:
            try:
                into.extend(self._api.items(path_of(resource, self.namespace), **query))
            except Refused as refused:
                if refused.status != 403:
                    raise
                denied.append(str(refused))
        return (*findings(rayjob, pods, events, self._api.now), *dict.fromkeys(denied))


def _sorted(manifests: Sequence[Manifest]) -> tuple[Manifest, list[Manifest]]:
    """The RayJob and the ConfigMaps."""
    for each in manifests:
        if each.get("kind") not in CREATED:
            raise ValueError(
                f"{each.get('kind')} {(each.get('metadata') or {}).get('name', '')}: only RayJobs and ConfigMaps are created here"
            )
    rayjobs = [each for each in manifests if each["kind"] == "RayJob"]
    if len(rayjobs) != 1:
        raise ValueError(f"a run is one RayJob, and these manifests have {len(rayjobs)}")
    return rayjobs[0], [each for each in manifests if each["kind"] == "ConfigMap"]


def _require_free(api: Api, manifest: Manifest) -> None:
    """Raises ValueError when there is a run of this name, saying how it stands and what can be done."""
    name, namespace = manifest["metadata"]["name"], manifest["metadata"]["namespace"]
    rayjob = _found(api, namespace, name)
    if rayjob is None:
        return
    phase = phase_of(rayjob)
    message = message_of(rayjob)
    stands = f"{phase.value}: {message}" if message else phase.value
    if rayjob["metadata"].get("deletionTimestamp"):
        remedy = "wait until it is gone, or give another --name"
    elif phase.ended:
        remedy = f"give another --name, or remove it with its log: kubectl delete rayjob {name} -n {namespace}"
    else:
        remedy = "look at it with facemae status, stop it with facemae cancel, or give another --name"
    raise ValueError(f"there is a run {name} in namespace {namespace} already ({stands}); {remedy}")


def _create(api: Api, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
    resource, name, namespace = CREATED[manifest["kind"]], manifest["metadata"]["name"], manifest["metadata"]["namespace"]
    try:
        return api.create(path_of(resource, namespace), manifest, dry_run=dry_run)
    except Refused as refused:
        if refused.reason != "AlreadyExists":
            raise
        command = f"kubectl delete {resource.removesuffix('s')} {name} -n {namespace}"
        raise ValueError(
            f"there is a {manifest['kind']} {name} in namespace {namespace} already, left by something else: give another --name, or "
            f"remove it: {command}"
        ) from None


def _found(api: Api, namespace: str, name: str) -> Manifest | None:
    try:
        return api.get(path_of("rayjobs", namespace, name))
    except Refused as refused:
        if refused.status != 404 or refused.name != name:  # the other 404 is KubeRay's absence
            raise
        return None


def _owner(rayjob: Manifest) -> Manifest:
    """Not blockOwnerDeletion, which some clusters let only those set who may change finalizers."""
    return {"apiVersion": rayjob["apiVersion"], "kind": "RayJob", "name": rayjob["metadata"]["name"], "uid": rayjob["metadata"]["uid"]}


def _path(rayjob: Manifest) -> str:
    return path_of("rayjobs", rayjob["metadata"]["namespace"], rayjob["metadata"]["name"])
