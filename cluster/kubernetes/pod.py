"""What the pods of a run are made of: security, resources, volumes, probes, where they go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kubernetes import client

USER = 1000  # the image's user
HOME = "/home/facemae"
CONFIG = "/etc/facemae"
SPILL = "/spill"
METRICS_PORT = 8080
GPU = "nvidia.com/gpu"
API_TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"
_SHM_SHARE = 0.3  # of a pod's memory, as Ray's own default
_HEALTH = "import sys, urllib.request as r; [r.urlopen(url, timeout=8).read() for url in sys.argv[1:]]"
_RAYLET = "http://localhost:52365/api/local_raylet_healthz"
_GCS = "http://localhost:8265/api/gcs_healthz"


def labels(run: str, component: str) -> dict[str, str]:
    """Labels of a run's objects. KubeRay finds its head by ``app.kubernetes.io/name``, which is therefore left to it."""
    return {"app.kubernetes.io/part-of": "facemae", "app.kubernetes.io/instance": run, "app.kubernetes.io/component": component}


def security() -> client.V1SecurityContext:
    """Of every container: as the "restricted" pod security standard asks, and nothing of the image can be written."""
    return client.V1SecurityContext(
        allow_privilege_escalation=False,
        capabilities=client.V1Capabilities(drop=["ALL"]),
        read_only_root_filesystem=True,
        run_as_non_root=True,
        run_as_user=USER,
        seccomp_profile=client.V1SeccompProfile(type="RuntimeDefault"),
    )


def pod_security() -> client.V1PodSecurityContext:
    """Of every pod; volumes belong to the group of the image's user."""
    return client.V1PodSecurityContext(
        fs_group=USER,
        run_as_group=USER,
        run_as_non_root=True,
        run_as_user=USER,
        seccomp_profile=client.V1SeccompProfile(type="RuntimeDefault"),
    )


def resources(cpus: float, memory_gib: float, *, gpus: int = 0, scratch_gib: int = 0) -> client.V1ResourceRequirements:
    """Requests and limits, the same: a pod that may take more than it asked for is the first to be killed."""
    amounts = {"cpu": f"{round(cpus * 1000)}m" if cpus % 1 else str(int(cpus)), "memory": f"{round(memory_gib * 1024)}Mi"}
    if memory_gib % 1 == 0:
        amounts["memory"] = f"{int(memory_gib)}Gi"
    if scratch_gib:
        amounts["ephemeral-storage"] = f"{scratch_gib}Gi"
    if gpus:
        amounts[GPU] = str(gpus)
    return client.V1ResourceRequirements(requests=dict(amounts), limits=dict(amounts))


def ray_volumes(memory_gib: int, scratch_gib: int) -> tuple[list[client.V1Volume], list[client.V1VolumeMount]]:
    """What a Ray node may write: shared memory (in the pod's memory), temporary files, spilled objects and the home folder."""
    shared = max(1, int(memory_gib * _SHM_SHARE))
    spill = scratch_gib // 2
    volumes = [
        empty_dir("shared-mem", f"{shared}Gi", memory=True),
        empty_dir("tmp", f"{scratch_gib - spill - 1}Gi"),
        empty_dir("spill", f"{spill}Gi"),
        empty_dir("home", "1Gi"),
    ]
    mounts = [mount("shared-mem", "/dev/shm"), mount("tmp", "/tmp"), mount("spill", SPILL), mount("home", HOME)]
    return volumes, mounts


def object_store_bytes(memory_gib: int) -> int:
    """Ray's object store: nine tenths of ``/dev/shm``; the rest is torch's and NCCL's."""
    return int(max(1, int(memory_gib * _SHM_SHARE)) * 0.9 * 1024**3)


def empty_dir(name: str, size: str, *, memory: bool = False) -> client.V1Volume:
    """A folder that goes with its pod."""
    return client.V1Volume(name=name, empty_dir=client.V1EmptyDirVolumeSource(medium="Memory" if memory else None, size_limit=size))


def mount(volume: str, path: str, *, read_only: bool | None = None) -> client.V1VolumeMount:
    """Where a container sees a volume."""
    return client.V1VolumeMount(name=volume, mount_path=path, read_only=read_only)


def api_token_volume(name: str) -> client.V1Volume:
    """The service account's token for the Kubernetes API, to be mounted by the autoscaler alone: the driver runs without it."""
    field = client.V1ObjectFieldSelector(field_path="metadata.namespace")
    sources = [
        client.V1VolumeProjection(service_account_token=client.V1ServiceAccountTokenProjection(path="token", expiration_seconds=3607)),
        client.V1VolumeProjection(
            config_map=client.V1ConfigMapProjection(name="kube-root-ca.crt", items=[client.V1KeyToPath(key="ca.crt", path="ca.crt")])
        ),
        client.V1VolumeProjection(
            downward_api=client.V1DownwardAPIProjection(items=[client.V1DownwardAPIVolumeFile(path="namespace", field_ref=field)])
        ),
    ]
    return client.V1Volume(name=name, projected=client.V1ProjectedVolumeSource(sources=sources))


def environment(values: Mapping[str, str]) -> list[client.V1EnvVar]:
    """Environment variables, in the order of their names."""
    return [client.V1EnvVar(name=name, value=values[name]) for name in sorted(values)]


def from_secrets(names: tuple[str, ...]) -> list[client.V1EnvFromSource] | None:
    """Environment variables from Secret objects."""
    return [client.V1EnvFromSource(secret_ref=client.V1SecretEnvSource(name=name)) for name in names] or None


def probes(*, head: bool) -> dict[str, Any]:
    """Whether Ray lives on the pod. They need no tool of the image but Python, and as much patience as KubeRay's own: a raylet answers
    for the GCS too, which may be away for minutes while another head takes over."""
    action = client.V1ExecAction(command=["python", "-c", _HEALTH, _RAYLET, *([_GCS] if head else [])])
    pace: dict[str, Any] = {"period_seconds": 10, "timeout_seconds": 10}
    return {
        "liveness_probe": client.V1Probe(_exec=action, initial_delay_seconds=30, failure_threshold=60, **pace),
        "readiness_probe": client.V1Probe(_exec=action, initial_delay_seconds=10, failure_threshold=10, **pace),
    }


def drain_hook(seconds: int) -> client.V1Lifecycle:
    """Before a worker pod is stopped, its workers hand back what they do."""
    action = client.V1ExecAction(command=["python", "-m", "cluster.drain", "--grace", str(seconds)])
    return client.V1Lifecycle(pre_stop=client.V1LifecycleHandler(_exec=action))


def driver_hook(seconds: int) -> client.V1Lifecycle:
    """Before the head's pod is stopped, the driver ends: Ray sent it SIGTERM already, when the run was cancelled."""
    action = client.V1ExecAction(command=["python", "-m", "cluster.driver_end", "--grace", str(seconds)])
    return client.V1Lifecycle(pre_stop=client.V1LifecycleHandler(_exec=action))


def spread(pod_labels: Mapping[str, str], *, zones: bool) -> list[client.V1TopologySpreadConstraint]:
    """Pods go to many machines, and to many zones where a zone may lose its machines at once; a wish, never a reason to wait."""
    keys = ["kubernetes.io/hostname", *(["topology.kubernetes.io/zone"] if zones else [])]
    selector = client.V1LabelSelector(match_labels=dict(pod_labels))
    return [
        client.V1TopologySpreadConstraint(max_skew=1, topology_key=key, when_unsatisfiable="ScheduleAnyway", label_selector=selector)
        for key in keys
    ]


def tolerations(*, gpus: int, spot: bool) -> list[client.V1Toleration] | None:
    """Of the marks that keep other pods from machines with GPUs and from spot machines."""
    marks = [*([GPU] if gpus else []), *(["karpenter.sh/capacity-type"] if spot else [])]
    return [client.V1Toleration(key=key, operator="Exists", effect="NoSchedule") for key in marks] or None
