"""Partial FC: a softmax over millions of classes, split over ranks, that looks at a share of the negatives each step.

The classifier of arXiv 2010.05222 and 2203.15565. Each rank holds the centres of a range of classes. The embeddings of all ranks are
gathered; a rank multiplies them with its own centres only, and the softmax is put together from the ranks' maxima and sums. A step looks
at every class that is in the batch and at each other class with probability `rate`.

What is kept between forward and update is one matrix, kept classes x batch, which holds the cosines, then their exponentials, then their
gradients. The gradient of the centres is never stored: `update` multiplies it out block by block and applies it at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from facemae.recognizer.class_sampling import draw_centers, sample_classes
from facemae.recognizer.margin import Margin
from facemae.recognizer.sharded_softmax import ShardedSoftmax, take
from facemae.relation import gather_rows


class PartialFC(nn.Module):
    """Class centres split over the ranks, and the loss of a margin softmax over them.

    Each step: `loss = head(embeddings, labels, step)`, `loss.backward()`, `head.update(lr)`. All ranks do so together; the calls gather
    and reduce over the group. Gradients do not add up over several backward passes: `update` applies the last one.

    The backward pass gives the embeddings the gradient of the mean loss of the global batch *times the world size*. DDP and DeepSpeed
    average the gradients of the backbone over the ranks, and a rank's rows are in its own backward pass only: the average of the
    multiplied gradients is the gradient of the global loss. The centres, which no one averages, get the gradient itself. Any factor that
    the loss is multiplied with before its backward pass goes into both.

    The maths is float32, also under autocast and for bfloat16 embeddings. `state_dict` holds what is the same on every rank (the buffers of
    the margin); centres and their momentum are saved through `rows` and `load_rows`, which do not know the number of ranks. Do not change
    the type of the module (`half()`, `bfloat16()`).

    Attributes:
        centers: (stop - start, dim) float32, this rank's.
        momentum: the same shape, of SGD.
        margin: what makes the true class harder; it is called with the global batch on every rank.
        start: this rank's first class.
        stop: the class after its last.
    """

    centers: Tensor
    momentum: Tensor

    def __init__(
        self, dim: int, num_classes: int, margin: Margin, rate: float = 1.0, seed: int = 0, group: dist.ProcessGroup | None = None
    ) -> None:
        """Draw this rank's centres, a function of `seed` and the class alone.

        Args:
            dim: length of an embedding.
            num_classes: number of identities; labels are 0 .. num_classes - 1.
            margin: from `create_margin`.
            rate: probability that a step looks at a class which is not in its batch; 1: the full softmax.
            seed: of the centres and of the choice of classes.
            group: the ranks; all of them by default, this process alone where torch.distributed is not initialised.

        Raises:
            ValueError: a number out of range.
        """
        super().__init__()
        if dim < 1 or num_classes < 1:
            raise ValueError(f"dim ({dim}) and num_classes ({num_classes}) must be 1 or more")
        if not 0 < rate <= 1:
            raise ValueError(f"rate is {rate}: give the share of classes that a step looks at, above 0 and up to 1 (the full softmax)")
        self.dim, self.num_classes, self.margin, self.rate, self.seed = dim, num_classes, margin, rate, seed
        distributed = dist.is_available() and dist.is_initialized()
        self.group, self.world_size = group, dist.get_world_size(group) if distributed else 1
        rank = dist.get_rank(group) if distributed else 0
        self.start, self.stop = num_classes * rank // self.world_size, num_classes * (rank + 1) // self.world_size
        self.register_buffer("centers", draw_centers(self.start, self.stop, dim, seed), persistent=False)
        self.register_buffer("momentum", torch.zeros(self.stop - self.start, dim), persistent=False)
        self._batch: ShardedSoftmax | None = None

    def forward(self, embeddings: Tensor, labels: Tensor, step: int) -> Tensor:
        """The mean loss of the global batch.

        Args:
            embeddings: (n, dim) of this rank, of any length and float type; ranks may hold different n, none included.
            labels: (n,) int64 classes.
            step: number of the training step, the same on every rank; with the seed it chooses the negatives.

        Returns:
            A float32 scalar, the same on every rank.

        Raises:
            ValueError: wrong shapes, a label out of range on any rank (then on all of them), or no row on any rank.
        """
        if embeddings.dim() != 2 or embeddings.shape[1] != self.dim or labels.shape != embeddings.shape[:1]:
            expected = f"(n, {self.dim}) and (n,)"
            raise ValueError(f"embeddings and labels must be {expected}, not {tuple(embeddings.shape)} and {tuple(labels.shape)}")
        if torch.is_grad_enabled() and not embeddings.requires_grad:  # so that every rank takes part in the backward pass
            embeddings = embeddings.detach().requires_grad_()
        with torch.autocast(device_type=embeddings.device.type, enabled=False):
            rows = gather_rows(_Multiplied.apply(embeddings.float(), self.world_size), self.group)
            everyone = self._checked(gather_rows(labels.unsqueeze(1), self.group).squeeze(1))
            softmax = self._softmax(everyone, step)
            self._batch = softmax if torch.is_grad_enabled() else self._batch
            return softmax.loss(rows, self.margin)

    @torch.no_grad()
    def update(self, lr: float, momentum: float = 0.9, weight_decay: float = 5e-4) -> None:
        """SGD with momentum and weight decay on the centres that took part in the last step; the others stay as they are.

        Args:
            lr: learning rate.
            momentum: of SGD; as in torch.optim.SGD without dampening.
            weight_decay: of SGD.

        Raises:
            RuntimeError: no backward pass since the last update.
        """
        batch, self._batch = self._batch, None
        if batch is None or not batch.has_gradient:
            raise RuntimeError("no gradient to apply: call forward and backward before each update")
        with torch.autocast(device_type=self.centers.device.type, enabled=False):
            for part, index in batch.blocks():
                centers, velocity = take(self.centers, index), take(self.momentum, index)
                velocity.mul_(momentum).add_(batch.center_gradient(part, centers)).add_(centers, alpha=weight_decay)
                centers.sub_(velocity, alpha=lr)
                if isinstance(index, Tensor):  # they are copies, not views
                    self.centers.index_copy_(0, index, centers)
                    self.momentum.index_copy_(0, index, velocity)
        del batch.scores  # the largest tensor here goes now, also where the caller still holds the loss

    def rows(self) -> tuple[int, Tensor, Tensor]:
        """This rank's piece of a checkpoint: its first class, centres and momentum (the tensors themselves, no copies)."""
        return self.start, self.centers, self.momentum

    @torch.no_grad()
    def load_rows(self, start: int, centers: Tensor, momentum: Tensor) -> int:
        """Take what is this rank's from a piece of a checkpoint that any number of ranks wrote.

        Args:
            start: the piece's first class.
            centers: (m, dim) centres of the classes start .. start + m - 1.
            momentum: (m, dim).

        Returns:
            How many rows were taken. All rows are there when the pieces' numbers add up to stop - start.

        Raises:
            ValueError: the piece has another shape than these classes.
        """
        stop = start + len(centers)
        if centers.shape != (stop - start, self.dim) or momentum.shape != centers.shape or not 0 <= start <= stop <= self.num_classes:
            raise ValueError(
                f"rows from class {start} of shapes {tuple(centers.shape)} and {tuple(momentum.shape)} are no piece of "
                f"{self.num_classes} classes x {self.dim}: load a checkpoint of the same classes and dim"
            )
        first, last = max(start, self.start), min(stop, self.stop)
        if first >= last:
            return 0
        for table, piece in ((self.centers, centers), (self.momentum, momentum)):
            table[first - self.start : last - self.start].copy_(piece[first - start : last - start])
        return last - first

    def _softmax(self, labels: Tensor, step: int) -> ShardedSoftmax:
        """This rank's part of the softmax over the classes of a step, for the labels of the global batch."""
        columns = ((labels >= self.start) & (labels < self.stop)).nonzero().squeeze(1)
        owned = labels[columns] - self.start
        if self.rate == 1:
            return ShardedSoftmax(self.centers, None, columns, owned, self.group)
        chosen = sample_classes(self.start, self.stop, self.rate, self.seed, step, labels.device)
        chosen[owned] = True
        kept = chosen.nonzero().squeeze(1)
        return ShardedSoftmax(self.centers, kept, columns, torch.searchsorted(kept, owned), self.group)

    def _checked(self, labels: Tensor) -> Tensor:
        """The labels of the global batch. Each rank sees all of them, so all raise together and none waits for another."""
        if len(labels) == 0:
            raise ValueError("the batch is empty on every rank: give at least one embedding")
        lowest, highest = (int(value) for value in torch.aminmax(labels))
        if lowest < 0 or highest >= self.num_classes:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"label {wrong} is outside 0 .. {self.num_classes - 1}: renumber the identities, or raise num_classes")
        return labels


class _Multiplied(torch.autograd.Function):
    """The rows themselves; backwards their gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
