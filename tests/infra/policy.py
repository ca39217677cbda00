"""The IAM policies of infra/s3 as tests use them: filled in, and evaluated by the rules of IAM."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

from infra.s3.render import PREFIXES, ROLES, TRUST, fill

__all__ = ["FOLDER", "PLACES", "ROLES", "Access", "accesses", "allows", "denies", "filled_in"]

FOLDER = Path(__file__).parents[2] / "infra" / "s3"
PLACES = {name: name.lower() for name in (*PREFIXES, *TRUST)} | {"BUCKET": "faces"}
_MATCHES: dict[str, Callable[[str, str], bool]] = {
    "StringEquals": lambda pattern, value: pattern == value,
    "StringLike": lambda pattern, value: _like(pattern, value),
    "ArnNotLike": lambda pattern, value: not _like(pattern, value),
    "Bool": lambda pattern, value: pattern == value,
    "NumericLessThan": lambda pattern, value: float(value) < float(pattern),
}


@dataclass(frozen=True)
class Access:
    """One thing that a request asks for: an action on a resource, with the request's condition keys."""

    action: str
    resource: str
    context: Mapping[str, str]


def filled_in(name: str, places: Mapping[str, str] = PLACES) -> Any:
    """A file of infra/s3 with its placeholders replaced."""
    return fill(name, places)


def allows(policy: Mapping[str, Any], access: Access, principal: str = "") -> bool:
    """IAM's rule: an explicit Deny counts most, then an Allow; without either it is denied. ``principal``: who asks a bucket's policy."""
    effects = {statement["Effect"] for statement in policy["Statement"] if _applies(statement, access, principal)}
    return "Deny" not in effects and "Allow" in effects


def denies(policy: Mapping[str, Any], access: Access, principal: str = "") -> bool:
    """Whether a policy forbids what another one may allow."""
    return any(statement["Effect"] == "Deny" and _applies(statement, access, principal) for statement in policy["Statement"])


def _applies(statement: Mapping[str, Any], access: Access, principal: str) -> bool:
    unknown = set(statement) - {"Sid", "Effect", "Action", "Resource", "Condition", "Principal"}
    assert not unknown, f"this evaluator does not know {unknown}"
    asked = statement.get("Principal", "*")
    if asked != "*" and principal not in _listed(asked["AWS"]):
        return False
    if not any(_like(pattern.lower(), access.action.lower()) for pattern in _listed(statement["Action"])):
        return False
    if not any(_like(pattern, access.resource) for pattern in _listed(statement["Resource"])):
        return False
    for operator, wanted in statement.get("Condition", {}).items():
        for key, patterns in wanted.items():
            value = access.context.get(key)
            if value is None:  # a key that the request does not have fits nothing, and so every "not"
                if "Not" not in operator:
                    return False
            elif not any(_MATCHES[operator](pattern, value) for pattern in _listed(patterns)):
                return False
    return True


def _listed(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def _like(pattern: str, text: str) -> bool:
    """IAM's wildcards: * is any text, slashes too, ? is one character; nothing else is special."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), text, re.DOTALL) is not None


def accesses(method: str, target: str, headers: Mapping[str, str]) -> list[Access]:
    """What a path-style S3 request needs, by the service's own table of operations and permissions.

    Raises:
        AssertionError: the request is of a kind that no job should send.
    """
    path, _, query = target.partition("?")
    bucket, _, key = unquote(path).lstrip("/").partition("/")
    given = dict(parse_qsl(query, keep_blank_values=True))
    given.pop("x-id", None)  # the SDK's name of the operation, which the service ignores
    bucket_arn = f"arn:aws:s3:::{bucket}"
    if not key:
        if "uploads" in given and method == "GET":  # IAM has no s3:prefix for this one
            return [Access("s3:ListBucketMultipartUploads", bucket_arn, {})]
        known = {"list-type", "prefix", "max-keys", "continuation-token", "encoding-type", "delimiter", "start-after"}
        assert method == "GET", f"{method} {target}: no job asks this of a bucket"
        assert given.get("list-type") == "2", f"{method} {target}: no job asks this of a bucket"
        assert not set(given) - known, f"{method} {target}: no job asks this of a bucket"
        return [Access("s3:ListBucket", bucket_arn, {"s3:prefix": given["prefix"]} if "prefix" in given else {})]
    resource = f"{bucket_arn}/{key}"
    kinds = {
        ("GET", ()): "s3:GetObject",
        ("HEAD", ()): "s3:GetObject",
        ("PUT", ()): "s3:PutObject",
        ("DELETE", ()): "s3:DeleteObject",
        ("POST", ("uploads",)): "s3:PutObject",
        ("PUT", ("partNumber", "uploadId")): "s3:PutObject",
        ("POST", ("uploadId",)): "s3:PutObject",
        ("DELETE", ("uploadId",)): "s3:AbortMultipartUpload",
    }
    kind = (method, tuple(sorted(given)))
    assert kind in kinds, f"{method} {target}: no job asks this of an object"
    found = [Access(kinds[kind], resource, {})]
    if source := headers.get("x-amz-copy-source"):
        found.append(Access("s3:GetObject", f"arn:aws:s3:::{unquote(source).lstrip('/')}", {}))
    return found
