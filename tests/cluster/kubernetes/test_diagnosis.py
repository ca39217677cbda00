"""Every finding from an object as a real cluster shows it."""

from __future__ import annotations

import re
import time

import pytest

from cluster.kubernetes.diagnosis import findings
from tests.cluster.kubernetes.api_server import stamp
from tests.cluster.kubernetes.objects import Object, event, pod, rayjob, unscheduled, waiting

QUOTA = (
    'pods "run-x7k2p-gpu-worker-abcde" is forbidden: exceeded quota: team-gpu, requested: requests.nvidia.com/gpu=1, '
    "used: requests.nvidia.com/gpu=8, limited: requests.nvidia.com/gpu=8"
)
SECURITY = (
    'pods "run-x7k2p-head-abcde" is forbidden: violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false '
    '(container "istio-init" must set securityContext.allowPrivilegeEscalation=false)'
)
PULL = 'Failed to pull image "registry.example/facemae:1": rpc error: code = '


def _found(pods: list[Object] = [], events: list[Object] = [], **status: str) -> tuple[str, ...]:  # noqa: B006
    return findings(rayjob(jobDeploymentStatus="Initializing", **status), pods, events, time.time())


POD_FINDINGS = [
    (
        pod(container=waiting("ErrImagePull", PULL + "NotFound desc = failed to resolve reference: registry.example/facemae:1: not found")),
        "there is no image registry.example/facemae:1: correct --image",
    ),
    (
        pod(container=waiting("ErrImagePull", PULL + "Unknown desc = failed to authorize: 401 Unauthorized")),
        "without credentials.*--pull-secret NAME",
    ),
    (
        pod(container=waiting("ErrImagePull", "pull access denied, repository does not exist or may require authorization")),
        "nobody without credentials, or does not have it: correct --image, or make a Secret",
    ),
    (
        pod(container=waiting("ErrImagePull", PULL + "Unknown desc = dial tcp: lookup registry.example: no such host")),
        "do not reach the registry",
    ),
    (pod(container=waiting("ErrImagePull", "toomanyrequests: You have reached your pull rate limit")), "limits how often"),
    (pod(container=waiting("ErrImagePull", "no match for platform in manifest: not found")), "not built for these nodes' processors"),
    (pod(container=waiting("InvalidImageName", "couldn't parse image name")), "is no image name: correct --image"),
    (pod(container=waiting("ErrImageNeverPull", "Container image is not present")), "imagePullPolicy Never"),
    (
        pod(container=waiting("CreateContainerConfigError", 'secret "s3-keys" not found')),
        "no Secret s3-keys .*kubectl create secret generic s3-keys.*--secret",
    ),
    (
        pod(container=waiting("CreateContainerConfigError", "couldn't find key AWS_ACCESS_KEY_ID in Secret faces/s3-keys")),
        "the Secret faces/s3-keys has no key AWS_ACCESS_KEY_ID",
    ),
    (
        pod(container=waiting("CreateContainerConfigError", "container has runAsNonRoot and image will run as root (pod: ...)")),
        "run as root.*infra/image",
    ),
    (
        pod(container=waiting("RunContainerError", 'exec: "facemae": executable file not found in $PATH: unknown')),
        "does not start.*facemae.*infra/image",
    ),
    (
        pod(container={"state": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}, phase="Failed"),
        "OOMKilled.*larger --preset",
    ),
    (
        pod(container={**waiting("CrashLoopBackOff", "back-off 5m0s"), "lastState": {"terminated": {"reason": "Error", "exitCode": 1}}}),
        "ended with exit code 1; see why with: kubectl logs run-x7k2p-gpu-worker-abcde -c ray-worker -n faces --previous",
    ),
    (
        pod(container={**waiting("CrashLoopBackOff"), "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}),
        "killed for want of memory",
    ),
    (
        pod(phase="Failed", reason="Evicted", message="The node was low on resource: ephemeral-storage. Threshold quantity: 1Gi."),
        "evicted it: The node was low on resource: ephemeral-storage",
    ),
    (
        pod(phase="Failed", reason="Shutdown", message="Pod was terminated in response to imminent node shutdown."),
        "its node went .Shutdown.",
    ),
    (
        pod(conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "preempting"}]),
        "higher priority took its place",
    ),
    (
        pod(conditions=[{"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager", "message": "deleting"}]),
        "spot machine.*handed out again",
    ),
    (
        unscheduled(
            "0/5 nodes are available: 1 node(s) had untolerated taint {node-role.kubernetes.io/control-plane: }, 2 Insufficient cpu, "
            "2 Insufficient nvidia.com/gpu. preemption: 0/5 nodes are available: 5 No preemption victims found for incoming pod."
        ),
        "no node fits: 1 of 5 nodes have the taint node-role.*2 of 5 nodes have too little free cpu.*2 of 5 nodes have too little free "
        "nvidia.com/gpu: .*device plugin",
    ),
    (unscheduled("0/3 nodes are available: 3 Insufficient memory."), "3 of 3 nodes have too little free memory: ask for less"),
    (
        unscheduled("0/3 nodes are available: 3 node(s) didn't match Pod's node affinity/selector. preemption: ..."),
        "3 of 3 nodes have labels that the pod's node selector does not match: kubectl get nodes --show-labels",
    ),
    (unscheduled("0/0 nodes are available: ."), "no node at all"),
    (unscheduled("0/2 nodes are available: 2 node(s) were unschedulable."), "cordoned"),
    (unscheduled("", "SchedulingGated"), "gated: a queue such as Kueue"),
]


@pytest.mark.parametrize(("trouble", "expected"), POD_FINDINGS)
def test_a_pods_trouble(trouble: Object, expected: str) -> None:
    (found,) = _found([trouble])
    assert re.search(expected, found), found
    assert "\n" not in found
    assert "(pod run-x7k2p-gpu-worker-abcde)" in found


EVENT_FINDINGS = [
    (event("FailedToCreateWorkerPod", f"Failed to create worker Pod: {QUOTA}", "RayCluster", "run-x7k2p"), "quota is used up: team-gpu"),
    (event("FailedCreate", f"Error creating: {QUOTA}", "Job", "run"), "limits requests.nvidia.com/gpu=8; used .*=8, asked .*=1; ask for"),
    (event("FailedToCreateHeadPod", f"Failed: {SECURITY}", "RayCluster", "run-x7k2p"), "Pod security level restricted:latest refuses"),
    (
        event(
            "FailedToCreateHeadPod",
            'pods "run-x7k2p-head" is forbidden: error looking up service account faces/facemae: serviceaccount "facemae" not found',
            "RayCluster",
            "run-x7k2p",
        ),
        "service account faces/facemae does not exist: apply infra/kubernetes/base",
    ),
    (
        event(
            "FailedToCreateHeadPod", 'pods "x" is forbidden: no PriorityClass with name facemae was found', "RayCluster", "run-x7k2p"
        ),
        "no PriorityClass facemae",
    ),
    (
        event("FailedToCreateHeadPod", 'pods "x" is forbidden: maximum cpu usage per Pod is 4, but 7', "RayCluster", "run-x7k2p"),
        "LimitRange",
    ),
    (
        event(
            "FailedToCreateRayCluster",
            'admission webhook "validate.kyverno.svc-fail" denied the request: images only from registry.corp, forbidden otherwise',
            "RayJob",
            "run",
        ),
        "webhook validate.kyverno.svc-fail denies it: images only",
    ),
    (event("InvalidRayJobSpec", "faces/run: backoffLimit is incompatible", "RayJob", "run"), "KubeRay refuses the RayJob"),
    (event("FailedToCreateRayJobSubmitter", "Failed to create new Kubernetes Job: timeout", "RayJob", "run"), "could not do a step"),
]  # fmt: skip


@pytest.mark.parametrize(("happened", "expected"), EVENT_FINDINGS)
def test_what_keeps_pods_from_being_made(happened: Object, expected: str) -> None:
    (found,) = _found([], [happened])
    assert re.search(expected, found), found


@pytest.mark.parametrize(
    ("happened", "expected"),
    [
        (event("FailedMount", 'MountVolume.SetUp failed for volume "job" : configmap "run" not found'), "no ConfigMap run .*submit again"),
        (event("FailedMount", 'MountVolume.SetUp failed for volume "gcs" : secret "gcs-key" not found'), "no Secret gcs-key"),
        (event("FailedMount", "MountVolume.SetUp failed for volume: mount failed: exit status 32"), "a volume cannot be mounted"),
        (event("FailedCreatePodSandBox", "failed to set up sandbox: plugin type calico failed"), "the node cannot start the pod"),
    ],
)
def test_what_keeps_a_pod_from_starting(happened: Object, expected: str) -> None:
    (found,) = _found([pod()], [happened])
    assert re.search(expected, found), found


@pytest.mark.parametrize(
    ("happened", "expected"),
    [
        (
            event("NotTriggerScaleUp", "pod didn't trigger scale-up: 1 max node group size reached", type="Normal"),
            "autoscaler cannot help .*1 max",
        ),
        (event("FailedScaleUp", "Failed adding 1 nodes to group gpu due to OutOfResource.GPU"), "adding a node failed .*OutOfResource"),
        (event("TriggeredScaleUp", "pod triggered scale-up: [{gpu 0->1 (max: 8)}]", type="Normal"), "a node is being added: wait"),
        (event("FailedScheduling", "incompatible with nodepool gpu", source={"component": "karpenter"}), "Karpenter cannot help"),
    ],
)
def test_what_the_autoscaler_says(happened: Object, expected: str) -> None:
    (found,) = _found([unscheduled("0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")], [happened])
    assert re.search(f"too little free nvidia.com/gpu.*{expected}", found), found


def test_the_reason_of_a_pull_that_waits_stands_in_an_event() -> None:
    waits = pod(container=waiting("ImagePullBackOff", 'Back-off pulling image "registry.example/facemae:1"'))
    (found,) = _found([waits], [event("Failed", PULL + "NotFound desc = manifest unknown")])
    assert found.startswith("there is no image registry.example/facemae:1")
    (unknown,) = _found([waits])
    assert "cannot be fetched: Back-off" in unknown


def test_the_same_trouble_of_many_pods_is_one_line() -> None:
    pods = [
        pod(f"run-x7k2p-gpu-worker-{index}", container=waiting("CreateContainerConfigError", 'secret "k" not found')) for index in range(64)
    ]
    (found,) = _found(pods)
    assert found.endswith("(several pods, run-x7k2p-gpu-worker-0 among them)")


def test_a_healthy_run_has_no_findings() -> None:
    healthy = pod(container={"state": {"running": {}}}, phase="Running", conditions=[{"type": "PodScheduled", "status": "True"}])
    assert _found([healthy], [event("Unhealthy", "Readiness probe failed: success", type="Warning")]) == ()


def test_others_and_old_events_are_left_out() -> None:
    others = [
        event("FailedCreate", QUOTA, "RayCluster", "run-2-abcde"),
        event("FailedCreate", QUOTA, "RayCluster", "run-x7k2p", ago=7200),
        event("InvalidRayJobSpec", "an earlier run's", "RayJob", "run", involved={"uid": "uid-0"}),
        event("FailedCreate", QUOTA, "Job", "run", ago=1200),  # before this run was made
    ]
    assert _found([], others) == ()
    assert len(_found([], [event("FailedCreate", QUOTA, "RayCluster", "run-x7k2p")])) == 1


def test_an_operator_that_does_not_react() -> None:
    new = rayjob()
    new["metadata"]["creationTimestamp"] = stamp(20)
    assert findings(new, [], [], time.time()) == ()
    (found,) = findings(new, [], [], time.time() + 100)
    assert "operator has not touched the RayJob in more than a minute" in found
    assert "helm install kuberay-operator" in found
    new["spec"]["managedBy"] = "kueue.x-k8s.io/multikueue"
    (found,) = findings(new, [], [], time.time() + 100)
    assert found.startswith("kueue.x-k8s.io/multikueue manages")


def test_a_suspended_run() -> None:
    held = rayjob(jobDeploymentStatus="Suspended")
    held["spec"]["suspend"] = True
    (found,) = findings(held, [], [], time.time())
    assert "Kueue" in found
    assert 'kubectl patch rayjob run --type merge -p \'{"spec":{"suspend":false}}\'' in found


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (
            {"jobDeploymentStatus": "ValidationFailed", "message": "name must be no more than 47 characters"},
            "KubeRay refuses the RayJob: name",
        ),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, "activeDeadlineSeconds.*goes on there"),
        ({"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded"}, "preRunningDeadlineSeconds"),
    ],
)
def test_how_it_ended(status: dict[str, str], expected: str) -> None:
    (found,) = findings(rayjob(**status), [], [], time.time())
    assert re.search(expected, found), found


def test_kuberays_own_account_of_pods_not_made() -> None:
    condition = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreateWorkerPod", "message": QUOTA}
    job = rayjob(jobDeploymentStatus="Initializing", rayClusterStatus={"conditions": [condition]})
    (found,) = findings(job, [], [event("FailedToCreateWorkerPod", QUOTA, "RayCluster", "run-x7k2p")], time.time())
    assert "team-gpu" in found


def test_no_finding_shows_a_credential() -> None:
    secret = "hunter2hunter2"
    texts = [
        f"pull https://user:{secret}@registry.example/v2/: 500",
        f"GET https://s3.example/x?X-Amz-Signature={secret}&X-Amz-Credential={secret}: 403",
        f"Authorization: Bearer {secret}",
        f"password={secret}",
    ]
    for text in texts:
        pods = [pod(container=waiting("ErrImagePull", text))]
        found = _found(pods, [event("FailedMount", text), event("FailedToCreateHeadPod", f"forbidden: {text}", "RayCluster", "run-x7k2p")])
        assert found
        assert secret not in " ".join(found)


def test_of_a_quota_that_changes_the_newest_is_told() -> None:
    changing = [
        event("FailedCreate", QUOTA.replace("gpu=8, limited", f"gpu={used}, limited"), "RayCluster", "run-x7k2p", ago=used)
        for used in (7, 6)
    ]
    (found,) = _found([], changing)
    assert "used requests.nvidia.com/gpu=6" in found


def test_a_container_that_never_gets_ready() -> None:
    def waits(ago: float, **container: object) -> Object:
        return pod(container={"state": {"running": {"startedAt": stamp(ago)}}, **container})

    (found,) = _found([waits(400, name="wait-gcs-ready")])
    assert "does not reach the head's port 6379" in found
    unhealthy = event("Unhealthy", "Readiness probe failed: HTTP Error 503")
    (found,) = _found([waits(400, ready=False)], [unhealthy])
    assert "ray-worker runs and is not ready: Readiness probe failed" in found
    assert _found([waits(100, name="wait-gcs-ready")]) == ()
    assert _found([waits(400, ready=True)], [unhealthy]) == ()
    assert _found([waits(100, ready=False)], [unhealthy]) == ()
