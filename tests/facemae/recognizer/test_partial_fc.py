"""Partial FC on 1, 2 and 4 ranks against one softmax over all kept classes in float64."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.nn import functional

from facemae.recognizer.class_sampling import INITIAL_BLOCK, draw_centers, sample_classes
from facemae.recognizer.margin import CosFace, Margin, MarginHead, create_margin
from facemae.recognizer.partial_fc import PartialFC

DIM, BATCH, STEPS, SEED = 16, 12, 3, 7
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}  # more decay than usual, so that it shows
COUNTS: dict[int, list[tuple[int, ...]]] = {  # rows of each rank, by step
    1: [(12,), (12,), (12,)],
    2: [(7, 5), (12, 0), (3, 9)],
    4: [(3, 4, 2, 3), (0, 12, 0, 0), (5, 1, 6, 0)],
}


@dataclass(frozen=True)
class Case:
    """One head and its classes; three classes leave one of four ranks without any."""

    margin: str
    num_classes: int
    rate: float


CASES = [Case("cosface", 50, 1.0), Case("arcface", 50, 1.0), Case("adaface", 50, 1.0), Case("cosface", 3, 1.0), Case("arcface", 300, 0.1)]
RESUMED = CASES[-1]


def batch(case: Case, step: int) -> tuple[Tensor, Tensor]:
    """Embeddings of various lengths, and labels of which several are the same."""
    generator = torch.Generator().manual_seed(100 + step)
    rows = torch.randn(BATCH, DIM, generator=generator) * torch.linspace(1, 12, BATCH).unsqueeze(1)
    labels = torch.randint(0, case.num_classes, (BATCH,), generator=generator)
    labels[5] = labels[0]
    return rows, labels


# ---------------------------------------------------------------------------------------------------------- reference


def splitmix64(seed: int, step: int, label: int) -> int:
    """Steele, Lea and Flood's formula in Python's integers."""
    start = int.from_bytes(blake2b(f"{seed}/{step}".encode(), digest_size=8).digest(), "little")
    state = (start + (label + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


def kept_classes(case: Case, step: int) -> list[int]:
    positives = set(batch(case, step)[1].tolist())
    return [label for label in range(case.num_classes) if label in positives or splitmix64(SEED, step, label) / 2**64 < case.rate]


class Hardened:
    """The margins' formulas in float64."""

    mean, std = 20.0, 100.0

    def __call__(self, name: str, cosines: Tensor, norms: Tensor) -> Tensor:
        if name == "cosface":
            return cosines - 0.4
        if name == "arcface":
            return (cosines.arccos() + 0.5).cos()
        self.mean = 0.99 * self.mean + 0.01 * float(norms.mean())
        self.std = 0.99 * self.std + 0.01 * float(norms.std())
        quality = ((norms - self.mean) / (self.std + 1e-3) * 0.333).clamp(-1, 1)
        return (cosines.arccos() - 0.4 * quality).cos() - 0.4 * (1 + quality)


def reference(case: Case) -> dict[str, Any]:
    """Loss and gradient of each step and the centres after the last, by one softmax and autograd in float64."""
    centers = draw_centers(0, case.num_classes, DIM, SEED).double()
    momentum, harden = torch.zeros_like(centers), Hardened()
    found: dict[str, Any] = {"losses": [], "gradients": [], "kept": []}
    for step in range(STEPS):
        rows, labels = batch(case, step)
        kept = torch.tensor(kept_classes(case, step))
        places = torch.tensor([kept.tolist().index(label) for label in labels])
        rows, chosen = rows.double().requires_grad_(), centers[kept].requires_grad_()
        cosines = functional.normalize(rows) @ functional.normalize(chosen).T
        own = torch.arange(BATCH)
        logits = cosines.index_put((own, places), harden(case.margin, cosines[own, places], rows.detach().norm(dim=1)))
        loss = functional.cross_entropy(64 * logits, places)
        by_rows, by_centers = torch.autograd.grad(loss, [rows, chosen])
        momentum[kept] = SGD["momentum"] * momentum[kept] + by_centers + SGD["weight_decay"] * centers[kept]
        centers[kept] -= SGD["lr"] * momentum[kept]
        found["losses"].append(float(loss.detach()))
        found["gradients"].append(by_rows.numpy())
        found["kept"].append(kept.numpy())
    return found | {"centers": centers.numpy(), "momentum": momentum.numpy()}


# ------------------------------------------------------------------------------------------------------------- ranks


def train(case: Case, rank: int, world_size: int, steps: range, head: PartialFC) -> dict[str, np.ndarray]:
    """The steps of one rank; what it saw."""
    found = {}
    for step in steps:
        before = head.centers.clone()
        counts = COUNTS[world_size][step]
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        rows, labels = (part[mine] for part in batch(case, step))
        rows.requires_grad_()
        loss = head(rows, labels, step)
        loss.backward()
        head.update(**SGD)
        assert rows.grad is not None
        found[f"loss-{step}"], found[f"gradient-{step}"] = loss.detach().numpy(), rows.grad.numpy()
        # Weight decay moves every centre that takes part.
        found[f"kept-{step}"] = ((before != head.centers).any(1).nonzero().squeeze(1) + head.start).numpy()
    found["start"], found["centers"], found["momentum"] = (np.array(part) for part in head.rows())
    return found


def create(case: Case) -> PartialFC:
    return PartialFC(DIM, case.num_classes, create_margin(case.margin), case.rate, SEED)


def run_rank(rank: int, world_size: int, folder: str) -> None:
    """What one rank does, and the size of the largest tensor that it reduced."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{world_size}", rank=rank, world_size=world_size)
    with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as reduce:
        for number, case in enumerate(CASES):
            save(folder, world_size, number, rank, train(case, rank, world_size, range(STEPS), create(case)))
        largest = max(call.args[0].numel() for call in reduce.call_args_list)
    save(folder, world_size, "largest", rank, {"reduced": np.array([largest])})
    if world_size == 4:
        save(folder, 4, "part", rank, train(RESUMED, rank, 4, range(2), create(RESUMED)))
    if world_size == 2:
        resume(rank, folder)
    rows, labels = batch(CASES[0], 0)
    labels[0] = 50 if rank == world_size - 1 else 0  # one rank's mistake must stop them all, not leave the others waiting
    with pytest.raises(ValueError, match=r"label 50 is outside 0 \.\. 49"):
        create(CASES[0])(rows, labels, 0)
    dist.barrier()
    if world_size > 1:
        os._exit(0)  # a gloo thread may hold a Python object yet: see test_relation
    dist.destroy_process_group()


def resume(rank: int, folder: str) -> None:
    """Two ranks go on where four stopped."""
    head = create(RESUMED)
    pieces = [load(folder, 4, "part", other) for other in range(4)]
    parts = [(int(piece["start"]), torch.from_numpy(piece["centers"]), torch.from_numpy(piece["momentum"])) for piece in pieces]
    assert sum(head.load_rows(*part) for part in parts) == head.stop - head.start
    save(folder, 2, "resumed", rank, train(RESUMED, rank, 2, range(2, 3), head))


def save(folder: str, world_size: int, name: object, rank: int, found: dict[str, np.ndarray]) -> None:
    save_file(found, f"{folder}/{world_size}-{name}-{rank}.safetensors")


def load(folder: str | Path, world_size: int, name: object, rank: int) -> dict[str, np.ndarray]:
    return load_file(f"{folder}/{world_size}-{name}-{rank}.safetensors")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What each rank of the groups of 1, 4 and 2 saw."""
    folder = tmp_path_factory.mktemp("ranks")
    run_rank(0, 1, str(folder))
    for world_size in (4, 2):
        torch.multiprocessing.spawn(run_rank, (world_size, str(folder)), nprocs=world_size)
    yield folder
    shutil.rmtree(folder)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """To 1e-5 of the largest number."""
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{CASES[number].margin}-{CASES[number].num_classes}")
def test_ranks_together_are_one_softmax(ranks, world_size, number):
    """Losses, gradients (times the world size), kept classes, centres and momentum, with unequal and empty batches."""
    expected = reference(CASES[number])
    found = [load(ranks, world_size, number, rank) for rank in range(world_size)]
    for step in range(STEPS):
        for part in found:
            close(part[f"loss-{step}"], np.array(expected["losses"][step]))
        close(np.concatenate([part[f"gradient-{step}"] for part in found]), world_size * expected["gradients"][step])
        np.testing.assert_array_equal(np.concatenate([part[f"kept-{step}"] for part in found]), expected["kept"][step])
    for table in ("centers", "momentum"):
        close(np.concatenate([part[table] for part in found]), expected[table])


def test_saved_by_four_ranks_continued_by_two(ranks):
    expected = reference(RESUMED)
    found = [load(ranks, 2, "resumed", rank) for rank in range(2)]
    close(found[0]["loss-2"], np.array(expected["losses"][2]))
    for table in ("centers", "momentum"):
        close(np.concatenate([part[table] for part in found]), expected[table])


@pytest.mark.parametrize("world_size", [2, 4])
def test_no_gradient_of_centers_is_reduced(ranks, world_size):
    """The largest thing that is summed over the ranks is the gradient of the batch, far smaller than that of 300 centres."""
    assert int(load(ranks, world_size, "largest", 0)["reduced"][0]) == BATCH * DIM


# ------------------------------------------------------------------------------------------------------- one process


def test_without_torch_distributed():
    for case in CASES:
        expected = reference(case)
        head = create(case)
        found = train(case, 0, 1, range(STEPS), head)
        close(found["centers"], expected["centers"])
        close(np.array([found[f"loss-{step}"] for step in range(STEPS)]), np.array(expected["losses"]))


@pytest.mark.parametrize("name", ["cosface", "arcface", "adaface"])
def test_equal_to_margin_head_and_cross_entropy(name):
    """Embeddings' and centres' gradients, the latter by one update."""
    full, partial = MarginHead(DIM, 40, create_margin(name)), PartialFC(DIM, 40, create_margin(name))
    full.weight.data = partial.centers.clone()
    rows, labels = batch(Case(name, 40, 1.0), 0)
    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    loss = functional.cross_entropy(full(theirs, labels), labels)
    loss.backward()
    assert full.weight.grad is not None
    expected = full.weight - SGD["lr"] * (full.weight.grad + SGD["weight_decay"] * full.weight)
    found = partial(ours, labels, 0)
    found.backward()
    partial.update(**SGD)
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(partial.centers, expected.detach(), rtol=1e-5, atol=1e-5)


class Lengths(Margin):
    """A margin that trains the lengths too."""

    def forward(self, cosines: Tensor, norms: Tensor) -> Tensor:
        return cosines - self.margin * norms.tanh()


def test_a_margin_may_train_the_lengths():
    full, partial = MarginHead(DIM, 40, Lengths(0.3, 16)), PartialFC(DIM, 40, Lengths(0.3, 16))
    full.weight.data = partial.centers.clone()
    rows, labels = batch(Case("", 40, 1.0), 0)
    rows = rows / 10
    ours, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    functional.cross_entropy(full(theirs, labels), labels).backward()
    partial(ours, labels, 0).backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_float32_under_autocast_and_for_bfloat16_embeddings():
    plain, automatic = PartialFC(DIM, 30, CosFace()), PartialFC(DIM, 30, CosFace())
    rows, labels = batch(Case("", 30, 1.0), 0)
    half = rows.bfloat16().requires_grad_()
    exact = half.detach().float().requires_grad_()
    plain(exact, labels, 0).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = automatic(half, labels, 0)
        assert loss.dtype == torch.float32
        loss.backward()
        automatic.update(0.1)
    plain.update(0.1)
    assert half.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(half.grad, exact.grad.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(automatic.centers, plain.centers, rtol=0, atol=0)


def test_logits_far_apart_neither_overflow_nor_vanish():
    """Scale 1000: exponentials of single logits are beyond float32 either way."""
    head = PartialFC(2, 2, CosFace(0.0, 1000.0))
    head.load_rows(0, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.zeros(2, 2))
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    assert float(head(rows, torch.tensor([0, 1]), 0).detach()) == 0
    assert float(head(rows, torch.tensor([1, 1]), 0).detach()) == pytest.approx(1000)


def test_frozen_embeddings_still_train_the_centers():
    head = PartialFC(DIM, 30, CosFace())
    before = head.centers.clone()
    head(*batch(Case("", 30, 1.0), 0), 0).backward()
    head.update(0.1)
    assert not torch.equal(before, head.centers)


def test_a_look_at_the_loss_leaves_the_gradient_alone():
    one, two = PartialFC(DIM, 30, CosFace()), PartialFC(DIM, 30, CosFace())
    rows, labels = batch(Case("", 30, 1.0), 0)
    for head in (one, two):
        head(rows, labels, 0).backward()
    with torch.no_grad():
        two(rows + 1, labels, 1)
    one.update(0.1)
    two.update(0.1)
    torch.testing.assert_close(one.centers, two.centers, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- random choices


@settings(max_examples=40, deadline=None)
@given(
    rate=st.floats(0.001, 1.0),
    seed=st.integers(-(2**63), 2**64),
    step=st.integers(0, 2**40),
    start=st.integers(0, 10**7),
    size=st.integers(1, 20_000),
    data=st.data(),
)
def test_choice_is_a_function_of_seed_step_and_class(rate, seed, step, start, size, data):
    """Of no range; about `rate` of the classes; as the formula in Python's integers has it."""
    whole = sample_classes(start, start + size, rate, seed, step)
    cut = data.draw(st.integers(0, size))
    parts = [sample_classes(start, start + cut, rate, seed, step), sample_classes(start + cut, start + size, rate, seed, step)]
    assert torch.equal(torch.cat(parts), whole)
    assert abs(int(whole.sum()) - rate * size) <= 6 * math.sqrt(rate * (1 - rate) * size) + 1
    place = data.draw(st.integers(0, size - 1))
    score = splitmix64(seed, step, start + place) >> 11
    assert bool(whole[place]) == (score < rate * 2**53)


def test_steps_and_seeds_choose_differently():
    """Two choices at rate 0.1 share about 1 % of the classes: they are independent."""
    choices = [sample_classes(0, 100_000, 0.1, seed, step) for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for first in range(4):
        for second in range(first):
            assert abs(int((choices[first] & choices[second]).sum()) - 1000) < 200


@settings(max_examples=10, deadline=None)
@given(start=st.integers(0, 3 * INITIAL_BLOCK), size=st.integers(0, 2 * INITIAL_BLOCK), cut=st.floats(0, 1))
def test_first_centers_are_a_function_of_seed_and_class(start, size, cut):
    middle = start + int(cut * size)
    whole = draw_centers(start, start + size, 3, 5)
    assert torch.equal(torch.cat([draw_centers(start, middle, 3, 5), draw_centers(middle, start + size, 3, 5)]), whole)


def test_first_centers_are_normal_and_differ():
    centers = draw_centers(0, 10_000, 32, 0)
    assert len(centers.unique(dim=0)) == 10_000
    assert float(centers.mean()) == pytest.approx(0, abs=1e-4)
    assert float(centers.std()) == pytest.approx(0.01, rel=0.01)
    assert not torch.equal(draw_centers(0, 10, 32, 1), centers[:10])


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("label", [-1, 30])
def test_a_label_out_of_range(label):
    rows, labels = batch(Case("", 30, 1.0), 0)
    labels[3] = label
    with pytest.raises(ValueError, match=rf"label {label} is outside 0 \.\. 29: renumber the identities, or raise num_classes"):
        PartialFC(DIM, 30, CosFace(), 0.5)(rows, labels, 0)


def test_shapes_that_do_not_fit():
    head = PartialFC(DIM, 30, CosFace())
    with pytest.raises(ValueError, match=r"must be \(n, 16\) and \(n,\), not \(4, 8\) and \(4,\)"):
        head(torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match=r"not \(4, 16\) and \(3,\)"):
        head(torch.zeros(4, DIM), torch.zeros(3, dtype=torch.int64), 0)
    with pytest.raises(ValueError, match="the batch is empty"):
        head(torch.zeros(0, DIM), torch.zeros(0, dtype=torch.int64), 0)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, math.nan])
def test_a_rate_that_is_none(rate):
    with pytest.raises(ValueError, match="rate is"):
        PartialFC(DIM, 30, CosFace(), rate)


def test_update_without_a_gradient():
    head = PartialFC(DIM, 30, CosFace())
    with pytest.raises(RuntimeError, match="call forward and backward before each update"):
        head.update(0.1)
    loss = head(*batch(Case("", 30, 1.0), 0), 0)
    with pytest.raises(RuntimeError, match="call forward and backward before each update"):
        head.update(0.1)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        loss.backward()


@pytest.mark.parametrize(("start", "shape"), [(25, (10, DIM)), (-1, (10, DIM)), (0, (10, DIM + 1))])
def test_a_piece_of_another_checkpoint(start, shape):
    with pytest.raises(ValueError, match="no piece of 30 classes x 16: load a checkpoint of the same classes and dim"):
        PartialFC(DIM, 30, CosFace()).load_rows(start, torch.zeros(shape), torch.zeros(shape))


def test_state_dict_knows_no_ranks():
    assert set(PartialFC(DIM, 30, create_margin("adaface")).state_dict()) == {"margin.mean", "margin.std"}
