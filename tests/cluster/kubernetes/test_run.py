"""A RayJob handed over, asked and stopped, through the real client."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from cluster.kubernetes.run import KubernetesRun, apply
from cluster.submitted import Phase, SubmittedRun
from tests.cluster.kubernetes.api_server import TOKEN, Cluster, Refusal
from tests.cluster.kubernetes.objects import event, pod, rayjob, unscheduled, waiting

MANIFESTS: list[dict[str, Any]] = [
    {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "run"}, "data": {"job.yaml": "originals: s3://faces/originals\n"}},
    {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "run"},
        "spec": {"entrypoint": "facemae protect", "backoffLimit": 2},
    },
]


def _with(**changes: Any) -> list[dict[str, Any]]:
    changed = copy.deepcopy(MANIFESTS)
    changed[1]["spec"].update(changes)
    return changed


def _posts(cluster: Cluster) -> list[str]:
    return [request.removeprefix("POST ") for request in cluster.requests if request.startswith("POST")]


def test_the_config_map_belongs_to_the_rayjob(cluster: Cluster) -> None:
    before = copy.deepcopy(MANIFESTS)
    assert apply(MANIFESTS) == ["configmap/run", "rayjob.ray.io/run"]
    assert before == MANIFESTS
    made, config = cluster.get("rayjobs", "run"), cluster.get("configmaps", "run")
    assert made is not None
    assert config is not None
    assert config["metadata"]["ownerReferences"] == [
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": "run", "uid": made["metadata"]["uid"]}
    ]
    assert [("dryRun=All" in each) for each in _posts(cluster)] == [True, True, False, False]
    assert all("fieldValidation=Strict" in each for each in _posts(cluster))
    cluster.remove("rayjobs", "run")
    assert cluster.get("configmaps", "run") is None


def test_nothing_is_made_when_the_server_refuses_one(cluster: Cluster) -> None:
    with pytest.raises(ConnectionError, match=r'unknown field "spec.backofLimit"'):
        apply(_with(backofLimit=3))
    cluster.always.append(
        (
            r"POST .*configmaps.*dryRun",
            Refusal(403, "Forbidden", "exceeded quota: q, requested: configmaps=1, used: configmaps=9, limited: configmaps=9"),
        )
    )
    with pytest.raises(ConnectionError, match=r"quota is used up: q limits configmaps=9"):
        apply(MANIFESTS)
    assert cluster.objects == {}
    assert all("dryRun=All" in each for each in _posts(cluster))


def test_what_was_made_goes_again_when_the_rest_cannot_be(cluster: Cluster) -> None:
    cluster.always.append((r"POST .*configmaps\?fieldValidation=Strict$", Refusal(500, "InternalError", "etcdserver: leader changed")))
    with pytest.raises(ConnectionError, match="leader changed"):
        apply(MANIFESTS)
    assert cluster.objects == {}
    assert any(request.startswith("DELETE") for request in cluster.requests)


def test_a_second_run_of_the_same_name_is_refused(cluster: Cluster) -> None:
    apply(MANIFESTS)
    first = copy.deepcopy(cluster.objects)
    cluster.status("run", jobDeploymentStatus="Running", jobStatus="RUNNING")
    with pytest.raises(
        ValueError, match=r"there is a run run in namespace faces already \(running\); .*facemae status.*facemae cancel.*--name"
    ):
        apply(MANIFESTS)
    cluster.status("run", jobDeploymentStatus="Failed", reason="AppFailed", message="exit code 2")
    with pytest.raises(ValueError, match=r"\(failed: the driver ended with an error: exit code 2\); .*kubectl delete rayjob run -n faces"):
        apply(MANIFESTS)
    assert cluster.objects.keys() == first.keys()


def test_a_config_map_left_by_something_else(cluster: Cluster) -> None:
    cluster.put("configmaps", {"metadata": {"name": "run"}})
    with pytest.raises(ValueError, match=r"there is a ConfigMap run in namespace faces already.*kubectl delete configmap run -n faces"):
        apply(MANIFESTS)
    assert cluster.get("rayjobs", "run") is None


def test_a_namespace_that_is_not_there(cluster: Cluster) -> None:
    with pytest.raises(ConnectionError, match="there is no namespace nowhere: make it with: kubectl create namespace nowhere"):
        apply(MANIFESTS, namespace="nowhere")


def test_a_cluster_without_kuberay(cluster: Cluster) -> None:
    cluster.kuberay = False
    with pytest.raises(ConnectionError, match="helm install kuberay-operator"):
        apply(MANIFESTS)
    with pytest.raises(ConnectionError, match="helm install kuberay-operator"):
        KubernetesRun("run").state()


@pytest.mark.parametrize(
    ("manifests", "message"),
    [
        ([{"kind": "Secret", "metadata": {"name": "s3"}}], "Secret s3: only RayJobs and ConfigMaps"),
        (MANIFESTS[:1], "these manifests have 0"),
        ([*MANIFESTS, MANIFESTS[1]], "have 2"),
        ([{**MANIFESTS[0], "metadata": {"name": "run", "namespace": "a"}}, MANIFESTS[1]], "different namespaces"),
    ],
)
def test_what_is_no_run_is_refused(cluster: Cluster, manifests: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply(manifests)
    assert cluster.requests == []


STATES = [
    ({}, Phase.WAITING, "KubeRay has not taken it up", 1),
    ({"jobDeploymentStatus": "Initializing"}, Phase.WAITING, "machines are being started", 1),
    ({"jobDeploymentStatus": "Initializing", "rayClusterStatus": {"desiredWorkerReplicas": 8}}, Phase.WAITING, "0 of 8 pods", 1),
    ({"jobDeploymentStatus": "Running"}, Phase.WAITING, "Ray has not started the driver", 1),
    ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "message": "Job is currently running."}, Phase.RUNNING, "Job is", 1),
    ({"jobDeploymentStatus": "Retrying", "failed": 1}, Phase.WAITING, "for the next one", 1),
    ({"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "failed": 2}, Phase.RUNNING, "", 3),
    ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "failed": 1, "succeeded": 1}, Phase.SUCCEEDED, "", 2),
    ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, Phase.STOPPED, "stopped in Ray", 1),
    ({"jobDeploymentStatus": "Failed", "reason": "AppFailed", "message": "a\nb", "failed": 3}, Phase.FAILED, "an error: a", 3),
    ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "failed": 1}, Phase.FAILED, "activeDeadlineSeconds", 1),
    ({"jobDeploymentStatus": "ValidationFailed", "message": "m"}, Phase.FAILED, "m", 1),
    ({"jobDeploymentStatus": "Suspended"}, Phase.WAITING, "suspended", 1),
]  # fmt: skip


@pytest.mark.parametrize(("status", "phase", "message", "attempt"), STATES)
def test_how_it_stands(cluster: Cluster, status: dict[str, Any], phase: Phase, message: str, attempt: int) -> None:
    cluster.put("rayjobs", rayjob(**status))
    run: SubmittedRun = KubernetesRun("run")
    state = run.state()
    assert (state.phase, state.attempt) == (phase, attempt)
    assert message in state.message
    assert "\n" not in state.message


def test_the_state_explains_what_it_waits_for(cluster: Cluster) -> None:
    cluster.put("rayjobs", rayjob(jobDeploymentStatus="Initializing"))
    cluster.put("pods", unscheduled("0/1 nodes are available: 1 Insufficient nvidia.com/gpu."))
    cluster.put("pods", pod("run-x7k2p-head-q", container=waiting("CreateContainerConfigError", 'secret "keys" not found')))
    cluster.put("pods", {**pod("others-head"), "metadata": {"name": "others-head", "labels": {"ray.io/cluster": "others"}}})
    cluster.put("events", event("NotTriggerScaleUp", "1 max node group size reached", type="Normal"))
    found = KubernetesRun("run").state().findings
    assert len(found) == 2
    assert "cluster autoscaler cannot help (1 max node group size reached)" in found[0]
    assert "no Secret keys" in found[1]


def test_what_may_not_be_looked_at_is_a_finding(cluster: Cluster) -> None:
    cluster.put("rayjobs", rayjob(jobDeploymentStatus="Running", jobStatus="RUNNING"))
    text = 'events is forbidden: User "ci" cannot list resource "events" in API group "" in the namespace "faces"'
    cluster.always.append(("/events", Refusal(403, "Forbidden", text)))
    state = KubernetesRun("run").state()
    assert state.phase is Phase.RUNNING
    assert len(state.findings) == 1
    assert "ci may not list events in namespace faces" in state.findings[0]


def test_cancelling_waits_for_the_pods(cluster: Cluster) -> None:
    cluster.put("rayjobs", rayjob(jobDeploymentStatus="Running", jobStatus="RUNNING"))
    run = KubernetesRun("run")
    run.cancel()
    state = run.state()
    assert not state.phase.ended
    assert "being stopped" in state.message
    with pytest.raises(ValueError, match=r"being stopped.*wait until it is gone"):
        apply(MANIFESTS)
    run.cancel()
    assert [request.split()[0] for request in cluster.requests].count("DELETE") == 1
    cluster.remove("rayjobs", "run")
    assert run.state().phase is Phase.STOPPED
    with pytest.raises(LookupError, match="there is no run run in namespace faces of http"):
        KubernetesRun("run").state()


def test_one_that_has_ended_and_is_cleared_away_stands_where_it_ended(cluster: Cluster) -> None:
    cluster.put("rayjobs", rayjob(jobDeploymentStatus="Failed", reason="AppFailed", failed=3))
    run = KubernetesRun("run")
    before = run.state()
    cluster.remove("rayjobs", "run")
    assert run.state() == before


def test_cancelling_one_that_has_ended_or_is_not_there(cluster: Cluster) -> None:
    with pytest.raises(LookupError, match="there is no run run"):
        KubernetesRun("run").cancel()
    cluster.put("rayjobs", rayjob(jobDeploymentStatus="Complete", jobStatus="SUCCEEDED"))
    KubernetesRun("run").cancel()
    assert cluster.get("rayjobs", "run") is not None
    assert not any(request.startswith("DELETE") for request in cluster.requests)


def test_a_run_that_took_the_name_in_the_meantime_is_left_alone(cluster: Cluster) -> None:
    made = cluster.put("rayjobs", rayjob(jobDeploymentStatus="Running", jobStatus="RUNNING"))
    run = KubernetesRun("run")
    seen = copy.deepcopy(made)
    made["metadata"]["uid"] = "another"
    run._rayjob = lambda: seen  # type: ignore[method-assign]
    run.cancel()
    assert cluster.get("rayjobs", "run") is made
    assert "deletionTimestamp" not in made["metadata"]


def test_cancelling_without_the_right_to(cluster: Cluster) -> None:
    cluster.put("rayjobs", rayjob(jobDeploymentStatus="Running", jobStatus="RUNNING"))
    text = 'rayjobs.ray.io "run" is forbidden: User "ci" cannot delete resource "rayjobs" in API group "ray.io" in the namespace "faces"'
    cluster.always.append(("DELETE", Refusal(403, "Forbidden", text)))
    with pytest.raises(
        ConnectionError, match=r"ci may not delete rayjobs\.ray\.io in namespace faces: .*kubectl auth can-i delete rayjobs\.ray\.io"
    ):
        KubernetesRun("run").cancel()


def test_nothing_secret_is_said(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither the token nor what stands in a manifest comes back in messages or on the terminal."""
    cluster.put("rayjobs", rayjob(jobDeploymentStatus="Failed", reason="AppFailed", message=f"GET with Bearer {TOKEN} failed"))
    said = [str(KubernetesRun("run").state())]
    for code in (400, 401, 403, 409, 422, 429, 500):
        cluster.always[:] = [("POST", Refusal(code, "x", f"Authorization: Bearer {TOKEN} at https://user:{TOKEN}@host"))]
        cluster.objects.clear()
        with pytest.raises((ValueError, ConnectionError)) as caught:
            apply(MANIFESTS)
        said.append(repr(caught.value))
    printed = capfd.readouterr()
    assert TOKEN not in "".join([*said, printed.out, printed.err])
