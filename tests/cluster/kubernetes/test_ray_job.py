"""The RayJob of a launch: what must be in it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shlex
import subprocess
from typing import Any

import pytest
import yaml

from cluster.kubernetes.launch import Launch
from cluster.kubernetes.nodes import PRESETS, Nodes
from cluster.kubernetes.ray_job import RAY_VERSION, entrypoint, manifests, to_yaml

CONFIG = "# faces\nroot: s3://bucket/faces\nfolder: results\n"
LAUNCH = Launch(
    name="faces",
    image="registry.example.org/facemae:0.1.0",
    job="pipeline",
    config_yaml=CONFIG,
    nodes=PRESETS["spot"],
    arguments=("--num-workers", "16"),
    secrets=("s3-access",),
    env={"AWS_REGION": "eu-central-1"},
    pull_secret="registry",
    retries=3,
    deadline_hours=2,
    keep_minutes=10,
    gcs_redis="facemae-redis:6379",
    s3_endpoint="https://s3.example.org",
    priority_class="facemae",
)


def job(launch: Launch = LAUNCH) -> dict[str, Any]:
    return manifests(launch)[1]


def pod_specs(launch: Launch = LAUNCH) -> dict[str, dict[str, Any]]:
    """The pod specs of a run by their place."""
    spec = job(launch)["spec"]
    cluster = spec["rayClusterSpec"]
    workers = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    return {"submitter": spec["submitterPodTemplate"]["spec"], "head": cluster["headGroupSpec"]["template"]["spec"], **workers}


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


def gib(amount: str) -> int:
    return int(amount.removesuffix("Gi"))


def test_the_configuration_arrives_as_it_was_written() -> None:
    config, run = manifests(LAUNCH)
    assert (config["apiVersion"], config["kind"], config["data"]) == ("v1", "ConfigMap", {"job.yaml": CONFIG})
    head = pod_specs()["head"]
    assert {"name": "config", "configMap": {"name": config["metadata"]["name"]}} in head["volumes"]
    assert {"name": "config", "mountPath": "/etc/facemae", "readOnly": True} in head["containers"][0]["volumeMounts"]
    assert run["metadata"]["name"] == "faces"
    assert run["metadata"]["namespace"] == config["metadata"]["namespace"] == "facemae"


@pytest.mark.parametrize("argument", ["a b", "it's", 'say "no"', "a;b&c|d>e", "*?[a]", "`id`", "\\", "#", "~", "!", "ü", "", "--", "{a,b}"])
def test_arguments_pass_two_shells_unchanged(argument: str) -> None:
    command = entrypoint(dataclasses.replace(LAUNCH, arguments=("--folder", argument))).replace("facemae", "printf '%s\\0'", 1)
    once = subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout.decode().split("\0")[:-1]
    assert once == ["pipeline", "--config", "/etc/facemae/job.yaml", "--folder", argument]
    again = shlex.join(["printf", "%s\\0", *once])  # as `ray job submit` joins what its shell gave it
    assert subprocess.run(["sh", "-c", again], capture_output=True, check=True).stdout.decode().split("\0")[:-1] == once


def test_the_run_ends_and_is_tried_again_as_told() -> None:
    spec = job()["spec"]
    assert (spec["submissionMode"], spec["backoffLimit"], spec["activeDeadlineSeconds"]) == ("K8sJobMode", 3, 7200)
    assert (spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"]) == (True, 600)
    assert "activeDeadlineSeconds" not in job(dataclasses.replace(LAUNCH, deadline_hours=None))["spec"]


def test_pods_come_and_go_with_the_work() -> None:
    cluster = job()["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["workerGroupSpecs"][0] | {"template": None} == {
        "groupName": "spot",
        "replicas": 0,
        "minReplicas": 0,
        "maxReplicas": 16,
        "rayStartParams": cluster["workerGroupSpecs"][0]["rayStartParams"],
        "template": None,
    }
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for place in ("head", "spot"):  # the autoscaler's second version replaces pods, and takes no policy that restarts them
        assert pod_specs()[place].get("restartPolicy", "Never") == "Never"


def test_ray_is_ours_and_asks_for_its_token() -> None:
    cluster = job()["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == RAY_VERSION == importlib.metadata.version("ray")
    assert cluster["authOptions"] == {"mode": "token"}


def test_requests_are_limits_and_volumes_fit_them() -> None:
    for preset, nodes in PRESETS.items():
        for place, spec in pod_specs(dataclasses.replace(LAUNCH, nodes=nodes)).items():
            resources = spec["containers"][0]["resources"]
            assert resources["requests"] == resources["limits"], (preset, place)
            assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["limits"])
            sizes = [volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume]
            in_memory = sum(gib(size["sizeLimit"]) for size in sizes if size.get("medium") == "Memory")
            on_disk = sum(gib(size["sizeLimit"]) for size in sizes if "medium" not in size)
            assert in_memory <= 0.4 * gib(resources["limits"]["memory"])
            assert on_disk <= gib(resources["limits"]["ephemeral-storage"])


def test_the_object_store_fits_shared_memory_and_spills_to_a_volume() -> None:
    cluster = job()["spec"]["rayClusterSpec"]
    groups = {"head": cluster["headGroupSpec"], "spot": cluster["workerGroupSpecs"][0]}
    for group in groups.values():
        spec, start = group["template"]["spec"], group["rayStartParams"]
        mounts = {mount["mountPath"]: mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        shared = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert shared["medium"] == "Memory"
        assert int(start["object-store-memory"]) <= gib(shared["sizeLimit"]) * 1024**3
        assert "emptyDir" in volumes[mounts[start["object-spilling-directory"]]]


def test_pods_are_restricted() -> None:
    containers = [spec["containers"][0] for spec in pod_specs().values()]
    autoscaler = job()["spec"]["rayClusterSpec"]["autoscalerOptions"]
    for container in (*containers, autoscaler):
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
    for spec in pod_specs().values():
        assert spec["securityContext"]["runAsNonRoot"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)


def test_only_the_autoscaler_holds_the_token_of_the_kubernetes_api() -> None:
    token = "/var/run/secrets/kubernetes.io/serviceaccount"
    for spec in pod_specs().values():
        assert spec["automountServiceAccountToken"] is False
        assert spec["serviceAccountName"] == "facemae"
        assert token not in {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
    autoscaler = job()["spec"]["rayClusterSpec"]["autoscalerOptions"]
    mounts = {mount["mountPath"]: mount["name"] for mount in autoscaler["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod_specs()["head"]["volumes"]}
    assert "serviceAccountToken" in volumes[mounts[token]]["projected"]["sources"][0]


def test_a_worker_drains_before_it_goes() -> None:
    for nodes in PRESETS.values():
        launch = dataclasses.replace(LAUNCH, nodes=nodes)
        for group in nodes.groups:
            spec = pod_specs(launch)[group.name]
            command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            assert command[:-1] == ["python", "-m", "cluster.drain", "--grace"]
            assert int(command[-1]) < spec["terminationGracePeriodSeconds"]
    assert pod_specs()["spot"]["terminationGracePeriodSeconds"] < 120  # a spot machine's notice


def test_the_head_outlasts_a_cancelled_driver_which_outlasts_its_workers() -> None:
    for nodes in PRESETS.values():
        launch = dataclasses.replace(LAUNCH, nodes=nodes)
        head = pod_specs(launch)["head"]
        *command, seconds = head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["python", "-m", "cluster.driver_end", "--grace"]
        assert environment(head["containers"][0])["RAY_JOB_STOP_WAIT_TIME_S"] == seconds
        assert max(group.drain_seconds for group in nodes.groups) <= int(seconds) < head["terminationGracePeriodSeconds"]


def test_workers_go_to_the_machines_meant_for_them() -> None:
    spec = pod_specs()["spot"]
    assert spec["nodeSelector"] == {"nvidia.com/gpu.present": "true", "karpenter.sh/capacity-type": "spot"}
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
    assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    keys = [constraint["topologyKey"] for constraint in spec["topologySpreadConstraints"]]
    assert keys == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    assert pod_specs()["head"]["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}
    cpu = pod_specs(dataclasses.replace(LAUNCH, nodes=PRESETS["cpu"]))["cpu"]
    assert not {"nodeSelector", "tolerations"} & set(cpu)


def test_spread_counts_pods_by_labels_that_they_have() -> None:
    template = job()["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]
    for constraint in template["spec"]["topologySpreadConstraints"]:
        assert constraint["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_kuberay_finds_its_own_labels_and_ports() -> None:
    cluster = job()["spec"]["rayClusterSpec"]
    labels = cluster["headGroupSpec"]["template"]["metadata"]["labels"]
    assert "app.kubernetes.io/name" not in labels  # the head's service selects by KubeRay's own
    ports = {port["name"]: port["containerPort"] for port in pod_specs()["head"]["containers"][0]["ports"]}
    assert ports == {"gcs-server": 6379, "dashboard": 8265, "metrics": 8080}


def test_the_environment_says_who_runs_it() -> None:
    for place in ("head", "spot"):
        container = pod_specs()[place]["containers"][0]
        values = environment(container)
        assert values["FACEMAE_RETRIED"] == "1"
        assert values["FACEMAE_LOG"] == "json"
        assert values["AWS_ENDPOINT_URL"] == "https://s3.example.org"
        assert values["AWS_REGION"] == "eu-central-1"
        assert values["DS_ACCELERATOR"] == ("cpu" if place == "head" else "cuda")
        assert container["envFrom"] == [{"secretRef": {"name": "s3-access"}}]


def test_the_head_can_be_replaced_where_there_is_a_redis() -> None:
    options = job()["spec"]["rayClusterSpec"]["gcsFaultToleranceOptions"]
    secret = {"valueFrom": {"secretKeyRef": {"name": "facemae-redis", "key": "password"}}}
    assert options == {"redisAddress": "facemae-redis:6379", "redisPassword": secret}
    assert not any("REDIS" in name for name in environment(pod_specs()["head"]["containers"][0]))
    assert "gcsFaultToleranceOptions" not in job(dataclasses.replace(LAUNCH, gcs_redis=None))["spec"]["rayClusterSpec"]


def test_every_pod_can_pull_and_has_its_priority() -> None:
    for spec in pod_specs().values():
        assert spec["imagePullSecrets"] == [{"name": "registry"}]
        assert spec["priorityClassName"] == "facemae"
        assert spec["containers"][0]["image"] == LAUNCH.image


def test_yaml_is_what_it_was_made_of_and_readable() -> None:
    made = manifests(LAUNCH)
    text = to_yaml(made)
    assert list(yaml.safe_load_all(text)) == made
    assert text == to_yaml(manifests(LAUNCH))
    assert "  job.yaml: |\n    # faces\n    root: s3://bucket/faces\n" in text
    assert "null" not in text


def test_pods_of_other_machines() -> None:
    nodes = Nodes(groups=PRESETS["gpu"].groups, head_selector={"pool": "system"}).on({"pool": "gpu"})
    specs = pod_specs(dataclasses.replace(LAUNCH, nodes=nodes))
    assert specs["head"]["nodeSelector"] == specs["submitter"]["nodeSelector"] == {"pool": "system"}
    assert specs["gpu"]["nodeSelector"] == {"pool": "gpu"}
