"""Which node is drained, and what is refused. The draining itself: tests/nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster import drain
from cluster.drain import DrainError, Node, Raylet, choose, local_raylets

HEAD = Node("a" * 56, "10.0.0.1", True, 0, 0, None)
FIRST = Node("b" * 56, "10.0.0.2", False, 8, 1, None)
SECOND = Node("c" * 56, "10.0.0.3", False, 8, 1, 1.0)
NODES = [HEAD, FIRST, SECOND]
HERE = [Raylet(FIRST.id, FIRST.ip, "10.0.0.1:6379"), Raylet("d" * 56, "127.0.0.2", "127.0.0.2:6379")]


def test_the_raylet_of_this_pod_is_found_among_those_of_other_clusters():
    assert choose(NODES, HERE, None) == FIRST


@pytest.mark.parametrize("wanted", [SECOND.ip, SECOND.id, SECOND.id[:8]])
def test_a_node_can_be_named_by_id_or_address(wanted: str):
    assert choose(NODES, HERE, wanted) == SECOND


@pytest.mark.parametrize(
    ("raylets", "wanted", "message"),
    [
        (HERE, "zzz", "--node zzz: no living node of the cluster has this id or address; there are\n  aaaa"),
        (HERE, "ccc", "no living node"),  # too short to mean one
        (HERE, HEAD.ip, "is the head"),
        ([], None, "no node of the cluster runs on this machine: give --node"),
        ([*HERE, Raylet(SECOND.id, SECOND.ip, "")], None, "2 nodes run on this machine: give --node ID, one of\n  bbbb"),
    ],
)
def test_what_is_not_one_worker_is_refused_and_the_choice_is_shown(raylets: list[Raylet], wanted: str | None, message: str):
    with pytest.raises(DrainError, match=message):
        choose(NODES, raylets, wanted)


@pytest.mark.parametrize("grace", ["-1", "nan", "inf", "soon"])
def test_a_grace_must_be_a_number_of_seconds(grace: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        drain.main([f"--grace={grace}"])
    assert ended.value.code == 2
    assert "--grace" in capsys.readouterr().err


class Gcs:
    """Ray's head, as far as it is asked."""

    def __init__(self, accepted: bool, leaves: bool = True) -> None:
        self.accepted, self.leaves, self.asked = accepted, leaves, list[str]()

    def nodes(self) -> list[Node]:
        return [node for node in NODES if not (self.leaves and node.id in self.asked)]

    def drain_node(self, node: str, *_: Any, **__: Any) -> tuple[bool, str]:
        self.asked.append(node)
        return self.accepted, "" if self.accepted else "it is busy"


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Gcs:
    made = Gcs(*request.param)
    monkeypatch.setattr(drain.Head, "__init__", lambda self, address: self.__dict__.update(address=address, _gcs=made))
    monkeypatch.setattr(drain.Head, "nodes", lambda self: made.nodes())
    monkeypatch.setattr(drain, "local_raylets", lambda: HERE)
    return made


@pytest.mark.parametrize(("gcs", "code"), [((True,), 0), ((False,), 2), ((True, False), 1)], indirect=["gcs"])
def test_the_exit_code_says_whether_the_node_is_gone(gcs: Gcs, code: int, capsys: pytest.CaptureFixture[str]):
    assert drain.main(["--grace", "1", "--address", "10.0.0.1:6379"]) == code
    assert gcs.asked == [FIRST.id]
    if code == 2:
        assert "Ray refuses to drain" in capsys.readouterr().err


@pytest.mark.parametrize("gcs", [(True,)], indirect=True)
def test_a_node_that_is_not_known_leaves_no_mark(gcs: Gcs, capsys: pytest.CaptureFixture[str]):
    assert drain.main(["--node", "zzz", "--address", "10.0.0.1:6379"]) == 2
    assert gcs.asked == []
    assert drain.main(["--list", "--address", "10.0.0.1:6379"]) == 0
    assert gcs.asked == []
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["alive", "alive", "draining"]


@pytest.mark.parametrize("gcs", [(True,)], indirect=True)
def test_without_an_address_the_cluster_must_be_clear(gcs: Gcs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert drain.main(["--grace", "1"]) == 2
    assert "2 Ray clusters run on this machine: give --address, one of 10.0.0.1:6379, 127.0.0.2:6379" in capsys.readouterr().err
    monkeypatch.setattr(drain, "local_raylets", lambda: HERE[:1])
    assert drain.main(["--grace", "1"]) == 0


def test_raylets_are_told_by_their_command_lines(tmp_path: Path):
    for number, command in enumerate(
        [
            ["/x/ray/core/src/ray/raylet/raylet", "--node_id=" + "b" * 56, "--node_ip_address=10.0.0.2", "--gcs-address=10.0.0.1:6379"],
            ["/usr/bin/tail", "-f", "raylet", "--node_id=" + "e" * 56],
        ]
    ):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "cmdline").write_bytes("\0".join(command).encode() + b"\0")
    assert local_raylets(tmp_path) == [HERE[0]]
