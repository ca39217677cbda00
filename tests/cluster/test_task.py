"""Errors of tasks: those that explain themselves come back as they were, others keep Ray's page."""

from __future__ import annotations

import pytest
import ray
from ray.exceptions import RayTaskError

from cluster.shard import ShardError
from cluster.store import StoreError
from cluster.task import answer_of


@ray.remote(num_cpus=0)
def fail(error: Exception | None) -> int:
    if error is not None:
        raise error
    return 7


@pytest.mark.parametrize("kind", [StoreError, ShardError, ValueError])
def test_an_error_that_explains_itself_comes_back_as_it_was(ray_session: None, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        answer_of(fail.remote(kind("the file, the reason, the remedy")))
    assert type(caught.value) is kind
    assert str(caught.value) == "the file, the reason, the remedy"


def test_a_bug_keeps_the_place_where_it_happened(ray_session: None) -> None:
    with pytest.raises(RayTaskError, match="fail"):
        answer_of(fail.remote(ZeroDivisionError("a bug")))


def test_answers_one_by_one_or_in_a_list(ray_session: None) -> None:
    assert answer_of(fail.remote(None)) == 7
    assert answer_of([fail.remote(None), fail.remote(None)]) == [7, 7]
