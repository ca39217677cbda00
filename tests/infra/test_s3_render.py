"""infra/s3/render.py: what it fills in for AWS, SeaweedFS and Ceph, what it refuses, and two roles on a server with the rendered file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from cluster.attempt import Attempt, attempting
from cluster.dataset import Dataset, Labels, ShardData
from cluster.picture import encode
from cluster.seaweedfs import seaweedfs
from cluster.shard import Sample, ShardWriter
from facemae.synthetic import SyntheticFaces
from infra.s3.render import PLACEHOLDER, ROLES, PlaceError, aws, ceph, fill, main, places
from jobs import status, verify
from tests.infra.policy import PLACES, Access, allows, denies, filled_in
from tests.infra.recorder import recorder
from tests.infra.test_policies import forbidden

TRUST = {
    "ACCOUNT": "123456789012",
    "ISSUER": "oidc.example.org/id/AB1",
    "NAMESPACE": "faces",
    "SERVICEACCOUNT": "facemae",
    "OWNER": "owner",
}
ADMIN = "arn:aws:iam::123456789012:role/owner"
FLAGS = [word for name, value in TRUST.items() for word in (f"--{name.lower()}", value)]


def test_all_files_for_aws(tmp_path: Path) -> None:
    assert main(["aws", "--bucket", "my-bucket", "--root", "a/b", "--output", str(tmp_path), *FLAGS]) == 0
    assert {path.stem for path in tmp_path.iterdir()} == {*ROLES, "bucket", "lifecycle", "trust-irsa"}
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert not PLACEHOLDER.search(text), path
        assert len(json.dumps(json.loads(text))) < 10240, "IAM's limit for a role's own policies"
    protector = json.loads((tmp_path / "protector.json").read_text())
    assert allows(protector, Access("s3:PutObject", "arn:aws:s3:::my-bucket/a/b/protected/shards/x.tar", {}))
    assert not allows(protector, Access("s3:PutObject", "arn:aws:s3:::my-bucket/a/b/original/shards/x.tar", {}))


def test_a_pipeline_s_role_covers_its_layout() -> None:
    policy = fill("pipeline", places("faces", {"ROOT": "a"}))
    for key in (
        "a/training/shards/x",
        "a/protected/dataset.json",
        "a/run/run.json",
        "a/results/recognizers/inside/weights/recognizer.onnx",
    ):
        assert allows(policy, Access("s3:PutObject", f"arn:aws:s3:::faces/{key}", {})), key
    for key in (
        "a/results/recognizers/inside/checkpoints/1",
        "a/run/checkpoints/1",
        "a/original/embeddings/r/.probe-1",
        "a/results/leakage/r/s/shards/x",
    ):
        assert allows(policy, Access("s3:DeleteObject", f"arn:aws:s3:::faces/{key}", {})), key


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bucket", "s3://faces"], "--bucket s3://faces: "),
        (["--original", "/faces/original"], "--original '/faces/original': give a prefix"),
        (["--original", "original/"], "without slashes at its ends"),
        (["--original", "a//b"], "--original 'a//b'"),
        (["--original", "../x"], "--original '../x'"),
        (["--original", "a*"], "wildcards"),
        (["--original", ""], "--original ''"),
        (["--original", "facemae/protected/x"], "--original facemae/protected/x lies in --protected facemae/protected"),
        (["--original", "facemae/protected"], "lies in --"),
        (["--release", "facemae/release"], "--release facemae/release lies in --root facemae"),
        (["--root", "faces", "--folder", "faces/run"], "lies in"),
        (["--account", "12"], "--account '12': give an AWS account is 12 digits"),
        (["--issuer", "https://oidc.example.org"], "--issuer 'https://oidc.example.org'"),
    ],
)
def test_what_cannot_be_is_refused(flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["aws", "--bucket", "faces", "--output", str(tmp_path / "out"), *FLAGS, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_placeholder_without_a_value_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["aws", "--bucket", "faces", "--output", str(tmp_path)]) == 2
    assert "trust-irsa.json needs --account, --issuer: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main(["aws", "--bucket", "faces", "--output", str(tmp_path), "--without", "trust-irsa", "--without", "bucket"]) == 0
    with pytest.raises(PlaceError, match=r"ingest.json needs --source"):
        fill("ingest", {name: value for name, value in PLACES.items() if name != "SOURCE"})


def test_a_value_that_looks_like_a_placeholder_stays_what_it_is() -> None:
    text = json.dumps(fill("trainer", {**PLACES, "TRAINING": "RUN", "RUN": "TRAINING"}))
    assert "faces/RUN/shards/*" in text
    assert "faces/TRAINING/checkpoints/*" in text


def on(action: str, key: str, **context: str) -> Access:
    given = {"aws:SecureTransport": "true", "s3:TlsVersion": "1.3", "aws:PrincipalArn": "arn:aws:iam::123456789012:role/facemae-x"}
    return Access(
        f"s3:{action}", f"arn:aws:s3:::faces/{key}", {**given, **{re.sub("_", ":", name): value for name, value in context.items()}}
    )


def test_the_bucket_s_policy() -> None:
    policy = aws({**places("faces"), **TRUST})["bucket.json"]
    for action in ("GetObject", "PutObject", "ListBucket"):
        assert not denies(policy, on(action, "facemae/original/shards/x"))
        assert denies(policy, on(action, "facemae/original/shards/x", aws_SecureTransport="false"))
        assert denies(policy, on(action, "facemae/original/shards/x", s3_TlsVersion="1.1"))
    for key in (
        "facemae/original/manifests/00000.json",
        "facemae/protected/dataset.json",
        "release/index.json",
        "facemae/repaired/dataset.json",
    ):
        for action in ("DeleteObject", "DeleteObjectVersion"):
            assert denies(policy, on(action, key))
            assert not denies(policy, on(action, key, aws_PrincipalArn=ADMIN))
        assert not denies(policy, on("PutObject", key))
    for key in ("facemae/original/shards/x", "facemae/original/embeddings/r/.cells-1/manifests/0.json", "facemae/run/checkpoints/1"):
        assert not denies(policy, on("DeleteObject", key)), key


def test_only_the_pods_of_the_service_account_take_a_role() -> None:
    statement = aws({**places("faces"), **TRUST})["trust-irsa.json"]["Statement"][0]
    assert statement["Principal"] == {"Federated": "arn:aws:iam::123456789012:oidc-provider/oidc.example.org/id/AB1"}
    asked = {"Statement": [{**{k: v for k, v in statement.items() if k != "Principal"}, "Resource": "*"}]}

    def takes(subject: str, audience: str = "sts.amazonaws.com") -> bool:
        context = {"oidc.example.org/id/AB1:sub": subject, "oidc.example.org/id/AB1:aud": audience}
        return allows(asked, Access("sts:AssumeRoleWithWebIdentity", "role", context))

    assert takes("system:serviceaccount:faces:facemae")
    assert not takes("system:serviceaccount:other:facemae")
    assert not takes("system:serviceaccount:faces:default")
    assert not takes("system:serviceaccount:faces:facemae", "other")


def test_ceph_s_one_policy_gives_each_role_its_own_and_no_more() -> None:
    policy = ceph(PLACES)
    assert not PLACEHOLDER.search(json.dumps(policy))
    assert len({each["Sid"] for each in policy["Statement"]}) == len(policy["Statement"])
    assert all(each["Sid"].isalnum() for each in policy["Statement"])
    for role in ROLES:
        user, own = f"arn:aws:iam:::user/facemae-{role}", filled_in(role)
        for access in forbidden()[role]:
            assert not allows(policy, access, user), (role, access)
        for access in _granted(own):
            assert allows(policy, access, user), (role, access)
            assert not allows(policy, access, "arn:aws:iam:::user/somebody")
            plain = Access(access.action, access.resource, {**access.context, "aws:SecureTransport": "false"})
            assert not allows(policy, plain, user)


def _granted(policy: dict[str, Any]) -> list[Access]:
    """An access for each thing that a policy grants."""
    found = []
    for statement in policy["Statement"]:
        prefixes = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix", [None])
        for resource in statement["Resource"]:
            contexts = [{} if prefix is None else {"s3:prefix": prefix.replace("*", "x")} for prefix in prefixes]
            found += [Access(action, resource.replace("*", "x"), context) for action in statement["Action"] for context in contexts]
    return found


def test_keys_are_private_kept_and_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["seaweedfs", "--bucket", "faces", "--output", str(tmp_path)]
    assert main(command) == 0
    first = (tmp_path / "s3.json").read_text()
    keys = [pair[name] for each in json.loads(first)["identities"] for pair in each["credentials"] for name in ("accessKey", "secretKey")]
    assert len(set(keys)) == 2 * len(ROLES)
    printed = capsys.readouterr()
    assert not [key for key in keys if key in printed.out + printed.err]
    for path in (tmp_path / "s3.json", *tmp_path.glob("*.env")):
        assert path.stat().st_mode & 0o077 == 0, path
    assert main([*command, "--source", "elsewhere"]) == 0
    again = json.loads((tmp_path / "s3.json").read_text())
    assert again["identities"] == json.loads(first)["identities"]
    assert again["policies"] != json.loads(first)["policies"]
    (tmp_path / "s3.json").write_text("{")
    assert main(command) == 2
    assert "its s3.json, whose keys would be kept, cannot be read" in capsys.readouterr().err


@pytest.mark.s3
@pytest.mark.timeout(300)
def test_roles_on_a_server_with_the_rendered_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline's role writes a set; the watcher sees how far it is, by way of a proxy that answers as AWS does, and no image."""
    assert main(["seaweedfs", "--bucket", "faces", "--root", "a/b", "--output", str(tmp_path)]) == 0

    def become(role: str, url: str) -> None:
        for line in (tmp_path / f"{role}.env").read_text().splitlines():
            monkeypatch.setenv(*line.split("=", 1))
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)

    with seaweedfs(tmp_path / "weed", json.loads((tmp_path / "s3.json").read_text())) as server, recorder(server.url) as record:
        server.create_bucket("faces")
        become("pipeline", record.url)
        _write_set("s3://faces/a/b/original")
        verify.run(verify.VerifyConfig(root="s3://faces/a/b/original"))
        become("watcher", record.url)
        for root in ("s3://faces/a/b/original", "s3://faces/a/b"):
            assert status.run(status.StatusConfig(root=root))["state"] == "complete"
        client = boto3.session.Session().client(
            "s3", region_name="us-east-1", config=Config(s3={"addressing_style": "path"})
        )  # the shared session keeps the first keys it saw
        shard = next(k["Key"] for k in server._client().list_objects_v2(Bucket="faces", Prefix="a/b/original/shards/")["Contents"])
        for call in (
            lambda: client.get_object(Bucket="faces", Key=shard),
            lambda: client.put_object(Bucket="faces", Key="a/b/original/dataset.json", Body=b"{}"),
            lambda: client.delete_object(Bucket="faces", Key=shard),
            lambda: client.list_objects_v2(Bucket="faces"),
        ):
            with pytest.raises(ClientError, match="AccessDenied"):
                call()
        become("pipeline", record.url)
        client = boto3.session.Session().client("s3", region_name="us-east-1", config=Config(s3={"addressing_style": "path"}))
        with pytest.raises(ClientError, match="AccessDenied"):
            client.delete_object(Bucket="faces", Key="a/b/original/dataset.json")


def _write_set(url: str) -> None:
    """A data set of one shard, as a stage commits it."""
    dataset, writer = Dataset(url), ShardWriter()
    for number, picture in enumerate(SyntheticFaces(2, 2).render(range(4))):
        writer.add(Sample(f"{number:08d}", encode(picture), number // 2))
    with attempting(dataset.store, "mark") as attempt:
        assert isinstance(attempt, Attempt)
        data = ShardData(writer.finish(), writer.samples, Labels.of(writer.labels))
        manifest = dataset.commit("00000", data, fingerprint="mark", attempt=attempt, seconds={})
        dataset.finish("images", {"parent": None, "config": {}, "fingerprint": "mark"}, [manifest])
