"""All that a run on Kubernetes is told, checked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from cluster.kubernetes import names
from cluster.kubernetes.nodes import Nodes
from cluster.secret import carries_credentials

LONGEST_NAME = 47  # KubeRay's limit for a RayJob
MOST_CONFIG_BYTES = 900_000  # a ConfigMap holds 1 MiB
_JOB = re.compile(r"[a-z][a-z-]*")
_SECRET_NAME = re.compile(r"(SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIAL|ACCESS_?KEY|API_?KEY|PRIVATE_?KEY)", re.IGNORECASE)
_OURS = re.compile(r"FACEMAE_RETRIED|AWS_ENDPOINT_URL|HOME|REDIS_.*|RAY_REDIS_ADDRESS|RAY_AUTH_.*|RAY_ADDRESS|RAY_enable_autoscaler_v2")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A job of ours as a RayJob of KubeRay.

    Attributes:
        name: of the RayJob and of its ConfigMap.
        namespace: where it runs.
        image: with FaceMAE in it.
        job: name of the job, as in ``facemae JOB``.
        config_yaml: the job's configuration, which everybody who may read the namespace's ConfigMaps can read.
        arguments: flags after the configuration, which override it.
        nodes: the pods.
        env: environment of all pods; never a secret.
        secrets: names of Secret objects, all of whose keys become environment variables of all pods.
        service_account: whose right it is to read and write the bucket, where rights are given by workload identity.
        pull_secret: name of the Secret with the registry's password.
        retries: tries after the first one, each with a new Ray cluster, which goes on with what is committed.
        deadline_hours: after which the run is stopped; None for never.
        keep_minutes: how long the pods are kept after the end.
        gcs_redis: HOST:PORT of a Redis that holds the head's tables.
        gcs_redis_secret: name of the Secret whose key ``password`` is that of the Redis.
        s3_endpoint: address of an S3 server other than AWS.
        priority_class: of all pods.

    Raises:
        ValueError: one of them cannot be; the message names the flag, the reason and the remedy, and repeats no password.
    """

    name: str
    image: str
    job: str
    config_yaml: str
    nodes: Nodes
    namespace: str = "facemae"
    arguments: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    service_account: str = "facemae"
    pull_secret: str | None = None
    retries: int = 2
    deadline_hours: float | None = None
    keep_minutes: float = 60
    gcs_redis: str | None = None
    gcs_redis_secret: str = "facemae-redis"
    s3_endpoint: str | None = None
    priority_class: str | None = None

    def __post_init__(self) -> None:
        names.check_name("--name", self.name, longest=LONGEST_NAME)
        names.check_namespace("--namespace", self.namespace)
        names.check_image("--image", self.image)
        if not _JOB.fullmatch(self.job):
            raise ValueError(f"{self.job!r} is no job; facemae --help lists them")
        for flag, given in self._objects():
            names.check_object(flag, given)
        names.check_count("--retries", self.retries, least=0)
        if self.deadline_hours is not None:
            names.check_seconds("--deadline-hours", self.deadline_hours, unit=3600, zero=False)
        names.check_seconds("--keep-minutes", self.keep_minutes, unit=60, zero=True)
        if self.s3_endpoint is not None:
            names.check_endpoint("--s3-endpoint", self.s3_endpoint)
        if self.gcs_redis is not None:
            names.check_host_port("--gcs-redis", self.gcs_redis)
        check_environment(self.env)
        self._check_arguments()
        self._check_config()

    @property
    def deadline_seconds(self) -> int | None:
        """The same in whole seconds."""
        return None if self.deadline_hours is None else names.check_seconds("--deadline-hours", self.deadline_hours, unit=3600, zero=False)

    @property
    def keep_seconds(self) -> int:
        """The same in whole seconds."""
        return names.check_seconds("--keep-minutes", self.keep_minutes, unit=60, zero=True)

    def _objects(self) -> Iterator[tuple[str, str]]:
        yield "--service-account", self.service_account
        for secret in self.secrets:
            yield "--secret", secret
        optional = {"--pull-secret": self.pull_secret, "--priority-class": self.priority_class}
        yield from ((flag, name) for flag, name in optional.items() if name is not None)
        yield "--gcs-redis-secret", self.gcs_redis_secret

    def _check_arguments(self) -> None:
        for argument in self.arguments:
            if carries_credentials(argument.partition("=")[2]) or carries_credentials(argument):
                raise ValueError("a flag of the job holds a user or password (not repeated here): put it into a Secret, --secret NAME")
            if "$" in argument or any(not character.isprintable() for character in argument):
                raise ValueError(f"{argument!r}: '$' and control characters would not arrive as they are: give it in the --config file")

    def _check_config(self) -> None:
        if len(self.config_yaml.encode()) > MOST_CONFIG_BYTES:
            raise ValueError(
                f"--config: more than {MOST_CONFIG_BYTES:,} bytes, too many for a ConfigMap: move lists into a file in the store"
            )
        try:
            content = yaml.safe_load(self.config_yaml)
        except yaml.YAMLError as error:
            raise ValueError(f"--config: no YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, Mapping):
            raise ValueError("--config: must be a mapping of the job's fields")
        for place, text in _texts(content, ""):
            if carries_credentials(text):
                raise ValueError(f"--config: {place} holds a user or password (not repeated here): put it into a Secret, --secret NAME")


def check_environment(env: Mapping[str, str]) -> None:
    """Variables that others can read and that reach the processes as they are. Raises ValueError."""
    for name, value in env.items():
        names.check_variable("--env", name)
        if _SECRET_NAME.search(name) and not name.endswith("_FILE"):
            raise ValueError(f"--env {name}: by its name a secret, which a manifest would show: put it into a Secret, --secret NAME")
        if _OURS.fullmatch(name):
            raise ValueError(f"--env {name}: is set by the run itself: leave it out, or use the flag that is there for it")
        if carries_credentials(value):
            raise ValueError(f"--env {name}: holds a user or password (not repeated here): put it into a Secret, --secret NAME")
        if "$(" in value or "\0" in value:
            raise ValueError(f"--env {name}: holds '$(', which Kubernetes would replace, or a NUL: write the value out")


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Every text in a configuration, with where it is."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{place}[{index}]")
    elif isinstance(value, str):
        yield place, value
