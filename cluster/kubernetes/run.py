"""A RayJob on a Kubernetes cluster: hand it over, ask how it stands, follow its log, stop it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cluster.kubernetes.api import Api
from cluster.submitted import RunState

Manifest = dict[str, Any]


def apply(manifests: Sequence[Manifest], *, context: str | None = None, namespace: str | None = None) -> list[str]:
    """Create a run's ConfigMap and RayJob; all are checked by the server first, so that nothing half done stays.

    Args:
        manifests: plain objects, as they would stand in YAML.
        context: of the kubeconfig; its current one where None.
        namespace: for objects that name none; the context's where None.

    Returns:
        What was created, in the order of ``manifests``: ``rayjob.ray.io/NAME``.

    Raises:
        ValueError: the name exists already, the manifests are not what can be created here, or there is no usable kubeconfig.
        ConnectionError: the API server does not answer, or refuses; the message says why and what to do.
    """
    raise NotImplementedError


class KubernetesRun:
    """A RayJob, as ``cluster.submitted.SubmittedRun``.

    Args:
        name: the RayJob's name.
        namespace: its namespace; the context's where None.
        context: of the kubeconfig; its current one where None.

    Raises:
        ValueError: there is no usable kubeconfig.
    """

    def __init__(self, name: str, *, namespace: str | None = None, context: str | None = None) -> None:
        self.name = name
        self._api = Api(context, namespace)
        self.namespace = self._api.namespace

    def state(self) -> RunState:
        """See SubmittedRun."""
        raise NotImplementedError

    def log(self) -> Iterator[str]:
        """See SubmittedRun. Blocks while there is no line yet; goes on across retries (a line says ``attempt 2``); ends when the run
        has ended."""
        raise NotImplementedError

    def cancel(self) -> None:
        """See SubmittedRun. Raises LookupError where there is no such RayJob."""
        raise NotImplementedError
