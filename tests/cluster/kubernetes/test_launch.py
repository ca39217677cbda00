"""What a launch refuses: each with its flag, and without repeating a password."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.kubernetes.launch import Launch
from cluster.kubernetes.nodes import PRESETS

GOOD: dict[str, Any] = {
    "name": "faces",
    "image": "registry.example.org:5000/team/facemae:0.1.0",
    "job": "pipeline",
    "config_yaml": "root: s3://bucket/faces\n",
    "nodes": PRESETS["cpu"],
}


@pytest.mark.parametrize(
    "good",
    [
        {"name": "f" * 47},
        {"image": "facemae"},
        {"image": "registry.example.org/facemae@sha256:" + "a" * 64},
        {"image": "registry.example.org/facemae:1.0@sha256:" + "a" * 64},
        {"s3_endpoint": "http://seaweedfs.storage.svc:8333"},
        {"s3_endpoint": "https://s3.example.org/"},
        {"s3_endpoint": "https://[2001:db8::1]:8333"},
        {"gcs_redis": "facemae-redis:6379"},
        {"retries": 0, "keep_minutes": 0, "deadline_hours": 0.5},
        {"env": {"AWS_REGION": "eu-central-1", "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token"}},
        {"secrets": ("s3-access", "keys.v2"), "pull_secret": "registry", "priority_class": "facemae", "service_account": "facemae"},
        {"arguments": ("--folder", "a b'c\"d", "--secret-seed", "env:FACEMAE_SEED")},
        {"config_yaml": "root: s3://bucket/faces\nprotect: {rekey: env:FACEMAE_REKEY}\n"},
    ],
)
def test_what_can_be_is_taken(good: dict[str, Any]) -> None:
    Launch(**{**GOOD, **good})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": ""}, "--name ''"),
        ({"name": "f" * 48}, "at most 47"),
        ({"name": "1st"}, "--name '1st'"),
        ({"name": "Faces"}, "--name 'Faces'"),
        ({"name": "faces-"}, "--name 'faces-'"),
        ({"name": "faces\n"}, "--name"),
        ({"namespace": "a.b"}, "--namespace 'a.b'"),
        ({"image": ""}, "--image ''"),
        ({"image": "Face MAE:1"}, "--image 'Face MAE:1'"),
        ({"image": "facemae:"}, "--image 'facemae:'"),
        ({"job": "Pipe line"}, "'Pipe line' is no job"),
        ({"secrets": ("S3_ACCESS",)}, "--secret 'S3_ACCESS'"),
        ({"secrets": ("",)}, "--secret ''"),
        ({"service_account": "a b"}, "--service-account 'a b'"),
        ({"pull_secret": ""}, "--pull-secret ''"),
        ({"priority_class": "-high"}, "--priority-class '-high'"),
        ({"gcs_redis_secret": "a/b"}, "--gcs-redis-secret 'a/b'"),
        ({"retries": -1}, "--retries -1: give a whole number, 0 or more"),
        ({"retries": 2**31}, "--retries"),
        ({"deadline_hours": 0.0}, "--deadline-hours 0.0: give a finite number above 0"),
        ({"deadline_hours": 0.0001}, "--deadline-hours"),
        ({"deadline_hours": -1.0}, "--deadline-hours"),
        ({"deadline_hours": float("nan")}, "--deadline-hours nan"),
        ({"deadline_hours": float("inf")}, "--deadline-hours inf"),
        ({"deadline_hours": 1e6}, "too long"),
        ({"keep_minutes": -1}, "--keep-minutes -1: give a finite number of 0 or more"),
        ({"keep_minutes": float("nan")}, "--keep-minutes nan"),
        ({"s3_endpoint": ""}, "--s3-endpoint ''"),
        ({"s3_endpoint": "s3.example.org"}, "with https:// or http:// before it"),
        ({"s3_endpoint": "ftp://s3.example.org"}, "with https:// or http:// before it"),
        ({"s3_endpoint": "https://"}, "no host and port"),
        ({"s3_endpoint": "https://s3.example.org:99999"}, "no host and port"),
        ({"s3_endpoint": "https://s3.example.org/bucket"}, "without a path"),
        ({"gcs_redis": "facemae-redis"}, "--gcs-redis 'facemae-redis': give HOST:PORT"),
        ({"gcs_redis": "redis://facemae-redis:6379"}, "give HOST:PORT"),
        ({"gcs_redis": "facemae-redis:0"}, "give HOST:PORT"),
        ({"env": {"1A": "b"}}, "--env '1A'"),
        ({"env": {"FACEMAE_RETRIED": "0"}}, "--env FACEMAE_RETRIED: is set by the run itself"),
        ({"env": {"RAY_REDIS_ADDRESS": "a:1"}}, "--env RAY_REDIS_ADDRESS"),
        ({"env": {"A": "$(B)"}}, "--env A: holds '$('"),
        ({"arguments": ("--folder", "$HOME")}, "'$HOME'"),
        ({"arguments": ("a\nb",)}, "control characters"),
        ({"config_yaml": "- a\n"}, "--config: must be a mapping"),
        ({"config_yaml": "a: [\n"}, "--config: no YAML"),
        ({"config_yaml": "a: " + "b" * 1_000_000}, "--config: more than 900,000 bytes"),
    ],
)
def test_what_cannot_be_is_refused_by_its_flag(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as error:
        Launch(**{**GOOD, **wrong})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"image": "user:hunter2@registry.example.org/facemae:1"},
        {"image": "https://user:hunter2@registry.example.org/facemae:1"},
        {"s3_endpoint": "https://user:hunter2@s3.example.org"},
        {"gcs_redis": ":hunter2@facemae-redis:6379"},
        {"gcs_redis": "redis://:hunter2@facemae-redis:6379"},
        {"env": {"PROXY": "http://user:hunter2@proxy.example.org"}},
        {"env": {"AWS_SECRET_ACCESS_KEY": "hunter2"}},
        {"env": {"AWS_ACCESS_KEY_ID": "hunter2"}},
        {"env": {"WANDB_API_KEY": "hunter2"}},
        {"env": {"REDIS_PASSWORD": "hunter2"}},
        {"arguments": ("--root", "s3://user:hunter2@bucket/faces")},
        {"arguments": ("--root=s3://user:hunter2@bucket/faces",)},
        {"config_yaml": "root: s3://user:hunter2@bucket/faces\n"},
        {"config_yaml": "protect: {list: [{root: 's3://user:hunter2@bucket'}]}\n"},
    ],
)
def test_a_password_is_refused_and_not_repeated(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Secret|secret") as error:
        Launch(**{**GOOD, **wrong})
    assert "hunter2" not in str(error.value)
