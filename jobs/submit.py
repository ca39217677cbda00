"""``facemae submit``: a job on somebody else's machines: Kubernetes with KubeRay, or a Ray cluster that runs."""

from __future__ import annotations

import dataclasses
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import tyro
import yaml

from cluster.kubernetes.launch import Launch, check_environment
from cluster.kubernetes.names import check_endpoint
from cluster.kubernetes.nodes import PRESETS, Nodes
from cluster.secret import carries_credentials
from cluster.submitted import SubmittedRun
from jobs.command import Config, UsageError, main_of
from jobs.submit_follow import Follower
from jobs.submit_job import InnerJob, read_job, references, warnings, with_workers

KUBERNETES = "kubernetes"


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(Config):
    """Run a job on Kubernetes (as a RayJob of KubeRay) or on a Ray cluster (through its job API), and follow it.

    Reads: the job's YAML file, checked here as the job will check it; every place in it must be in the store (s3://).
    Writes: nothing here. On Kubernetes a ConfigMap and a RayJob; on a Ray cluster a job, with this installation's modules.
    Exit code: the job's own (0, 3, 4), 2 for an error, 143 when it was stopped, 130 after Ctrl-C, which ends the following, not the run.
    Next: facemae status ROOT, facemae cancel NAME.
    """

    takes_file: ClassVar[bool] = False

    job: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="JOB")]
    """ingest, train, protect, pipeline, ...: what `facemae JOB` would be."""
    config: str
    """The job's YAML file, local or s3://."""
    to: str
    """kubernetes, http(s)://HOST:8265 (the dashboard of a Ray cluster) or ray://HOST:10001."""
    name: str | None = None
    """Name of the run; by default facemae-JOB- and something random. A Ray cluster takes each name once."""
    dry_run: bool = False
    """Check everything, print what would be submitted, and submit nothing."""
    follow: bool = True
    """Follow the log until the run has ended."""
    s3_endpoint: str | None = None
    """Address of an S3 server other than AWS, as the cluster reaches it."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of all processes of the run, as NAME VALUE. Others can read it: no secrets."""
    installed: bool = False
    """On a Ray cluster: use the facemae that is installed there, and upload the file alone."""
    image: str | None = None
    """On Kubernetes: the container image (docs/image.md)."""
    preset: Literal["cpu", "gpu", "spot", "large"] = "cpu"
    """On Kubernetes: which pods. cpu: 4 of 7 cores; gpu: 8 with a GPU; spot: 16 with a GPU that may go at
    any moment; large: 64 with a GPU."""
    pods: int | None = None
    """On Kubernetes: at most so many worker pods, instead of the preset's."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """On Kubernetes: labels of the workers' machines, as LABEL VALUE, instead of the preset's."""
    namespace: str = "facemae"
    """On Kubernetes: the namespace."""
    context: str | None = None
    """On Kubernetes: a context of the kubeconfig, by default its current one."""
    secret: list[str] = field(default_factory=list)
    """On Kubernetes: Secrets whose keys become environment variables of all pods (AWS_ACCESS_KEY_ID, a secret of --rekey, ...)."""
    service_account: str = "facemae"
    """On Kubernetes: the service account that may use the bucket."""
    pull_secret: str | None = None
    """On Kubernetes: the Secret with the registry's password."""
    retries: int = 2
    """On Kubernetes: tries after a failed one; each goes on with what is committed."""
    deadline_hours: float | None = None
    """On Kubernetes: stop the run after so long."""
    keep_minutes: float = 60.0
    """On Kubernetes: keep the pods so long after the end."""
    gcs_redis: str | None = None
    """On Kubernetes: HOST:PORT of a Redis that lets the head be replaced under way."""
    gcs_redis_secret: str = "facemae-redis"
    """On Kubernetes: the Secret whose key `password` is the Redis's."""
    priority_class: str | None = None
    """On Kubernetes: the priority class of all pods."""


ONLY_KUBERNETES = (
    *("image", "preset", "pods", "node_selector", "namespace", "context", "secret", "service_account", "pull_secret", "retries"),
    *("deadline_hours", "keep_minutes", "gcs_redis", "gcs_redis_secret", "priority_class"),
)
ADDRESSES = frozenset(("to", "image", "s3_endpoint", "gcs_redis"))
"""Flags in which an @ can only follow a user or password."""


def run(config: SubmitConfig) -> dict[str, Any]:
    """Submit and follow. Returns the exit code and what to run next.

    Raises:
        UsageError: the job's file or a flag is wrong.
        ConnectionError: what was asked for cannot be reached, or refuses.
    """
    _require_no_credentials(config)
    if config.name == "":
        raise UsageError("--name is empty: give one, or leave it out")
    job, name = read_job(config.job, config.config), config.name or f"facemae-{config.job}-{secrets.token_hex(3)}"
    return _on_kubernetes(config, job, name) if config.to == KUBERNETES else _on_ray(config, job, name)


def _on_kubernetes(config: SubmitConfig, job: InnerJob, name: str) -> dict[str, Any]:
    from cluster.kubernetes.ray_job import manifests, to_yaml
    from cluster.kubernetes.run import KubernetesRun, apply

    if config.installed:
        raise UsageError("--installed is for a Ray cluster: on Kubernetes facemae is in the --image")
    nodes = _nodes(config)
    job = with_workers(job, nodes, config.preset, config.config)
    rendered = manifests(_launch(config, job, name, nodes))
    _warn([*warnings(job, nodes, config.preset), *_secret_warnings(config, job), *_image_warnings(config.image or "")])
    if config.dry_run:
        print(to_yaml(rendered), end="")
        return {}
    for made in apply(rendered, context=config.context, namespace=config.namespace):
        print(f"created: {made} in {config.namespace}", flush=True)
    where = f"--namespace {config.namespace}" + (f" --context {config.context}" if config.context else "")
    return _follow(config, job, KubernetesRun(name, namespace=config.namespace, context=config.context), where)


def _on_ray(config: SubmitConfig, job: InnerJob, name: str) -> dict[str, Any]:
    from cluster.job_api import RayJob, RayJobRun, check_address
    from cluster.job_package import package_files

    check_address(config.to)
    unfit = [flag for flag in ONLY_KUBERNETES if getattr(config, flag) != _default(flag)]
    if unfit:
        raise UsageError(f"--{unfit[0].replace('_', '-')} is for --to kubernetes: that Ray cluster has its machines already")
    check_environment(config.env)
    if config.s3_endpoint is not None:
        check_endpoint("--s3-endpoint", config.s3_endpoint)
    environment = {**config.env, **({"AWS_ENDPOINT_URL": config.s3_endpoint} if config.s3_endpoint else {})}
    asked = RayJob(name, job.name, job.yaml, not config.installed, environment, {"root": job.root or ""})
    if config.dry_run:
        files = package_files(asked.config, code=asked.code)
        package = {"files": len(files), "bytes_unpacked": sum(map(len, files.values()))}
        content = {"submission_id": name, "entrypoint": asked.entrypoint, "env_vars": asked.env_vars, "package": package}
        print(yaml.safe_dump_all([content, dict(job.content)], sort_keys=False, explicit_start=True), end="")
        return {}
    submitted = RayJobRun.submit(config.to, asked)
    print(f"submitted: {name} to {config.to}", flush=True)
    return _follow(config, job, submitted, f"--to {config.to}")


def _follow(config: SubmitConfig, job: InnerJob, submitted: SubmittedRun, where: str) -> dict[str, Any]:
    """Follow, and say how it ended and what to run next."""
    target = where if config.to != KUBERNETES else f"--to kubernetes {where}"
    stop = f"facemae cancel {submitted.name} {target}"
    look = f"facemae status {job.root}" if job.root else "its log, where it runs"
    if not config.follow:
        return {"next": f"{look}, or {stop}"}
    print(f"Ctrl-C ends the following, not the run; to stop it: {stop}", flush=True)
    ending = Follower(submitted, look).follow()
    print(f"\nfacemae submit: {ending.message}" + (f"; {ending.advice}" if ending.advice else ""), flush=True)
    if job.root:
        print(f"output:  {job.root}")
    unended = f"{look}, or {stop}" if ending.code == 130 else ""
    return {"exit_code": ending.code, "next": unended or ending.next or (job.root and look)}


def _nodes(config: SubmitConfig) -> Nodes:
    nodes = PRESETS[config.preset]
    nodes = nodes if config.pods is None else nodes.with_pods(config.pods)
    return nodes.on(config.node_selector) if config.node_selector else nodes


def _launch(config: SubmitConfig, job: InnerJob, name: str, nodes: Nodes) -> Launch:
    """Everything as the manifests want it. Raises ValueError for a flag that is wrong."""
    if config.image is None:
        raise UsageError("--to kubernetes needs --image HOST/NAME:TAG, an image with facemae in it (docs/image.md)")
    same = (
        *("image", "namespace", "env", "service_account", "pull_secret", "retries", "deadline_hours", "keep_minutes", "gcs_redis"),
        *("gcs_redis_secret", "s3_endpoint", "priority_class"),
    )
    given = {flag: getattr(config, flag) for flag in same}
    return Launch(name=name, job=job.name, config_yaml=job.yaml, nodes=nodes, secrets=tuple(config.secret), **given)


def _require_no_credentials(config: SubmitConfig) -> None:
    """Refuse flags with a user or password in them, whatever they are for. Raises UsageError, which does not repeat it."""
    for flag in dataclasses.fields(config):
        value = getattr(config, flag.name)
        texts = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        given = [text for text in texts if isinstance(text, str)]
        if any(map(carries_credentials, given)) or (flag.name in ADDRESSES and any("@" in text.partition("@sha256:")[0] for text in given)):
            raise UsageError(
                f"--{flag.name.replace('_', '-')} holds a user or password (it is not repeated here): leave it out; credentials come "
                "from the environment, on Kubernetes from a Secret (--secret NAME)"
            )


def _secret_warnings(config: SubmitConfig, job: InnerJob) -> list[str]:
    missing = references(job) if not config.secret else []
    return [f"{name} is read in every pod: put it into a Secret and give --secret NAME" for name in missing]


def _image_warnings(image: str) -> list[str]:
    name, _, tag = image.rpartition("/")[2].partition(":")
    if "@sha256:" in image or tag not in ("", "latest"):
        return []
    return [f"--image {name}: without a tag of its own another try may run other code: give HOST/{name}:TAG, or @sha256:DIGEST"]


def _warn(texts: Sequence[str]) -> None:
    for text in texts:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _default(name: str) -> Any:
    found = next(field for field in dataclasses.fields(SubmitConfig) if field.name == name)
    return found.default_factory() if found.default_factory is not dataclasses.MISSING else found.default


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(SubmitConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
