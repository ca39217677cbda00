"""Checkpoints: atomic in the store, and the same training whatever ZeRO stage and number of ranks wrote or read them."""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cluster.checkpoint import Checkpoint, CheckpointError, Checkpoints, capture, load_optimizer, load_weights
from cluster.store import open_store


def checkpoint(step: int, value: float = 0.0) -> Checkpoint:
    tensors = {f"{part}/layer.weight": torch.full((3, 2), value + i) for i, part in enumerate(("weight", "exp_avg", "exp_avg_sq"))}
    return Checkpoint(step, {"samples": 10 * step}, tensors)


def assert_equal(one: dict[str, Tensor] | Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_roundtrip_and_the_newest_are_kept(tmp_path: Path):
    checkpoints = Checkpoints(open_store(tmp_path), keep=2)
    assert checkpoints.latest() is None
    for step in (5, 10, 15, 100):
        checkpoints.save(checkpoint(step, step))
    found = checkpoints.latest()
    assert found is not None
    assert (found.step, found.facts["samples"]) == (100, 1000)
    assert_equal(found.tensors, checkpoint(100, 100).tensors)
    assert checkpoints.steps() == [15, 100]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4


def test_data_cut_short_or_missing_or_a_foreign_commit_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    checkpoints = Checkpoints(open_store(tmp_path), keep=9)
    for step in (1, 2, 3):
        checkpoints.save(checkpoint(step, step))
    second, third = (next((tmp_path / "checkpoints").glob(f"{step:08d}-*")) for step in (2, 3))
    third.write_bytes(third.read_bytes()[:-5])
    second.unlink()
    (tmp_path / "checkpoints" / "00000004.json").write_text('{"schema": 1')
    with caplog.at_level(logging.WARNING):
        found = checkpoints.latest()
    assert found is not None
    assert found.step == 1
    assert len(caplog.records) == 3
    assert "cut short" in caplog.text
    with pytest.raises(CheckpointError, match="cut short"):
        checkpoints.load(3)


def test_data_without_its_commit_does_not_count_and_is_cleaned_up(tmp_path: Path):
    checkpoints = Checkpoints(open_store(tmp_path))
    checkpoints.save(checkpoint(1))
    checkpoints.save(checkpoint(2))
    (tmp_path / "checkpoints" / "00000002.json").unlink()
    found = checkpoints.latest()
    assert found is not None
    assert found.step == 1
    checkpoints.save(checkpoint(3))
    assert list((tmp_path / "checkpoints").glob("00000002*"))  # another attempt may be about to commit it
    Checkpoints(open_store(tmp_path), keep=1).save(checkpoint(4))
    assert {path.name[:8] for path in (tmp_path / "checkpoints").iterdir()} == {"00000004"}


def test_a_second_attempt_at_a_step_keeps_the_first_unless_it_is_damaged(tmp_path: Path):
    checkpoints = Checkpoints(open_store(tmp_path))
    checkpoints.save(checkpoint(1, 1.0))
    checkpoints.save(checkpoint(1, 2.0))
    assert_equal(checkpoints.load(1).tensors, checkpoint(1, 1.0).tensors)
    files = list((tmp_path / "checkpoints").glob("*.safetensors"))
    assert len(files) == 1
    files[0].write_bytes(b"")
    checkpoints.save(checkpoint(1, 3.0))
    assert_equal(checkpoints.load(1).tensors, checkpoint(1, 3.0).tensors)
    assert json.loads((tmp_path / "checkpoints" / "00000001.json").read_text())["samples"] == 10


def test_weights_of_another_model_are_refused():
    with pytest.raises(CheckpointError, match=r"another model: it differs in layer\.weight"):
        load_weights(nn.ModuleDict({"layer": nn.Linear(4, 3, bias=False)}), checkpoint(1))


def toy_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.Linear(13, 5))


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": [p for p in model.parameters() if (p.ndim > 1) == m], "weight_decay": 0.1 * m} for m in (True, False)]


def toy_engine(stage: int, start: Checkpoint | None, bf16: bool = False) -> Any:
    """An engine at a ZeRO stage; two parameter groups of sizes that no number of ranks divides."""
    import deepspeed

    model = toy_model()
    if start is not None:
        load_weights(model, start)
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == matrix], "weight_decay": 0.1 * matrix} for matrix in (True, False)
    ]
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage}, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.05), config=config)[0]
    load_optimizer(engine, start)
    return engine


def train(engine: Any, first: int, last: int) -> None:
    """Steps on a batch of 4, of which every rank takes its part."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step in range(first, last):
        inputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(step))[rank::world_size]
        loss = engine(inputs).square().mean()
        engine.backward(loss)
        engine.step()


def reference(first: int, last: int) -> Checkpoint:
    """The same training in plain torch."""
    model = toy_model()
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == matrix], "weight_decay": 0.1 * matrix} for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    for step in range(first, last):
        optimizer.zero_grad()
        model(torch.randn(4, 7, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    states = {name: {"weight": p.detach(), **optimizer.state[p]} for name, p in model.named_parameters()}
    parts = ("weight", "exp_avg", "exp_avg_sq")
    return Checkpoint(last, {}, {f"{part}/{name}": state[part] for name, state in states.items() for part in parts})


def through_the_stages(rank: int, world_size: int, port: int, root: str) -> None:
    """Trains 2 steps at each ZeRO stage in turn, each from the checkpoint of the one before."""
    facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in facts.items()} | {"DS_ACCELERATOR": "cpu"})
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled here
    torch.distributed.init_process_group("gloo")
    checkpoints = Checkpoints(open_store(root), keep=99)
    start = checkpoints.latest()
    for stage in (1, 0, 2, 3, 1):
        done = 0 if start is None else start.step
        engine = toy_engine(stage, start)
        train(engine, done, done + 2)
        tensors = capture(engine)
        assert bool(tensors) == (rank == 0)
        if rank == 0:
            checkpoints.save(Checkpoint(done + 2, {"stage": stage}, tensors))
        torch.distributed.barrier()
        start = checkpoints.load(done + 2)
        engine.destroy()
    bf16_masters_survive(start)
    torch.distributed.destroy_process_group()


def bf16_masters_survive(start: Checkpoint | None) -> None:
    """fp32 masters and moments of bf16 parameters come back bit by bit, not rounded."""
    assert start is not None
    for stage in (1, 2, 3):
        engine = toy_engine(stage, start, bf16=True)
        found = capture(engine)
        if found:
            assert_equal(found, start.tensors)
        engine.destroy()


def test_any_zero_stage_continues_any_other(tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(through_the_stages, (2, port, str(tmp_path)), nprocs=2)
    checkpoints = Checkpoints(open_store(tmp_path))
    for step in checkpoints.steps():
        found, expected = checkpoints.load(step), reference(0, step)
        for name, tensor in expected.tensors.items():
            torch.testing.assert_close(found.tensors[name], tensor, rtol=2e-4, atol=2e-6)
