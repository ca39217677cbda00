"""Training checkpoints in object storage: for any number of ranks, any ZeRO stage, one file, no pickle.

    <run>/checkpoints/<step>-<sha256[:12]>.safetensors   every parameter in fp32 and the optimiser's moments, whole
    <run>/checkpoints/<step>-<part>-<sha256[:12]>.safetensors   tables too large for one process, in ranges of rows (cluster/centers.py)
    <run>/checkpoints/<step>.json                        the commit: names the data's sha256 and size; written last, by conditional PUT

This takes the place of DeepSpeed's own universal checkpoint. That one is a folder of pickles per rank, is converted by a separate
offline program before another number of ranks can read it, and is not one object that is either there or not. Here each parameter is
gathered from its ZeRO fragments and written whole, so the file knows nothing of ranks or stages.

No random state is kept because none is used: masks and sample order come from hashes, and nothing else is random.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from cluster.shard import sha256_hex
from cluster.store import AlreadyExists, NotFound, Store

SCHEMA = 1
ADAMW = ("exp_avg", "exp_avg_sq")
SGD = ("momentum_buffer",)
"""The moments that an optimiser keeps of every parameter, by torch's names for them."""

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is damaged, cut short, or of another model."""


@dataclass(frozen=True)
class Checkpoint:
    """Where training stood after ``step`` optimiser steps.

    Attributes:
        step: global steps done; also AdamW's step count.
        facts: what else the JSON says (epoch, samples seen, world size, config).
        tensors: ``weight/NAME`` and ``MOMENT/NAME`` for every parameter, ``buffer/NAME`` for what else a network keeps; float32 on the CPU.
    """

    step: int
    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        store: the run's root.
        keep: how many of the newest to keep.
    """

    def __init__(self, store: Store, keep: int = 3) -> None:
        self._store, self._keep = store, max(keep, 1)

    def save(self, checkpoint: Checkpoint) -> None:
        """Publish a checkpoint whole or not at all, then remove all but the newest ones."""
        data = save(dict(checkpoint.tensors))
        digest = sha256_hex(data)
        file = f"checkpoints/{checkpoint.step:08d}-{digest[:12]}.safetensors"
        content = {"schema": SCHEMA, "step": checkpoint.step, "file": file, "sha256": digest, "bytes": len(data), **checkpoint.facts}
        self._store.put(file, data, sha256=digest)
        self._commit(checkpoint.step, content)
        self._prune(checkpoint.step)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None. One whose data is missing, cut short or changed is passed over with a warning."""
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except (CheckpointError, NotFound) as error:
                logger.warning("checkpoint passed over: %s", error)
        return None

    def load(self, step: int) -> Checkpoint:
        """One checkpoint; of its parts only that they are there. Raises CheckpointError or NotFound when it is not whole."""
        content = self.describe(step)
        for part in content.get("parts", ()):
            if self._store.size(part["file"]) != part["bytes"]:
                raise CheckpointError(f"{self._store.url}/{part['file']} is cut short")
        data = self._store.get(content["file"])
        where = f"{self._store.url}/{content['file']}"
        if len(data) != content["bytes"] or sha256_hex(data) != content["sha256"]:
            raise CheckpointError(f"{where} is damaged or cut short ({len(data)} of {content['bytes']} bytes, sha256 checked)")
        try:
            return Checkpoint(step, content, load(data))
        except SafetensorError as error:
            raise CheckpointError(f"{where} is no safetensors file: {error}") from None

    def describe(self, step: int) -> dict[str, Any]:
        """A checkpoint's JSON. Raises CheckpointError or NotFound."""
        key = f"checkpoints/{step:08d}.json"
        try:
            content = json.loads(self._store.get(key))
            file = f"checkpoints/{step:08d}-{content['sha256'][:12]}.safetensors"
            if (content["schema"], content["step"], content["file"]) == (SCHEMA, step, file) and isinstance(content["bytes"], int):
                return content
        except (ValueError, KeyError, TypeError):
            pass
        raise CheckpointError(f"{self._store.url}/{key} is no checkpoint of schema {SCHEMA}, or cut short")

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending; their data is not looked at."""
        names = (stored.key.removeprefix("checkpoints/") for stored in self._store.list("checkpoints/"))
        return sorted(int(name.removesuffix(".json")) for name in names if name.endswith(".json") and name[:-5].isdigit())

    def _commit(self, step: int, content: Mapping[str, Any]) -> None:
        key, data = f"checkpoints/{step:08d}.json", (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
        try:
            self._store.put(key, data, if_absent=True)
            return
        except AlreadyExists:
            pass
        try:
            winner = self.load(step)  # an earlier attempt came this far
        except (CheckpointError, NotFound):
            self._store.put(key, data)  # and its data is gone or damaged, so ours takes its place
            return
        for file in files_of(content) - files_of(winner.facts):
            self._store.delete(file)

    def _prune(self, newest: int) -> None:
        """Remove all but the newest checkpoints up to the one just published, which is known to be whole; what lies beyond it may be
        damaged, and the way on leads there again. Data without a commit goes when it is older than all that stays: later data may be
        that of another attempt, about to commit it."""
        steps = [step for step in self.steps() if step <= newest]
        kept = steps[-self._keep :]
        for step in steps[: -self._keep]:
            self._store.delete(f"checkpoints/{step:08d}.json")
        for stored in list(self._store.list("checkpoints/")):
            number, dash, _ = stored.key.removeprefix("checkpoints/").partition("-")
            if dash and number.isdigit() and int(number) < min(kept, default=0):
                self._store.delete(stored.key)


def files_of(content: Mapping[str, Any]) -> set[str]:
    """The keys of all data that a checkpoint's JSON names."""
    return {content["file"], *(part["file"] for part in content.get("parts", ()))}


def capture(engine: Any) -> dict[str, Tensor]:
    """Gather a DeepSpeed engine's fp32 parameters and their moments, one parameter at a time. Every rank must call it.

    Returns:
        Checkpoint.tensors on rank 0, nothing elsewhere. Buffers (the running statistics of batch norms) are the mean over the ranks,
        each of which has seen its share of the batches.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    tensors, moments = dict[str, Tensor](), _moments(engine)
    for name, parameter in _trained(engine.module):
        if engine.zero_optimization_stage():
            full = [safe_get_full_fp32_param(parameter), *(safe_get_full_optimizer_state(parameter, moment) for moment in moments)]
        else:
            full = [parameter.detach(), *(engine.basic_optimizer.state[parameter][moment] for moment in moments)]
        if engine.global_rank == 0:
            parts = zip(("weight", *moments), full, strict=True)
            tensors.update({f"{part}/{name}": tensor.detach().to("cpu", torch.float32, copy=True) for part, tensor in parts})
    for name, buffer in _buffers(engine.module):
        mean = buffer.detach().float().clone()
        dist.all_reduce(mean)
        if engine.global_rank == 0:
            tensors[f"buffer/{name}"] = mean.cpu() / dist.get_world_size()
    return tensors


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's parameters and buffers into a model that DeepSpeed does not hold yet.

    Raises:
        CheckpointError: the checkpoint is of another model.
    """
    kept = {f"weight/{name}": parameter for name, parameter in _trained(model)} | {f"buffer/{name}": b for name, b in _buffers(model)}
    expected = {name: tuple(tensor.shape) for name, tensor in kept.items()}
    found = {name: tuple(t.shape) for name, t in checkpoint.tensors.items() if name.startswith(("weight/", "buffer/"))}
    if expected != found:
        different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        names = ", ".join(name.partition("/")[2] for name in different[:3])
        raise CheckpointError(f"checkpoint {checkpoint.step} is of another model: it differs in {names}")
    with torch.no_grad():
        for name, tensor in kept.items():
            tensor.copy_(checkpoint.tensors[name])


def load_optimizer(engine: Any, checkpoint: Checkpoint | None) -> None:
    """Put a checkpoint's moments, and the fp32 masters of low-precision parameters, into an engine made from a model that has its
    weights already (``load_weights``). Every rank must call it; without a checkpoint too, or ``capture`` may find no moments: DeepSpeed
    links them after the first parameter group's first step, when the other groups have none yet."""
    _create_moments(engine, 0 if checkpoint is None else checkpoint.step)
    if checkpoint is None:
        return
    for name, parameter in _trained(engine.module):
        full = {moment: checkpoint.tensors[f"{moment}/{name}"].to(engine.device) for moment in _moments(engine)}
        if not engine.zero_optimization_stage():
            for moment, value in full.items():
                engine.basic_optimizer.state[parameter][moment].copy_(value)
            continue
        full = {"weight": checkpoint.tensors[f"weight/{name}"].to(engine.device), **full}
        _set_partitions(parameter, full)


def _set_partitions(parameter: Any, full: Mapping[str, Tensor]) -> None:
    """Set this rank's part of a parameter's fp32 master and moments from the whole ones."""
    from deepspeed import utils

    for part, value in full.items():
        if hasattr(parameter, "ds_tensor"):  # ZeRO 3, whose safe_set_full_* fail where the ranks do not divide the parameter
            size, rank = parameter.ds_tensor.numel(), dist.get_rank(parameter.ds_process_group)
            mine = value.flatten()[size * rank : size * (rank + 1)]
            value, setters = (
                nn.functional.pad(mine, (0, size - len(mine))),
                (utils.safe_set_local_fp32_param, utils.safe_set_local_optimizer_state),
            )
        else:
            setters = (utils.safe_set_full_fp32_param, utils.safe_set_full_optimizer_state)
        if part == "weight":
            setters[0](parameter, value)
        else:
            setters[1](parameter, value, part)


def _create_moments(engine: Any, step: int) -> None:
    """Make the moments that the optimiser would make at its first step, and set the step count of AdamW's bias correction."""
    optimizer, moments = engine.basic_optimizer, _moments(engine)
    for flat in _flat_parameters(engine):
        count = {"step": torch.tensor(float(step))} if moments == ADAMW else {}  # one each: AdamW counts in place
        optimizer.state[flat] = {**count, **{moment: torch.zeros_like(flat, requires_grad=False) for moment in moments}}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # ZeRO 1, 2: DeepSpeed does it after the first step
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _flat_parameters(engine: Any) -> list[Tensor]:
    """The tensors that the optimiser inside the engine steps: this rank's fp32 partitions, or the parameters themselves at stage 0."""
    for name in ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat"):
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    return [parameter for _, parameter in _trained(engine.module)]


def _moments(engine: Any) -> tuple[str, ...]:
    return SGD if isinstance(engine.basic_optimizer, torch.optim.SGD) else ADAMW


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The floats that a network keeps beside its parameters; a batch norm's count of batches changes nothing."""
    kept = model.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept and buffer.is_floating_point())


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
