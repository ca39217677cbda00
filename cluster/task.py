"""What a Ray task or actor answers, with the errors that explain themselves as they were raised there."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayTaskError

from cluster.shard import ShardError
from cluster.store import StoreError

EXPLAINED = (StoreError, ShardError, ValueError)


def answer_of(calls: Any) -> Any:
    """``ray.get``, of one call or a list of them.

    Raises:
        StoreError, ShardError, ValueError: as it was raised there, without Ray's page about where.
        RayTaskError, RayActorError: anything else.
    """
    try:
        return ray.get(calls)
    except RayTaskError as error:
        if isinstance(error.cause, EXPLAINED):
            raise error.cause from error
        raise
