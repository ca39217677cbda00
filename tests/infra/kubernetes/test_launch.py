"""What the program renders: whatever a launch accepts, the checker accepts too."""

from __future__ import annotations

import contextlib
import dataclasses
import string
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cluster.kubernetes.launch import Launch
from cluster.kubernetes.nodes import PRESETS, Nodes, WorkerGroup
from cluster.kubernetes.ray_job import manifests, to_yaml
from tests.infra.kubernetes.check import Problem, check, definitions, load

OUTSIDE = ("ServiceAccount/*", "Secret/*", "PriorityClass/*")
"""What a launch names and does not bring along."""

ALL: dict[str, Any] = {
    "arguments": ("--num-workers", "16", "--folder", "a b'c\"d"),
    "env": {"AWS_REGION": "eu-central-1", "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token"},
    "secrets": ("s3-access", "keys.v2"),
    "pull_secret": "registry",
    "deadline_hours": 24,
    "gcs_redis": "facemae-redis:6379",
    "s3_endpoint": "https://s3.example.org",
    "priority_class": "facemae",
}


def launch(**changes: Any) -> Launch:
    given: dict[str, Any] = {
        "name": "faces",
        "image": "registry.example.org/facemae:0.1.0",
        "job": "pipeline",
        "config_yaml": "root: s3://bucket/faces\nprotect: {rekey: env:FACEMAE_REKEY}\n",
        "nodes": PRESETS["gpu"],
    }
    return Launch(**(given | changes))


def problems(run: Launch) -> list[Problem]:
    """What is wrong with a rendered launch, also against KubeRay's schema where it is."""
    return check(manifests(run), OUTSIDE, crd=definitions())


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_accepted(preset: str, options: dict[str, Any]) -> None:
    assert problems(launch(nodes=PRESETS[preset], **options)) == []


@pytest.mark.parametrize("job", ["ingest", "train", "protect", "embed", "leakage", "evaluate", "compare", "pretrain", "pipeline", "verify"])
def test_every_job_is_accepted(job: str) -> None:
    assert problems(launch(job=job, name=f"run-{job}")) == []


def test_what_is_printed_is_what_is_applied() -> None:
    run = launch(**ALL)
    assert load(to_yaml(manifests(run))) == manifests(run)


WORDS = st.text(string.ascii_letters + string.digits + "-._/:= ", max_size=30)
NAMES = st.from_regex(r"[a-z]([-a-z0-9]{0,20}[a-z0-9])?", fullmatch=True)
LABELS = st.dictionaries(
    st.from_regex(r"([a-z]([-a-z0-9.]{0,10}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,10}[A-Za-z0-9])?", fullmatch=True), WORDS, max_size=3
)
VARIABLES = st.dictionaries(st.from_regex(r"[A-Z][A-Z0-9_]{0,12}", fullmatch=True), st.text(max_size=20), max_size=3)
GROUP = st.fixed_dictionaries(
    {"name": NAMES, "pods": st.integers(0, 300)},
    optional={
        "min_pods": st.integers(-1, 300),
        "cpus": st.integers(0, 200),
        "memory_gib": st.integers(0, 2000),
        "gpus": st.integers(0, 16),
        "scratch_gib": st.integers(0, 5000),
        "spot": st.booleans(),
        "node_selector": LABELS,
    },
)
NODES = st.fixed_dictionaries(
    {"groups": st.lists(GROUP, min_size=1, max_size=3)},
    optional={
        "head_cpus": st.integers(0, 100),
        "head_memory_gib": st.integers(0, 500),
        "head_scratch_gib": st.integers(0, 500),
        "head_selector": LABELS,
    },
)
IMAGES = st.from_regex(
    r"([a-z]{1,9}(:[0-9]{1,4})?/)?[a-z0-9]{1,9}([._/-]{1,2}[a-z0-9]{1,5}){0,2}:[A-Za-z0-9_.-]{1,9}", fullmatch=True
).filter(lambda image: not image.endswith(":latest"))
LAUNCH = st.fixed_dictionaries(
    {"name": NAMES},
    optional={
        "namespace": NAMES | WORDS,
        "image": IMAGES,
        "config_yaml": st.dictionaries(NAMES, st.text(max_size=40) | st.integers() | st.none(), max_size=4).map(yaml.safe_dump),
        "arguments": st.lists(st.text(max_size=15), max_size=3).map(tuple),
        "env": VARIABLES,
        "secrets": st.lists(NAMES | WORDS, max_size=2).map(tuple),
        "service_account": NAMES | WORDS,
        "pull_secret": st.none() | NAMES,
        "retries": st.integers(-1, 2**31),
        "deadline_hours": st.none() | st.floats(-1, 1e7),
        "keep_minutes": st.floats(-1, 1e9),
        "gcs_redis": st.none() | st.just("redis:6379") | WORDS,
        "s3_endpoint": st.none() | st.just("http://s3:8333") | WORDS.map("https://{}".format),
        "priority_class": st.none() | NAMES,
    },
)


def accepted(options: dict[str, Any], nodes: dict[str, Any]) -> Launch:
    """A launch with those of the options that it does not refuse: one that it refuses must not hide what the others do."""
    run = launch()
    groups = []
    for number, group in enumerate(nodes["groups"]):
        with contextlib.suppress(ValueError):
            groups.append(WorkerGroup(**(group | {"name": f"{group['name']}{number}"})))
    with contextlib.suppress(ValueError):
        run = dataclasses.replace(run, nodes=Nodes(**(nodes | {"groups": tuple(groups)})))
    for name, value in options.items():
        with contextlib.suppress(ValueError):
            run = dataclasses.replace(run, **{name: value})
    return run


@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(LAUNCH, NODES)
def test_what_a_launch_accepts_the_checker_accepts(options: dict[str, Any], nodes: dict[str, Any]) -> None:
    run = accepted(options, nodes)
    assert problems(run) == []
