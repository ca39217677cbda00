"""Synthetic faces: a labelled face data set of any size from a seed, with no real person in it.

Identity (shape, colours, hair, lasting marks) and nuisance (pose, light, expression, background, camera) are drawn
apart, each from a counter hash, so image i is the same bytes in whatever batch, order, process or machine it is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from facemae.synthetic_paint import Floats
from facemae.synthetic_scene import Scene
from facemae.synthetic_traits import appearance, circumstances

BLOCK = 256  # images whose parameters are drawn at once
CHUNK = 8  # images painted at once: a few of their planes fit a core's cache together
NAMES = {"ids": "num_identities", "images": "images_per_identity", "seed": "seed", "size": "size"}
LIMITS = {"num_identities": (1, 2**31), "images_per_identity": (1, 2**31), "seed": (0, 2**63), "size": (16, 1025)}


@cache
def _keep_freed_memory() -> None:
    """Frees one large block: glibc then recycles blocks up to that size instead of mapping each temporary array anew.

    The page faults of the first few hundred images otherwise cost half as much again as drawing them.
    """
    block = np.empty(24 << 20, np.uint8)
    del block


@dataclass(frozen=True)
class SyntheticFaces:
    """A data set of drawn faces; image i shows identity i // images_per_identity.

    Attributes:
        num_identities: number of people, 1 to 2**31 - 1.
        images_per_identity: images of each, 1 to 2**31 - 1.
        seed: 0 to 2**63 - 1; another seed gives other people.
        size: side of the square pictures in pixels, 16 to 1024.

    Raises:
        ValueError: on creation, where a number is out of its range.
    """

    num_identities: int
    images_per_identity: int
    seed: int = 0
    size: int = 112

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (low, stop) = getattr(self, field.name), LIMITS[field.name]
            if not low <= value < stop:
                raise ValueError(f"{field.name}={value}: must be from {low} to {stop - 1}")

    @classmethod
    def parse(cls, text: str) -> SyntheticFaces:
        """Reads "ids=500,images=20", optionally with ",seed=0" and ",size=112", in any order.

        Raises:
            ValueError: for an unknown, repeated, missing or malformed setting; the message shows the text.
        """
        usage = f"{text!r}: expected ids=COUNT,images=COUNT[,seed=NUMBER][,size=PIXELS]"
        settings: dict[str, int] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in NAMES:
                raise ValueError(f"{usage}; {part.strip()!r} is not one of {', '.join(NAMES)}")
            if NAMES[name] in settings:
                raise ValueError(f"{usage}; {name} is given twice")
            if not (value.isascii() and value.isdigit()):
                raise ValueError(f"{usage}; {name} needs a whole number, not {value!r}")
            settings[NAMES[name]] = int(value)
        missing = [name for name in ("ids", "images") if NAMES[name] not in settings]
        if missing:
            raise ValueError(f"{usage}; {' and '.join(missing)} missing")
        return cls(**settings)

    def __len__(self) -> int:
        return self.num_identities * self.images_per_identity

    def identities(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Identity of each image: indices (N,) -> int64 (N,).

        Raises:
            IndexError: where an index is not in 0 to len - 1.
        """
        return self._checked(indices) // self.images_per_identity

    def render(self, indices: ArrayLike) -> NDArray[np.uint8]:
        """Draws images: indices (N,) -> uint8 (N, size, size, 3) RGB. Each depends on its own index alone.

        Raises:
            IndexError: where an index is not in 0 to len - 1.
        """
        wanted = self._checked(indices)
        _keep_freed_memory()
        pictures = np.empty((len(wanted), self.size, self.size, 3), np.uint8)
        for start in range(0, len(wanted), BLOCK):
            block = wanted[start : start + BLOCK]
            params = appearance(self.seed, block // self.images_per_identity) | circumstances(self.seed, block)
            # like with like: a scene skips beards and glasses when nobody in it has them
            order = np.lexsort((params["moustache"].ravel(), params["glasses"].ravel()))
            for first in range(0, len(block), CHUNK):
                chosen = order[first : first + CHUNK]
                scene = Scene(self.size, {name: values[..., chosen, :, :] for name, values in params.items()})
                pictures[start + chosen] = _to_pixels(scene.draw())
        return pictures

    def _checked(self, indices: ArrayLike) -> NDArray[np.int64]:
        wanted = np.asarray(indices)
        if wanted.size == 0:
            wanted = wanted.astype(np.int64)
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
            raise IndexError(f"indices: need whole numbers of shape (N,), not {wanted.dtype} {wanted.shape}")
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if outside.size:
            raise IndexError(f"image {outside[0]}: the data set holds images 0 to {len(self) - 1}")
        return wanted.astype(np.int64)


def _to_pixels(painted: Floats) -> NDArray[np.uint8]:
    """Rounds (3, N, size, size) in [0, 1] to uint8 (N, size, size, 3)."""
    pixels = np.empty((*painted.shape[1:], 3), np.uint8)
    for channel, plane in enumerate(np.clip(painted * 255 + 0.5, 0, 255)):
        pixels[..., channel] = plane  # the cast cuts off the fraction
    return pixels
