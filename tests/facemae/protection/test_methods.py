"""What every picture-by-picture protection promises, whatever it does to the picture."""

from __future__ import annotations

import inspect
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from facemae.protection import PROTECTIONS, Protection, ShardProtection, create_protection, protection_class
from facemae.synthetic import SyntheticFaces

WEIGHTED = {"facemae", "mae"}
STRENGTHS: dict[str, list[float]] = {
    "blur": [0.5, 1, 2, 4, 8, 16, 40],
    "pixelate": [2, 4, 8, 16, 32, 56, 112],
    "noise": [5, 10, 20, 50, 100, 255],
    "random_mask": [0.1, 0.3, 0.5, 0.75, 0.9],
    "fixed_mask": [0.25, 0.5, 1, 1.5, 2],
    "pixel_dp": [50, 5, 1, 0.5, 0.1, 0.02],
}
"""Rising protection."""
RANDOM = {"noise", "random_mask", "pixel_dp"}
METHODS = pytest.mark.parametrize("method", STRENGTHS)
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (5, 9), (113, 50)])


def faces(count: int = 12) -> np.ndarray:
    return SyntheticFaces(4, 3, seed=5).render(np.arange(count))


FACES = faces()
KEYS = [f"00000-{row:07d}" for row in range(len(FACES))]


def test_every_method_is_tested_here_or_by_itself() -> None:
    assert STRENGTHS.keys() | WEIGHTED | {"none", "k_same"} == PROTECTIONS.keys()
    assert {name: protection_class(name).name for name in PROTECTIONS} == {name: name for name in PROTECTIONS}
    assert [name for name in STRENGTHS if isinstance(create_protection(name), ShardProtection)] == []


@METHODS
def test_alone_in_any_batch_and_any_order_the_bytes_are_the_same(method: str) -> None:
    protection = create_protection(method)
    expected = np.concatenate([protection.protect(FACES[row : row + 1], [KEYS[row]]) for row in range(len(FACES))])
    np.testing.assert_array_equal(create_protection(method).protect(FACES, KEYS), expected)
    for trial in range(3):
        chosen = np.random.default_rng(trial).permutation(len(FACES))[: 3 + 4 * trial]
        np.testing.assert_array_equal(protection.protect(FACES[chosen], [KEYS[row] for row in chosen]), expected[chosen])


@METHODS
def test_every_step_of_the_dial_changes_the_picture_more(method: str) -> None:
    protected = [create_protection(method, strength=strength).protect(FACES, KEYS) for strength in STRENGTHS[method]]
    changes = [np.abs(each.astype(int) - FACES).mean() for each in protected]
    assert changes == sorted(changes), changes
    assert 0 < changes[0] < changes[-1] / 2, changes
    dial = protection_class(method).dial
    assert dial is not None
    assert dial.rising is (STRENGTHS[method] == sorted(STRENGTHS[method]))


@METHODS
@SHAPES
def test_any_size_layout_and_no_picture_at_all(method: str, shape: tuple[int, int]) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, *shape, 3), dtype=np.uint8)
    protection, before = create_protection(method), pictures.copy()
    expected = protection.protect(pictures, KEYS[:3])
    assert (expected.shape, expected.dtype) == (pictures.shape, np.uint8)
    strided = np.repeat(pictures, 2, axis=2)[:, :, ::2]
    strided.flags.writeable = False
    np.testing.assert_array_equal(protection.protect(strided, KEYS[:3]), expected)
    np.testing.assert_array_equal(pictures, before)
    assert protection.protect(pictures[:0], []).shape == (0, *shape, 3)


@METHODS
def test_the_key_and_the_seed_matter_where_chance_does_and_nowhere_else(method: str) -> None:
    protection = create_protection(method)
    other_key = protection.protect(FACES[:1], ["another"])
    assert np.array_equal(other_key, protection.protect(FACES[:1], KEYS[:1])) is (method not in RANDOM)
    assert ("seed" in inspect.signature(protection_class(method)).parameters) is (method in RANDOM)
    if method in RANDOM:
        reseeded = create_protection(method, seed=2**127 + 1).protect(FACES[:1], KEYS[:1])
        assert not np.array_equal(reseeded, protection.protect(FACES[:1], KEYS[:1]))


@METHODS
def test_describe_is_json_and_tells_two_settings_apart(method: str) -> None:
    settings: list[dict[str, Any]] = [{"strength": strength} for strength in STRENGTHS[method]]
    settings += [{"seed": seed} for seed in (1, 2, 2**127)] if method in RANDOM else []
    settings += {"random_mask": [{"patch_size": 8}], "pixel_dp": [{"block": 8}, {"neighborhood": 4}]}.get(method, [])
    described = [create_protection(method, **each).describe() for each in settings]
    assert [json.loads(json.dumps(each)) for each in described] == described
    assert {each["method"] for each in described} == {method}
    assert len({json.dumps(each) for each in described}) == len(described)


@METHODS
def test_variants_are_other_seeds_that_never_come_twice(method: str) -> None:
    protection = create_protection(method)
    first, second = protection.variants(), protection.variants(skip=4)
    if method not in RANDOM - {"pixel_dp"}:  # a draw of pixel_dp that is chosen has no guarantee
        assert (len(first), len(second)) == (0, 0)
        return
    outputs = {each.protect(FACES[:1], KEYS[:1]).tobytes() for each in (protection, *first, *second)}
    assert len(outputs) == 9
    described: list[Protection] = [*first, *second]
    assert {each.describe()["strength"] for each in described} == {protection.describe()["strength"]}


@given(st.sampled_from(sorted(STRENGTHS)), st.floats(allow_nan=True, allow_infinity=True))
@settings(max_examples=60, deadline=None)
def test_a_strength_is_taken_as_it_is_or_refused_by_name_value_and_range(method: str, strength: float) -> None:
    dial = protection_class(method).dial
    assert dial is not None
    inside = dial.low <= strength <= dial.high and not (dial.open_low and strength == dial.low) and not (dial.open_high and strength == 1)
    if inside and (not dial.whole or strength == int(strength)):
        options = {"patch_size": 1} if method == "random_mask" else {}  # with larger patches a small share hides none
        assume(method != "random_mask" or strength * 112 * 112 >= 1)
        assert create_protection(method, strength=strength, **options).describe()["strength"] == strength
        return
    with pytest.raises(ValueError, match=f"^{method}: strength is .*: give .*{dial.range}"):
        create_protection(method, strength=strength)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("blur", {"strength": 0}, "blur: strength is 0: give from above 0 to 112"),
        ("pixelate", {"strength": 7.5}, "pixelate: strength is 7.5: give a whole number from 2 to 112"),
        ("random_mask", {"patch_size": 0}, "random_mask: patch_size is 0"),
        ("pixel_dp", {"neighborhood": 0}, "pixel_dp: neighborhood is 0"),
        ("pixel_dp", {"block": -1}, "pixel_dp: block is -1"),
        ("k_same", {"strength": 1}, "k_same: strength is 1: give a whole number from 2 to 1000"),
    ],
)
def test_an_option_out_of_range_is_named(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_protection(method, **options)


@METHODS
def test_a_wrong_batch_is_named(method: str) -> None:
    with pytest.raises(ValueError, match="2 pictures with 1 keys"):
        create_protection(method).protect(FACES[:2], KEYS[:1])
    with pytest.raises(ValueError, match="pictures are float32"):
        create_protection(method).protect(FACES[:1].astype(np.float32), KEYS[:1])
