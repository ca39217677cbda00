"""Training a recogniser on labelled faces: one process, torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from facemae.recognizer.margin import CosFace, MarginHead


def fit_recognizer(
    net: nn.Module,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    num_classes: int,
    steps: int,
    *,
    lr: float = 0.1,
    warmup: int = 0,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    clip_norm: float = 5.0,
    flip: bool = True,
    head: MarginHead | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, float, float], None] | None = None,
) -> MarginHead:
    """Train `net` in place with SGD and a margin head; leave it in eval mode.

    The recipe of arcface_torch: SGD with momentum, weight decay 5e-4, gradients clipped at norm 5, learning rate
    falling to zero as (1 - step/steps)^2, horizontal flips as the only augmentation.

    Args:
        net: embeds (N, 3, 112, 112) float32 in [-1, 1] as (N, net.dim).
        batches: yields (pictures uint8 (N, H, W, 3), classes int64 (N,)), at least `steps` of them; N of 2 or more.
        num_classes: classes are 0 .. num_classes - 1.
        steps: number of batches to train on.
        lr: highest learning rate; 0.1 suits batches of 128 (compact networks) to 1024 (large ones).
        warmup: number of first steps over which the rate rises linearly.
        momentum: of SGD.
        weight_decay: of SGD, on network and head.
        clip_norm: largest norm of the gradient.
        flip: mirror each picture with probability 1/2.
        head: the margin head; CosFace with scale 64 and margin 0.4 by default.
        seed: of the flips and of the default head. The network's own start is the caller's.
        device: where to train.
        on_step: called after each step with (step from 0, loss, learning rate).

    Returns:
        The trained head.

    Raises:
        ValueError: a class is out of range, the batches end too early, or the loss is no longer finite.
    """
    device = torch.device(device)
    net.to(device).train()
    if device.type == "cpu":  # convolutions run up to twice as fast with the channels innermost
        net.to(memory_format=torch.channels_last)
    head = head or MarginHead(int(net.dim), num_classes, CosFace(), seed)  # type: ignore[arg-type]
    head.to(device).train()
    parameters = [*net.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    source = iter(batches)
    for step in range(steps):
        pictures, classes = _next_batch(source, step, steps, num_classes)
        rate = polynomial_rate(step, steps, lr, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        labels = torch.from_numpy(classes).to(device)
        loss = functional.cross_entropy(head(net(_images(pictures, flip, generator, device)), labels), labels)
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {float(loss.detach())} at step {step} of {steps}: lower lr ({lr}) or give a warmup")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        if on_step:
            on_step(step, float(loss.detach()), rate)
    net.eval()
    return head


def polynomial_rate(step: int, steps: int, lr: float, warmup: int = 0) -> float:
    """The learning rate of arcface_torch's recipe: a linear rise over the first `warmup` steps times (1 - step / steps)^2.

    Args:
        step: from 0 to steps - 1.
        steps: of the whole training.
        lr: the highest rate.
        warmup: steps of the rise.
    """
    return lr * min(1.0, (step + 1) / (warmup + 1)) * (1 - step / steps) ** 2


def _next_batch(source: Iterator[tuple[np.ndarray, np.ndarray]], step: int, steps: int, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The next batch of the iterator, its labels checked before they index the head's centres."""
    try:
        pictures, classes = next(source)
    except StopIteration:
        raise ValueError(f"the batches ended after {step} of {steps} steps: repeat them or lower steps") from None
    classes = np.asarray(classes, dtype=np.int64)
    if len(classes) and not (classes.min() >= 0 and classes.max() < num_classes):
        raise ValueError(
            f"step {step} has classes {classes.min()} .. {classes.max()}, expected 0 .. {num_classes - 1}: "
            "renumber the identities, or raise num_classes"
        )
    return pictures, classes


def _images(pictures: np.ndarray, flip: bool, generator: torch.Generator, device: torch.device) -> Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in [-1, 1] on the device, each mirrored by chance."""
    # Permuting leaves the channels innermost in memory: channels_last without a copy.
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device).float().div_(127.5).sub_(1)
    if flip:
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(mirrored.to(device).view(-1, 1, 1, 1), images.flip(3), images)
    return images
