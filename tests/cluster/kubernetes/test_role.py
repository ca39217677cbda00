"""The role that infra gives to users allows all that submit, follow and cancel ask for, and nothing that they do not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from cluster.kubernetes.run import KubernetesRun, apply
from tests.cluster.kubernetes.api_server import Cluster, Refusal
from tests.cluster.kubernetes.objects import rayjob
from tests.cluster.kubernetes.test_run import MANIFESTS

ROLE = Path(__file__).parents[3] / "infra/kubernetes/base/submitter.yaml"
VERBS = {"POST": "create", "DELETE": "delete", "GET": "list"}
REQUEST = re.compile(r"(\w+) /(?:api/v1|apis/([^/]+)/v1)/namespaces/[^/]+/(\w+)(?:/([^/?]+))?(?:/(\w+))?")


def _asked(request: str) -> tuple[str, str, str]:
    """API group, resource and verb."""
    found = REQUEST.match(request)
    assert found is not None, request
    method, group, resource, name, part = found.groups()
    return group or "", f"{resource}/{part}" if part else resource, "get" if method == "GET" and name else VERBS[method]


def test_the_role_allows_what_is_asked(cluster: Cluster) -> None:
    apply(MANIFESTS)
    cluster.status("run", jobDeploymentStatus="Running", jobStatus="RUNNING", rayClusterName="run-x7k2p")
    cluster.submitter("run", "run-a").write("one")
    run = KubernetesRun("run")
    run.state()
    log = run.log()
    assert next(log) == "one"
    cluster.exit("run-a")
    cluster.status("run", jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    assert list(log) == []
    cluster.remove("rayjobs", "run")
    cluster.refusals.append((r"POST .*configmaps\?fieldValidation=Strict$", Refusal(500, "InternalError", "x")))
    with pytest.raises(ConnectionError):
        apply(MANIFESTS)
    cluster.put("rayjobs", rayjob(jobDeploymentStatus="Running"))
    KubernetesRun("run").cancel()
    asked = {_asked(request) for request in cluster.requests}
    role = next(each for each in yaml.safe_load_all(ROLE.read_text()) if each["kind"] == "Role")
    allowed = {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    assert asked <= allowed
    assert {resource for _, resource, _ in allowed} - {resource for _, resource, _ in asked} <= {"rayclusters"}  # for the eye: kubectl
