"""``facemae submit --to kubernetes`` and ``facemae cancel`` from end to end, against the tests' API server and its operator."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cancel, submit, submit_follow
from tests.cluster.kubernetes.api_server import TOKEN, Cluster, Refusal
from tests.cluster.kubernetes.conftest import cluster as cluster
from tests.cluster.kubernetes.objects import pod, waiting
from tests.cluster.kubernetes.operator import Attempt, operating

NAME = "run"
JOB = {"source": "s3://faces/raw", "output": "s3://faces/originals"}


@pytest.fixture
def submitted(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Submits the job; what follows is looked at often."""
    cluster.namespace = "facemae"
    for module, name, seconds in ((submit_follow, "POLL_SECONDS", 0.05), (cancel, "POLL_SECONDS", 0.05)):
        monkeypatch.setattr(module, name, seconds)
    follower = submit_follow.Follower
    monkeypatch.setattr(submit, "Follower", lambda run, again: follower(run, again, poll=0.05, quiet=0.1, lag=5.0))
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(JOB))

    def main(*flags: str) -> int:
        to = ("--to", "kubernetes", "--image", "registry.example/facemae:1", "--name", NAME)
        return submit.main(["ingest", "--config", str(file), *to, *flags])

    return main


def test_a_run_is_made_followed_and_ends(submitted: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    with operating(cluster, Attempt(["shard 1 of 2", "shard 2 of 2"])):
        assert submitted() == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines.count("shard 1 of 2") == lines.count("shard 2 of 2") == 1
    assert "submitted successfully" not in printed.out
    assert "created: rayjob.ray.io/run in facemae" in lines
    assert "run succeeded" in printed.out
    made, config = cluster.get("rayjobs", NAME), cluster.get("configmaps", NAME)
    assert made is not None
    assert config is not None
    assert config["metadata"]["ownerReferences"][0]["uid"] == made["metadata"]["uid"]
    assert yaml.safe_load(config["data"]["job.yaml"])["output"] == JOB["output"]
    assert TOKEN not in printed.out + printed.err


@pytest.mark.parametrize(
    ("attempts", "code"),
    [
        ([Attempt(["facemae ingest: settled with exit code 3"])], 3),
        ([Attempt(["release withheld", "facemae ingest: settled with exit code 4"])], 4),
        ([Attempt(["error: no such bucket"], "FAILED", "Job entrypoint command failed with exit code 2, last available logs")], 2),
        ([Attempt(["killed"], "FAILED"), Attempt(["goes on", "facemae ingest: settled with exit code 3"])], 3),
        ([Attempt(["stopped from within"], "STOPPED")], 143),
    ],
)
def test_the_exit_code_is_the_jobs_own(
    submitted: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str], attempts: list[Attempt], code: int
) -> None:
    with operating(cluster, *attempts):
        assert submitted() == code
    out = capsys.readouterr().out.splitlines()
    for attempt in attempts:
        for line in attempt.lines:
            assert out.count(line) == 1
    assert ("attempt 2" in out) == (len(attempts) == 2)


def test_a_run_that_is_cancelled_from_elsewhere(
    submitted: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    with operating(cluster, Attempt(["shard 1 of 9"], None, last="2 shards handed back")) as operator:
        thread = threading.Thread(target=lambda: codes.append(submitted()), daemon=True)
        thread.start()
        operator._until(lambda: cluster.logs and cluster.get("rayjobs", NAME) and cluster.logs.get(f"{NAME}-submitter-0") is not None)
        operator._until(lambda: any("/log" in each for each in cluster.requests))
        assert cancel.main([NAME, "--to", "kubernetes"]) == 0
        thread.join(30)
    assert codes == [143]
    out = capsys.readouterr().out
    assert "2 shards handed back" in out
    assert "run is asked to stop" in out
    assert "run is stopped; what is committed stays" in out
    assert "run was stopped after" in out
    assert cluster.get("configmaps", NAME) is None
    assert cancel.main([NAME, "--to", "kubernetes"]) == 2


def test_a_second_run_of_the_name_is_refused(submitted: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert submitted("--no-follow") == 0
    assert submitted("--no-follow") == 2
    assert "error: there is a run run in namespace facemae already" in capsys.readouterr().err


def test_what_keeps_it_from_starting_is_said_once(
    submitted: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = pod(f"{NAME}-c0-head", container=waiting("CreateContainerConfigError", 'secret "s3-keys" not found'))
    worker["metadata"].update(namespace="facemae", labels={"ray.io/cluster": f"{NAME}-c0"})
    cluster.put("pods", worker)
    with operating(cluster, Attempt(["shard 1 of 1"], None)) as operator:
        said: list[str] = []
        thread = threading.Thread(target=submitted, daemon=True)
        thread.start()
        while "there is no Secret s3-keys" not in "".join(said):
            said.append(capsys.readouterr().out)
            assert not operator.stopped.wait(0.02)
        cancel.main([NAME, "--to", "kubernetes"])
        thread.join(30)
    said.append(capsys.readouterr().out)
    assert "".join(said).count("there is no Secret s3-keys") == 1


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (
            Refusal(
                403,
                "Forbidden",
                'rayjobs.ray.io is forbidden: User "ann" cannot create resource "rayjobs" in API group "ray.io" in the namespace "facemae"',
            ),
            "ann may not create rayjobs.ray.io in namespace facemae",
        ),
        (Refusal(401, "Unauthorized", "Unauthorized"), "does not accept the credentials (401)"),
    ],
)
def test_a_refusal_is_one_line_and_nothing_stays(
    submitted: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str], refusal: Refusal, expected: str
) -> None:
    cluster.always.append(("POST", refusal))
    assert submitted() == 2
    errors: Any = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(errors) == 1
    assert f"facemae submit: error: {'' if 'may not' in expected else 'http'}" in errors[0]
    assert expected in errors[0]
    assert cluster.objects == {}


def test_ctrl_c_ends_the_following_and_not_the_run(
    submitted: Callable[..., int], cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    following = submit_follow.Follower._line

    def line(self: submit_follow.Follower, text: str) -> None:
        following(self, text)
        raise KeyboardInterrupt  # as Python does on Ctrl-C

    monkeypatch.setattr(submit_follow.Follower, "_line", line)
    with operating(cluster, Attempt(["shard 1 of 9"], None)):
        assert submitted() == 130
        made = cluster.get("rayjobs", NAME)
        assert made is not None
        assert "deletionTimestamp" not in made["metadata"]
    out = capsys.readouterr().out
    assert "the run run goes on" in out
    assert f"facemae cancel {NAME} --to kubernetes --namespace facemae" in out
    assert not any(request.startswith("DELETE") for request in cluster.requests)
