"""Secrets in places that everybody reads: variables, arguments, ConfigMaps, annotations."""

from __future__ import annotations

import base64
import binascii
import re

from cluster.secret import carries_credentials
from tests.infra.kubernetes.problem import Found, Object, join, listed, walk

_NAME = re.compile(r"(?i)(secret|passw(or)?d|token|credential|api_?key|access_?key|private_?key)")
_NAME_ONLY = re.compile(r"(?i)(_file|_path|_dir|_name|_arn|_url|_mode|_seed)$|^RAY_AUTH_MODE$")
_REFERENCE = re.compile(r"(env:[A-Za-z_]\w*|file:/[^\s]+|\$\([A-Za-z_]\w*\)|true|false|\d{1,6})?")
_SHAPES = (
    ("an AWS access key", re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
    ("a GitHub token", re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36}\b")),
    ("a JSON web token", re.compile(r"\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}")),
)
_SETTING = re.compile(
    r"(?i)(?:^|[\s\"'{,-])[\w-]*(?:secret|passw(?:or)?d|token|credential|api[_-]?key|access[_-]?key)[\w-]*[\"']?\s*[:=]\s*[\"']?([^\s\"',}#]+)"
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+[^\s\"']+")


def literal(text: str) -> str | None:
    """What secret a text holds, in words; None where it seems to hold none."""
    for what, shape in _SHAPES:
        if shape.search(text):
            return what
    if any(carries_credentials(url) for url in _URL.findall(text)):
        return "a URL with a user or a password"
    return "a secret's value" if any(not _REFERENCE.fullmatch(value) for value in _SETTING.findall(text)) else None


def check(thing: Object) -> Found:
    """Everything in an object that looks like a secret; what it is is said, it is not repeated."""
    if thing.get("kind") == "Secret":
        yield from _secret(thing)
        return
    for path, value in walk(thing):
        if isinstance(value, str) and (what := literal(value)) and not (what == "a secret's value" and path.startswith("metadata.")):
            yield path, f"looks like {what}: name a Secret instead"
        if isinstance(value, dict):
            for where, variable in listed(value, "env", path):
                name, given = str(variable.get("name")), variable.get("value")
                if isinstance(given, str) and _NAME.search(name) and not _NAME_ONLY.search(name) and not _REFERENCE.fullmatch(given):
                    yield join(where, "value"), f"{name} looks like a secret: take it from a Secret by valueFrom or envFrom"


def _secret(thing: Object) -> Found:
    for key, value in (thing.get("data") or {}).items():
        try:
            text = base64.b64decode(value, validate=True).decode(errors="replace")
        except (binascii.Error, TypeError, ValueError):
            yield f"data.{key}", "is not base64"
            continue
        yield from _placeholder(f"data.{key}", text)
    for key, value in (thing.get("stringData") or {}).items():
        yield from _placeholder(f"stringData.{key}", str(value))


def _placeholder(path: str, text: str) -> Found:
    if what := next((what for what, shape in _SHAPES if shape.search(text)), None):
        yield path, f"holds {what}: manifests are kept where many read them; create the Secret apart"
