"""The drawing behind `facemae.synthetic`: one chunk of faces, painted layer by layer from their parameters.

Everything here is addition, multiplication, division, comparison and square root on float32, and table look-ups: operations
that IEEE 754 rounds in one way only. An image therefore does not depend on its neighbours in the batch nor on the machine.
Per-pixel `exp` or `sin` would be slower, and their last bit depends on the vector width.

Units are pixels of the 112 x 112 template whatever the size drawn, measured from the point between the eyes (x to the
right, y down), so the eyes are near (-17.6, 0) and (17.6, 0), the nose near (0, 20) and the mouth near (0, 41).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Params = dict[str, Floats]

TEMPLATE = 112
CENTRE_X, CENTRE_Y = 55.9, 51.6  # the point between the eyes in the ArcFace template
EYE_X = 17.6  # half the distance of the template's eyes
TABLE = 128  # side of the noise tables, a power of two so that the look-up wraps by a bit mask
SIDES = np.array([-1, 1], np.float32).reshape(2, 1, 1, 1)


@dataclass
class Patch:
    """A rectangle of the picture: its colours and, for every pixel, where it lies on the face.

    Attributes:
        colour: float32 (3, N, h, w), 1.0 is white; (3, 2, N, h, w) for a pair of mirrored rectangles.
        x: float32 (N, h, w) face coordinate; in a pair (2, N, h, w), growing outwards on both sides.
        y: float32, like x.
    """

    colour: Floats
    x: Floats
    y: Floats

    def paint(self, mask: Floats, colour: Floats) -> None:
        """Blends colour (3, N, 1, 1) or (3, N, h, w) over the patch where mask, in [0, 1], is above zero."""
        layer = colour[:, None] if self.colour.ndim == 5 else colour
        difference = layer - self.colour
        difference *= mask
        self.colour += difference

    def darken(self, mask: Floats) -> None:
        """Takes the share mask of the light away."""
        self.colour *= 1 - mask


def clamp(values: Floats) -> Floats:
    """Limits values to [0, 1]."""
    return np.clip(values, 0, 1)


def positive(values: Floats) -> Floats:
    """Sets what is below zero to zero (np.clip is four times as fast as np.maximum with a scalar)."""
    return np.clip(values, 0, None)


def inside(distance: Floats, softness: float = 1.0) -> Floats:
    """Antialiased mask of the points whose signed distance in pixels is negative."""
    return clamp(0.5 - distance * (1 / softness))


def bump(squared_radius: Floats) -> Floats:
    """Smooth blob: 1 in the middle, 0 from radius 1 on."""
    falloff = positive(1 - squared_radius)
    return falloff * falloff


def mix(first: Any, second: Any, share: Any) -> Floats:
    """Linear interpolation."""
    return first + (second - first) * share


def rgb(red: float, green: float, blue: float) -> Floats:
    """A constant colour as (3, 1, 1, 1)."""
    return np.array([red, green, blue], np.float32).reshape(3, 1, 1, 1)


@lru_cache(maxsize=1)
def noise_tables() -> tuple[Floats, Floats]:
    """Fixed noise: (smooth, white), each float32 (TABLE ** 2,), mean about 0 and standard deviation about 1."""
    cells = np.arange(TABLE * TABLE, dtype=np.uint64)
    cells = (cells + 1) * np.uint64(0x9E3779B97F4A7C15)
    total = np.zeros(TABLE * TABLE, np.float32)
    for _ in range(4):  # a sum of four uniform numbers is close enough to a normal one
        cells ^= cells >> np.uint64(29)
        cells *= np.uint64(0xBF58476D1CE4E5B9)
        cells ^= cells >> np.uint64(32)
        total += (cells >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    white = (total - 2) * np.float32(1.732)
    smooth = white.reshape(TABLE, TABLE)
    for axis in (0, 0, 1, 1):
        smooth = (np.roll(smooth, 1, axis) + smooth + np.roll(smooth, -1, axis)) / 3
    return (smooth * np.float32(4.4)).ravel(), white


def texture(x: Floats, y: Floats) -> Floats:
    """Smooth noise at table coordinates, about four cells a wave: float32 of the shape of x and y together."""
    column = x.astype(np.int32) & (TABLE - 1)
    row = (y.astype(np.int32) & (TABLE - 1)) * TABLE
    return np.take(noise_tables()[0], column + row)


def face_grid(size: int, p: Params) -> tuple[Floats, Floats]:
    """Where each pixel lies on the face, after shift, scale, roll, yaw and pitch: two float32 (N, size, size).

    Yaw and pitch are the second-order terms of turning a sphere: the eyes stay, as alignment would keep them, the middle of
    the face moves against the outline, and the far side shrinks.
    """
    line = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(TEMPLATE / size) - np.float32(0.5)
    across = (line - np.float32(CENTRE_X))[None, None, :] + p["shift_x"]
    down = (line - np.float32(CENTRE_Y))[None, :, None] + p["shift_y"]
    half = p["roll"] * p["roll"]  # the tangent of half the angle gives an exact rotation without a sine
    cosine, sine = (1 - half) / (1 + half) * p["scale"], 2 * p["roll"] / (1 + half) * p["scale"]
    x = across * cosine + (down - 20) * sine
    y = (down - 20) * cosine - across * sine
    x += (x * x - EYE_X**2) * (p["yaw"] / 80)
    y += (y * y - 400) * (p["pitch"] / 90)
    return x, y + 20


class Scene:
    """One chunk of faces being painted.

    Args:
        size: side of the picture in pixels.
        params: name -> float32 (N, 1, 1), or (3, N, 1, 1) for colours; see `facemae.synthetic` for names and ranges.
    """

    def __init__(self, size: int, params: Params) -> None:
        self.size, self.p = size, params
        x, y = face_grid(size, params)
        self.picture = Patch(np.empty((3, *x.shape), np.float32), x, y)
        self._outline()
        self._strands()

    def draw(self) -> Floats:
        """Paints all layers, back to front: float32 (3, N, size, size), mostly in [0, 1]."""
        self._background()
        self._back_hair()
        self._body()
        self._ears()
        self._head()
        self._marks()
        self._beard()
        self._nose()
        self._mouth()
        self._eyes()
        self._front_hair()
        self._glasses()
        self._light()
        self._camera()
        return self.picture.colour

    def _cut(self, left: float, top: float, right: float, bottom: float) -> tuple[Patch, tuple[slice, slice]]:
        """Contiguous copy of a rectangle in template units, and its rows and columns for `_put`."""
        scale = self.size / TEMPLATE
        edges = [min(max(round((edge + centre) * scale), 0), self.size) for edge, centre in
                 ((top, CENTRE_Y), (bottom, CENTRE_Y), (left, CENTRE_X), (right, CENTRE_X))]  # fmt: skip
        area = slice(edges[0], edges[1]), slice(edges[2], edges[3])
        full = self.picture
        return Patch(*(np.ascontiguousarray(part[..., area[0], area[1]]) for part in (full.colour, full.x, full.y))), area

    def _put(self, patch: Patch, area: tuple[slice, slice]) -> None:
        self.picture.colour[..., area[0], area[1]] = patch.colour

    def _cut_pair(self, inner: float, top: float, outer: float, bottom: float) -> tuple[Patch, list[Any]]:
        """The rectangle right of the middle and its mirror image, stacked, so that both sides are painted at once."""
        left, left_area = self._cut(-outer, top, -inner, bottom)
        right, right_area = self._cut(inner, top, outer, bottom)
        width = min(left.x.shape[-1], right.x.shape[-1])
        areas = [(left_area[0], slice(left_area[1].stop - width, left_area[1].stop)),
                 (right_area[0], slice(right_area[1].start, right_area[1].start + width))]  # fmt: skip
        colour = np.stack([left.colour[..., ::-1][..., :width], right.colour[..., :width]], axis=1)
        x = np.stack([-left.x[..., ::-1][..., :width], right.x[..., :width]])
        y = np.stack([left.y[..., ::-1][..., :width], right.y[..., :width]])
        return Patch(colour, x, y), areas

    def _put_pair(self, pair: Patch, areas: list[Any]) -> None:
        self.picture.colour[..., areas[0][0], areas[0][1]] = pair.colour[:, 0, ..., ::-1]
        self.picture.colour[..., areas[1][0], areas[1][1]] = pair.colour[:, 1]

    def _outline(self) -> None:
        """Head: an ellipse above, a tapered superellipse below. `head` is below zero inside."""
        p, x, y = self.p, self.picture.x, self.picture.y
        below = positive(y - p["widest"]) / (p["chin"] - p["widest"])
        above = np.clip(y - p["widest"], None, 0) / 58
        self.across = x / (p["width"] * (1 - p["taper"] * np.clip(below, None, 1.2)))
        self.down = above + below
        squared = below * below
        self.head = self.across * self.across + above * above + mix(squared, squared * squared, p["square"]) - 1
        self.head_mask = inside(self.head * 22)

    def _strands(self) -> None:
        """Hair texture: noise that runs from the crown outwards; curls let it vary along the strand too."""
        p, x, y = self.p, self.picture.x, self.picture.y
        along = y + 82
        angle = (x - p["part"]) / np.clip(along, 12, None) * p["strand"]
        self.strands = texture(angle + along * p["curl"] + 64, along * (p["curl"] + 0.04) + p["lock"])

    def _background(self) -> None:
        """Out-of-focus shapes: two colours blended by random heights on a coarse grid."""
        p, size = self.p, self.size
        heights = p["heights"]  # (N, 6, 6)
        place = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(5 / size)
        cell = np.clip(place.astype(np.int64), 0, 4)
        weight = place - cell
        weight = weight * weight * (3 - 2 * weight)
        rows = mix(heights[:, cell], heights[:, cell + 1], weight[None, :, None])
        field = mix(rows[:, :, cell], rows[:, :, cell + 1], weight)
        field = clamp((field - 0.5) * p["contrast"] + 0.5)
        np.multiply(p["back_two"] - p["back_one"], field, out=self.picture.colour)
        self.picture.colour += p["back_one"]

    def _back_hair(self) -> None:
        p, x, y = self.p, self.picture.x, self.picture.y
        side = x / (p["width"] + p["volume"])
        above = np.clip(y - p["widest"], None, 0) / (56 + p["volume"])
        below = positive(y - p["widest"]) / p["length"]
        below *= below
        shape = side * side + above * above + below * below - 1 + self.strands * p["frizz"]
        self.cap = inside(shape * 22, 1.5)
        self.hair_mask = self.cap * p["hair"]
        self.picture.paint(self.hair_mask, self._hair_colour(x, y) * 0.62)

    def _hair_colour(self, x: Floats, y: Floats) -> Floats:
        """Strands and a band of shine across the top, (3, N, size, size)."""
        shine_at = (y + 40 - x * x * 0.012) / 9
        tone = 1 + self.strands * self.p["streaks"] + bump(shine_at * shine_at) * self.p["shine"]
        return self.p["hair_colour"] * tone

    def _body(self) -> None:
        """Neck and clothes: what shows of them below the jaw."""
        p = self.p
        patch, area = self._cut(-56, 34, 57, 61)
        patch.paint(inside(abs(patch.x) - p["neck"]), p["skin"] * 0.66)
        shoulder = p["collar"] + abs(patch.x) * 0.12 - patch.y
        patch.paint(inside(shoulder) * inside(p["neck"] - 6 - abs(patch.x)), p["clothes"])
        self._put(patch, area)

    def _ears(self) -> None:
        p = self.p
        pair, areas = self._cut_pair(30, -16, 57, 32)
        x, y = (pair.x - p["width"] - p["ear_out"]) / 5.5, (pair.y - 6) / p["ear"]
        radius = x * x + y * y
        shown = 1 - p["ears_covered"]
        pair.paint(inside((radius - 1) * 3.2) * shown, p["skin"] * 0.93)
        pair.paint(bump(radius * 2.2) * 0.6 * shown, p["skin"] * rgb(0.62, 0.5, 0.48))
        self._put_pair(pair, areas)

    def _head(self) -> None:
        p = self.p
        self.picture.paint(self.head_mask, p["skin"])
        rim = clamp(1 + self.head * 3.2)
        self.picture.darken(rim * rim * self.head_mask * 0.16)

    def _marks(self) -> None:
        """Blush, freckles, moles and the lines of age."""
        p = self.p
        patch, area = self._cut(-42, -2, 43, 56)
        x, y = patch.x, patch.y
        cheek_x, cheek_y = (abs(x) - 25) / 15, (y - 21) / 12
        cheek = bump(cheek_x * cheek_x + cheek_y * cheek_y)
        patch.paint(cheek * p["blush"], p["skin"] * rgb(0.98, 0.68, 0.62))
        spread_x, spread_y = x / 36, (y - 16) / 15
        spots = clamp(texture(x * 2 + p["spot_x"], y * 2 + p["spot_y"]) * 1.6 - 1.3)
        patch.paint(spots * bump(spread_x * spread_x + spread_y * spread_y) * p["freckles"], p["skin"] * rgb(0.66, 0.5, 0.4))
        for name in ("mole", "mark"):
            dx, dy = x - p[f"{name}_x"], y - p[f"{name}_y"]
            patch.paint(inside(dx * dx + dy * dy - p[f"{name}_r"], 2), p["skin"] * rgb(0.36, 0.26, 0.24))
        fold = abs(abs(x - p["yaw"] * 5) - 13 - (y - 24) * 0.42 - p["smile"] * 1.5)
        patch.darken(clamp(1.6 - fold) * bump(((y - 29) / 9) * ((y - 29) / 9)) * p["folds"])
        self._put(patch, area)

    def _beard(self) -> None:
        p = self.p
        patch, area = self._cut(-52, 4, 53, 61)
        x, y = patch.x - p["yaw"] * 4, patch.y
        edge_x = patch.x / p["width"]
        edge_x *= edge_x
        jaw = clamp((y - p["mouth_y"] - 3 + edge_x * 44) * 0.22)
        lip_y = (y - p["mouth_y"] + 5 - x * x * 0.012) / 4.5
        lip_x = x / (p["mouth"] + 4)
        lip_x *= lip_x
        moustache = clamp(2.4 * bump(lip_y * lip_y * 0.6 + lip_x * lip_x * 0.6))
        grain = texture(x * 2.2 + 64, y * 1.3 + p["lock"])
        amount = np.maximum(jaw * p["beard"], moustache * p["moustache"]) * clamp(0.86 + grain * 0.16)
        patch.paint(amount, p["hair_colour"] * 0.75)
        keep = inside(self.head[..., area[0], area[1]] * 22)  # the beard ends where the head does
        patch.paint(1 - keep, self.picture.colour[..., area[0], area[1]])
        self._put(patch, area)

    def _nose(self) -> None:
        p = self.p
        patch, area = self._cut(-26, -10, 27, 36)
        x, y = patch.x - p["yaw"] * 9, patch.y - p["pitch"] * 6 - p["nose_y"]  # the tip stands out, so it moves most
        ramp = clamp((y + 26) * 0.045)
        across = x / (p["bridge"] + (p["nose"] - p["bridge"]) * ramp * ramp)
        ridge = positive(1 - across * across * 0.45) * clamp((7 - y) * 0.25) * clamp((y + 30) * 0.1)
        patch.darken(ridge * (across * p["light_x"] * -0.2 + across * across * 0.11))
        tip_x, tip_y = x / p["nose"], (y - 5) / 4
        patch.darken(bump(tip_x * tip_x * 0.8 + tip_y * tip_y) * 0.3)
        wing = abs(x) - p["nose"] * 0.72
        wing_r = wing * wing + (y + 0.5) * (y + 0.5)
        crease = clamp(1.3 - abs(wing_r - 14) * 0.13) * inside(-wing - 1, 2)
        patch.paint(crease * 0.42, p["skin"] * rgb(0.55, 0.38, 0.34))
        hole_x, hole_y = (abs(x) - p["nose"] * 0.45) / 2.7, (y - 2.6 + abs(x) * 0.1) / 1.5
        patch.paint(inside((hole_x * hole_x + hole_y * hole_y - 1) * 1.1) * 0.8, p["skin"] * rgb(0.3, 0.18, 0.16))
        glow_x, glow_y = (x + p["light_x"] * -2) / 3.6, (y + 3) / 3.6
        line_y = (y + 14) / 14
        glow = bump(glow_x * glow_x + glow_y * glow_y) + bump(glow_x * glow_x * 3 + line_y * line_y) * 0.45
        patch.paint(glow * 0.3, mix(p["skin"], 1, 0.55))
        self._put(patch, area)

    def _mouth(self) -> None:
        p = self.p
        patch, area = self._cut(-32, 24, 33, 61)
        x = patch.x - p["yaw"] * 4
        across = x / (p["mouth"] + p["smile"] * 2.5)
        squared = across * across
        y = patch.y - p["mouth_y"] - p["pitch"] * 3 - p["smile"] * (1.5 - squared * 4.2)
        curve = positive(1 - squared)
        gap = p["open"] * curve * 5 + 0.35
        bow = 1 - p["bow"] * positive(1 - squared * 14)
        top, bottom = y + gap * 0.5 + p["upper"] * curve * bow, y - gap - p["lower"] * curve * (0.6 + 0.4 * curve)
        ends = inside((squared - 1) * 8, 2)
        patch.darken(bump(squared + ((bottom - 3) / 4) * ((bottom - 3) / 4)) * 0.2)
        patch.paint(inside(np.maximum(-top, bottom), 1.3) * ends * p["lipstick"], p["lips"])
        patch.paint(inside(np.maximum(-top, y), 1.3) * ends * 0.3, p["lips"] * 0.62)
        hole = np.maximum(-y - gap * 0.5, y - gap)
        corners = inside((squared - 1.1) * 8, 2)
        patch.paint(inside(hole, 1.1) * corners, p["lips"] * rgb(0.32, 0.2, 0.2))
        teeth = np.maximum(hole + 0.7, y + gap * 0.5 - 3.6)
        patch.paint(inside(teeth) * inside((squared - 0.62) * 8, 3), rgb(0.95, 0.93, 0.89))
        shine_y = (bottom + p["lower"] * 0.55) / 1.6
        patch.paint(bump(squared * 4 + shine_y * shine_y) * 0.35, mix(p["lips"], 1, 0.5))
        self._put(patch, area)

    def _eyes(self) -> None:
        p = self.p
        pair, areas = self._cut_pair(0, -30, 48, 20)
        x, y = pair.x - p["eye_x"], pair.y - p["eye_y"]
        socket_y = (y + 3) / 11
        pair.darken(bump((x / 16) * (x / 16) + socket_y * socket_y) * p["socket"])
        across = x / p["eye_width"]
        curve = positive(1 - across * across)
        y = y + x * p["tilt"]
        upper = -p["eye_height"] * p["lids"] * curve * (1 - across * p["almond"])
        lower = p["eye_height"] * 0.62 * curve * mix(1, p["lids"], 0.5)
        white = inside(np.maximum(upper - y, y - lower), 1.1)
        pair.paint(white, rgb(0.95, 0.94, 0.93))
        self._iris(pair, x, y, white)
        pair.darken(white * clamp(1 - (y - upper) * 0.35) * 0.45)  # the shadow of the upper lid
        reach = inside((across * across - 1.12) * 5, 2)
        lash = p["lash"] * (0.75 + clamp(across) * 0.6)
        pair.paint(inside(abs(y - upper + lash * 0.5) - lash, 1.2) * reach * 0.92, p["lash_colour"])
        pair.paint(inside(abs(y - lower) - 0.25, 1.2) * reach * 0.4, p["skin"] * rgb(0.45, 0.32, 0.3))
        crease = abs(y - upper * 1.1 + p["crease"] - across * across * 1.2)
        pair.paint(clamp(1.1 - crease) * reach * 0.4, p["skin"] * rgb(0.5, 0.36, 0.33))
        bag = abs(y - lower - 3.6 + across * across * 2)
        pair.darken(clamp(1.4 - bag) * reach * p["folds"] * 0.8)
        self._brows(pair)
        self._put_pair(pair, areas)

    def _iris(self, pair: Patch, x: Floats, y: Floats, white: Floats) -> None:
        p = self.p
        dx, dy = x - p["gaze_x"] * SIDES, y - p["gaze_y"] + 0.4
        radius = np.sqrt(dx * dx + dy * dy)
        pair.paint(inside(radius - p["iris_r"]) * white, p["iris"] * 0.55)
        disc = inside(radius - p["iris_r"] + 1.1, 1.6) * white
        pair.paint(disc, p["iris"])
        pair.paint(disc * clamp(dy * 0.3), p["iris"] * 1.35)
        pair.paint(inside(radius - p["pupil"]) * white, rgb(0.03, 0.03, 0.04))
        dx, dy = dx - p["light_x"] * SIDES * 1.6, dy + 1.5
        pair.paint(inside((dx * dx + dy * dy - 1.1) * 0.6) * white * 0.9, rgb(1, 1, 1))

    def _brows(self, pair: Patch) -> None:
        p = self.p
        across = (pair.x - p["eye_x"] - 0.5) / p["brow_length"]
        squared = across * across
        line = p["brow_y"] - p["raise"] * (3 + across * p["frown"]) - p["brow_tilt"] * across + p["brow_arch"] * squared
        thickness = p["brow"] * clamp(1.6 - squared * 1.6) * (1 - 0.42 * clamp(across + 0.1))
        grain = texture(pair.x * 2 + pair.y + 64, pair.y * 1.5 + p["lock"])
        amount = inside(abs(pair.y - line) - thickness, 1.5) * inside((squared - 1) * 8, 2)
        pair.paint(amount * clamp(0.8 + grain * 0.12), p["brow_colour"])

    def _front_hair(self) -> None:
        """The hair line over the forehead and down the temples, and the shadow it throws on the skin."""
        p, x, y = self.p, self.picture.x, self.picture.y
        across = x / p["width"]
        squared = across * across
        fourth = squared * squared
        off_part = (x - p["part"]) / 13
        temple = abs(across) - 0.55
        line = p["hairline"] + squared * p["arch"] + fourth * fourth * p["sides"] + across * p["slant"]
        line -= positive(1 - off_part * off_part) * p["parting"] + positive(1 - temple * temple * 16) * p["recede"]
        line += self.strands * p["jag"]
        depth = y - line
        patch_mask = inside(depth, 2) * self.cap * p["hair"]
        shadow = clamp(1 - depth * 0.16) * self.head_mask * p["hair"]
        self.picture.darken(shadow * 0.34)
        edge = clamp(1.08 + depth * 0.012)  # strands dip into shade near the crown
        self.picture.paint(patch_mask, self._hair_colour(x, y) * edge)
        self.hair_mask = np.maximum(self.hair_mask, patch_mask)

    def _glasses(self) -> None:
        p = self.p
        pair, areas = self._cut_pair(0, -18, 56, 22)
        x, y = pair.x - p["eye_x"] + 0.6, pair.y - 1.5
        side, height = (x / p["lens"]), y / (p["lens"] * p["lens_high"])
        side, height = side * side, height * height
        shape = mix(side + height, side * side + height * height, p["lens_square"]) - 1
        distance = shape * p["lens"] / (2 + 2 * p["lens_square"])
        pair.paint(inside(distance) * p["glasses"] * 0.12, p["glass"])
        glare = clamp(2 - abs(x + y * 0.8 + 4) * 0.8) * inside(distance + 1.5)
        pair.paint(glare * p["glasses"] * p["glare"], rgb(1, 1, 1))
        rim = inside(abs(distance) - p["rim"], 1.2)
        bar = inside(abs(y + 3) - p["rim"], 1.2) * inside(-distance)
        keep = inside(pair.x - p["width"] - 2)
        pair.paint(np.maximum(rim, bar) * keep * p["glasses"], p["frame"])
        self._put_pair(pair, areas)

    def _light(self) -> None:
        """One soft lamp on a pseudo normal map of the head, plus tinted ambient light."""
        p = self.p
        normal_x, normal_y = np.clip(self.across, -1.1, 1.1) * 0.75, np.clip(self.down, -1, 1.1) * 0.6
        normal_z = np.sqrt(np.clip(1 - normal_x * normal_x - normal_y * normal_y, 0.04, None))
        lambert = positive(normal_x * p["light_x"] + normal_y * p["light_y"] + normal_z * p["light_z"])
        person = np.maximum(self.head_mask, self.hair_mask)
        lambert = mix(p["light_z"] * 0.8, lambert, person)
        spot_x, spot_y = self.across - p["light_x"] * 0.45, self.down - p["light_y"] * 0.5 + 0.1
        gloss = bump((spot_x * spot_x + spot_y * spot_y) * 3.2) * self.head_mask * p["gloss"]
        self.picture.colour *= p["ambient"] + p["lamp"] * lambert
        self.picture.colour += gloss

    def _camera(self) -> None:
        """Focus, exposure with a soft shoulder, and sensor noise."""
        p, colour = self.p, self.picture.colour
        middle = colour[..., 1:-1]
        middle += (colour[..., :-2] + colour[..., 2:] - 2 * middle) * p["blur"]
        middle = colour[..., 1:-1, :]
        middle += (colour[..., :-2, :] + colour[..., 2:, :] - 2 * middle) * p["blur"]
        colour *= p["exposure"]
        colour *= 1.12 - 0.16 * np.clip(colour, 0, 1.4)
        colour += self._grain() * p["noise"]

    def _grain(self) -> Floats:
        """Sensor noise (3, N, size, size): for each image and channel the fixed table, read from another place."""
        wanted = self.size * self.size
        repeated = np.resize(noise_tables()[1], wanted + TABLE * TABLE)
        starts = self.p["grain"].astype(np.int64)  # (3, N)
        views = np.lib.stride_tricks.sliding_window_view(repeated, wanted)
        return views[starts].reshape(*starts.shape, self.size, self.size)
