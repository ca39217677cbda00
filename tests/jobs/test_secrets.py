"""No secret of a run is found anywhere but where its user put it: printed text, bucket, Ray's logs, temporary files, command lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from tests.infra.whole_run import WholeRun

pytestmark = [pytest.mark.s3, pytest.mark.timeout(900)]


def places(run: WholeRun) -> Iterator[tuple[str, bytes]]:
    """Everything that the run left behind, by where it is."""
    for name, done in run.done.items():
        yield f"what {name!r} printed", done.text.encode()
    for key, data in run.objects().items():
        yield f"s3://faces/{key}", data
    for path in (run.folder / "t").rglob("*"):
        if path.is_file():
            yield str(path), path.read_bytes()
    for line in run.command_lines:
        yield "a command line", line


def found(run: WholeRun, secrets: Mapping[str, str]) -> set[tuple[str, str]]:
    """(secret's name, place), as text and as the bytes that hexadecimal digits stand for."""
    forms = {name: [secret.encode()] for name, secret in secrets.items()}
    for name, secret in secrets.items():
        if not set(secret) - set("0123456789abcdef"):
            forms[name].append(bytes.fromhex(secret))
    return {(name, where) for where, data in places(run) for name, needles in forms.items() if any(n in data for n in needles)}


def test_a_planted_secret_is_found_in_every_place(whole_run: WholeRun) -> None:
    where = {place for _, place in found(whole_run, {"planted": whole_run.planted})}
    assert where == {"what 'planted' printed", "s3://faces/planted", f"{whole_run.folder}/t/planted", "a command line"}


def test_no_secret_and_no_access_key_anywhere(whole_run: WholeRun) -> None:
    secrets = {"rekey secret": whole_run.rekey_secret, "owner's key": whole_run.endpoint.secret_key}
    for role, (access, secret) in whole_run.keys.items():
        secrets |= {f"{role}'s access key": access, f"{role}'s secret key": secret}
    assert found(whole_run, secrets) == set()
    logs = [path for path in (whole_run.folder / "t").rglob("*.log") if "session_" in str(path)]
    assert len(logs) > 20, "Ray's session logs were looked at"
    assert any(b"raylet" in line for line in whole_run.command_lines), "command lines were looked at while Ray ran"


def test_what_went_wrong_is_said_in_one_line(whole_run: WholeRun) -> None:
    messages = {
        "wrong key": "the secret key is wrong: check AWS_SECRET_ACCESS_KEY",
        "wrong endpoint": "the endpoint does not answer: check AWS_ENDPOINT_URL and the network",
        "no secret": "were replaced for a release: give --rekey",
        "short secret": "env:S: the secret has 27 bytes, at least 32 are needed; make one with: openssl rand -hex 32",
        "keys in a URL": "holds a user or password (it is not repeated here)",
        "keys in the endpoint": "AWS_ENDPOINT_URL holds a user or password",
        "read only": "access denied: check the credentials and the bucket's policy",
    }
    for name, message in messages.items():
        done = whole_run.done[name]
        assert done.code == 2, name
        assert message in done.text.strip().rpartition("\n")[2], name
        assert "Traceback" in done.text, "FACEMAE_TRACEBACK=1 was set: the long form was searched too"


def test_the_reference_of_the_secret_is_in_no_data_set(whole_run: WholeRun) -> None:
    for key, data in whole_run.objects().items():
        assert b"REKEY_SECRET" not in data, key
        assert f"{whole_run.folder}/secret".encode() not in data, key
