"""Instance relation matching: the distances between people, kept by the reconstructions (arXiv 2205.11090)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

Distance = Literal["cosine", "euclidean"]


def relation_matrix(z: Tensor, distance: Distance = "cosine") -> Tensor:
    """The relation graph of a batch: how far every embedding lies from every other one (our reading of 2205.11090).

    The result is float32 (float64 for float64 rows) whatever the dtype of `z`, also under autocast: a graph holds
    differences of nearly equal numbers, which bfloat16 would round away.

    Args:
        z: (B, D) unit rows, any float dtype.
        distance: "cosine", 1 - z_i . z_j in [0, 2]; or "euclidean", ||z_i - z_j|| in [0, 2], whose gradient is zero
            where two rows are equal (every row with itself).

    Returns:
        (B, B) distances.

    Raises:
        ValueError: `z` is not a matrix, or the distance is unknown.
    """
    if z.dim() != 2:
        raise ValueError(f"embeddings must be a (B, D) matrix, not a tensor of shape {tuple(z.shape)}")
    with torch.autocast(device_type=z.device.type, enabled=False):
        rows = z if z.dtype == torch.float64 else z.float()
        if distance == "cosine":
            return 1 - rows @ rows.T
        if distance == "euclidean":
            # Not by the matrix product: its cancellation gives near neighbours a distance of 3e-4 or zero.
            return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    raise ValueError(f"unknown distance {distance!r}: give one of {', '.join(get_args(Distance))}")


def relation_loss(real: Tensor, fake: Tensor, distance: Distance = "cosine") -> Tensor:
    """Mean squared gap between two relation graphs: mean_ij (G_ij - G^_ij)^2 over all pairs of the batch.

    Args:
        real: (B, D) unit embeddings of the real faces.
        fake: (B, D) unit embeddings of their reconstructions, in the same order.
        distance: see `relation_matrix`.

    Returns:
        A float32 scalar (float64 for float64 rows).

    Raises:
        ValueError: the two batches have different numbers of rows, or no row; or the distance is unknown.
    """
    if len(real) != len(fake) or len(real) == 0:
        raise ValueError(f"the graphs need the same pictures: got {len(real)} real and {len(fake)} reconstructed rows")
    return (relation_matrix(real, distance) - relation_matrix(fake, distance)).square().mean()


def gather_rows(z: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The rows of all ranks, in rank order; the gradient flows through the local rows only.

    Without torch.distributed (or with one rank) it returns `z` itself. Ranks may hold different numbers of rows, none
    included. Each rank then computes the loss of the whole graph and gets the gradient of its own rows: the *sum* of
    the ranks' gradients is the gradient of the whole. DDP and DeepSpeed *average* over the ranks, so a loss on
    gathered rows has to be multiplied by the world size there.

    Args:
        z: (B_rank, D) rows; D, dtype and kind of device are those of every rank.
        group: the ranks to gather over; all of them by default.

    Returns:
        (sum of B_rank, D) rows.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return z
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    counts = [torch.zeros(1, dtype=torch.int64, device=z.device) for _ in range(world_size)]
    dist.all_gather(counts, torch.tensor([len(z)], device=z.device), group=group)
    num_rows = [int(count) for count in counts]
    # all_gather wants equal shapes on every rank.
    padded = functional.pad(z.detach(), (0, 0, 0, max(num_rows) - len(z))).contiguous()
    gathered = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(gathered, padded, group=group)
    parts = [rows[:count] for rows, count in zip(gathered, num_rows, strict=True)]
    parts[rank] = z
    return torch.cat(parts)
