"""Secrets by reference: what is refused, what never shows, and the map of keys against the standard library's own HMAC."""

from __future__ import annotations

import hashlib
import hmac
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle

from cluster.secret import KeyMap, SecretError, carries_credentials, key_map_of, read_secret
from cluster.shard import Sample, ShardWriter, read_samples
from cluster.store import StoreError, open_store, require_no_credentials

SECRET = "5b1d0a7e" * 8


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("REKEY_SECRET", SECRET)
    return "env:REKEY_SECRET"


def test_both_places_give_the_same_secret(reference: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")  # as `openssl rand -hex 32 > secret` leaves it
    assert read_secret(reference) == read_secret(f"file:{tmp_path}/secret") == SECRET.encode()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "env:REKEY_SECRET: the environment variable is not set"),
        ("  \n", "is not set"),
        ("a" * 31, r"has 31 bytes, at least 32 are needed; make one with: openssl rand -hex 32"),
    ],
)
def test_a_missing_or_short_secret_is_refused(value: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REKEY_SECRET", raising=False)
    if value is not None:
        monkeypatch.setenv("REKEY_SECRET", value)
    with pytest.raises(SecretError, match=message) as caught:
        KeyMap("env:REKEY_SECRET")
    assert "aaa" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match=f"file:{tmp_path}/none: No such file"):
        read_secret(f"file:{tmp_path}/none")


@pytest.mark.parametrize("given_secret", [SECRET, f"env:{SECRET}", f"{SECRET}\n", f"env:A={SECRET}", ""])
def test_a_secret_given_in_place_of_its_reference_is_not_repeated(given_secret: str) -> None:
    with pytest.raises(SecretError, match="env:NAME or file:PATH") as caught:
        read_secret(given_secret)
    assert SECRET not in str(caught.value)


@given(st.text(max_size=40))
def test_keys_are_those_of_the_standard_hmac(key: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REKEY_SECRET", SECRET)
        new = KeyMap("env:REKEY_SECRET")(key)
    assert new == hmac.digest(SECRET.encode(), key.encode("utf-8", "surrogatepass"), hashlib.sha256).hex()[:32]


def test_new_keys_make_a_shard(reference: str) -> None:
    new_key, writer = KeyMap(reference), ShardWriter()
    for number in range(100):
        writer.add(Sample(new_key(f"00000-{number:07d}"), b"x", 1))
    assert len({sample.key for sample in read_samples(writer.finish())}) == 100


def test_a_map_does_not_travel_and_shows_nothing(reference: str) -> None:
    new_key = KeyMap(reference)
    for dump in (pickle.dumps, cloudpickle.dumps):
        with pytest.raises(TypeError, match="does not travel"):
            dump({"new_key": new_key})
    with pytest.raises(TypeError, match="does not travel"):
        cloudpickle.dumps(lambda: new_key("a"))  # as Ray pickles a task
    assert SECRET not in f"{new_key!r} {new_key.describe()}"


def test_another_secret_is_refused_by_its_check(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = KeyMap(reference)
    assert KeyMap(reference, first.check).check == first.check
    config = {"rekey": first.describe()}
    same = key_map_of(config, reference, "the set")
    assert same is not None
    assert same("a") == first("a")
    monkeypatch.setenv("OTHER", "f" * 64)
    with pytest.raises(SecretError, match=f"env:OTHER: another secret than .* theirs is {first.check}"):
        key_map_of(config, "env:OTHER", "the set")
    with pytest.raises(SecretError, match="the set were replaced for a release: give --rekey"):
        key_map_of(config, None, "the set")
    with pytest.raises(SecretError, match="were not replaced: leave out --rekey"):
        key_map_of({}, reference, "the set")
    assert key_map_of({}, None, "the set") is None


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAX:topsecret@bucket/prefix",
        "s3://AKIAX:top/secret@bucket/prefix",
        "s3:/AKIAX:topsecret@bucket",
        "http://user:topsecret@host:9000",
        "http://user:top/secret@host:9000",
        "https://topsecret@host",
    ],
)
def test_credentials_in_urls_are_refused_and_not_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert carries_credentials(url)
    with pytest.raises(StoreError, match="holds a user or password") as caught:
        open_store(url)
    assert caught.value.fatal
    assert "secret" not in str(caught.value)
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3") if url.startswith("http") else ():
        monkeypatch.setenv(name, url)
        with pytest.raises(StoreError, match=f"{name} holds a user") as caught:
            open_store("s3://bucket/prefix")
        assert "secret" not in str(caught.value)
        monkeypatch.delenv(name)


def test_an_endpoint_with_credentials_in_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").write_text("[default]\nendpoint_url = http://user:topsecret@127.0.0.1:1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with pytest.raises(StoreError, match="endpoint_url of the AWS profile holds a user") as caught:
        open_store("s3://bucket/prefix")
    assert "topsecret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a@b:c",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/faces/prefix",
        "/data/me@home:x",
        "runs:2024@home/x",
        "file:///data/a@b",
        "http://127.0.0.1:9000",
    ],
)
def test_other_urls_are_left_alone(url: str) -> None:
    assert not carries_credentials(url)
    require_no_credentials(url, "it")
