"""``facemae submit`` and ``cancel`` against an API server that speaks Kubernetes' protocol, and does with a RayJob what KubeRay does."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from jobs import cancel, submit
from tests.cluster.kubernetes.api_server import Cluster
from tests.cluster.kubernetes.conftest import cluster  # noqa: F401
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
    cluster: Cluster,  # noqa: F811
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


def test_a_run_is_cancelled_while_it_is_followed(cluster: Cluster, capsys: pytest.CaptureFixture[str], file: str) -> None:  # noqa: F811
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
    cluster: Cluster,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    file: str,
) -> None:
    assert submit.main(["ingest", "--config", file, *FLAGS, "--no-follow"]) == 0
    assert "facemae cancel mine --to kubernetes --namespace faces" in capsys.readouterr().out
    assert submit.main(["ingest", "--config", file, *FLAGS, "--no-follow"]) == 2
    assert "there is a run mine in namespace faces already" in capsys.readouterr().err
    assert submit.main(["ingest", "--config", file, *FLAGS[:-4], "--namespace", "nowhere"]) == 2
    assert "there is no namespace nowhere" in capsys.readouterr().err
