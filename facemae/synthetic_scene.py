"""One chunk of synthetic faces: composes background, hair, head and features, lights them and takes the picture."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from facemae import synthetic_features as features
from facemae.synthetic_paint import (
    TABLE,
    Floats,
    Params,
    Patch,
    bump,
    clamp,
    inside,
    mix,
    noise_tables,
    positive,
    square,
    texture,
)

TEMPLATE = 112
CENTRE_X, CENTRE_Y = 55.9, 51.6  # the point between the eyes in the ArcFace template
EYE_X = 17.6  # half the distance between the template's eyes
BEARD = (-52, 4, 53, 61)  # left, top, right, bottom of its patch
Area = tuple[slice, slice]
Feature = Callable[[Patch, Params], None]


def face_grid(size: int, p: Params) -> tuple[Floats, Floats]:
    """Where each pixel lies on the face, after shift, scale, roll, yaw and pitch: two float32 (N, size, size).

    Yaw and pitch are the second-order terms of turning a sphere: the eyes stay, as alignment would keep them, the middle
    of the face moves against the outline, and the far side shrinks.
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


def _dome(height: Floats) -> Floats:
    """The top of a skull, fuller than a circle's: 0 at height 0, 1 at height 1."""
    squared = height * height
    return squared * (0.6 + 0.4 * squared)


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
        self._paint(features.body, -57, 34, 57, 61)
        self._paint_pair(features.ears, 30, -16, 57, 32)
        self._head()
        self._paint(features.marks, -42, 0, 43, 54)
        if (p["beard"] + p["moustache"]).any():  # painting with an empty mask changes no bit, so it can be skipped
            self._paint(self._beard, *BEARD)
        self._paint(features.nose, -26, -10, 27, 36)
        self._paint(features.mouth, -32, 24, 33, 61)
        self._paint_pair(features.eyes, 0, -18, 40, 16)
        self._paint_pair(features.brows, 0, -30, 40, 2)
        self._front_hair()
        if p["glasses"].any():
            self._paint_pair(features.glasses, 0, -20, 57, 22)
        self._light()
        self._camera()
        return self.picture.colour

    def _area(self, left: float, top: float, right: float, bottom: float) -> Area:
        """Rows and columns of a rectangle given in template units."""
        pixels = [round((edge + center) * self.size / TEMPLATE) for edge, center in
                  ((top, CENTRE_Y), (bottom, CENTRE_Y), (left, CENTRE_X), (right, CENTRE_X))]  # fmt: skip
        first, last, start, stop = (min(max(pixel, 0), self.size) for pixel in pixels)
        return slice(first, last), slice(start, stop)

    def _paint(self, feature: Feature, left: float, top: float, right: float, bottom: float) -> None:
        """Paints a feature on a contiguous copy of its rectangle, which stays in the cache, and puts it back."""
        whole, area = self.picture, (..., *self._area(left, top, right, bottom))
        patch = Patch(*(np.ascontiguousarray(part[area]) for part in (whole.colour, whole.x, whole.y)))
        feature(patch, self.p)
        whole.colour[area] = patch.colour

    def _paint_pair(self, feature: Feature, inner: float, top: float, outer: float, bottom: float) -> None:
        """Like `_paint` for a rectangle right of the middle and its mirror image at once."""
        rows, left = self._area(-outer, top, -inner, bottom)
        _, right = self._area(inner, top, outer, bottom)
        width = min(left.stop - left.start, right.stop - right.start)
        mirrored = (..., rows, slice(left.stop - 1, left.stop - 1 - width if left.stop > width else None, -1))
        direct = (..., rows, slice(right.start, right.start + width))
        whole = self.picture
        pair = Patch(
            np.stack([whole.colour[mirrored], whole.colour[direct]], axis=1),
            np.stack([-whole.x[mirrored], whole.x[direct]]),
            np.stack([whole.y[mirrored], whole.y[direct]]),
        )
        feature(pair, self.p)
        whole.colour[mirrored], whole.colour[direct] = pair.colour[:, 0], pair.colour[:, 1]

    def _shape_head(self) -> None:
        """Outline: an ellipse above, a tapered superellipse below. `head` is below zero inside."""
        p, x, y = self.p, self.picture.x, self.picture.y
        below = positive(y - p["widest"]) / (p["chin"] - p["widest"])
        above = np.clip(y - p["widest"], -np.inf, 0) / 58
        self.across = x / (p["width"] * (1 - p["taper"] * np.clip(below, 0, 1.2)))
        self.down = above + below
        below *= below
        self.head = square(self.across) + _dome(above) + mix(below, square(below), p["square"]) - 1
        self.head_mask = inside(self.head * 22)

    def _shape_hair(self) -> None:
        """Strands run from the crown outwards; curls let them vary along their length. `cap` is all hair may cover."""
        p, x, y = self.p, self.picture.x, self.picture.y
        along = y + 82
        angle = (x - p["part"]) / np.clip(along, 12, np.inf) * p["strand"]
        self.strands = texture(angle + along * p["curl"] + 64, along * (p["curl"] + 0.04) + p["lock"])
        side, above = x / (p["width"] + p["volume"]), np.clip(y - p["widest"], -np.inf, 0) / (56 + p["volume"])
        below = positive(y - p["widest"]) / p["length"]
        shape = square(side) + _dome(above) + square(square(below)) - 1
        self.cap = inside((shape + self.strands * p["frizz"]) * 22, 1.5)
        self.hair_mask = self.cap * p["hair"]
        shine = bump(square((y + 40 - x * x * 0.012) / 9)) * p["shine"]
        self.hair_colour = p["hair_colour"] * (1 + self.strands * p["streaks"] + shine)

    def _background(self) -> None:
        """Out-of-focus shapes: two colours blended by random heights on a coarse grid."""
        p, size = self.p, self.size
        place = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(5 / size)
        cell = np.clip(place.astype(np.intp), 0, 4)
        share = place - cell.astype(np.float32)
        share = share * share * (3 - 2 * share)
        heights = p["heights"]  # (N, 6, 6)
        wide = mix(np.take(heights, cell, axis=2), np.take(heights, cell + 1, axis=2), share)
        field = mix(np.take(wide, cell, axis=1), np.take(wide, cell + 1, axis=1), share[:, None])
        field = clamp((field - 0.5) * p["contrast"] + 0.5)
        np.multiply(p["back_two"] - p["back_one"], field, out=self.picture.colour)
        self.picture.colour += p["back_one"]

    def _head(self) -> None:
        self.picture.paint(self.head_mask, self.p["skin"])
        self.picture.darken(square(clamp(1 + self.head * 3.2)) * self.head_mask * 0.16)

    def _beard(self, patch: Patch, p: Params) -> None:
        features.beard(patch, p, self.head_mask[(..., *self._area(*BEARD))])

    def _front_hair(self) -> None:
        """The hair line over the forehead and down the temples, and the shadow it throws on the skin."""
        p, x, y = self.p, self.picture.x, self.picture.y
        across = x / p["width"]
        squared = across * across
        line = p["hairline"] + squared * p["arch"] + square(square(squared)) * p["sides"] + across * p["slant"]
        line -= positive(1 - square((x - p["part"]) / 13)) * p["parting"]
        line -= positive(1 - square(abs(across) - 0.55) * 16) * p["recede"]
        line += self.strands * p["jag"]
        depth = y - line
        mask = inside(depth, 2) * self.hair_mask
        self.picture.darken(clamp(1 - depth * 0.16) * self.head_mask * (p["hair"] * 0.34))
        self.picture.paint(mask, self.hair_colour)

    def _light(self) -> None:
        """One soft lamp on a pseudo normal map of the head plus tinted ambient light, and the exposure."""
        p = self.p
        normal_x, normal_y = np.clip(self.across, -1.1, 1.1) * 0.75, np.clip(self.down, -1, 1.1) * 0.6
        normal_z = np.sqrt(np.clip(1 - square(normal_x) - square(normal_y), 0.04, 1))
        lambert = positive(normal_x * p["light_x"] + normal_y * p["light_y"] + normal_z * p["light_z"])
        # hair scatters light and the background has no normals: they take part of the relief, or none of it
        lambert = mix(p["light_z"] * 0.8, lambert, np.maximum(self.head_mask, self.hair_mask * 0.6))
        shine = square(self.across - p["light_x"] * 0.45) + square(self.down - p["light_y"] * 0.5 + 0.1)
        self.picture.colour *= p["ambient"] * p["exposure"] + p["lamp"] * p["exposure"] * lambert
        self.picture.colour += bump(shine * 3.2) * self.head_mask * p["gloss"]

    def _camera(self) -> None:
        """Focus, a soft shoulder for the highlights, and sensor noise."""
        p, colour = self.p, self.picture.colour
        for middle, before, after in (
            (colour[..., 1:-1], colour[..., :-2], colour[..., 2:]),
            (colour[..., 1:-1, :], colour[..., :-2, :], colour[..., 2:, :]),
        ):
            middle += (before + after - 2 * middle) * p["blur"]
        colour *= 1.25 - 0.35 * np.clip(colour, 0, 1.7)
        colour += self._grain() * p["noise"]

    def _grain(self) -> Floats:
        """Sensor noise (3, N, size, size): for each image and channel the fixed table, read from another place."""
        pixels = self.size * self.size
        table = np.resize(noise_tables()[1], pixels + TABLE * TABLE)
        starts = self.p["grain"].astype(np.intp)[..., 0, 0]  # (3, N)
        grain: Floats = np.lib.stride_tricks.sliding_window_view(table, pixels)[starts]
        return grain.reshape(*starts.shape, self.size, self.size)
