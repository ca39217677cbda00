"""The API server asked through the real client: refusals explained, what is tried again and what is not."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from pathlib import Path

import pytest

from cluster.kubernetes import api
from cluster.kubernetes.api import Api, Refused, path_of
from tests.cluster.kubernetes.api_server import TOKEN, Cluster, Refusal, write_kubeconfig

PODS = path_of("pods", "faces")
RBAC = (
    'pods is forbidden: User "system:serviceaccount:faces:ci" cannot list resource "pods" in API group "" in the namespace "faces"'
)  # fmt: skip


def _map(name: str = "m") -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"job.yaml": "a: 1"}}


def test_a_list_is_read_page_by_page(cluster: Cluster) -> None:
    for index in range(5):
        cluster.put("pods", {"metadata": {"name": f"p{index}"}})
    assert [each["metadata"]["name"] for each in Api().items(PODS, limit="2")] == [f"p{index}" for index in range(5)]


def test_the_contexts_namespace_is_taken(cluster: Cluster) -> None:
    assert Api().namespace == "faces"
    assert Api(context="elsewhere").namespace == "default"
    assert Api(context="elsewhere", namespace="n").namespace == "n"


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (Refusal(403, "Forbidden", RBAC), r"system:serviceaccount:faces:ci may not list pods in namespace faces: .*infra/kubernetes/base.*kubectl auth can-i list pods -n faces"),  # noqa: E501
        (Refusal(403, "Forbidden", RBAC.replace("system:serviceaccount:faces:ci", "system:anonymous")), "anonymous one: no credentials"),
        (Refusal(403, "Forbidden", 'pods "x" is forbidden: unable to create new content in namespace faces because it is being terminated'), "being deleted"),  # noqa: E501
        (Refusal(403, "Forbidden", "something new"), "forbids to get pods: something new"),
        (Refusal(422, "Invalid", 'RayJob "run" is invalid: spec.x: Required value'), "refuses the manifest: RayJob .*versions"),
        (Refusal(500, "InternalError", 'Internal error occurred: failed calling webhook "mrayjob.kb.io": connection refused'), "webhook .*does not answer"),  # noqa: E501
        (Refusal(404, "NotFound", 'namespaces "faces" not found', {"kind": "namespaces", "name": "faces"}), "kubectl create namespace"),
        (Refusal(405, "MethodNotAllowed", "no"), r"refuses to get pods \(405\): no"),
    ],
)  # fmt: skip
def test_a_refusal_is_explained_and_not_repeated(cluster: Cluster, refusal: Refusal, expected: str) -> None:
    cluster.always.append(("GET", refusal))
    with pytest.raises(Refused, match=expected) as caught:
        Api().get(PODS)
    assert "\n" not in str(caught.value)
    assert len(cluster.requests) == 1


def test_expired_credentials_are_named_and_not_shown(cluster: Cluster) -> None:
    cluster.token = "another"
    with pytest.raises(Refused, match=r"does not accept the credentials \(401\): they have expired") as caught:
        Api().get(PODS)
    assert TOKEN not in str(caught.value)


def test_an_absent_kuberay_is_named(cluster: Cluster) -> None:
    cluster.kuberay = False
    with pytest.raises(Refused, match=r"KubeRay is not installed .*helm install kuberay-operator .*--version 1\.7\.0"):
        Api().get(path_of("rayjobs", "faces", "run"))


@pytest.mark.parametrize("code", [429, 500, 502, 503, 504])
def test_passing_troubles_are_tried_again(cluster: Cluster, code: int) -> None:
    cluster.refusals += [("GET", Refusal(code, "x", "busy", retry_after=0))] * (api.TRIES - 1)
    assert Api().get(PODS)["items"] == []
    assert len(cluster.requests) == api.TRIES


@pytest.mark.parametrize(("code", "expected"), [(429, r"overloaded \(429\)"), (503, r"fails \(503\): busy")])
def test_they_are_given_up_in_the_end(cluster: Cluster, code: int, expected: str) -> None:
    cluster.always.append(("GET", Refusal(code, "x", "busy")))
    with pytest.raises(Refused, match=expected):
        Api().get(PODS)
    assert len(cluster.requests) == api.TRIES


def test_a_change_is_only_sent_again_when_it_was_not_made(cluster: Cluster) -> None:
    path = path_of("configmaps", "faces")
    cluster.refusals.append(("POST", Refusal(429, "TooManyRequests", "later", retry_after=0)))
    assert Api().create(path, _map())["metadata"]["uid"]
    cluster.refusals.append(("POST", Refusal(500, "InternalError", "etcd timed out")))
    with pytest.raises(Refused, match="etcd timed out"):
        Api().create(path, _map("n"))
    assert [request.split()[0] for request in cluster.requests] == ["POST"] * 3


def test_unknown_fields_are_refused_and_a_dry_run_keeps_nothing(cluster: Cluster) -> None:
    path = path_of("configmaps", "faces")
    Api().create(path, _map(), dry_run=True)
    assert cluster.get("configmaps", "m") is None
    with pytest.raises(Refused, match='unknown field "dat"'):
        Api().create(path, {**_map(), "dat": {}})


def test_a_server_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    write_kubeconfig(tmp_path / "k", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "k"))
    monkeypatch.setattr(api, "PAUSE_SECONDS", 0.01)
    with pytest.raises(ConnectionError, match=f"http://127.0.0.1:{port} does not answer .*Connection refused.*kubectl cluster-info"):
        Api().get(PODS)


def test_a_certificate_that_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key)]
    subprocess.run([*command, "-out", str(certificate), "-days", "2", "-subj", "/CN=127.0.0.1"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            import contextlib

            with contextlib.suppress(OSError):
                context.wrap_socket(listener.accept()[0], server_side=True)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        write_kubeconfig(tmp_path / "k", f"https://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "k"))
        with pytest.raises(ConnectionError, match=r"no trusted connection to https://127.*certificate-authority is not this cluster's"):
            Api().get(PODS)
        thread.join(10)


def test_a_kubeconfig_that_cannot_be_used(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"--context nowhere: .* has no such context; it has elsewhere, here"):
        Api(context="nowhere")
    (tmp_path / "broken").write_text("clusters: 3\n")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "broken"))
    with pytest.raises(ValueError, match=r"the kubeconfig .*broken cannot be read \(TypeError\)"):
        Api()
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"there is no kubeconfig at .*none: log in to the cluster, or set KUBECONFIG"):
        Api()


def test_inside_a_pod_its_service_account_is_used(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.config import incluster_config

    url = Api().server
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "namespace").write_text("faces\n")
    (tmp_path / "ca.crt").write_text("a certificate")
    monkeypatch.setattr(api, "SERVICE_ACCOUNT", str(tmp_path))
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", url.rpartition(":")[2])
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    inside = Api()
    assert (inside.namespace, inside.server) == ("faces", url.replace("http:", "https:"))
