"""What a synthetic face looks like: named parameters drawn from counter hashes.

`appearance` draws what is lasting about an identity, `circumstances` what differs from image to image. The two never
share a draw, and a draw is a pure function of (seed, identity) or (seed, image).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from facemae.synthetic_paint import Floats, Params, positive, rgb

# name -> (low, high) of a uniform draw, in template pixels, shares of one or radians unless said otherwise
IDENTITY = {
    "width": (37, 46), "widest": (-4, 10), "chin": (53, 59.5), "taper": (0.08, 0.34), "square": (0, 0.9),
    "ear": (8, 13), "ear_out": (0, 3), "neck": (20, 28),
    "eye_x": (15.9, 19.2), "eye_y": (-1.2, 1.2), "eye_width": (7.8, 11), "eye_height": (3.6, 6.4), "tilt": (-0.1, 0.2),
    "almond": (-0.3, 0.3), "crease": (1.6, 4.2), "iris_r": (3.9, 4.9), "socket": (0.02, 0.22),
    "brow_y": (-15.5, -10.5), "brow_length": (10, 14), "brow_arch": (0.5, 5), "brow_tilt": (-1.5, 2.5),
    "nose": (6.5, 11.5), "nose_y": (17.5, 22.5), "bridge": (2.5, 5),
    "mouth": (11.5, 16.5), "mouth_y": (38, 43), "upper": (1.4, 4), "lower": (2.2, 5.2), "bow": (0, 0.55),
    "hairline": (-36, -25), "arch": (-4, 12), "slant": (-5, 5), "part": (-22, 22), "volume": (2, 12), "lock": (0, 100),
    "shine": (0.1, 0.7), "mole_x": (-30, 30), "mole_y": (4, 50), "mark_x": (-30, 30), "mark_y": (4, 50),
    "spot_x": (64, 192), "spot_y": (64, 192), "lens": (12, 15.2), "lens_high": (0.66, 1), "rim": (0.4, 1.1),
}  # fmt: skip
NUISANCE = {
    "shift_x": (-2, 2), "shift_y": (-2, 2), "scale": (0.96, 1.05), "roll": (-0.05, 0.05), "yaw": (-0.34, 0.34),
    "pitch": (-0.22, 0.22), "smile": (-0.2, 1), "raise": (-0.4, 1), "frown": (-0.6, 0.6), "lids": (0.6, 1.12),
    "gaze_x": (-2, 2), "gaze_y": (-0.8, 0.8), "pupil": (1.6, 2.3), "light_x": (-0.85, 0.85), "light_y": (-0.75, 0.15),
    "collar": (47, 58), "contrast": (0.5, 3), "glare": (0, 0.5), "gloss": (0, 0.16), "blur": (0, 0.2),
    "noise": (0.003, 0.018), "exposure": (0.75, 1.15),
}  # fmt: skip
SKIN = ((0.98, 0.84, 0.74), (0.95, 0.77, 0.65), (0.88, 0.68, 0.53), (0.75, 0.54, 0.39), (0.57, 0.39, 0.28),
        (0.41, 0.28, 0.2))  # fmt: skip
HAIR = ((0.1, 0.09, 0.1), (0.2, 0.13, 0.1), (0.33, 0.21, 0.14), (0.46, 0.26, 0.15), (0.55, 0.25, 0.12),
        (0.62, 0.48, 0.3), (0.84, 0.69, 0.42))  # fmt: skip
GREY = rgb(0.74, 0.73, 0.72)
IRIS = ((0.2, 0.12, 0.08), (0.36, 0.21, 0.1), (0.48, 0.36, 0.16), (0.32, 0.46, 0.28), (0.24, 0.46, 0.66),
        (0.46, 0.54, 0.58))  # fmt: skip
FRAMES = ((0.08, 0.08, 0.1), (0.3, 0.17, 0.1), (0.62, 0.5, 0.25), (0.45, 0.1, 0.14), (0.12, 0.2, 0.38),
          (0.6, 0.62, 0.65))  # fmt: skip


def mix_bits(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Draws:
    """Named uniform draws for each of N things: a pure function of (seed, stream, index, order of the draw)."""

    def __init__(self, seed: int, stream: int, indices: NDArray[np.int64]) -> None:
        key = mix_bits(np.array([seed, stream], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        self.state = mix_bits(indices.astype(np.uint64) ^ key[0]) ^ key[1]

    def uniform(self, low: float = 0, high: float = 1, planes: int = 0) -> Floats:
        """Next draw in [low, high): float32 (N, 1, 1), or (planes, N, 1, 1) independent ones."""
        drawn = np.stack([self._next() for _ in range(max(planes, 1))])
        drawn = drawn * np.float32(high - low) + np.float32(low)
        return drawn[..., None, None] if planes else drawn[0][:, None, None]

    def table(self, ranges: dict[str, tuple[float, float]]) -> Params:
        """One uniform draw for each named range."""
        return {name: self.uniform(*limits) for name, limits in ranges.items()}

    def _next(self) -> Floats:
        self.state = self.state + np.uint64(0x9E3779B97F4A7C15)
        return (mix_bits(self.state) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def blend(palette: tuple[tuple[float, float, float], ...], place: Floats) -> Floats:
    """Colour (3, N, 1, 1) at place in [0, 1] (N, 1, 1) along a palette."""
    colours = np.array(palette, np.float32).T[:, :, None, None]
    position = np.clip(place, 0, 1)[:, 0, 0] * np.float32(len(palette) - 1)
    first = np.clip(position.astype(np.int64), 0, len(palette) - 2)
    share = (position - first.astype(np.float32))[:, None, None]
    low, high = colours[:, first, 0], colours[:, first + 1, 0]
    return low[..., None] * (1 - share) + high[..., None] * share


def pick(palette: tuple[tuple[float, float, float], ...], place: Floats) -> Floats:
    """Colour (3, N, 1, 1) of the palette entry at place in [0, 1) (N, 1, 1), without blending."""
    chosen = (place[:, 0, 0] * np.float32(len(palette))).astype(np.int64)
    return np.array(palette, np.float32).T[:, chosen, None, None]


def chance(draw: Floats, share: Floats | float) -> Floats:
    """1.0 where a uniform draw falls below share, else 0.0."""
    return (draw < share).astype(np.float32)


def appearance(seed: int, identities: NDArray[np.int64]) -> Params:
    """What is lasting about each identity: parameters of `Scene`, float32 (N, 1, 1) or (3, N, 1, 1)."""
    draws = Draws(seed, 1, identities)
    p = draws.table(IDENTITY)
    uniform = draws.uniform
    rugged, age = uniform(), uniform()  # two threads that run through many parameters, so that faces look of a piece
    p["square"] = p["square"] * (0.3 + 0.7 * rugged)
    p["brow"] = 0.7 + 1.1 * rugged + uniform(0, 0.7)
    p["folds"] = positive(age - 0.35) * 0.5 + uniform(0, 0.05)
    p["lash"] = 0.55 + 0.55 * (1 - rugged) * uniform()
    _paint_colours(p, draws, rugged, age)
    _style_hair(p, draws, rugged)
    _add_marks(p, draws, rugged)
    return p


def _paint_colours(p: Params, draws: Draws, rugged: Floats, age: Floats) -> None:
    uniform = draws.uniform
    depth = uniform()
    p["skin"] = blend(SKIN, depth) * (1 + uniform(-0.03, 0.03, planes=3))
    hair = blend(HAIR, uniform() * (1.15 - depth)) * (1 + uniform(-0.06, 0.06, planes=3))
    grey = chance(uniform(), 0.9) * np.clip((age - 0.82) * 5.5, 0, 0.95)
    p["hair_colour"] = hair * (1 - grey) + GREY * grey
    p["brow_colour"] = p["hair_colour"] * 0.7
    p["lash_colour"] = p["hair_colour"] * 0.3
    p["iris"] = pick(IRIS, uniform() * (1 - 0.72 * depth))
    tint = 0.25 + 0.4 * (1 - rugged) * uniform()
    p["lips"] = p["skin"] * (1 - tint) * rgb(0.92, 0.68, 0.66) + rgb(0.86, 0.36, 0.38) * tint
    p["lipstick"] = 0.72 + 0.28 * (1 - rugged)
    p["blush"] = 0.12 + 0.4 * (1 - rugged) * uniform()


def _style_hair(p: Params, draws: Draws, rugged: Floats) -> None:
    uniform = draws.uniform
    long = chance(uniform(), 1.05 - rugged * 1.1)
    curly = chance(uniform(), 0.28)
    fringe = chance(uniform(), 0.14 + 0.16 * long)
    p["hair"] = 1 - chance(uniform(), positive(rugged - 0.55) * 0.4)
    p["length"] = uniform(6, 22) * (1 - long) + uniform(40, 110) * long
    p["volume"] = p["volume"] * (0.6 + 0.5 * curly + 0.25 * long)
    p["hairline"] = p["hairline"] + fringe * uniform(8, 13)
    p["parting"] = uniform(0, 9) * (1 - fringe)
    p["arch"] = p["arch"] * (1 - 0.8 * fringe)
    p["sides"] = uniform(4, 26) + long * uniform(10, 60)
    p["recede"] = uniform(0, 12) * chance(uniform(), rugged * 0.5)
    p["ears_covered"] = long * chance(uniform(), 0.85) * p["hair"]
    p["curl"] = uniform(0.02, 0.1) * (1 - curly) + uniform(0.15, 0.3) * curly
    p["strand"] = uniform(70, 130) * (1 - curly) + uniform(40, 64) * curly
    p["streaks"] = 0.1 + 0.08 * curly + uniform(0, 0.06)
    p["frizz"] = uniform(0.004, 0.02) + curly * uniform(0.02, 0.06)
    p["jag"] = uniform(0.4, 1.6) + curly * 0.8 + fringe * 0.5


def _add_marks(p: Params, draws: Draws, rugged: Floats) -> None:
    uniform = draws.uniform
    p["freckles"] = uniform(0.3, 0.8) * chance(uniform(), 0.2)
    for name in ("mole", "mark"):
        p[f"{name}_r"] = uniform(0.7, 1.8) * chance(uniform(), 0.3) * 2 - 1  # -1 is less than any square: no mole
    bearded = chance(uniform(), positive(rugged - 0.45) * 1.3)
    stubble = chance(uniform(), 0.4)
    p["beard"] = bearded * (0.32 * stubble + uniform(0.75, 0.95) * (1 - stubble)) * chance(uniform(), 0.8)
    p["moustache"] = bearded * (0.32 * stubble + 0.9 * (1 - stubble))
    p["glasses"] = chance(uniform(), 0.18)
    p["lens_square"] = uniform(-0.1, 1)
    p["frame"] = pick(FRAMES, uniform())
    p["glass"] = uniform(0.3, 0.9, planes=3)


def circumstances(seed: int, images: NDArray[np.int64]) -> Params:
    """What differs between two images of one identity, with the same shapes as `appearance`."""
    draws = Draws(seed, 2, images)
    p = draws.table(NUISANCE)
    uniform = draws.uniform
    p["open"] = np.clip(uniform(-1.2, 1) * (0.6 + 0.6 * positive(p["smile"])), 0, 1)
    p["light_z"] = np.sqrt(np.clip(1 - (p["light_x"] * p["light_x"] + p["light_y"] * p["light_y"]) * 0.7, 0.1, 1))
    warmth, green = uniform(-0.13, 0.13), uniform(-0.04, 0.04)
    white = np.stack([1 + warmth, 1 + green, 1 - warmth])
    p["ambient"] = uniform(0.42, 0.72) * white * (1 + uniform(-0.05, 0.05, planes=3))
    p["lamp"] = uniform(0.4, 0.72) * white * (1 + uniform(-0.06, 0.06, planes=3))
    for name, spread in (("clothes", 0.3), ("back_one", 0.15), ("back_two", 0.15)):
        p[name] = np.clip(uniform(0.1, 0.95) + uniform(-spread, spread, planes=3), 0.03, 1)
    p["heights"] = uniform(planes=36)[:, :, 0, 0].T.reshape(-1, 6, 6)
    p["grain"] = uniform(0, 128 * 128, planes=3)
    return p
