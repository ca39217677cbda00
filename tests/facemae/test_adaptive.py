"""The adaptive attacker on protections whose undoing is known, and its maps as exact arithmetic and as a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from facemae import adaptive_fit
from facemae.adaptive import GRID, AdaptiveError, AdaptiveMap, AdaptiveMaps, half
from facemae.adaptive_fit import MIN_IDENTITIES, fit_maps
from facemae.adaptive_network import TEMPERATURE, contrast
from facemae.adaptive_ridge import Moments, Settings

DIM = 24


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def rotation(dim: int, seed: int = 9) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0]


def faces(people: int = 250, images: int = 3, dim: int = DIM, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Originals, unit rows in clusters by identity, and labels."""
    rng = np.random.default_rng(seed)
    identities = np.repeat(np.arange(people), images)
    return unit_rows(rng.standard_normal((people, dim))[identities] + 0.7 * rng.standard_normal((len(identities), dim))), identities


def cmc1(queries: np.ndarray, gallery: np.ndarray) -> float:
    scores = queries.astype(np.float64) @ gallery.astype(np.float64).T
    return float(np.mean(np.sum(scores > np.diag(scores)[:, None], axis=1) == 0))


def random_map(seed: int, width: int = 40, dim: int = DIM) -> AdaptiveMap:
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"linear": (dim, dim), "offset": (dim,)}
    shapes |= {"hidden": (dim, width), "bias": (width,), "out": (width, dim)} if width else {}
    return AdaptiveMap.of(dim, {name: 3 * rng.standard_normal(shape) for name, shape in shapes.items()})


def test_a_rotation_that_hides_everything_is_undone_on_people_never_seen() -> None:
    originals, identities = faces()
    noise = 0.03 * np.random.default_rng(1).standard_normal(originals.shape)
    protected = unit_rows(originals @ rotation(DIM) + noise)
    assert cmc1(protected, originals) < 0.02
    maps = fit_maps(protected, originals, identities, seed=3)
    assert cmc1(maps.apply(protected, identities), originals) > 0.95
    for said in maps.fitted:
        assert said["kind"] in ("ridge", "mlp")
        assert said["held_out"]["ridge"]["cmc1"] > 0.9 > said["held_out"]["identity"]["cmc1"]
    strangers, labels = faces(seed=7)  # people of neither half
    assert cmc1(maps.apply(unit_rows(strangers @ rotation(DIM)), labels), strangers) > 0.95


def test_a_shift_common_to_all_is_taken_off_with_fewer_pairs_than_dimensions() -> None:
    originals, identities = faces(people=50, images=2, dim=128)
    rng = np.random.default_rng(1)
    protected = unit_rows(originals + 2 * originals[0] + 0.12 * rng.standard_normal(originals.shape))
    plain = cmc1(protected, originals)
    assert cmc1(fit_maps(protected, originals, identities, seed=0).apply(protected, identities), originals) > plain + 0.3


def test_pairs_that_do_not_belong_together_teach_nothing() -> None:
    originals, identities = faces(people=60, images=2, dim=64)
    protected = unit_rows(np.random.default_rng(5).standard_normal(originals.shape))
    overfitted = AdaptiveMap.of(64, Moments.of(protected, originals).ridge(Settings(1e-3, False, "plain")))
    assert cmc1(overfitted(protected), originals) > 0.2, "the test must be able to see a map that has seen its queries"
    hits = [
        round(cmc1(fit_maps(protected, originals, identities, seed).apply(protected, identities), originals) * 120) for seed in range(4)
    ]
    assert sum(hits) <= 14, f"{hits} of 120 each: guessing finds 1 of each, and 4 together exceed 14 once in 10,000"


def test_no_map_sees_an_identity_that_it_is_used_on(monkeypatch: pytest.MonkeyPatch) -> None:
    originals, identities = faces(people=40, images=2)
    seen: list[np.ndarray] = []
    choose = adaptive_fit._fit

    def spy(pairs: adaptive_fit.Pairs, seed: int) -> Any:
        seen.append(pairs.identities)
        assert len(pairs) == len(pairs.protected)
        return choose(pairs, seed)

    monkeypatch.setattr(adaptive_fit, "_fit", spy)
    fit_maps(originals, originals, identities, seed=11)
    used_on = [identities[half(identities, 11) == which] for which in (0, 1)]
    for fitted, used in zip(seen, used_on, strict=True):
        assert len(fitted) > 0
        assert not set(fitted) & set(used)
    assert sum(map(len, seen)) == len(identities)
    held = adaptive_fit._held_out(identities, 11)
    assert 0 < held.sum() < len(held)
    assert not set(identities[held]) & set(identities[~held])


def test_halves_are_even_and_a_function_of_label_and_seed() -> None:
    labels = np.array([0, 1, -1, 1 << 62, 17, 17])
    for seed in (0, 1, -5, 1 << 80):
        np.testing.assert_array_equal(half(labels, seed), [half(labels[[i]], seed)[0] for i in range(6)])
    many = np.arange(20_000)
    assert abs(half(many, 0).mean() - 0.5) < 0.02
    assert abs((half(many, 0) == half(many, 1)).mean() - 0.5) < 0.02
    assert half(np.array([3, 4, 5, 6, 7, 8, 9, 10]), 0).tolist() == [1, 1, 1, 0, 1, 0, 0, 1], "published halves must not move"


def test_a_network_undoes_what_no_linear_map_can() -> None:
    """x = s (1, t) of y = (s, t) with a sign s: t = s (s t) is a product, uncorrelated with x; two hidden units a coordinate give it."""
    rng = np.random.default_rng(0)
    sign, rest = rng.choice([-2.0, 2.0], (1500, 1)), rng.standard_normal((1500, 15))
    originals, protected = unit_rows(np.hstack([sign, rest])), unit_rows(np.hstack([sign, np.sign(sign) * rest]) @ rotation(16))
    identities = np.arange(1500)
    maps = fit_maps(protected, originals, identities, seed=0)
    assert cmc1(protected, originals) < 0.02
    assert cmc1(maps.apply(protected, identities), originals) > 0.9
    for said in maps.fitted:
        assert said["kind"] == "mlp"
        assert said["held_out"]["ridge"]["cmc1"] < 0.3 < 0.9 < said["held_out"]["mlp"]["cmc1"]


def test_without_protection_the_identity_is_kept_to_the_byte() -> None:
    originals, identities = faces(people=60)
    maps = fit_maps(originals.astype(np.float32), originals, identities, seed=0)
    assert [said["kind"] for said in maps.fitted] == ["identity", "identity"]
    assert maps.apply(originals, identities).tobytes() == originals.tobytes()


def test_a_protection_that_is_the_same_picture_for_all() -> None:
    originals, identities = faces(people=60)
    protected = np.repeat(originals[:1], len(originals), axis=0)
    mapped = fit_maps(protected, originals, identities, seed=0).apply(protected, identities)
    np.testing.assert_allclose(np.linalg.norm(mapped.astype(float), axis=1), 1, atol=2e-3)
    assert cmc1(mapped, originals) < 0.05


def test_the_same_fit_from_any_number_of_threads() -> None:
    originals, identities = faces(people=60)
    protected, before = unit_rows(np.abs(originals.astype(float)) @ rotation(DIM) + 0.1), torch.get_num_threads()
    first = fit_maps(protected, originals, identities, seed=4)
    torch.set_num_threads(2)
    try:
        assert fit_maps(protected, originals, identities, seed=4).to_bytes() == first.to_bytes()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert fit_maps(protected, originals, identities, seed=5).to_bytes() != first.to_bytes()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=6), st.integers(0, 3), st.sampled_from([0, 40]))
def test_any_division_into_batches_gives_the_same_bytes(cuts: list[int], seed: int, width: int) -> None:
    rows, identities = faces(people=100, seed=seed)
    maps = AdaptiveMaps((random_map(seed, width), random_map(seed + 1, width)), seed)
    whole = maps.apply(rows, identities)
    parts = np.split(np.arange(len(rows)), sorted(cuts))
    assert np.concatenate([maps.apply(rows[part], identities[part]) for part in parts]).tobytes() == whole.tobytes()
    turned = maps.apply(np.asfortranarray(rows[::-1]), identities[::-1])[::-1]
    assert turned.tobytes() == whole.tobytes()


def test_the_sums_are_exact() -> None:
    """Against rational arithmetic: nothing is rounded before the hidden layer's grid and the last division."""
    one, rows = random_map(3), faces(people=3, images=1)[0]
    exact = {name: [[Fraction(float(v)) for v in row] for row in np.atleast_2d(tensor)] for name, tensor in one.tensors.items()}

    def times(row: list[Fraction], matrix: list[list[Fraction]]) -> list[Fraction]:
        return [sum((a * b for a, b in zip(row, column, strict=True)), Fraction(0)) for column in zip(*matrix, strict=True)]

    for row, found in zip(rows, one(rows), strict=True):
        x = [Fraction(float(value)) for value in row]
        hidden = [max(a + b, Fraction(0)) for a, b in zip(times(x, exact["hidden"]), exact["bias"][0], strict=True)]
        on_grid = [Fraction(round(value / Fraction(GRID))) * Fraction(GRID) for value in hidden]
        terms = zip(times(x, exact["linear"]), exact["offset"][0], times(on_grid, exact["out"]), strict=True)
        mapped = [float(a + b) + float(c) for a, b, c in terms]
        largest = max(map(abs, mapped))
        scaled = [np.rint(value / largest * 2**20) / 2**20 for value in mapped]
        length = np.sqrt(float(sum(Fraction(value) ** 2 for value in scaled)))
        assert found.tobytes() == np.array([value / length for value in scaled]).astype(np.float16).tobytes()


def test_the_order_of_the_sums_does_not_matter_at_full_size() -> None:
    """The same map with its coordinates and hidden units in another order; all of one sign, so that the sums are as large as they get."""
    rng = np.random.default_rng(4)
    tensors = {name: np.abs(tensor) for name, tensor in random_map(6, width=4096, dim=512).tensors.items()}
    rows = unit_rows(np.abs(rng.standard_normal((40, 512))))
    here, there = rng.permutation(512), rng.permutation(4096)
    turned = {"linear": tensors["linear"][here], "offset": tensors["offset"], "hidden": tensors["hidden"][here][:, there]}
    turned |= {"bias": tensors["bias"][there], "out": tensors["out"][there]}
    assert AdaptiveMap(512, turned)(rows[:, here]).tobytes() == AdaptiveMap(512, tensors)(rows).tobytes()
    assert AdaptiveMap(512, turned).estimates(rows[:, here]).tobytes() == AdaptiveMap(512, tensors).estimates(rows).tobytes()


def test_contrast_is_the_cross_entropy_among_other_people() -> None:
    estimates, originals = (torch.from_numpy(faces(people=6, images=1, seed=seed)[0]).double() for seed in (0, 1))
    identities = torch.tensor([1, 1, 2, 3, 4, 4])
    scores = np.exp((estimates / estimates.norm(dim=1, keepdim=True) @ originals.T).numpy() / TEMPERATURE)
    expected = 0.0
    for row in range(6):
        rivals = [column for column in range(6) if column == row or identities[column] != identities[row]]
        expected -= np.log(scores[row, row] / scores[row, rivals].sum()) / 6
    assert float(contrast(3 * estimates, originals, identities)) == pytest.approx(expected)


def test_a_map_is_what_its_formula_says() -> None:
    rng = np.random.default_rng(2)
    wide = {"linear": rng.standard_normal((DIM, DIM)), "offset": rng.standard_normal(DIM), "hidden": rng.standard_normal((DIM, 9))}
    wide |= {"bias": rng.standard_normal(9), "out": rng.standard_normal((9, DIM))}
    rows = faces(people=50)[0]
    x = rows.astype(np.float64)
    expected = x @ wide["linear"] + wide["offset"] + np.maximum(x @ wide["hidden"] + wide["bias"], 0) @ wide["out"]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(AdaptiveMap.of(DIM, wide)(rows).astype(np.float64), expected, atol=6e-4)
    nothing = AdaptiveMap.of(DIM, {"linear": np.zeros((DIM, DIM)), "offset": np.zeros(DIM)})
    assert nothing(rows).tobytes() == rows.tobytes()


def test_ridge_equals_the_normal_equations() -> None:
    originals, _ = faces(people=40)
    protected = unit_rows(originals @ rotation(DIM) + 0.5 * np.random.default_rng(3).standard_normal(originals.shape))
    x, y = protected.astype(np.float64), originals.astype(np.float64)
    centered, wanted = x - x.mean(0), y - y.mean(0)
    added = 0.1 * np.trace(centered.T @ centered) / DIM
    for towards, start in ((False, np.zeros((DIM, DIM))), (True, np.eye(DIM))):
        expected = np.linalg.solve(centered.T @ centered + added * np.eye(DIM), centered.T @ wanted + added * start)
        found = Moments.of(protected, originals)
        plain, mean = (found.ridge(Settings(0.1, towards, finish)) for finish in ("plain", "mean"))
        np.testing.assert_allclose(plain["linear"], expected, atol=1e-8)
        np.testing.assert_allclose(plain["offset"], -x.mean(0) @ expected, atol=1e-8)
        np.testing.assert_allclose(mean["offset"], y.mean(0) - x.mean(0) @ expected, atol=1e-8)
        errors = np.cov((wanted - centered @ expected).T, bias=True)
        shrunk = errors + np.trace(errors) / DIM * np.eye(DIM)
        whitened = found.ridge(Settings(0.1, towards, "whitened"))
        np.testing.assert_allclose(whitened["linear"], expected @ np.linalg.inv(shrunk), rtol=1e-6, atol=1e-6)


def test_too_few_people_leave_the_identity_map_and_say_so() -> None:
    originals, identities = faces(people=8)
    maps = fit_maps(originals @ rotation(DIM).astype(np.float16), originals, identities, seed=0)
    assert maps.apply(originals, identities).tobytes() == originals.tobytes()
    for said in maps.fitted:
        assert said["kind"] == "identity"
        assert said["reason"] == f"{said['identities']} identities to learn from, at least {MIN_IDENTITIES} are needed"
    empty = fit_maps(originals[:0], originals[:0], identities[:0], seed=0)
    assert empty.apply(originals[:0], identities[:0]).shape == (0, DIM)


@pytest.mark.parametrize(
    ("protected", "originals", "labels", "message"),
    [
        (np.ones((4, 3)), np.ones((4, 2)), np.arange(4), r"protected \(4, 3\), originals \(4, 2\) .* are no pairs"),
        (np.ones((4, 3)), np.ones((4, 3)), np.arange(3), "are no pairs"),
        (np.ones(4), np.ones(4), np.arange(4), "are no pairs"),
        (np.diag([1, 1, np.nan]), np.eye(3), np.arange(3), r"protected row 2 is not of unit length \(squared: nan"),
        (np.eye(3), np.eye(3) * [1, 0, 1], np.arange(3), "original row 1 is not of unit length"),
    ],
)
def test_what_makes_no_pairs_is_refused(protected: np.ndarray, originals: np.ndarray, labels: np.ndarray, message: str) -> None:
    with np.errstate(invalid="ignore"), pytest.raises(AdaptiveError, match=message):
        fit_maps(protected, originals, labels, seed=0)


def test_the_file_comes_back_and_equal_maps_are_equal_bytes() -> None:
    maps = AdaptiveMaps((random_map(1), AdaptiveMap(DIM, {})), -7, [{"kind": "mlp"}, {"kind": "identity", "reason": "ü"}])
    data = maps.to_bytes()
    back = AdaptiveMaps.from_bytes(data)
    assert (back.seed, list(back.fitted), [one.kind for one in back.maps]) == (-7, maps.fitted, ["mlp", "identity"])
    assert back.to_bytes() == data
    rows, identities = faces(people=30)
    assert back.apply(rows, identities).tobytes() == maps.apply(rows, identities).tobytes()
    with pytest.raises(AdaptiveError, match=r"shape \(\d+, 8\) for a map of 24"):
        back.apply(unit_rows(np.ones((30, 8))), np.zeros(30, np.int64))
    with pytest.raises(AdaptiveError, match="90 vectors and 3 identities"):
        back.apply(rows, identities[:3])


@contextmanager
def refused(message: str = "") -> Iterator[None]:
    with pytest.raises(AdaptiveError, match=f"HERE is no file of adaptive maps .*{message}.*fit them again"):
        yield


def test_damaged_and_hostile_files_are_refused() -> None:
    data = AdaptiveMaps((random_map(1), random_map(2, width=0)), 0).to_bytes()
    tensors = load(data)
    head = {"schema": 1, "dim": DIM, "seed": 0, "fitted": [{}, {}]}
    for cut in (0, 7, 100, len(data) - 4):
        with refused():
            AdaptiveMaps.from_bytes(data[:cut], "HERE")
    for bad in (b"x" * 200, data + b"0000", b"\xff" * 8 + data[8:], save(tensors), save(tensors, {"adaptive": "[" * 100_000})):
        with refused():
            AdaptiveMaps.from_bytes(bad, "HERE")

    def changed(name: str, value: np.ndarray) -> bytes:
        return save({**tensors, name: value}, {"adaptive": json.dumps(head)})

    AdaptiveMaps.from_bytes(changed("0.bias", tensors["0.bias"]), "HERE")  # the builder of bad files builds good ones
    offset = tensors["0.offset"]
    for value in (np.float32(np.nan), np.float32(np.inf), np.float32(1.5), np.float32(GRID / 3)):
        with refused("offset holds values that no map has"):
            AdaptiveMaps.from_bytes(changed("0.offset", np.where(np.arange(DIM) == 3, value, offset)), "HERE")
    shapeless: list[tuple[str, np.ndarray]] = [("0.offset", offset[:-1]), ("1.linear", np.eye(DIM)), ("0.out", tensors["0.out"][:, :3])]
    for name, wrong in (*shapeless, ("0.bias", np.array([[1]], np.float32))):
        with refused("is float(32|64)"):
            AdaptiveMaps.from_bytes(changed(name, wrong), "HERE")
    for name in ("2.linear", "0.more", "1.bias", "linear"):
        with refused():
            AdaptiveMaps.from_bytes(changed(name, offset), "HERE")
    heads: list[dict[str, Any]] = [{"schema": 2}, {"dim": 0}, {"dim": 10**9}, {"dim": "24"}, {"seed": 1.5}, {"fitted": []}, {"fitted": 3}]
    for wrong_head in heads:
        with refused():
            AdaptiveMaps.from_bytes(save(tensors, {"adaptive": json.dumps({**head, **wrong_head})}), "HERE")
