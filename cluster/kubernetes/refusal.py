"""What an API server's refusal means and what to do about it: one line with reason and remedy, and never a secret."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping
from typing import Any

INSTALL_KUBERAY = (
    "helm install kuberay-operator kuberay-operator --version 1.7.0 --repo https://ray-project.github.io/kuberay-helm "
    "--namespace kuberay --create-namespace"
)
"""The command that installs KubeRay with its custom resource definitions."""
LINE_CHARACTERS = 500

_SECRETS = (
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"), r"\1 ***"),
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}(\.[A-Za-z0-9_-]*)*"), "***"),
    (re.compile(r"(?<=://)[^/\s@]+@"), "***@"),
    (
        re.compile(r"(?i)\b((?:x-amz-)?(?:signature|credential|security-token)|token|password|secret_?(?:access_?)?key)=[^&\s\"']+"),
        r"\1=***",
    ),
)
_RBAC = re.compile(
    r'User "(?P<user>[^"]*)" cannot (?P<verb>\w+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"'
    r'(?: in the namespace "(?P<namespace>[^"]*)")?'
)
_QUOTA = re.compile(r"exceeded quota: (?P<quota>[^,]+), requested: (?P<requested>.*), used: (?P<used>.*), limited: (?P<limited>.*)")


def line_of(text: object, characters: int = LINE_CHARACTERS) -> str:
    """The first line of a message that has any letters, shortened, without what looks like a credential."""
    first = next((line.strip() for line in str(text or "").splitlines() if line.strip()), "")
    for pattern, replacement in _SECRETS:
        first = pattern.sub(replacement, first)
    return first if len(first) <= characters else f"{first[: characters - 3]}..."


def seconds_of(stamp: str | None) -> float:
    """A time stamp of the API server in seconds since 1970; 0 for none."""
    return datetime.datetime.fromisoformat(stamp).timestamp() if stamp else 0.0


def explain(status: int, body: Mapping[str, Any], asked: str, namespace: str, server: str) -> str:
    """One line: why the API server refused, and what to do.

    Args:
        status: the HTTP status code.
        body: the ``Status`` object of the answer; empty where there was none.
        asked: what was asked for, in words: ``get pods``.
        namespace: in which namespace.
        server: the API server's address.
    """
    message = line_of(body.get("message"))
    if status == 401:
        return (
            f"{server} does not accept the credentials (401): they have expired or belong to another cluster; log in again, and look at "
            "the current context with: kubectl config get-contexts"
        )
    if status == 403:
        return explain_forbidden(message, asked, namespace)
    if status == 404:
        return _explain_missing(body, message, asked, namespace, server)
    if status in (400, 422):
        return (
            f"the API server refuses the manifest: {message or asked}; this facemae and the KubeRay installed may be of different versions"
        )
    if "failed calling webhook" in message:
        return f"a webhook of the cluster does not answer: {message}; tell the cluster's administrator, and submit again when it answers"
    if status == 429:
        return f"{server} is overloaded (429) and goes on refusing after several tries; wait a minute and run the same command again"
    if status >= 500:
        reason = f": {message}" if message else ""
        return f"{server} fails ({status}){reason}; run the same command again, and tell the cluster's administrator when it goes on"
    return f"{server} refuses to {asked} ({status}): {message or 'no reason given'}"


def explain_forbidden(message: str, asked: str, namespace: str) -> str:
    """One line for a 403, or for the same words in an event: RBAC, quota, Pod security, limits, admission webhooks."""
    if found := _RBAC.search(message):
        if found["user"] == "system:anonymous":
            return "the API server took the request for an anonymous one: no credentials were sent; log in, or give --context"
        group = f".{found['group']}" if found["group"] else ""
        where = f"in namespace {found['namespace']}" if found["namespace"] else "in the whole cluster"
        return (
            f"{found['user']} may not {found['verb']} {found['resource']}{group} {where}: have an administrator apply the Role of "
            f"infra/kubernetes/base and bind it; check with: kubectl auth can-i {found['verb']} {found['resource']}{group} -n {namespace}"
        )
    for pattern, words in _FORBIDDEN:
        if found := re.search(pattern, message):
            return words(message, found)
    return f"the API server forbids to {asked}: {message or 'no reason given'}"


def _quota(message: str, _: re.Match[str]) -> str:
    numbers = _QUOTA.search(message)
    detail = f"{numbers['quota']} limits {numbers['limited']}; used {numbers['used']}, asked {numbers['requested']}" if numbers else message
    return f"the namespace's quota is used up: {detail}; ask for fewer or smaller workers, wait for other runs to end, or have it raised"


def _limits(message: str, _: re.Match[str]) -> str:
    return f"the namespace's LimitRange does not allow this pod: {message}; choose a smaller --preset, or have the limits raised"


def _pod_security(message: str, found: re.Match[str]) -> str:
    return (
        f"the namespace's Pod security level {found['level']} refuses the pod: {found['why']}; facemae's own pods keep to restricted: look "
        "for what a cluster's webhook or your own patch adds, or have the namespace's label changed"
    )


def _terminating(message: str, _: re.Match[str]) -> str:
    return f"the namespace is being deleted ({message}): give another --namespace"


def _webhook(message: str, found: re.Match[str]) -> str:
    return f"the cluster's admission webhook {found['webhook']} denies it: {found['why']}; ask who runs that webhook"


def _service_account(message: str, found: re.Match[str]) -> str:
    return f"the service account {found['account']} does not exist: apply infra/kubernetes/base, which makes it, or give another one"


def _priority(message: str, found: re.Match[str]) -> str:
    return f"there is no PriorityClass {found['class']}: apply infra/kubernetes/base, which makes it, or leave it out"


_FORBIDDEN: tuple[tuple[str, Callable[[str, re.Match[str]], str]], ...] = (
    (r"exceeded quota", _quota),
    (r'violates PodSecurity "(?P<level>[^"]+)": (?P<why>.*)', _pod_security),
    (r"(maximum|minimum) (cpu|memory|\S+) usage per|must be specified|failed quota", _limits),
    (r"is being terminated", _terminating),
    (r'admission webhook "(?P<webhook>[^"]+)" denied the request:? ?(?P<why>.*)', _webhook),
    (r"error looking up service account (?P<account>[^:]+):", _service_account),
    (r"no PriorityClass with name (?P<class>\S+) was found", _priority),
)


def _explain_missing(body: Mapping[str, Any], message: str, asked: str, namespace: str, server: str) -> str:
    details = body.get("details") or {}
    if details.get("kind") == "namespaces" or re.search(r'namespaces? "[^"]*" not found', message):
        return f"there is no namespace {namespace}: make it with: kubectl create namespace {namespace}, or give another --namespace"
    if "ray" in asked and not details.get("name"):  # the path itself is not known: no such resource definition
        return f"KubeRay is not installed in this cluster (it knows no RayJob): {INSTALL_KUBERAY}"
    return f"{server} has nothing there to {asked}: {message or 'not found'}"
