"""A launch as manifests: the job's configuration as a ConfigMap, and KubeRay's RayJob."""

from __future__ import annotations

import shlex
from typing import Any

from kubernetes import client

from cluster.kubernetes import pod
from cluster.kubernetes.kinds import (
    AuthOptions,
    AutoscalerOptions,
    GcsFaultToleranceOptions,
    HeadGroupSpec,
    Manifest,
    RayClusterSpec,
    RayJob,
    RayJobSpec,
    RedisCredential,
    SubmitterConfig,
    WorkerGroupSpec,
    to_manifest,
    to_yaml,
)
from cluster.kubernetes.launch import Launch
from cluster.kubernetes.nodes import WorkerGroup

__all__ = ["Launch", "entrypoint", "manifests", "to_yaml"]

RAY_VERSION = "2.60.0"
CONFIG_FILE = "job.yaml"
IDLE_SECONDS = 300  # a step's end must not cost the next one its pods
STOP_SECONDS = 60  # from the end of a worker pod's drain, or of the driver, until the pod is killed
_STAY = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
_TOKEN = "api-token"


def manifests(launch: Launch) -> list[Manifest]:
    """What to apply, in this order: the ConfigMap, then the RayJob."""
    metadata = client.V1ObjectMeta(name=launch.name, namespace=launch.namespace, labels=pod.labels(launch.name, launch.job))
    config = client.V1ConfigMap(api_version="v1", kind="ConfigMap", metadata=metadata, data={CONFIG_FILE: launch.config_yaml})
    return [to_manifest(config), to_manifest(RayJob(metadata=metadata, spec=_job_spec(launch)))]


def entrypoint(launch: Launch) -> str:
    """The driver's command, quoted for the two shells that it passes: the submitter's, and (quoted again by Ray) the job's."""
    return shlex.join(["facemae", launch.job, "--config", f"{pod.CONFIG}/{CONFIG_FILE}", *launch.arguments])


def _job_spec(launch: Launch) -> RayJobSpec:
    return RayJobSpec(
        submission_mode="K8sJobMode",
        entrypoint=entrypoint(launch),
        backoff_limit=launch.retries,
        active_deadline_seconds=launch.deadline_seconds,
        shutdown_after_job_finishes=True,
        ttl_seconds_after_finished=launch.keep_seconds,
        submitter_config=SubmitterConfig(backoff_limit=2),
        submitter_pod_template=_submitter(launch),
        ray_cluster_spec=RayClusterSpec(
            ray_version=RAY_VERSION,
            auth_options=AuthOptions(mode="token"),
            enable_in_tree_autoscaling=True,
            autoscaler_options=_autoscaler(),
            gcs_fault_tolerance_options=_fault_tolerance(launch),
            head_group_spec=_head(launch),
            worker_group_specs=tuple(_workers(launch, group) for group in launch.nodes.groups),
        ),
    )


def _autoscaler() -> AutoscalerOptions:
    """It alone has the token for the Kubernetes API, and /tmp of the head, whose log folder it writes to."""
    return AutoscalerOptions(
        version="v2",
        idle_timeout_seconds=IDLE_SECONDS,
        upscaling_mode="Default",
        image_pull_policy="IfNotPresent",
        resources=pod.resources(0.5, 1),
        security_context=pod.security(),
        env=(client.V1EnvVar(name="HOME", value="/tmp"),),
        volume_mounts=(pod.mount("tmp", "/tmp"), pod.mount(_TOKEN, pod.API_TOKEN, read_only=True)),
    )


def _fault_tolerance(launch: Launch) -> GcsFaultToleranceOptions | None:
    if launch.gcs_redis is None:
        return None
    password = client.V1SecretKeySelector(name=launch.gcs_redis_secret, key="password")
    source = client.V1EnvVarSource(secret_key_ref=password)
    return GcsFaultToleranceOptions(redis_address=launch.gcs_redis, redis_password=RedisCredential(value_from=source))


def _head(launch: Launch) -> HeadGroupSpec:
    """The head: GCS, dashboard, autoscaler and the driver. No CPU of it is Ray's, so that no worker is put there."""
    nodes = launch.nodes
    stop = max(group.drain_seconds for group in nodes.groups)  # a cancelled driver waits until its workers have handed back
    volumes, mounts = pod.ray_volumes(nodes.head_memory_gib, nodes.head_scratch_gib)
    volumes += [
        client.V1Volume(name="config", config_map=client.V1ConfigMapVolumeSource(name=launch.name)),
        pod.api_token_volume(_TOKEN),
    ]
    ports = {"gcs-server": 6379, "dashboard": 8265, "metrics": pod.METRICS_PORT}
    container = client.V1Container(
        name="ray-head",
        image=launch.image,
        image_pull_policy="IfNotPresent",
        ports=[client.V1ContainerPort(name=name, container_port=port) for name, port in ports.items()],
        env=pod.environment({"RAY_JOB_STOP_WAIT_TIME_S": str(stop), **_environment(launch, gpus=0)}),
        env_from=pod.from_secrets(launch.secrets),
        lifecycle=pod.driver_hook(stop),
        resources=pod.resources(nodes.head_cpus, nodes.head_memory_gib, scratch_gib=nodes.head_scratch_gib),
        security_context=pod.security(),
        volume_mounts=[*mounts, pod.mount("config", pod.CONFIG, read_only=True)],
        **pod.probes(head=True),
    )
    spec = client.V1PodSpec(
        containers=[container],
        volumes=volumes,
        node_selector=dict(nodes.head_selector) or None,
        termination_grace_period_seconds=stop + STOP_SECONDS,
        **_pod_settings(launch),
    )
    metadata = client.V1ObjectMeta(labels=pod.labels(launch.name, "head"), annotations=dict(_STAY))
    start = {**_start(nodes.head_memory_gib), "num-cpus": "0", "dashboard-host": "0.0.0.0"}
    return HeadGroupSpec(ray_start_params=start, template=client.V1PodTemplateSpec(metadata=metadata, spec=spec))


def _workers(launch: Launch, group: WorkerGroup) -> WorkerGroupSpec:
    volumes, mounts = pod.ray_volumes(group.memory_gib, group.scratch_gib)
    own = pod.labels(launch.name, f"worker-{group.name}")
    container = client.V1Container(
        name="ray-worker",
        image=launch.image,
        image_pull_policy="IfNotPresent",
        ports=[client.V1ContainerPort(name="metrics", container_port=pod.METRICS_PORT)],
        env=pod.environment(_environment(launch, gpus=group.gpus)),
        env_from=pod.from_secrets(launch.secrets),
        lifecycle=pod.drain_hook(group.drain_seconds),
        resources=pod.resources(group.cpus, group.memory_gib, gpus=group.gpus, scratch_gib=group.scratch_gib),
        security_context=pod.security(),
        volume_mounts=mounts,
        **pod.probes(head=False),
    )
    spec = client.V1PodSpec(
        containers=[container],
        volumes=volumes,
        node_selector=dict(group.node_selector) or None,
        tolerations=pod.tolerations(gpus=group.gpus, spot=group.spot),
        topology_spread_constraints=pod.spread(own, zones=group.spot),
        termination_grace_period_seconds=group.drain_seconds + (STOP_SECONDS if not group.spot else 25),
        **_pod_settings(launch),
    )
    return WorkerGroupSpec(
        group_name=group.name,
        replicas=group.min_pods,
        min_replicas=group.min_pods,
        max_replicas=group.pods,
        ray_start_params=_start(group.memory_gib),
        template=client.V1PodTemplateSpec(metadata=client.V1ObjectMeta(labels=own), spec=spec),
    )


def _submitter(launch: Launch) -> client.V1PodTemplateSpec:
    """The pod that hands the command to Ray and follows its log; KubeRay gives it its command."""
    container = client.V1Container(
        name="ray-job-submitter",
        image=launch.image,
        image_pull_policy="IfNotPresent",
        env=pod.environment({"HOME": "/tmp"}),
        resources=pod.resources(0.5, 1, scratch_gib=1),
        security_context=pod.security(),
        volume_mounts=[pod.mount("tmp", "/tmp")],
    )
    spec = client.V1PodSpec(
        containers=[container],
        volumes=[pod.empty_dir("tmp", "1Gi")],
        node_selector=dict(launch.nodes.head_selector) or None,
        restart_policy="Never",
        **_pod_settings(launch),
    )
    metadata = client.V1ObjectMeta(labels=pod.labels(launch.name, "submitter"), annotations=dict(_STAY))
    return client.V1PodTemplateSpec(metadata=metadata, spec=spec)


def _pod_settings(launch: Launch) -> dict[str, Any]:
    """What all three kinds of pod share."""
    return {
        "automount_service_account_token": False,
        "image_pull_secrets": [client.V1LocalObjectReference(name=launch.pull_secret)] if launch.pull_secret else None,
        "priority_class_name": launch.priority_class,
        "security_context": pod.pod_security(),
        "service_account_name": launch.service_account,
    }


def _environment(launch: Launch, *, gpus: int) -> dict[str, str]:
    values = {
        "DS_ACCELERATOR": "cuda" if gpus else "cpu",
        "FACEMAE_LOG": "json",
        "FACEMAE_RETRIED": "1",
        "HOME": pod.HOME,
        "OMP_NUM_THREADS": "1",
    }
    if launch.s3_endpoint:
        values["AWS_ENDPOINT_URL"] = launch.s3_endpoint
    return {**values, **launch.env}


def _start(memory_gib: int) -> dict[str, str]:
    return {
        "metrics-export-port": str(pod.METRICS_PORT),
        "object-spilling-directory": pod.SPILL,
        "object-store-memory": str(pod.object_store_bytes(memory_gib)),
    }
