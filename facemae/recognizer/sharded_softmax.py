"""A softmax whose classes are split over ranks: maxima and sums are put together from the ranks', logits stay where they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from facemae.recognizer.margin import Margin

_BLOCK_ROWS = {"cpu": 1024}  # centres worked on at a time: what fits into a core's cache
_MOST_ROWS = 1 << 16  # on other devices: few kernels, and still little memory


class ShardedSoftmax:
    """One batch on one rank: its loss, and the gradient of the centres that took part.

    The margin needs the true cosines of the global batch and is differentiated by autograd, so the loss is two autograd functions with the
    margin between them.

    Attributes:
        has_gradient: whether a backward pass was made.
        scores: (K, N) cosines; after the loss exponentials; after its backward pass the loss's gradient by centre times unit embedding.
        unit: (N, dim) unit embeddings; ``shrink``: (K, 1) one over the lengths of the kept centres.
    """

    def __init__(
        self, centers: Tensor, kept: Tensor | None, columns: Tensor, places: Tensor, group: dist.ProcessGroup | None = None
    ) -> None:
        """Nothing is computed yet.

        Args:
            centers: (C, dim) float32, the rank's.
            kept: int64 (K,) the rows of `centers` that take part, ascending; None: all.
            columns: int64 (M,) rows of the global batch whose class is this rank's.
            places: int64 (M,) where among the kept the class of each lies.
            group: the ranks.
        """
        self.centers, self.kept, self.columns, self.places, self.group = centers, kept, columns, places, group
        self.num_kept = len(centers) if kept is None else len(kept)
        self.has_gradient = False

    def loss(self, rows: Tensor, margin: Margin) -> Tensor:
        """Mean cross entropy of the global batch, the same on every rank.

        Its backward pass gives the whole gradient by `rows`, on every rank, and makes `center_gradient` ready.

        Args:
            rows: (N, dim) float32 embeddings of the global batch, of any length.
            margin: makes the true class harder, and has the scale of the logits.
        """
        self.scale = margin.scale
        true_cosines = _Cosines.apply(functional.normalize(rows), self)
        return _CrossEntropy.apply(margin(true_cosines, rows.norm(dim=1)), self)

    def blocks(self) -> Iterator[tuple[slice, slice | Tensor]]:
        """Blocks of `scores`, and for each what `take` finds its centres by."""
        size = _BLOCK_ROWS.get(self.centers.device.type, _MOST_ROWS)
        for begin in range(0, self.num_kept, size):
            part = slice(begin, min(begin + size, self.num_kept))
            yield part, part if self.kept is None else self.kept[part]

    def measure(self, unit: Tensor) -> Tensor:
        """Fill `scores` with cosines; returns those of the true classes, (N,), on every rank."""
        self.unit = unit.detach()  # not the graph behind it: this outlives the backward pass
        self.scores, self.shrink = unit.new_empty(self.num_kept, len(unit)), unit.new_empty(self.num_kept, 1)
        for part, index in self.blocks():
            centers = take(self.centers, index)
            # A zero centre divides by functional.normalize's epsilon.
            torch.linalg.vector_norm(centers, dim=1, keepdim=True, out=self.shrink[part]).clamp_min_(1e-12).reciprocal_()
            torch.mm(centers, unit.T, out=self.scores[part]).mul_(self.shrink[part])
        true_cosines = unit.new_zeros(len(unit))
        true_cosines[self.columns] = self.scores[self.places, self.columns]
        return self.reduce(true_cosines, dist.ReduceOp.SUM)

    def softmax(self, hardened: Tensor) -> tuple[Tensor, Tensor]:
        """Turn `scores` into exponentials; returns the maxima of all ranks' logits and the sums over all ranks, (N,) both."""
        self.scores[self.places, self.columns] = hardened[self.columns]
        # A rank without classes has no maximum of its own.
        top = self.scores.amax(0) if self.num_kept else hardened.clone()
        self.reduce(top, dist.ReduceOp.MAX)
        total = torch.zeros_like(top)
        for part, _ in self.blocks():
            total += self.scores[part].sub_(top).mul_(self.scale).exp_().sum(0)
        return top, self.reduce(total, dist.ReduceOp.SUM)

    def pull(self, true_gradient: Tensor) -> Tensor:
        """The gradient by the unit embeddings, summed over the ranks, (N, dim); from here on `scores` has `shrink` in it."""
        self.scores[self.places, self.columns] = true_gradient[self.columns]
        gradient = torch.zeros_like(self.unit)
        for part, index in self.blocks():
            gradient.addmm_(self.scores[part].mul_(self.shrink[part]).T, take(self.centers, index))
        self.has_gradient = True
        return self.reduce(gradient, dist.ReduceOp.SUM)

    def center_gradient(self, part: slice, centers: Tensor) -> Tensor:
        """The gradient by a block of centres: what pulls along a centre is taken out, its length has no say in a cosine."""
        gradient = self.scores[part] @ self.unit
        along = torch.linalg.vecdot(gradient, centers).unsqueeze(1).mul_(self.shrink[part].square())
        return gradient.addcmul_(centers, along, value=-1)

    def reduce(self, values: Tensor, operation: Any) -> Tensor:
        """All-reduce in place."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values, operation, group=self.group)
        return values


class _Cosines(torch.autograd.Function):
    """Cosines to the true classes, (N,). All others go to the loss as the batch's one matrix, which is changed in place."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, batch: ShardedSoftmax) -> Tensor:
        ctx.batch = batch
        return batch.measure(unit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        batch, ctx.batch = ctx.batch, None
        with torch.autocast(device_type=gradient.device.type, enabled=False):
            pulled = batch.pull(gradient)
        return pulled, None


class _CrossEntropy(torch.autograd.Function):
    """The mean over the global batch of -log softmax of the true class. Its backward pass comes before that of `_Cosines`."""

    @staticmethod
    def forward(ctx: Any, hardened: Tensor, batch: ShardedSoftmax) -> Tensor:
        top, total = batch.softmax(hardened)
        logits = batch.scale * (hardened - top)
        ctx.batch = batch
        ctx.save_for_backward(logits, total)
        return (total.log() - logits).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, total = ctx.saved_tensors
        batch, ctx.batch = ctx.batch, None
        if batch is None:
            raise RuntimeError("second backward pass through one loss of PartialFC, whose first used up the scores: call forward again")
        factor = gradient * batch.scale / len(logits)
        batch.scores.mul_(factor / total)
        return factor * (logits.exp() / total - 1), None


def take(table: Tensor, index: slice | Tensor) -> Tensor:
    """Rows: views of a slice, copies of those that a tensor names (by index_select, on the CPU three times as fast as brackets)."""
    return table[index] if isinstance(index, slice) else table.index_select(0, index)
