"""infra/kubernetes: what a pod finds there, and who may speak to whom."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from cluster.kubernetes.nodes import PRESETS
from jobs.submit_job import read_job
from tests.infra.kubernetes.check import check, definitions, load
from tests.infra.kubernetes.network import End, allows
from tests.infra.kubernetes.pod import Pod, pods
from tests.infra.kubernetes.problem import Object, place
from tests.infra.kubernetes.quantity import quantity

FOLDER = Path(__file__).parents[3] / "infra" / "kubernetes"
JOBS = sorted(file.stem for file in (FOLDER / "jobs").glob("*.yaml"))

OUTSIDE = {"static-secret": "Secret/facemae-s3", "redis": "Secret/facemae-redis"}
"""What a component leaves to be made apart."""

BASE = ("ServiceAccount/facemae", "PriorityClass/facemae")
"""What the base brings and a single job's manifest leaves to it."""


def kustomize(folder: Path) -> list[Object]:
    """What `kubectl apply -k FOLDER` would apply."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here to run kustomize")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return load(done.stdout)


def with_components(tmp_path: Path, overlay: str, components: Iterable[str]) -> list[Object]:
    """An overlay of somebody's own: one of ours with components."""
    shutil.copytree(FOLDER, tmp_path / "kubernetes", ignore=shutil.ignore_patterns("__pycache__"))
    own = tmp_path / "kubernetes" / "overlays" / "own"
    own.mkdir()
    content = {"resources": [f"../{overlay}"], "components": [f"../../components/{name}" for name in components]}
    (own / "kustomization.yaml").write_text(
        yaml.safe_dump({"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **content})
    )
    return kustomize(own)


@pytest.mark.parametrize("component", OUTSIDE)
def test_a_secret_that_must_be_made_apart_is_told(component: str, tmp_path: Path) -> None:
    found = {problem.reason.partition(" here")[0] for problem in check(with_components(tmp_path, "spot", [component]), crd=definitions())}
    kind, _, name = OUTSIDE[component].partition("/")
    assert found == {f"there is no {kind} {name!r}"}


@pytest.mark.parametrize("job", JOBS)
def test_every_job_is_accepted(job: str) -> None:
    assert check(load((FOLDER / "jobs" / f"{job}.yaml").read_text()), BASE, crd=definitions()) == []


def configurations() -> list[Path]:
    return sorted([*(FOLDER / "jobs").glob("*.yaml"), *(FOLDER / "overlays").glob("*/rayjob.yaml")])


@pytest.mark.parametrize("file", configurations(), ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_what_the_pod_finds_is_a_configuration_of_its_job(file: Path, tmp_path: Path) -> None:
    """The command, the mount and the ConfigMap's key fit each other, and the job's own checks take what is there."""
    objects = load(file.read_text())
    job = next(thing for thing in objects if thing["kind"] == "RayJob")
    (head,) = (pod for pod in pods(job) if pod.role == "head")
    command, name, flag, path, *rest = job["spec"]["entrypoint"].split()
    assert (command, flag, rest) == ("facemae", "--config", [])
    mount = next(mount for mount in head.spec["containers"][0]["volumeMounts"] if path.startswith(mount["mountPath"] + "/"))
    volume = next(volume for volume in head.spec["volumes"] if volume["name"] == mount["name"])
    config = next(thing for thing in objects if place(thing) == f"ConfigMap/{volume['configMap']['name']}")
    (tmp_path / "job.yaml").write_text(config["data"][Path(path).name])
    assert read_job(name, str(tmp_path / "job.yaml")).name == name


def test_the_quota_holds_a_run_of_its_overlay(tmp_path: Path) -> None:
    objects = with_components(tmp_path, "gpu", ["quota"])
    (hard,) = (thing["spec"]["hard"] for thing in objects if thing["kind"] == "ResourceQuota")
    wanted: Counter[str] = Counter()
    for thing in objects:
        for pod in pods(thing):
            times = pod.group.get("maxReplicas", 1)
            wanted["pods"] += times
            for _, container in pod.all_containers():
                for name, amount in container["resources"]["requests"].items():
                    wanted[f"requests.{name}"] += times * (quantity(amount) or 0)
    assert wanted["requests.nvidia.com/gpu"] == 8
    assert {name: amount for name, amount in hard.items() if wanted[name] > (quantity(amount) or 0)} == {}


def test_the_page_states_the_sizes_of_the_presets() -> None:
    rows = re.findall(r"^\| (\w+) \| (.*?) \| 0 to (\d+) \| (.*?) \|", (FOLDER.parents[1] / "docs" / "cluster.md").read_text(), re.M)
    assert {name: int(pods) for name, _, pods, _ in rows} == {name: nodes.groups[0].pods for name, nodes in PRESETS.items()}
    for name, head, _, worker in rows:
        nodes, group = PRESETS[name], PRESETS[name].groups[0]
        assert head.startswith("the same") or head == f"{nodes.head_cpus} cores, {nodes.head_memory_gib} GiB"
        size = f"{group.cpus} cores, {group.memory_gib} GiB" + (f", {group.gpus} GPU" if group.gpus else "")
        assert worker.startswith("the same") or worker == size
    assert {(nodes.head_cpus, nodes.head_memory_gib) for name, nodes in PRESETS.items() if name != "large"} == {(3, 12)}
    assert {(nodes.groups[0].cpus, nodes.groups[0].memory_gib) for name, nodes in PRESETS.items() if name != "large"} == {(7, 26)}


# Who may speak to whom


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    return with_components(tmp_path_factory.mktemp("network"), "gpu", ["redis"])


def ends(objects: list[Object]) -> dict[str, End]:
    """The pods of a bundle by role, and others that matter or must not get in."""
    found = {pod.role: _end(pod) for thing in objects for pod in pods(thing)}
    assert set(found) == {"head", "worker", "submitter", "StatefulSet"}
    return found | {
        "redis": found["StatefulSet"],
        "another run's head": dataclasses.replace(found["head"], labels=dict(found["head"].labels) | {"app.kubernetes.io/instance": "b"}),
        "operator": End({"app.kubernetes.io/name": "kuberay-operator"}, "kuberay-system"),
        "operator beside": End({"app.kubernetes.io/name": "kuberay-operator"}, "default"),
        "prometheus": End({"app.kubernetes.io/name": "prometheus"}, "monitoring"),
        "dns": End({"k8s-app": "kube-dns"}, "kube-system"),
        "stranger": End({"app": "web", "ray.io/is-ray-node": "yes"}, "web"),
        "neighbour": End({"app": "web"}, "facemae"),
        "impostor": End({"app.kubernetes.io/part-of": "facemae", "app.kubernetes.io/component": "head"}, "web"),
        "bucket": End(address="52.218.0.1"),
        "machine": End(address="169.254.169.254"),
        "api": End(address="10.96.0.1"),
    }


def _end(pod: Pod) -> End:
    ports = {port["name"]: port["containerPort"] for _, container in pod.containers() for port in container.get("ports") or ()}
    return End(pod.labels, "facemae", ports=ports)


NEEDED = [
    ("worker", "head", 6379),
    ("head", "worker", 10002),
    ("worker", "worker", 20000),
    ("submitter", "head", 8265),
    ("operator", "head", 8265),
    ("operator beside", "head", 8265),
    ("prometheus", "head", 8080),
    ("prometheus", "worker", 8080),
    ("head", "redis", 6379),
    ("head", "bucket", 443),
    ("worker", "bucket", 443),
    ("head", "api", 443),
    ("head", "api", 6443),
]
REFUSED = [
    *(("stranger", target, port) for target in ("head", "worker") for port in (6379, 8265, 10001, 8080)),
    *(("neighbour", "head", port) for port in (6379, 8265, 10001, 8080)),
    *(("impostor", target, port) for target, port in (("head", 8265), ("worker", 10002), ("redis", 6379))),
    ("prometheus", "head", 8265),
    ("prometheus", "head", 6379),
    ("operator", "head", 6379),
    ("operator", "worker", 8265),
    ("worker", "redis", 6379),
    ("submitter", "redis", 6379),
    ("neighbour", "redis", 6379),
    ("redis", "bucket", 443),
    ("redis", "head", 8265),
    ("worker", "machine", 80),
    ("head", "machine", 80),
    ("head", "machine", 443),
    ("worker", "api", 6443),
    ("worker", "bucket", 80),
    ("worker", "bucket", 22),
    ("worker", "stranger", 8080),
    ("stranger", "neighbour", 80),
    ("neighbour", "bucket", 443),
]


@pytest.mark.parametrize(("source", "target", "port"), NEEDED, ids=str)
def test_what_a_run_needs_gets_through(bundle: list[Object], source: str, target: str, port: int) -> None:
    policies, known = [thing for thing in bundle if thing["kind"] == "NetworkPolicy"], ends(bundle)
    assert allows(policies, known[source], known[target], port)


@pytest.mark.parametrize("source", ["head", "worker", "submitter"])
@pytest.mark.parametrize("protocol", ["UDP", "TCP"])
def test_names_are_resolved(bundle: list[Object], source: str, protocol: str) -> None:
    policies, known = [thing for thing in bundle if thing["kind"] == "NetworkPolicy"], ends(bundle)
    assert allows(policies, known[source], known["dns"], 53, protocol)
    assert allows(policies, known[source], End(address="169.254.20.10"), 53, protocol)  # node-local cache


@pytest.mark.parametrize(("source", "target", "port"), REFUSED, ids=str)
def test_what_a_run_does_not_need_does_not_get_through(bundle: list[Object], source: str, target: str, port: int) -> None:
    policies, known = [thing for thing in bundle if thing["kind"] == "NetworkPolicy"], ends(bundle)
    assert not allows(policies, known[source], known[target], port)
    assert allows([], known[source], known[target], port)  # it is the policies that refuse


def test_no_policy_is_there_for_nothing(bundle: list[Object]) -> None:
    """Without any one of them something that a run needs is cut off, or something gets through that it does not need."""
    policies, known = [thing for thing in bundle if thing["kind"] == "NetworkPolicy"], ends(bundle)
    lookups = [("worker", "dns", 53)]
    for policy in policies:
        left = [other for other in policies if other is not policy]
        cut_off = [each for each in (*NEEDED, *lookups) if not allows(left, known[each[0]], known[each[1]], each[2])]
        let_in = [each for each in REFUSED if allows(left, known[each[0]], known[each[1]], each[2])]
        assert cut_off or let_in, place(policy)
