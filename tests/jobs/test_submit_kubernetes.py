"""``facemae submit`` and ``cancel`` against an API server that speaks Kubernetes' protocol, and does with a RayJob what KubeRay does."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from jobs import cancel, submit, submit_follow
from tests.cluster.kubernetes.api_server import TOKEN, Cluster, Refusal
from tests.cluster.kubernetes.conftest import cluster as cluster
from tests.cluster.kubernetes.objects import pod, waiting
from tests.cluster.kubernetes.operator import Attempt, operating

FLAGS = ("--to", "kubernetes", "--image", "registry.example.org/facemae:1.0", "--namespace", "faces", "--name", "mine")
LINES = ("ingest: 100%", "written: s3://bucket/x", "next:    facemae embed --input s3://bucket/x")


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "job.yaml").write_text("source: synthetic:ids=4,images=4\noutput: s3://bucket/x\n")
    return str(tmp_path / "job.yaml")


@pytest.mark.parametrize(
    ("attempts", "code", "last"),
    [
        ([Attempt(LINES)], 0, "next:    facemae embed --input s3://bucket/x"),
        ([Attempt(["Killed"], "FAILED"), Attempt(LINES)], 0, "next:    facemae embed --input s3://bucket/x"),
        ([Attempt(["facemae ingest: settled with exit code 3"])], 3, "next:    facemae status s3://bucket/x"),
        ([Attempt(["error"], "FAILED", "Job failed due to exit code 2")], 2, "next:    facemae status s3://bucket/x"),
    ],
)
def test_a_run_is_followed_to_its_end(
    cluster: Cluster,
    capsys: pytest.CaptureFixture[str],
    file: str,
    attempts: list[Attempt],
    code: int,
    last: str,
) -> None:
    with operating(cluster, *attempts):
        assert submit.main(["ingest", "--config", file, *FLAGS]) == code
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == ["created: configmap/mine in faces", "created: rayjob.ray.io/mine in faces"]
    assert "output:  s3://bucket/x" in shown
    assert shown[-1] == last
    assert set(attempts[-1].lines) - {LINES[-1]} <= set(shown)


def test_a_run_is_cancelled_while_it_is_followed(cluster: Cluster, capsys: pytest.CaptureFixture[str], file: str) -> None:
    codes = list[int]()
    follower = threading.Thread(target=lambda: codes.append(submit.main(["ingest", "--config", file, *FLAGS])))
    with operating(cluster, Attempt(["ingest: 10%"], None, last="stopped as asked")):
        follower.start()
        while "ingest: 10%" not in (shown := capsys.readouterr().out):
            assert follower.is_alive(), shown
        assert cancel.main(["mine", "--to", "kubernetes", "--namespace", "faces"]) == 0
        follower.join(60)
    assert codes == [143]
    assert "mine is stopped" in capsys.readouterr().out
    assert cancel.main(["mine", "--to", "kubernetes", "--namespace", "faces"]) == 2
    assert "there is no run mine" in capsys.readouterr().err


def test_a_second_run_of_one_name_and_a_missing_namespace_are_explained(
    cluster: Cluster,
    capsys: pytest.CaptureFixture[str],
    file: str,
) -> None:
    assert submit.main(["ingest", "--config", file, *FLAGS, "--no-follow"]) == 0
    assert "facemae cancel mine --to kubernetes --namespace faces" in capsys.readouterr().out
    assert submit.main(["ingest", "--config", file, *FLAGS, "--no-follow"]) == 2
    assert "there is a run mine in namespace faces already" in capsys.readouterr().err
    assert submit.main(["ingest", "--config", file, *FLAGS[:-4], "--namespace", "nowhere"]) == 2
    assert "there is no namespace nowhere" in capsys.readouterr().err


def test_what_keeps_it_from_starting_is_said_once(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower = submit_follow.Follower
    monkeypatch.setattr(submit, "Follower", lambda run, again: follower(run, again, poll=0.05))
    worker = pod("mine-c0-head", container=waiting("CreateContainerConfigError", 'secret "s3-keys" not found'))
    worker["metadata"]["labels"] = {"ray.io/cluster": "mine-c0"}
    cluster.put("pods", worker)
    said = ""
    following = threading.Thread(target=lambda: submit.main(["ingest", "--config", file, *FLAGS]))
    with operating(cluster, Attempt(["ingest: 10%"], None)):
        following.start()
        while "there is no Secret s3-keys" not in said:
            said += capsys.readouterr().out
            assert following.is_alive(), said
        asked = len(cluster.requests)
        while len(cluster.requests) < asked + 30:  # it looks again, and again
            assert following.is_alive(), said
        assert cancel.main(["mine", "--to", "kubernetes", "--namespace", "faces"]) == 0
        following.join(60)
    said += capsys.readouterr().out
    assert said.count("there is no Secret s3-keys") == 1
    assert TOKEN not in said


def test_ctrl_c_ends_the_following_and_not_the_run(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = submit_follow.Follower._line

    def interrupted(self: submit_follow.Follower, text: str) -> None:
        line(self, text)
        raise KeyboardInterrupt  # as Python does on Ctrl-C

    monkeypatch.setattr(submit_follow.Follower, "_line", interrupted)
    with operating(cluster, Attempt(["ingest: 10%"], None)):
        assert submit.main(["ingest", "--config", file, *FLAGS]) == 130
        assert not any(request.startswith("DELETE") for request in cluster.requests)
    assert "facemae cancel mine --to kubernetes --namespace faces" in capsys.readouterr().out


def test_a_refusal_is_one_line_and_nothing_stays(cluster: Cluster, capsys: pytest.CaptureFixture[str], file: str) -> None:
    text = 'rayjobs.ray.io is forbidden: User "ann" cannot create resource "rayjobs" in API group "ray.io" in the namespace "faces"'
    cluster.always.append(("POST", Refusal(403, "Forbidden", text)))
    assert submit.main(["ingest", "--config", file, *FLAGS]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert error.startswith("facemae submit: error: ann may not create rayjobs.ray.io in namespace faces")
    assert cluster.objects == {}
