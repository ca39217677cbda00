"""KubeRay's own kinds, as types, and every kind as plain dicts and as YAML.

Core kinds (pods and what is in them) are the kubernetes client's models. It has none for KubeRay, so those that a run needs are here,
with the field names of its ``ray.io/v1`` resource definitions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from kubernetes import client

Manifest = dict[str, Any]
_FIRST = ("apiVersion", "kind", "metadata", "name", "namespace")


@dataclass(frozen=True, kw_only=True)
class AutoscalerOptions:
    """The autoscaler, a container beside the head's."""

    version: str
    idle_timeout_seconds: int
    upscaling_mode: str
    image_pull_policy: str
    resources: client.V1ResourceRequirements
    security_context: client.V1SecurityContext
    env: tuple[client.V1EnvVar, ...]
    volume_mounts: tuple[client.V1VolumeMount, ...]


@dataclass(frozen=True, kw_only=True)
class RedisCredential:
    """A user or password of the Redis, by the Secret that holds it."""

    value_from: client.V1EnvVarSource


@dataclass(frozen=True, kw_only=True)
class GcsFaultToleranceOptions:
    """Where the GCS keeps its tables, so that another head can take them up."""

    redis_address: str
    redis_password: RedisCredential


@dataclass(frozen=True, kw_only=True)
class AuthOptions:
    """How Ray's nodes and clients prove who they are."""

    mode: str


@dataclass(frozen=True, kw_only=True)
class HeadGroupSpec:
    """The head."""

    ray_start_params: Mapping[str, str]
    template: client.V1PodTemplateSpec


@dataclass(frozen=True, kw_only=True)
class WorkerGroupSpec:
    """A group of like worker pods."""

    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    ray_start_params: Mapping[str, str]
    template: client.V1PodTemplateSpec


@dataclass(frozen=True, kw_only=True)
class RayClusterSpec:
    """The Ray cluster of one try."""

    ray_version: str
    auth_options: AuthOptions
    enable_in_tree_autoscaling: bool
    autoscaler_options: AutoscalerOptions
    gcs_fault_tolerance_options: GcsFaultToleranceOptions | None
    head_group_spec: HeadGroupSpec
    worker_group_specs: tuple[WorkerGroupSpec, ...]


@dataclass(frozen=True, kw_only=True)
class SubmitterConfig:
    """How often the pod that submits the job to Ray is tried again; it does not start the job twice."""

    backoff_limit: int


@dataclass(frozen=True, kw_only=True)
class RayJobSpec:
    """A job, its tries and what becomes of the cluster."""

    submission_mode: str
    entrypoint: str
    backoff_limit: int
    active_deadline_seconds: int | None
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: int
    submitter_config: SubmitterConfig
    submitter_pod_template: client.V1PodTemplateSpec
    ray_cluster_spec: RayClusterSpec


@dataclass(frozen=True, kw_only=True)
class RayJob:
    """KubeRay's RayJob."""

    metadata: client.V1ObjectMeta
    spec: RayJobSpec
    api_version: str = "ray.io/v1"
    kind: str = "RayJob"


def to_manifest(kind: Any) -> Manifest:
    """A kind, ours or the client's, as the plain dict that the API server takes: without what is not set."""
    manifest = _ordered(_plain(kind))
    assert isinstance(manifest, dict)
    return manifest


def to_yaml(manifests: Sequence[Mapping[str, Any]]) -> str:
    """Manifests as one YAML file, the same for the same manifests; texts of several lines as they are."""
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True, explicit_start=len(manifests) > 1)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {_camel(name): _plain(item) for name, item in pairs.items() if item is not None}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return client.ApiClient().sanitize_for_serialization(value)


def _ordered(value: Any) -> Any:
    """The same with what names a thing before what it is made of."""
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: _FIRST.index(key) if key in _FIRST else len(_FIRST))
        return {key: _ordered(value[key]) for key in keys}
    return [_ordered(item) for item in value] if isinstance(value, list) else value


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
