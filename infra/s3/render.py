"""`python -m infra.s3.render aws|seaweedfs|ceph --bucket NAME --output FOLDER ...`: the policies of this folder for one bucket.

The files beside this one hold placeholders in capitals. What is rendered is checked: no placeholder is left, and no prefix lies in another.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ROLES = (
    *("ingest", "trainer", "protector", "measurer", "repairer", "auditor", "watcher", "cleaner", "publisher", "reader"),
    "pipeline",
)
INSIDE = ("TRAINING", "ORIGINAL", "PROTECTED", "REPAIRED", "RUN", "RECOGNIZERS")
"""Prefixes that lie below ROOT unless they are given, as FOLDER does under the name of results."""
PREFIXES = ("SOURCE", "ROOT", *INSIDE, "FOLDER", "RESULTS", "RELEASE")
TRUST = ("ACCOUNT", "ISSUER", "NAMESPACE", "SERVICEACCOUNT", "OWNER")
PLACEHOLDER = re.compile(rf"\b({'|'.join(('BUCKET', *PREFIXES, *TRUST))})\b")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"[\w!'()-][\w!.'()=+@ -]*(/[\w!'()-][\w!.'()=+@ -]*)*", re.ASCII)
_PLAIN = {
    "ACCOUNT": (r"\d{12}", "an AWS account is 12 digits"),
    "ISSUER": (r"(?!https?://)[\w.-]+(/[\w.-]+)*", "the cluster's OIDC issuer without https:// and without a slash at its end"),
    "NAMESPACE": (r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", "a namespace of Kubernetes"),
    "SERVICEACCOUNT": (r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", "a service account of Kubernetes"),
    "OWNER": (r"[\w+=,.@/-]+", "the name of the IAM role that may take back what is committed"),
}


class PlaceError(ValueError):
    """A bucket, prefix or name that cannot be filled in; the message says the flag, the reason and the remedy."""


def places(bucket: str, given: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """A value for every placeholder that has one.

    Args:
        bucket: its name.
        given: by placeholder; those that are None or absent get their default: below ROOT what the pipeline puts there.

    Raises:
        PlaceError: a wrong value, or two prefixes of which one lies in the other, so that a policy for one would reach the other.
    """
    found = {name: value for name, value in (given or {}).items() if value is not None}
    root = found.setdefault("ROOT", "facemae")
    for name in INSIDE:
        found.setdefault(name, f"{root}/{name.lower()}")
    found.setdefault("FOLDER", f"{root}/results")
    found.setdefault("RESULTS", f"{found['FOLDER']}/leakage")
    for name, default in (("SOURCE", "incoming"), ("RELEASE", "release"), ("NAMESPACE", "facemae"), ("SERVICEACCOUNT", "facemae")):
        found.setdefault(name, default)
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise PlaceError(f"--bucket {bucket}: 3 to 63 small letters, digits, dots and hyphens, without s3://")
    for name in PREFIXES:
        if not _PREFIX.fullmatch(found[name]):
            raise PlaceError(
                f"{_flag(name)} {found[name]!r}: give a prefix as in faces/original, without slashes at its ends, wildcards or empty parts"
            )
    for name, (pattern, meaning) in _PLAIN.items():
        if name in found and not re.fullmatch(pattern, found[name]):
            raise PlaceError(f"{_flag(name)} {found[name]!r}: give {meaning}")
    _require_apart(found)
    return {**found, "BUCKET": bucket}


def _require_apart(found: Mapping[str, str]) -> None:
    """Refuse prefixes of which one lies in another, but for those of a pipeline below its root and folder."""
    for outer in PREFIXES:
        for inner in PREFIXES:
            expected = (outer == "ROOT" and inner in (*INSIDE, "FOLDER", "RESULTS")) or (outer == "FOLDER" and inner == "RESULTS")
            if outer != inner and not expected and f"{found[inner]}/".startswith(f"{found[outer]}/"):
                raise PlaceError(
                    f"{_flag(inner)} {found[inner]} lies in {_flag(outer)} {found[outer]}: who may read or write that would reach it; "
                    "give prefixes beside each other"
                )


def fill(name: str, values: Mapping[str, str]) -> Any:
    """A file of this folder with its placeholders replaced, all in one pass: a value may look like a placeholder.

    Raises:
        PlaceError: a placeholder has no value.
    """
    missing = set[str]()

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            missing.add(match[1])
            return match[0]
        return json.dumps(values[match[1]])[1:-1]

    text = PLACEHOLDER.sub(value, (FOLDER / f"{name}.json").read_text())
    if missing:
        flags = ", ".join(_flag(each) for each in sorted(missing))
        raise PlaceError(f"{name}.json needs {flags}: give it, or leave this file out with --without {name}")
    return json.loads(text)


def aws(values: Mapping[str, str], without: Sequence[str] = ()) -> dict[str, Any]:
    """File name -> content: a policy for each role, who may take the roles, the bucket's policy and its lifecycle."""
    names = [name for name in (*ROLES, "trust-irsa", "bucket", "lifecycle") if name not in without]
    return {f"{name}.json": fill(name, values) for name in names}


def seaweedfs(values: Mapping[str, str], keys: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """What ``-s3.config`` takes: an identity for each role with its keys and its policy. The owner's own identity is not among them."""
    identities = [
        {"name": role, "credentials": [{"accessKey": keys[role][0], "secretKey": keys[role][1]}], "policyNames": [role]} for role in ROLES
    ]
    return {"identities": identities, "policies": [{"name": role, "content": json.dumps(fill(role, values))} for role in ROLES]}


def ceph(values: Mapping[str, str]) -> dict[str, Any]:
    """One bucket policy: the statements of all roles, each with its user, and what is denied. A user is named facemae-ROLE."""
    users = {role: f"arn:aws:iam:::user/facemae-{role}" for role in ROLES}
    statements = [
        {**statement, "Sid": f"{role}{statement['Sid']}", "Principal": {"AWS": [users[role]]}}
        for role in ROLES
        for statement in fill(role, values)["Statement"]
    ]
    denied = {each["Sid"]: each for each in fill("bucket", {"ACCOUNT": "", "OWNER": "", **values})["Statement"]}
    committed = {name: value for name, value in denied["WhatIsCommittedStays"].items() if name != "Condition"}
    committed["Principal"] = {"AWS": list(users.values())}  # not the bucket's owner
    return {"Version": "2012-10-17", "Statement": [denied["OnlyOverTls"], committed, *statements]}


def main(words: Sequence[str] | None = None) -> int:
    """Write the files. Returns 0, or 2 after saying what is wrong."""
    flags = _parser().parse_args(words)
    try:
        values = places(flags.bucket, {name: getattr(flags, name.lower()) for name in (*PREFIXES, *TRUST)})
        folder = Path(flags.output)
        folder.mkdir(parents=True, exist_ok=True)
        if flags.kind == "aws":
            files = aws(values, flags.without)
        elif flags.kind == "ceph":
            files = {"bucket-policy.json": ceph(values), "lifecycle.json": fill("lifecycle", values)}
        else:
            keys = _keys(folder)
            files = {"s3.json": seaweedfs(values, keys), "lifecycle.json": fill("lifecycle", values)}
            for role, (access, secret) in keys.items():
                _write(folder / f"{role}.env", f"AWS_ACCESS_KEY_ID={access}\nAWS_SECRET_ACCESS_KEY={secret}\n", private=True)
        for name, content in files.items():
            _write(folder / name, json.dumps(content, indent=2) + "\n", private=name == "s3.json")
    except (PlaceError, OSError) as error:
        print(f"infra.s3.render: error: {error}", file=sys.stderr)
        return 2
    print(f"written: {folder}: {', '.join(files)}" + (", and the keys of each role as ROLE.env" if flags.kind == "seaweedfs" else ""))
    return 0


def _keys(folder: Path) -> dict[str, tuple[str, str]]:
    """The keys of every role: those of the file that is there, new ones for the others."""
    known = dict[str, tuple[str, str]]()
    if (folder / "s3.json").exists():
        try:
            for identity in json.loads((folder / "s3.json").read_text())["identities"]:
                pair = identity["credentials"][0]
                known[identity["name"]] = str(pair["accessKey"]), str(pair["secretKey"])
        except (ValueError, LookupError, TypeError):
            raise PlaceError(f"--output {folder}: its s3.json, whose keys would be kept, cannot be read: remove it, or mend it") from None
    return {role: known.get(role) or (secrets.token_hex(10), secrets.token_urlsafe(30)) for role in ROLES}


def _write(path: Path, text: str, *, private: bool = False) -> None:
    path.unlink(missing_ok=True)  # so that the mode is that of a new file
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644), "w") as file:
        file.write(text)


def _flag(name: str) -> str:
    return f"--{name.lower()}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infra.s3.render", description="Fill the policies of infra/s3 in for one bucket.")
    parser.add_argument("kind", choices=["aws", "seaweedfs", "ceph"])
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--output", required=True, help="folder for what is written; with seaweedfs it holds keys, mode 600")
    defaults = places("any-bucket")
    for name in PREFIXES:
        parser.add_argument(_flag(name), help=f"a prefix, by default {defaults[name]}")
    for name in TRUST:
        parser.add_argument(_flag(name), help=f"aws: {_PLAIN[name][1]}")
    parser.add_argument("--without", action="append", default=[], choices=["trust-irsa", "bucket"], help="aws: leave this file out")
    return parser


if __name__ == "__main__":
    sys.exit(main())
