"""Sizes of pods, and how many workers fit them."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.kubernetes.nodes import PRESETS, Nodes, WorkerGroup


@pytest.mark.parametrize(
    ("cpus", "gpus", "want"),
    [(1, 0.0, 7), (2, 0.0, 3), (8, 0.0, 0), (1, 1.0, 2), (4, 1.0, 1), (1, 2.0, 1), (1, 0.5, 4), (1, 1 / 3, 6), (1, 0.6, 2), (1, 3.0, 0)],
)
def test_workers_of_a_pod_are_held_by_its_cores_and_by_its_gpus(cpus: int, gpus: float, want: int) -> None:
    assert WorkerGroup(name="g", pods=1, cpus=7, gpus=2).workers_per_pod(cpus, gpus) == want


def test_workers_of_all_groups_count() -> None:
    nodes = Nodes(groups=(WorkerGroup(name="a", pods=3), WorkerGroup(name="b", pods=2, gpus=1)))
    assert nodes.fitting_workers(cpus=2) == 5 * 3
    assert nodes.fitting_workers(cpus=2, gpus=1) == 2


@pytest.mark.parametrize(
    ("preset", "cpus", "gpus", "want"), [("cpu", 1, 0.0, 28), ("gpu", 7, 1.0, 8), ("spot", 7, 1.0, 16), ("large", 15, 1.0, 64)]
)
def test_presets_hold_what_they_say(preset: str, cpus: int, gpus: float, want: int) -> None:
    assert PRESETS[preset].fitting_workers(cpus, gpus) == want


def test_presets_leave_room_for_the_daemons_of_a_node() -> None:
    for nodes in PRESETS.values():
        for group in nodes.groups:
            assert group.cpus + 1 in (4, 8, 16)
            assert group.memory_gib <= 0.9 * 4 * (group.cpus + 1)


def test_other_pods_and_other_machines() -> None:
    nodes = PRESETS["gpu"].with_pods(2).on({"node.kubernetes.io/instance-type": "g5.2xlarge"})
    assert nodes.fitting_workers(1, 1) == 2
    assert nodes.groups[0].node_selector == {"node.kubernetes.io/instance-type": "g5.2xlarge"}
    assert PRESETS["gpu"].groups[0].pods == 8


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"name": "Big"}, "--group 'Big'"),
        ({"pods": 0}, "--pods 0: give a whole number, 1 or more"),
        ({"pods": True}, "--pods"),
        ({"min_pods": 3}, "--min-pods 3: more than the most pods"),
        ({"min_pods": -1}, "--min-pods -1"),
        ({"cpus": 0}, "--cpus 0"),
        ({"memory_gib": 1}, "--memory-gib 1"),
        ({"gpus": -1}, "--gpus -1"),
        ({"scratch_gib": 0}, "--scratch-gib 0"),
        ({"node_selector": {"c": "d e"}}, "--node-selector c=d e: 'd e' is no label's value"),
        ({"node_selector": {"c d": "e"}}, "'c d' is no label's name"),
        ({"node_selector": {"": "e"}}, "is no label's name"),
        ({"node_selector": {"/a": "e"}}, "is no label's name"),
        ({"node_selector": {"A_B/c": "e"}}, "is no label's name"),
        ({"node_selector": {"a": "b" * 64}}, "is no label's value"),
        ({"node_selector": {"a": "b\n"}}, "is no label's value"),
    ],
)
def test_a_group_that_cannot_be_is_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match="--") as error:
        WorkerGroup(**{"name": "g", "pods": 2, **wrong})
    assert says in str(error.value)


def test_groups_need_names_of_their_own() -> None:
    group = WorkerGroup(name="g", pods=1)
    with pytest.raises(ValueError, match="--group g: given twice"):
        Nodes(groups=(group, group))
    with pytest.raises(ValueError, match="no group of workers"):
        Nodes(groups=())
    with pytest.raises(ValueError, match="--head-selector"):
        Nodes(groups=(group,), head_selector={"c": "d e"})
