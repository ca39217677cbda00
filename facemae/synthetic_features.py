"""The features of a synthetic face, each painted on the patch that holds it.

Units are pixels of the 112 x 112 ArcFace template, measured from the point between the eyes, x to the right and y down:
the eyes near (-17.6, 0) and (17.6, 0), the tip of the nose near (0, 20), the mouth near (0, 41). `ears`, `eyes`, `brows`
and `glasses` take a mirrored pair, where x grows outwards on both sides. p holds the parameters drawn by
`facemae.synthetic_traits`.
"""

from __future__ import annotations

import numpy as np

from facemae.synthetic_paint import Floats, Params, Patch, bump, clamp, inside, mix, positive, rgb, square, texture

# turns a direction in the picture into one in a mirrored pair
SIDES = np.array([-1, 1], np.float32).reshape(2, 1, 1, 1)


def body(patch: Patch, p: Params) -> None:
    """Neck and clothes: what shows of them below the jaw."""
    side = abs(patch.x)
    patch.paint(inside(side - p["neck"]), p["skin"] * 0.62)
    collar = p["collar"] + side * 0.12 - patch.y
    patch.paint(inside(collar) * inside(p["neck"] - 6 - side), p["clothes"])


def ears(pair: Patch, p: Params) -> None:
    """Both ears, before the head covers their inner halves."""
    radius = square((pair.x - p["width"] - p["ear_out"]) / 5.5) + square((pair.y - 6) / p["ear"])
    shown = 1 - p["ears_covered"]
    pair.paint(inside((radius - 1) * 3.2) * shown, p["skin"] * 0.93)
    pair.paint(bump(radius * 2.2) * 0.6 * shown, p["skin"] * rgb(0.62, 0.5, 0.48))


def marks(patch: Patch, p: Params) -> None:
    """Blush, freckles, moles and the lines of age."""
    x, y = patch.x, patch.y
    cheek = bump(square((abs(x) - 25) / 15) + square((y - 21) / 12))
    patch.paint(cheek * p["blush"], p["skin"] * rgb(0.98, 0.68, 0.62))
    spots = clamp(texture(x * 2 + p["spot_x"], y * 2 + p["spot_y"]) * 1.2 - 0.9)
    spread = bump(square(x / 38) + square((y - 15) / 16))
    patch.paint(spots * spread * p["freckles"], p["skin"] * rgb(0.7, 0.53, 0.42))
    for name in ("mole", "mark"):
        away = square(x - p[f"{name}_x"]) + square(y - p[f"{name}_y"])
        patch.paint(inside(away - p[f"{name}_r"], 2), p["skin"] * rgb(0.4, 0.28, 0.26))
    fold = abs(abs(x - p["yaw"] * 5) - 13 - (y - 24) * 0.42 - p["smile"] * 1.5)
    patch.darken(clamp(1.6 - fold) * bump(square((y - 29) / 9)) * p["folds"])


def beard(patch: Patch, p: Params, head: Floats) -> None:
    """Beard and moustache, where the mask head says that there is skin."""
    x, y = patch.x - p["yaw"] * 4, patch.y
    jaw = clamp((y - p["mouth_y"] - 3 + square(patch.x / p["width"]) * 44) * 0.22)
    lip = square((y - p["mouth_y"] + 5 - x * x * 0.012) / 4.5) + square(x / (p["mouth"] + 4))
    moustache = clamp(2.4 * bump(lip * 0.6))
    grain = clamp(0.86 + texture(x * 2.2 + 64, y * 1.3 + p["lock"]) * 0.16)
    patch.paint(np.maximum(jaw * p["beard"], moustache * p["moustache"]) * grain * head, p["hair_colour"] * 0.75)


def nose(patch: Patch, p: Params) -> None:
    """Ridge and tip by light and shade, wings and nostrils by line. The tip stands out, so pose moves it most."""
    x, y = patch.x - p["yaw"] * 9, patch.y - p["pitch"] * 6 - p["nose_y"]
    ramp = square(clamp((y + 26) * 0.04))
    across = x / mix(p["bridge"], p["nose"], ramp)
    ridge = positive(1 - across * across * 0.45) * clamp((6 - y) * 0.2) * clamp((y + 30) * 0.1)
    patch.darken(ridge * (across * p["light_x"] * -0.22 + across * across * 0.09))
    patch.darken(bump(square(x / p["nose"]) * 0.7 + square((y - 4) / 4.5)) * 0.26)
    wing = abs(x) - p["nose"] * 0.68
    crease = clamp(1.4 - abs(square(wing) + square(y + 0.5) - 12) * 0.14) * clamp((wing + 0.5) * 0.5)
    patch.paint(crease * clamp((y + 4.5) * 0.3) * 0.38, p["skin"] * rgb(0.55, 0.38, 0.34))
    hole = square((abs(x) - p["nose"] * 0.46) / 2.6) + square((y - 2.2 + abs(x) * 0.12) / 1.3)
    patch.paint(inside((hole - 1) * 1.1, 1.4) * 0.72, p["skin"] * rgb(0.32, 0.19, 0.17))
    glow_x = square((x - p["light_x"] * 2) / 3.6)
    glow = bump(glow_x + square((y + 3) / 3.6)) + bump(glow_x * 3 + square((y + 14) / 14)) * 0.45
    patch.paint(glow * 0.28, mix(p["skin"], 1, 0.55))


def mouth(patch: Patch, p: Params) -> None:
    """Lips along a curve that the smile bends; teeth show through the gap of an open mouth."""
    across = (patch.x - p["yaw"] * 4) / (p["mouth"] + p["smile"] * 2.5)
    squared = across * across
    y = patch.y - p["mouth_y"] - p["pitch"] * 3 - p["smile"] * (1.5 - squared * 4.2)
    curve = positive(1 - squared)
    gap = p["open"] * curve * 5 + 0.35
    bow = 1 - p["bow"] * positive(1 - squared * 14)
    top = y + gap * 0.5 + p["upper"] * curve * bow
    bottom = y - gap - p["lower"] * curve * (0.6 + 0.4 * curve)
    ends = inside((squared - 1) * 8, 2)
    patch.darken(bump(squared + square((bottom - 3) / 4)) * 0.2)
    patch.paint(inside(np.maximum(-top, bottom), 1.3) * ends * p["lipstick"], p["lips"])
    patch.paint(inside(np.maximum(-top, y), 1.3) * ends * 0.3, p["lips"] * 0.62)
    hole = np.maximum(-y - gap * 0.5, y - gap)
    patch.paint(inside(hole, 1.1) * inside((squared - 1.1) * 8, 2), p["lips"] * rgb(0.32, 0.2, 0.2))
    teeth = np.maximum(hole + 0.7, y + gap * 0.5 - 3.6)
    patch.paint(inside(teeth) * inside((squared - 0.62) * 8, 3), rgb(0.95, 0.93, 0.89))
    shine = square((bottom + p["lower"] * 0.55) / 1.6)
    patch.paint(bump(squared * 4 + shine) * 0.35, mix(p["lips"], 1, 0.5))


def eyes(pair: Patch, p: Params) -> None:
    """Both eyes: an almond between two lid curves, then iris, lashes and the folds around them."""
    x, y = pair.x - p["eye_x"], pair.y - p["eye_y"]
    pair.darken(bump(square(x / 16) + square((y + 3) / 11)) * p["socket"])
    y = y + x * p["tilt"]
    across = x / p["eye_width"]
    squared = across * across
    curve = positive(1 - squared)
    upper = -p["eye_height"] * p["lids"] * curve * (1 - across * p["almond"])
    lower = p["eye_height"] * (0.31 + 0.31 * p["lids"]) * curve
    white = inside(np.maximum(upper - y, y - lower), 1.1) * inside((squared - 1) * 8, 2)
    pair.paint(white, rgb(0.95, 0.94, 0.93))
    _iris(pair, p, x, y, white)
    pair.darken(white * clamp(1 - (y - upper) * 0.35) * 0.45)  # the shadow of the upper lid
    reach = inside((squared - 1.12) * 5, 2)
    lash = p["lash"] * (0.75 + clamp(across) * 0.6)
    pair.paint(inside(abs(y - upper + lash * 0.5) - lash, 1.2) * reach * 0.92, p["lash_colour"])
    pair.paint(inside(abs(y - lower) - 0.25, 1.2) * reach * 0.4, p["skin"] * rgb(0.45, 0.32, 0.3))
    crease = abs(y - upper * 1.1 + p["crease"] - squared * 1.2)
    pair.paint(clamp(1.1 - crease) * reach * 0.4, p["skin"] * rgb(0.5, 0.36, 0.33))
    bag = abs(y - lower - 3.6 + squared * 2)
    pair.darken(clamp(1.4 - bag) * reach * p["folds"] * 0.8)


def _iris(pair: Patch, p: Params, x: Floats, y: Floats, white: Floats) -> None:
    """Iris, pupil and the lamp's reflection, where white is open."""
    x, y = x - p["gaze_x"] * SIDES, y - p["gaze_y"] + 0.4
    radius = np.sqrt(x * x + y * y)
    pair.paint(inside(radius - p["iris_r"]) * white, p["iris"] * 0.55)
    disc = inside(radius - p["iris_r"] + 1.1, 1.6) * white
    pair.paint(disc, p["iris"])
    pair.paint(disc * clamp(y * 0.3), p["iris"] * 1.35)
    pair.paint(inside(radius - p["pupil"]) * white, rgb(0.03, 0.03, 0.04))
    spark = square(x - p["light_x"] * SIDES * 1.6) + square(y + 1.5)
    pair.paint(inside((spark - 1.1) * 0.6) * white * 0.9, rgb(1, 1, 1))


def brows(pair: Patch, p: Params) -> None:
    """Both eyebrows: a curve that thins outwards."""
    across = (pair.x - p["eye_x"] - 0.5) / p["brow_length"]
    squared = across * across
    line = p["brow_y"] - p["raise"] * (3 + across * p["frown"]) - p["brow_tilt"] * across + p["brow_arch"] * squared
    thickness = p["brow"] * clamp(1.6 - squared * 1.6) * (1 - 0.42 * clamp(across + 0.1))
    amount = inside(abs(pair.y - line) - thickness, 1.5) * inside((squared - 1) * 8, 2)
    grain = texture(pair.x * 2 + pair.y + 64, pair.y * 1.5 + p["lock"])
    pair.paint(amount * clamp(0.8 + grain * 0.12), p["brow_colour"])


def glasses(pair: Patch, p: Params) -> None:
    """Round to square rims with a bar across, tinted lenses and a streak of glare; p["glasses"] is 0 for most."""
    x, y = pair.x - p["eye_x"] + 0.6, pair.y - 1.5
    side, height = square(x / p["lens"]), square(y / (p["lens"] * p["lens_high"]))
    shape = mix(side + height, side * side + height * height, p["lens_square"]) - 1
    distance = shape * p["lens"] / (2 + 2 * p["lens_square"])
    pair.paint(inside(distance) * p["glasses"] * 0.12, p["glass"])
    glare = clamp(2 - abs(x + y * 0.8 + 4) * 0.8) * inside(distance + 1.5)
    pair.paint(glare * p["glasses"] * p["glare"], rgb(1, 1, 1))
    bar = inside(abs(y + 3) - p["rim"], 1.2) * inside(-distance)
    rim = np.maximum(inside(abs(distance) - p["rim"], 1.2), bar)
    pair.paint(rim * inside(pair.x - p["width"] - 2) * p["glasses"], p["frame"])
