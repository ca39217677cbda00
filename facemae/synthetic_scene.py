"""One chunk of synthetic faces: composes background, hair, head and features, lights them and takes the picture."""

from __future__ import annotations

import numpy as np

from facemae import synthetic_features as features
from facemae.synthetic_paint import (
    TABLE, Floats, Params, Patch, bump, clamp, inside, mix, noise_tables, positive, square, texture,
)  # fmt: skip

TEMPLATE = 112
CENTRE_X, CENTRE_Y = 55.9, 51.6  # the point between the eyes in the ArcFace template
EYE_X = 17.6  # half the distance between the template's eyes
Area = tuple[slice, slice]


def face_grid(size: int, p: Params) -> tuple[Floats, Floats]:
    """Where each pixel lies on the face, after shift, scale, roll, yaw and pitch: two float32 (N, size, size).

    Yaw and pitch are the second-order terms of turning a sphere: the eyes stay, as alignment would keep them, the middle of
    the face moves against the outline, and the far side shrinks.
    """
    line = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(TEMPLATE / size) - np.float32(0.5)
    across = line[None, None, :] - np.float32(CENTRE_X) + p["shift_x"]
    down = line[None, :, None] - np.float32(CENTRE_Y + 20) + p["shift_y"]
    half = square(p["roll"])  # the tangent of half the angle gives an exact rotation without a sine
    cosine, sine = (1 - half) / (1 + half) * p["scale"], 2 * p["roll"] / (1 + half) * p["scale"]
    x = across * cosine + down * sine
    y = down * cosine - across * sine
    x += (x * x - EYE_X**2) * (p["yaw"] / 80)
    y += (y * y - 400) * (p["pitch"] / 90)
    return x, y + 20


class Scene:
    """One chunk of faces being painted.

    Args:
        size: side of the picture in pixels.
        params: name -> float32 (N, 1, 1), or (3, N, 1, 1) for colours, as `facemae.synthetic_traits` draws them.
    """

    def __init__(self, size: int, params: Params) -> None:
        self.size, self.p = size, params
        x, y = face_grid(size, params)
        self.picture = Patch(np.empty((3, *x.shape), np.float32), x, y)
        self._shape_head()
        self._shape_hair()

    def draw(self) -> Floats:
        """Paints all layers, back to front: float32 (3, N, size, size), mostly in [0, 1]."""
        p = self.p
        self._background()
        self.picture.paint(self.hair_mask, self.hair_colour * 0.66)
        self._paint_box(features.body, -57, 34, 57, 61)
        self._paint_pair((features.ears,), 30, -16, 57, 32)
        self._head()
        self._paint_box(features.marks, -42, -2, 43, 56)
        self._paint_box(lambda patch, p: features.beard(patch, p, self._crop(self.head_mask, -52, 4, 53, 61)), -52, 4, 53, 61)
        self._paint_box(features.nose, -26, -10, 27, 36)
        self._paint_box(features.mouth, -32, 24, 33, 61)
        self._paint_pair((features.eyes, features.brows), 0, -30, 44, 20)
        self._front_hair()
        self._paint_pair((features.glasses,), 0, -18, 56, 22)
        self._light()
        self._camera()
        return self.picture.colour
