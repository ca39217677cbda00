"""infra/s3: what each role may do, held against what the jobs really ask for, by IAM's rules and by a server that enforces them."""

from __future__ import annotations

import json
import re
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator

from cluster.dataset import Dataset
from cluster.seaweedfs import Endpoint
from cluster.store import NotFound, StoreError, open_store
from tests.infra.policy import FOLDER, PLACES, ROLES, Access, accesses, allows, filled_in
from tests.infra.whole_run import WholeRun

SETS = ("training", "original", "protected")
LOST = ("shards/x.tar", "quarantine/x.parquet", ".probe-x")
COMMITS = ("dataset.json", "index.json", "manifests/00000.json")

RARE = re.compile(
    r"\w+ AbortMultipartUpload .*"  # an upload of a large tar was cut off
    r"|\w+ DeleteObject .*/(shards|quarantine)/\*"  # another attempt committed first
    r"|\w+ \w+ .*/quarantine/\*"  # nothing was left out of that set
    r"|(ingest|protector|repairer) GetObject \w+/shards/\*"  # after the PUT of a large tar
    r"|trainer GetObject run/(checkpoints|weights)/\*"  # a run that was stopped goes on
)
"""Grants that the whole run has no occasion to use."""


def on(key: str, action: str = "s3:GetObject") -> Access:
    return Access(action, f"arn:aws:s3:::faces/{key}", {})


def listing(prefix: str | None) -> Access:
    return Access("s3:ListBucket", "arn:aws:s3:::faces", {} if prefix is None else {"s3:prefix": prefix})


def these(action: str, *keys: str) -> list[Access]:
    return [on(key, action) for key in keys]


def forbidden() -> dict[str, list[Access]]:
    """By role, what must be denied."""
    get, put, drop = "s3:GetObject", "s3:PutObject", "s3:DeleteObject"
    bucket = ("s3:DeleteBucket", "s3:PutBucketPolicy", "s3:PutLifecycleConfiguration")
    everybody = [listing(None), listing(""), Access(get, "arn:aws:s3:::other/original/dataset.json", {})]
    everybody += [Access(action, "arn:aws:s3:::faces", {}) for action in bucket]
    everybody += [access for action in (get, put, drop) for access in these(action, "elsewhere/x", "original-2/dataset.json")]
    everybody += these(drop, *(f"{root}/{key}" for root in (*SETS, "repaired", "release") for key in COMMITS))
    originals = [f"original/{key}" for key in (*COMMITS, *LOST)]
    embeddings = [f"{root}/embeddings/r/shards/x.parquet" for root in SETS]
    every_root = [f"{root}/{key}" for root in (*SETS, "run", "results", "release") for key in (*COMMITS, *LOST)]
    keep_originals, write_nothing = ([*these(put, *keys), *these(drop, *keys)] for keys in (originals, every_root))
    no_embeddings = [*these(get, *embeddings), *these(put, *embeddings)]
    weights = "run/weights/model.safetensors"
    roles = {
        "ingest": no_embeddings
        + these(get, "protected/dataset.json", "run/run.json")
        + these(put, "source/x.jpg")
        + these(drop, "source/x.jpg"),
        "trainer": keep_originals + these(get, *originals, *embeddings[1:], "protected/dataset.json") + these(put, "training/shards/x.tar"),
        "protector": keep_originals + no_embeddings + these(get, "original/quarantine/x", "run/checkpoints/x") + these(put, weights),
        "measurer": keep_originals
        + these(get, weights, "source/x.jpg")
        + these(put, "protected/shards/x.tar", "training/dataset.json")
        + these(put, "protected/index.json", "protected/manifests/00000.json", "protected/quarantine/x.parquet"),
        "repairer": keep_originals
        + these(get, "original/quarantine/x", "run/checkpoints/x", "source/x.jpg", embeddings[2], "training/shards/x.tar")
        + these(put, *(f"protected/{key}" for key in COMMITS), "results/leakage.json", embeddings[1], weights),
        "auditor": write_nothing + these(get, weights, "source/x.jpg", "original/attempts/00001.json"),
        "watcher": write_nothing
        + these(
            get, *(f"{root}/{key}" for root in SETS for key in LOST), *embeddings, weights, "run/checkpoints/x.safetensors", "source/x.jpg"
        )
        + these(get, "results/r/s/shards/x.parquet", "recognizers/x.onnx"),
        "pipeline": these(drop, *(f"root/{root}/{key}" for root in SETS for key in COMMITS), "root/run/weights/x", "folder/leakage.json")
        + these(put, "source/x.jpg", "recognizers/x.onnx", "release/dataset.json")
        + these(drop, "source/x.jpg", "recognizers/x.onnx"),
        "cleaner": these(put, *every_root) + these(drop, "run/checkpoints/x", "results/x", "source/x.jpg"),
        "publisher": these(get, *originals, *embeddings, "protected/attempts/1.json") + these(put, "protected/shards/x.tar", *embeddings),
        "reader": write_nothing + these(get, *originals, *embeddings, "protected/dataset.json", "run/run.json", "results/leakage.json"),
    }
    return {role: everybody + own for role, own in roles.items()}


@pytest.mark.parametrize("role", ROLES)
def test_a_policy_is_narrow(role: str) -> None:
    text = (FOLDER / f"{role}.json").read_text()
    policy = filled_in(role)
    assert policy["Version"] == "2012-10-17"
    assert len(text) < 6144, "IAM's limit for a managed policy"
    assert not [place for place in PLACES if place in json.dumps(policy)], "a placeholder was left"
    for statement in policy["Statement"]:
        assert statement["Effect"] == "Allow"
        assert not [action for action in statement["Action"] if "*" in action]
        assert not [resource for resource in statement["Resource"] if resource.startswith("arn:aws:s3:::faces/*")]
        if "s3:ListBucket" in statement["Action"]:
            assert statement["Action"] == ["s3:ListBucket"]
            assert all(prefix.rstrip("*") for prefix in statement["Condition"]["StringLike"]["s3:prefix"])
    for access in forbidden()[role]:
        assert not allows(policy, access), access


def test_only_protect_and_the_gate_write_what_says_that_a_set_is_released() -> None:
    writers = {role for role in ROLES if allows(filled_in(role), on("protected/dataset.json", "s3:PutObject"))}
    assert writers == {"protector", "measurer"}


def test_only_the_cleaner_and_losers_of_a_commit_delete() -> None:
    for role in ROLES:
        policy = filled_in(role)
        deletable = {r.rpartition("faces/")[2] for s in policy["Statement"] if "s3:DeleteObject" in s["Action"] for r in s["Resource"]}
        assert bool(deletable) is (role not in ("auditor", "watcher", "publisher", "reader"))
        # the measurer's: an index's intermediate set
        own = {
            "cleaner": ["attempts/*"],
            "trainer": ["checkpoints/*"],
            "measurer": [".cells-*/*"],
            "pipeline": ["checkpoints/*", ".cells-*/*"],
        }
        allowed = ("shards/*", "quarantine/*", ".probe-*", *own.get(role, []))
        assert all(resource.endswith(allowed) for resource in deletable), role


@pytest.mark.parametrize(
    ("statement", "access", "allowed"),
    [
        ({}, on("a/b"), True),
        ({"Action": "s3:Get*"}, on("a/b"), True),
        ({"Action": "S3:GETOBJECT"}, on("a/b"), True),
        ({"Action": "s3:PutObject"}, on("a/b"), False),
        ({"Resource": "arn:aws:s3:::faces/a/?"}, on("a/b"), True),
        ({"Resource": "arn:aws:s3:::faces/a/?"}, on("a/bc"), False),
        ({"Resource": "arn:aws:s3:::faces/a"}, on("a/b"), False),
        ({"Resource": "arn:aws:s3:::faces/*/c"}, on("a/b/c"), True),
        ({"Resource": "arn:aws:s3:::faces/A/*"}, on("a/b"), False),
        ({"Condition": {"StringEquals": {"s3:prefix": "a*"}}}, on("a/b"), False),
    ],
)
def test_the_evaluator_follows_iam(statement: dict[str, Any], access: Access, allowed: bool) -> None:
    whole = {"Effect": "Allow", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::faces/a/*", **statement}
    assert allows({"Statement": [whole]}, access) is allowed
    assert not allows({"Statement": [whole, {"Effect": "Deny", "Action": "*", "Resource": "*"}]}, access)
    assert not allows({"Statement": []}, access)


def test_conditions_and_requests_are_read_as_s3_does() -> None:
    condition = {"StringLike": {"s3:prefix": ["a/*"]}}
    policy = {"Statement": [{"Effect": "Allow", "Action": "s3:ListBucket", "Resource": "arn:aws:s3:::faces", "Condition": condition}]}
    for target, allowed in (
        ("prefix=a%2Fb", True),
        ("prefix=a%2F", True),
        ("prefix=b%2F", False),
        ("prefix=", False),
        ("max-keys=1", False),
    ):
        (access,) = accesses("GET", f"/faces?list-type=2&{target}", {})
        assert allows(policy, access) is allowed, target
    assert accesses("POST", "/faces/a%20b?uploads", {}) == [on("a b", "s3:PutObject")]
    assert accesses("PUT", "/faces/a?partNumber=1&uploadId=x", {}) == [on("a", "s3:PutObject")]
    assert accesses("DELETE", "/faces/a?uploadId=x", {}) == [on("a", "s3:AbortMultipartUpload")]
    assert accesses("PUT", "/faces/a", {"x-amz-copy-source": "/faces/b"}) == [on("a", "s3:PutObject"), on("b")]
    for method, target in (
        ("PUT", "/faces"),
        ("GET", "/faces?acl"),
        ("GET", "/faces/a?acl"),
        ("POST", "/faces?delete"),
        ("DELETE", "/faces"),
    ):
        with pytest.raises(AssertionError, match="no job asks this"):
            accesses(method, target, {})


@pytest.mark.s3
@pytest.mark.timeout(900)
def test_every_request_of_every_job_is_within_its_role(whole_run: WholeRun) -> None:
    roles = {access: role for role, (access, _) in whole_run.keys.items()}
    policies = {role: filled_in(role) for role in ROLES}
    seen: dict[str, set[tuple[str, str]]] = {role: set() for role in ROLES}
    denied = 0
    for request in whole_run.record.requests:
        role = roles[request.access_key]
        needed = accesses(request.method, request.target, request.headers)
        if role == "reader" and needed[0].action == "s3:ListBucketMultipartUploads":
            assert request.status == 403, "verify does without, and says so"
            continue
        seen[role] |= {(request.method, a.action) for a in needed}
        allowed = all(allows(policies[role], access) for access in needed)
        # the two ends of the run that must fail: a wrong secret key, and a write under the auditor's keys
        if role == "auditor" and request.status == 403:
            denied += 1
            continue
        assert allowed, f"{role}: {request.method} {request.target}"
        assert request.status != 403, f"{role}: the server refused {request.method} {request.target}"
    assert denied >= 2
    assert len(whole_run.record.requests) > 200
    everything = {("GET", "s3:ListBucket"), ("GET", "s3:GetObject"), ("PUT", "s3:PutObject"), ("DELETE", "s3:DeleteObject")}
    for role in ("ingest", "trainer", "protector", "measurer", "repairer"):
        assert seen[role] >= everything, role
    assert seen["auditor"] >= {("GET", "s3:ListBucket"), ("GET", "s3:GetObject"), ("GET", "s3:ListBucketMultipartUploads")}
    assert seen["reader"] == {("GET", "s3:ListBucket"), ("GET", "s3:GetObject")}
    assert any(r.status == 404 for r in whole_run.record.requests), "the store met 403 in place of 404, as on AWS"


@pytest.mark.s3
@pytest.mark.timeout(900)
@pytest.mark.parametrize("role", ROLES)
def test_the_server_denies_what_the_evaluator_does(whole_run: WholeRun, role: str) -> None:
    client = whole_run.client(role)
    calls = {
        "s3:GetObject": client.get_object,
        "s3:DeleteObject": client.delete_object,
        "s3:PutObject": lambda **target: client.put_object(Body=b"x", **target),
    }
    before = whole_run.objects()
    for access in forbidden()[role]:
        bucket, _, key = access.resource.removeprefix("arn:aws:s3:::").partition("/")
        if access.action == "s3:ListBucket":
            with pytest.raises(ClientError, match="AccessDenied"):
                client.list_objects_v2(Bucket=bucket, Prefix=access.context.get("s3:prefix", ""))
        elif key and bucket == "faces":
            with pytest.raises(ClientError, match="AccessDenied"):
                calls[access.action](Bucket=bucket, Key=key)
    assert whole_run.objects() == before


@pytest.mark.s3
@pytest.mark.timeout(900)
def test_nothing_is_granted_that_no_job_uses(whole_run: WholeRun) -> None:
    """Every action and resource of a policy was asked for, but for what only a race, a large tar or a failure asks."""
    roles = {access: role for role, (access, _) in whole_run.keys.items()}
    used: dict[str, dict[tuple[str, str], Access]] = {role: {} for role in ROLES}
    for request in whole_run.record.requests:
        needed = accesses(request.method, request.target, request.headers)
        used[roles[request.access_key]] |= {(access.action, access.resource): access for access in needed}
    unused = set()
    for role in ("ingest", "trainer", "protector", "measurer", "repairer", "auditor"):
        grants = [(a, r) for s in filled_in(role)["Statement"] if "Condition" not in s for a in s["Action"] for r in s["Resource"]]
        for action, resource in grants:
            one = {"Statement": [{"Effect": "Allow", "Action": action, "Resource": resource}]}
            if not any(allows(one, access) for access in used[role].values()):
                unused.add(f"{role} {action.removeprefix('s3:')} {resource.removeprefix('arn:aws:s3:::faces/')}")
    assert sorted(grant for grant in unused if not RARE.fullmatch(grant)) == []


@pytest.mark.s3
@pytest.mark.timeout(900)
def test_a_missing_object_is_told_from_a_forbidden_one(whole_run: WholeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in whole_run.environment("protector").items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)
    store = open_store("s3://faces/original")
    ledger = next(key for key in whole_run.objects() if key.startswith("original/quarantine/")).removeprefix("original/")
    for read in (store.get, store.size, lambda key: store.get_range(key, 0, 1)):
        with pytest.raises(NotFound, match=r"manifests/99999\.json does not exist"):
            read("manifests/99999.json")
        with pytest.raises(StoreError, match="access denied: check the credentials") as caught:
            read(ledger)  # it is there, and may be listed, but not read
        assert not isinstance(caught.value, NotFound)
        assert caught.value.fatal
    with pytest.raises(StoreError, match="access denied"):
        open_store("s3://faces/results").get("leakage.json")  # may not even be listed
    with pytest.raises(StoreError, match="access denied"):
        store.put("shards/x.tar", b"x")


@pytest.mark.s3
@pytest.mark.timeout(900)
def test_a_refused_writer_leaves_nothing_half_written(whole_run: WholeRun) -> None:
    assert "access denied: check the credentials and the bucket's policy" in whole_run.done["read only"].text
    assert not [key for key in whole_run.objects() if key.startswith("protected2/")]
    for name in ("verify", "verify original", "verify release"):
        assert "nothing missing, nothing doubled, no stray object" in whole_run.done[name].text
    writes = [r for r in whole_run.record.requests if r.access_key == whole_run.keys["reader"][0] and r.method not in ("GET", "HEAD")]
    assert writes == []


@pytest.mark.s3
@pytest.mark.timeout(900)
def test_the_gate_withholds_and_releases_by_an_index_of_cells(whole_run: WholeRun) -> None:
    assert whole_run.done["withheld"].code == 4
    assert "release withheld: up to" in whole_run.done["withheld"].text
    assert "released: true" in whole_run.done["released"].text
    objects = whole_run.objects()
    assert json.loads(objects["protected/dataset.json"])["released"] is json.loads(objects["release/dataset.json"])["released"] is True
    assert {key.split("/")[0] for key in objects if ".index-" in key} == {"original", "protected"}
    assert not [key for key in objects if ".cells-" in key], "the measurer takes the intermediate sets away"


@pytest.mark.s3
def test_the_lifecycle_is_taken_by_botocore_and_by_a_server(s3_server: Endpoint) -> None:
    rules = filled_in("lifecycle")
    keys = {"aws_access_key_id": s3_server.access_key, "aws_secret_access_key": s3_server.secret_key, "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=s3_server.url, **keys)
    shape = client.meta.service_model.operation_model("PutBucketLifecycleConfiguration").input_shape
    given = {"Bucket": "tests-lifecycle", "LifecycleConfiguration": rules}
    assert not ParamValidator().validate(given, shape).has_errors()
    s3_server.create_bucket("tests-lifecycle")
    client.put_bucket_lifecycle_configuration(**given)
    stored = {rule["ID"]: rule for rule in client.get_bucket_lifecycle_configuration(Bucket="tests-lifecycle")["Rules"]}
    assert {rule["Filter"]["Prefix"] for rule in stored.values() if "Expiration" in rule} == {f"{root}/embeddings/" for root in SETS}
    assert stored.keys() == {rule["ID"] for rule in rules["Rules"]}
    assert [rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] for rule in stored.values() if "Expiration" not in rule] == [2]
    assert Dataset("s3://x/original").embeddings("r").url.removeprefix("s3://x/").startswith("original/embeddings/")
