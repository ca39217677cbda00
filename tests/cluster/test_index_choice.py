"""Which index a gallery gets, and what is refused before any work is done."""

from __future__ import annotations

import pytest

from cluster.index_choice import BYTES_PER_ACTOR, EXACT_IMAGES, choose, num_cells_for


def test_small_galleries_are_compared_whole_and_large_ones_get_cells() -> None:
    small, large = choose(EXACT_IMAGES, 512), choose(EXACT_IMAGES + 1, 512)
    assert (small.factory, small.exact, small.num_parts) == ("Flat", True, 0)
    assert (large.factory, large.exact, large.coded) == ("IVF4096,SQfp16", False, False)
    assert "every query against every image" in small.why
    assert "4096 cells" in large.why


@pytest.mark.parametrize(("images", "cells"), [(250_000, 2048), (1_000_000, 4096), (10_000_000, 16384), (260_000_000, 65536)])
def test_cells_are_four_roots_up_to_a_power_of_two(images: int, cells: int) -> None:
    assert num_cells_for(images) == cells
    assert 4 * images**0.5 <= cells < 8 * images**0.5


def test_no_actor_holds_more_than_its_memory() -> None:
    for images in (10**6, 10**7, 260 * 10**6):
        found = choose(images, 512)
        assert images * found.bytes_per_image <= found.num_actors * BYTES_PER_ACTOR
        assert found.num_actors <= found.num_parts


def test_codes_where_the_actors_given_hold_no_more() -> None:
    found = choose(260 * 10**6, 512, num_actors=8)
    assert (found.factory, found.coded, found.num_actors) == ("IVF65536,PQ64", True, 8)
    assert found.bytes_per_image == 64 + 12


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("HNSW32", "give auto, Flat, or IVF"),
        ("IVF1,Flat", "give auto, Flat, or IVF"),
        ("IVF99999,SQfp16", "99999 cells for 1000 images: take at most 250, or Flat"),
        ("IVF8,PQ7", r"FAISS makes no index of 'IVF8,PQ7' for embeddings of 128 numbers .*IVF1024,PQ16"),
        ("IVF8,Nonsense", "FAISS makes no index of"),
    ],
)
def test_what_is_no_index_is_refused(factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(1000, 128, factory=factory)
