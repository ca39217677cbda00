"""infra/monitoring/podmonitor.yaml: accepted, finds the pods of every preset, and the network lets Prometheus reach them."""

from __future__ import annotations

import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster.kubernetes.nodes import PRESETS
from cluster.kubernetes.ray_job import manifests
from tests.infra.kubernetes.check import check, load
from tests.infra.kubernetes.monitor import watches
from tests.infra.kubernetes.network import End, allows
from tests.infra.kubernetes.pod import Pod, pods
from tests.infra.kubernetes.problem import Object
from tests.infra.kubernetes.test_launch import launch
from tests.infra.kubernetes.wrong import change

INFRA = Path(__file__).parents[3] / "infra"
FILE = INFRA / "monitoring" / "podmonitor.yaml"


def monitor() -> Object:
    (found,) = load(FILE.read_text())
    return found


def ray_pods(preset: str) -> list[Pod]:
    return [pod for pod in pods(manifests(launch(nodes=PRESETS[preset]))[1]) if pod.is_ray]


def test_it_is_accepted() -> None:
    assert check([monitor()]) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_it_watches_the_pods_of_every_preset(preset: str) -> None:
    assert list(watches(monitor(), ray_pods(preset))) == []


def test_prometheus_reaches_what_it_watches() -> None:
    policies = load((INFRA / "kubernetes" / "base" / "network-policy.yaml").read_text())
    for policy in policies:
        policy["metadata"]["namespace"] = "facemae"  # as kustomize does
    prometheus = End({"app.kubernetes.io/name": "prometheus"}, "monitoring")
    for pod in ray_pods("gpu"):
        ports = {port["name"]: port["containerPort"] for _, container in pod.containers() for port in container.get("ports") or ()}
        for endpoint in monitor()["spec"]["podMetricsEndpoints"]:
            assert allows(policies, prometheus, End(pod.labels, "facemae"), ports[endpoint["port"]])


def test_the_pages_command_makes_a_rule_of_the_alerts() -> None:
    page = (INFRA.parent / "docs" / "monitoring.md").read_text()
    (command,) = re.findall(r"^    (\(printf .*?\n.*?\)) \| kubectl --namespace facemae apply --filename -$", page, re.M)
    done = subprocess.run(["bash", "-c", command], cwd=INFRA.parent, capture_output=True, text=True, timeout=60)
    (rule,) = load(done.stdout)
    assert (rule["apiVersion"], rule["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    (alerts,) = load((INFRA / "monitoring" / "alerts.yaml").read_text())
    assert rule["spec"] == alerts
    assert set(alerts) == {"groups"}  # its definition knows no other field
    assert {key for group in alerts["groups"] for key in group} <= {"name", "interval", "rules", "limit", "labels"}
    fields = {"alert", "expr", "for", "labels", "annotations", "record", "keep_firing_for"}
    assert {key for group in alerts["groups"] for found in group["rules"] for key in found} <= fields


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("spec.podMetricsEndpoint", [], "no such field"),
        ("spec.podMetricsEndpoints", [], "members"),
        ("spec.podMetricsEndpoints[0].interval", "15 s", "match"),
        ("spec.podMetricsEndpoints[0].portNumber", 8080, "port or portNumber"),
        ("spec.podMetricsEndpoints[0].relabelings[0].sourceLabels", ["a/b"], "match"),
        ("spec.podMetricsEndpoints[0].relabelings[0].action", "set", "none of"),
        ("spec.selector", "ray", "object"),
        ("metadata.name", "Face MAE", "small letters"),
    ],
)
def test_a_wrong_one_is_refused(path: str, value: Any, reason: str) -> None:
    wrong = copy.deepcopy(monitor())
    change(wrong, path, value)
    (found,) = check([wrong])
    assert found.path.startswith(path) or path.startswith(found.path)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("spec.selector.matchLabels", {"app": "ray"}, "does not select head"),
        ("spec.podMetricsEndpoints[0].port", "metric", "has no port"),
        ("spec.podMetricsEndpoints[0].relabelings[0].sourceLabels", ["__meta_kubernetes_pod_label_ray_cluster"], "no label"),
    ],
)
def test_one_that_watches_nothing_is_told(path: str, value: Any, reason: str) -> None:
    wrong = copy.deepcopy(monitor())
    change(wrong, path, value)
    found = list(watches(wrong, ray_pods("cpu")))
    assert {place for place, _ in found} == {path.removesuffix(".matchLabels")}
    assert any(reason in words for _, words in found)
