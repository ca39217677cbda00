"""The role of those who submit: what the program asks of the API server is granted, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cluster.kubernetes.run import KubernetesRun, apply
from cluster.submitted import Phase
from tests.cluster.kubernetes.api_server import Cluster
from tests.cluster.kubernetes.operator import Attempt, operating
from tests.infra.kubernetes.check import load

ROLE = Path(__file__).parents[3] / "infra" / "kubernetes" / "base" / "submitter.yaml"
_REQUEST = re.compile(
    r"(?P<method>\w+) /(?:api|apis/(?P<group>[^/]+))/\w+/namespaces/[^/]+/(?P<resource>\w+)(?:/(?P<name>[^/?]+))?(?:/(?P<part>\w+))?"
)
MANIFESTS: list[dict[str, Any]] = [
    {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "run"}, "data": {"job.yaml": "a: 1\n"}},
    {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "run"}, "spec": {"entrypoint": "facemae protect"}},
]
Right = tuple[str, str, str]
"""Group, resource, verb."""


def right(request: str) -> Right:
    """What a request needs, by Kubernetes' rules."""
    found = _REQUEST.match(request)
    assert found is not None, request
    query = parse_qs(urlsplit(request.split(maxsplit=1)[1]).query)
    verb = {"POST": "create", "DELETE": "delete", "PATCH": "patch", "PUT": "update"}.get(found["method"])
    if verb is None:
        verb = "watch" if "watch" in query else "get" if found["name"] else "list"
    resource = found["resource"] + (f"/{found['part']}" if found["part"] else "")
    return found["group"] or "", resource, verb


def granted() -> set[Right]:
    (role,) = (thing for thing in load(ROLE.read_text()) if thing["kind"] == "Role")
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_a_submitter_may_do_what_the_program_does(cluster: Cluster) -> None:
    """Handed over, asked, followed to its end; another one cancelled; one whose ConfigMap cannot be made."""
    with operating(cluster, Attempt(["a line"])):
        apply(MANIFESTS)
        run = KubernetesRun("run")
        list(run.log())
        assert run.state().phase is Phase.SUCCEEDED
    apply([thing | {"metadata": {"name": "other"}} for thing in MANIFESTS])
    KubernetesRun("other").state()
    KubernetesRun("other").cancel()
    asked = {right(request) for request in cluster.requests}
    assert asked - granted() == set()
    assert {resource for _, resource, _ in granted() - asked} <= {"rayclusters", *(resource for _, resource, _ in asked)}  # for kubectl
    assert {verb for _, _, verb in asked} >= {"get", "list", "create", "delete"}


def test_the_role_grants_no_more_than_one_namespace_and_nothing_wide() -> None:
    objects = load(ROLE.read_text())
    assert {thing["kind"] for thing in objects} == {"Role", "RoleBinding"}
    assert not any("*" in right or right[1] in ("secrets", "pods/exec", "serviceaccounts/token") for right in granted())
    assert {verb for _, resource, verb in granted() if resource != "rayjobs" and resource != "configmaps"} <= {"get", "list", "watch"}
