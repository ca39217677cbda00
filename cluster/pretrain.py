"""Pretraining a recogniser in the calling process, as a group of one: what a task that trains many small ones runs.

Large ones train by ``cluster.train.train(job)``, on any number of workers; both run the same trainer and leave the same run.
"""

from __future__ import annotations

import os
from typing import Any

import ray

from cluster.pretrain_job import PretrainJob
from cluster.store import open_store
from cluster.train import Board, finished_run, require_own_checkpoints
from cluster.train_job import TrainError


def pretrain_alone(job: PretrainJob) -> dict[str, Any]:
    """Train in this process, from the newest checkpoint if there is one. Ray must be connected.

    Returns:
        The content of run.json; at once where the training was finished before.

    Raises:
        TrainError: the job asks for several workers, the output holds another training, or an error that trying again cannot help.
    """
    import torch.distributed as dist

    from cluster.trainer import work

    if job.options.num_workers != 1:
        raise TrainError(f"{job.options.num_workers} workers, but a task trains alone: plan the job with one")
    store = open_store(job.output)
    if (finished := finished_run(store, job)) is not None:
        return finished
    require_own_checkpoints(store, job)
    board: Any = ray.remote(num_cpus=0)(Board).remote()
    os.environ.setdefault("LOCAL_RANK", "0")  # what DeepSpeed asks a launcher for
    dist.init_process_group("nccl" if job.options.use_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        work(job, board)
    except (ValueError, FloatingPointError) as error:
        raise TrainError(str(error)) from None
    finally:
        dist.destroy_process_group()
        ray.kill(board)
    found = finished_run(store, job)
    assert found is not None
    return found
