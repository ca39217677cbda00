from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from facemae.synthetic import BLOCK, CHUNK, SyntheticFaces
from facemae.synthetic_paint import noise_tables
from facemae.synthetic_traits import Draws, appearance, circumstances, mix_bits

FACES = SyntheticFaces(num_identities=40, images_per_identity=5, seed=7)


@pytest.fixture(scope="module")
def album() -> np.ndarray:
    """All images, drawn one at a time: what every other way of drawing must reproduce."""
    return np.concatenate([FACES.render([index]) for index in range(len(FACES))])


def splitmix64_finaliser(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_mix_bits_is_the_splitmix64_finaliser(values: list[int]) -> None:
    mixed = mix_bits(np.array(values, np.uint64))
    assert [int(value) for value in mixed] == [splitmix64_finaliser(value) for value in values]


def test_pictures_have_the_agreed_shape_and_use_the_range(album: np.ndarray) -> None:
    assert album.shape == (200, 112, 112, 3)
    assert album.dtype == np.uint8
    assert album.min() < 20
    assert album.max() > 235
    assert 70 < album.mean() < 170
    assert np.mean(album == 255) < 0.03, "highlights are blown out"


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, len(FACES) - 1), max_size=3 * CHUNK))
def test_an_image_does_not_depend_on_its_batch(album: np.ndarray, indices: list[int]) -> None:
    assert np.array_equal(FACES.render(indices), album[indices])


def test_an_image_does_not_depend_on_order_or_block(album: np.ndarray) -> None:
    order = np.random.default_rng(0).permutation(np.arange(BLOCK + CHUNK + 3) % len(FACES))
    assert np.array_equal(FACES.render(order), album[order])


def test_an_image_does_not_depend_on_how_many_identities_there_are(album: np.ndarray) -> None:
    assert np.array_equal(SyntheticFaces(10**6, 5, seed=7).render([0, 101]), album[[0, 101]])


def test_the_bytes_stay_the_same_from_version_to_version() -> None:
    """Published numbers name a seed: a change of the drawing has to be a decision, made by changing this sum."""
    pictures = SyntheticFaces(8, 2, seed=1).render(range(16))
    assert hashlib.sha256(pictures.tobytes()).hexdigest()[:16] == "7313138156e17ed1"


def test_seed_size_and_index_matter(album: np.ndarray) -> None:
    assert len({picture.tobytes() for picture in album}) == len(album)
    other = SyntheticFaces(40, 5, seed=8).render([0])
    assert np.abs(other[0].astype(int) - album[0]).mean() > 10
    assert not np.array_equal(SyntheticFaces(40, 5, seed=7 + 2**62).render([0])[0], album[0])


@pytest.mark.parametrize("size", [16, 64, 113, 224])
def test_other_sizes_show_the_same_picture(album: np.ndarray, size: int) -> None:
    drawn = SyntheticFaces(40, 5, seed=7, size=size).render([3, 77])
    assert drawn.shape == (2, size, size, 3)

    def coarse(pictures: np.ndarray) -> np.ndarray:
        """Mean colour on an 8 x 8 grid."""
        cells = np.arange(pictures.shape[1]) * 8 // pictures.shape[1]
        rows = np.stack([pictures[:, cells == cell].mean(1) for cell in range(8)])
        return np.stack([rows[:, :, cells == cell].mean(2) for cell in range(8)])

    assert np.abs(coarse(drawn) - coarse(album[[3, 77]])).mean() < 6


def test_appearance_belongs_to_the_identity_and_circumstances_to_the_image() -> None:
    people = appearance(3, np.array([5, 5, 6]))
    assert all(np.array_equal(values[..., 0, :, :], values[..., 1, :, :]) for values in people.values())
    assert sum(not np.array_equal(values[..., 0, :, :], values[..., 2, :, :]) for values in people.values()) > 50
    scenes = circumstances(3, np.array([5, 5, 6]))
    assert all(np.array_equal(values[..., 0, :, :], values[..., 1, :, :]) for values in scenes.values())
    assert not people.keys() & scenes.keys(), "one would overwrite the other"


def test_draws_are_uniform_and_independent() -> None:
    draws = Draws(0, 1, np.arange(20000))
    first, second = draws.uniform().ravel(), draws.uniform(-2, 4).ravel()
    assert first.min() >= 0
    assert first.max() < 1
    for values, low, high in ((first, 0, 1), (second, -2, 4)):
        counts = np.histogram(values, 20, (low, high))[0]
        assert np.all(np.abs(counts - 1000) < 160), "5 standard deviations"
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.04
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.04


def test_noise_tables_are_standardised() -> None:
    for table in noise_tables():
        assert abs(table.mean()) < 0.05
        assert 0.85 < table.std() < 1.15


def nearest_is_mate(features: np.ndarray, identities: np.ndarray) -> float:
    """Share of images whose nearest other image, by Euclidean distance, shows the same identity."""
    distance = np.linalg.norm(features[:, None] - features[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    return float(np.mean(identities[distance.argmin(1)] == identities))


def test_identity_shows_in_the_face_but_not_in_the_mean_colour(album: np.ndarray) -> None:
    identities = FACES.identities(np.arange(len(FACES)))
    chance = 4 / 199
    faces = album[:, 20:108, 20:92].reshape(len(album), 22, 4, 18, 4, 3).mean((2, 4)).reshape(len(album), -1)
    left, singular, _ = np.linalg.svd(faces - faces.mean(0), full_matrices=False)
    assert nearest_is_mate(left[:, :60] * np.sqrt(singular[:60]), identities) > 12 * chance
    assert nearest_is_mate(album.mean((1, 2)), identities) < 6 * chance


def test_images_of_one_identity_are_more_alike_than_of_two(album: np.ndarray) -> None:
    identities = FACES.identities(np.arange(len(FACES)))
    small = album.reshape(len(album), 28, 4, 28, 4, 3).mean((2, 4)).reshape(len(album), -1)
    distance = np.linalg.norm(small[:, None] - small[None], axis=-1)
    mates = (identities[:, None] == identities) & ~np.eye(len(album), dtype=bool)
    strangers = identities[:, None] != identities
    assert distance[mates].mean() < 0.9 * distance[strangers].mean()


def test_the_eyes_lie_where_the_template_has_them() -> None:
    """Over many images, the darkest spot of each upper half of the mean face is an iris."""
    mean = SyntheticFaces(150, 1).render(range(150)).mean((0, 3))
    for left, expected in ((30, 38.29), (64, 73.53)):
        window = mean[44:60, left : left + 18]
        row, column = np.unravel_index(window.argmin(), window.shape)
        assert abs(row + 44 - 51.6) < 3
        assert abs(column + left - expected) < 3


def test_identities_count_images_in_order() -> None:
    assert FACES.identities(range(12)).tolist() == [0] * 5 + [1] * 5 + [2] * 2
    assert FACES.identities([]).shape == (0,)
    assert FACES.identities([199]).dtype == np.int64
    assert FACES.render([]).shape == (0, 112, 112, 3)


@pytest.mark.parametrize("indices", [[200], [0, -1], [2**63], [0.5], [[0, 1]], 3])
def test_indices_out_of_range_are_refused(indices: object) -> None:
    with pytest.raises(IndexError, match=r"image|indices"):
        FACES.render(indices)  # type: ignore[arg-type]


def test_the_index_error_names_the_index_and_the_range() -> None:
    with pytest.raises(IndexError, match=r"image 200: .* 0 to 199"):
        FACES.identities([3, 200])


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(0, 2**63 - 1), st.permutations(range(3)))
def test_parse_reads_what_was_written(ids: int, images: int, seed: int, order: list[int]) -> None:
    parts = [f"ids={ids}", f" images = {images}", f"seed={seed}"]
    parsed = SyntheticFaces.parse(",".join(parts[place] for place in order))
    assert parsed == SyntheticFaces(ids, images, seed)
    assert len(parsed) == ids * images


def test_parse_fills_in_seed_and_size() -> None:
    assert SyntheticFaces.parse("ids=500,images=20") == SyntheticFaces(500, 20, seed=0, size=112)
    assert SyntheticFaces.parse("ids=500,images=20,size=64").size == 64


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is not one of"),
        ("ids=5", "images missing"),
        ("seed=5", "ids and images missing"),
        ("ids=5,images=2,colour=1", "'colour=1' is not one of ids, images, seed, size"),
        ("ids=5,images=2,ids=6", "ids is given twice"),
        ("ids=5,images=two", "images needs a whole number, not 'two'"),
        ("ids=5,images=", "images needs a whole number, not ''"),
        ("ids=5,images=2.5", "not '2.5'"),
        ("ids=5,images=-2", "not '-2'"),
        ("ids=\u0665,images=2", "ids needs a whole number"),
        ("ids=5,images=0", "images_per_identity=0: must be from 1"),
        ("ids=5,images=2,seed=9223372036854775808", "seed=9223372036854775808: must be from 0"),
        ("ids=5,images=2,size=8", "size=8: must be from 16 to 1024"),
    ],
)
def test_parse_says_what_is_wrong(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        SyntheticFaces.parse(text)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="num_identities=0"):
        SyntheticFaces(0, 5)
