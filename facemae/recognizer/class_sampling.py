"""What Partial FC draws at random: any number of ranks, whatever range of classes each holds, draws the same."""

from __future__ import annotations

import math
from hashlib import blake2b

import torch
from torch import Tensor

INITIAL_BLOCK = 4096
"""Classes whose first centres one random generator draws. A constant of the format: another number gives other centres."""

_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # splitmix64's increment (Steele, Lea, Flood, OOPSLA 2014)
_SHIFTS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def draw_centers(start: int, stop: int, dim: int, seed: int) -> Tensor:
    """The first centres of classes start .. stop - 1, from N(0, 0.01^2): a function of (seed, class) alone.

    Returns:
        (stop - start, dim) float32, on the CPU.
    """
    centers = torch.empty(stop - start, dim)
    for block in range(start // INITIAL_BLOCK, -(-stop // INITIAL_BLOCK)):
        first = block * INITIAL_BLOCK
        generator = torch.Generator().manual_seed(_hash(f"centres/{seed}/{block}"))
        drawn = torch.randn(INITIAL_BLOCK, dim, generator=generator).mul_(0.01)
        begin, end = max(start, first), min(stop, first + INITIAL_BLOCK)
        centers[begin - start : end - start] = drawn[begin - first : end - first]
    return centers


def sample_classes(start: int, stop: int, rate: float, seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """Which of the classes start .. stop - 1 a step looks at beside those of its batch.

    A class is chosen by splitmix64 of (seed, step, class), so any division of the classes into ranges chooses the same ones.

    Args:
        start: first class of the range.
        stop: the class after the last.
        rate: probability of each class, in (0, 1].
        seed: any integer.
        step: number of the training step.
        device: where to compute.

    Returns:
        (stop - start,) bool.
    """
    # int64 in place of uint64, which has few operators in torch: products and sums wrap alike, only shifts need a mask.
    state = torch.arange(start + 1, stop + 1, device=device).mul_(_signed(_GOLDEN_RATIO)).add_(_signed(_hash(f"{seed}/{step}")))
    for shift, factor in _SHIFTS:
        state.bitwise_xor_((state >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))
    return (state >> 11).bitwise_and_((1 << 53) - 1) < math.ceil(rate * (1 << 53))


def _hash(text: str) -> int:
    """An unsigned 64-bit number."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _signed(number: int) -> int:
    """The int64 with the bits of a uint64."""
    return number - (1 << 64) if number >> 63 else number
