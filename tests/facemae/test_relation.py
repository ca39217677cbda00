from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from facemae.relation import gather_rows, relation_loss, relation_matrix

DISTANCES = ["cosine", "euclidean"]


def unit_rows(num_rows: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)).to(dtype)


def reference_matrix(z: np.ndarray, distance: str) -> np.ndarray:
    """Pair by pair in float64."""
    z = z.astype(np.float64)
    between = {"cosine": lambda a, b: 1 - np.dot(a, b), "euclidean": lambda a, b: np.sqrt(np.sum((a - b) ** 2))}
    return np.array([[between[distance](a, b) for b in z] for a in z])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(2, 17), st.integers(0, 99), st.sampled_from(DISTANCES))
def test_matrix_and_loss_against_numpy(num_rows, dim, seed, distance):
    real, fake = unit_rows(num_rows, dim, seed), unit_rows(num_rows, dim, seed + 100)
    expected = [reference_matrix(z.numpy(), distance) for z in (real, fake)]
    np.testing.assert_allclose(relation_matrix(real, distance).numpy(), expected[0], atol=1e-6)
    loss = np.mean((expected[0] - expected[1]) ** 2)
    np.testing.assert_allclose(float(relation_loss(real, fake, distance)), loss, rtol=1e-3, atol=1e-9)
    in_float64 = relation_loss(real.double(), fake.double(), distance)
    np.testing.assert_allclose(float(in_float64), loss, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradient_matches_finite_differences(distance):
    real, fake = unit_rows(5, 4, 0, torch.float64), unit_rows(5, 4, 1, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: relation_matrix(z, distance), fake)
    assert torch.autograd.gradcheck(lambda z: relation_loss(real, z, distance), fake)


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_rows_have_distance_zero_and_a_finite_gradient(distance):
    z = unit_rows(1, 8, 0).repeat(3, 1).requires_grad_()
    graph = relation_matrix(z, distance)
    torch.testing.assert_close(graph, torch.zeros(3, 3), atol=1e-6, rtol=0)
    relation_loss(unit_rows(3, 8, 1), z, distance).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_euclidean_resolves_near_neighbours():
    """By the matrix product a distance of 1e-5 would come out as 0 or 3e-4."""
    near = torch.zeros(2, 128)
    near[:, 0], near[1, 1] = 1.0, 1e-5
    assert float(relation_matrix(near, "euclidean")[0, 1]) == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize("distance", DISTANCES)
def test_loss_ignores_a_common_rotation_but_not_a_change_of_distances(distance):
    real = unit_rows(6, 8, 0, torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    assert float(relation_loss(real, real @ rotation, distance)) < 1e-15
    assert float(relation_loss(real, real.roll(1, dims=0), distance)) > 1e-2


@pytest.mark.parametrize("distance", DISTANCES)
def test_float32_under_autocast_and_for_bfloat16_rows(distance):
    z = unit_rows(7, 64, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        graph = relation_matrix(z, distance)
    assert graph.dtype == torch.float32
    torch.testing.assert_close(graph, relation_matrix(z, distance), rtol=0, atol=0)
    assert relation_matrix(z.bfloat16(), distance).dtype == torch.float32


def test_errors_name_what_was_given():
    z = unit_rows(3, 4, 0)
    with pytest.raises(ValueError, match=r"'hamming'.*cosine, euclidean"):
        relation_matrix(z, "hamming")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        relation_matrix(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="3 real and 2 reconstructed"):
        relation_loss(z, z[:2])
    with pytest.raises(ValueError, match="0 real"):
        relation_loss(z[:0], z[:0])


def test_gather_without_distributed_returns_the_rows_themselves():
    z = unit_rows(3, 4, 0)
    assert gather_rows(z) is z


COUNTS = ((3, 5), (4, 0), (2, 2))  # rows of rank 0 and rank 1 in three batches


def _rank(rank: int, folder: str) -> None:
    """One of two processes: gathers its part of each batch and saves rows and gradient."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for batch, counts in enumerate(COUNTS):
        real = unit_rows(sum(counts), 6, batch)
        fake = unit_rows(sum(counts), 6, batch + 50)
        mine = slice(0, counts[0]) if rank == 0 else slice(counts[0], None)
        local = fake[mine].clone().requires_grad_()
        rows = gather_rows(local)
        relation_loss(gather_rows(real[mine]), rows, "euclidean").backward()
        np.save(Path(folder) / f"rows-{batch}-{rank}.npy", rows.detach().numpy())
        assert local.grad is not None
        np.save(Path(folder) / f"grad-{batch}-{rank}.npy", local.grad.numpy())
    dist.barrier()
    # A gloo thread may still be letting go of a Python object that the backward pass left in its work item. It needs the
    # interpreter's lock for that, and aborts the process (torch 2.15, Python 3.11) if the interpreter is shutting down.
    os._exit(0)


def test_two_ranks_gather_in_order_and_their_gradients_make_up_the_whole(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    for batch, counts in enumerate(COUNTS):
        fake = unit_rows(sum(counts), 6, batch + 50).requires_grad_()
        relation_loss(unit_rows(sum(counts), 6, batch), fake, "euclidean").backward()
        for rank in range(2):
            np.testing.assert_array_equal(np.load(tmp_path / f"rows-{batch}-{rank}.npy"), fake.detach().numpy())
        gradients = [np.load(tmp_path / f"grad-{batch}-{rank}.npy") for rank in range(2)]
        assert tuple(len(gradient) for gradient in gradients) == counts
        np.testing.assert_allclose(np.concatenate(gradients), fake.grad.numpy(), rtol=1e-5, atol=1e-8)
