"""Rows of a comparison to tables, the claim, the picture and the page, on made-up figures: nothing here was measured."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jobs.command import UsageError
from jobs.compare_claim import MOST, claim, duels, pareto
from jobs.compare_plot import picture
from jobs.compare_results import write_page
from jobs.compare_row import Block, Record, Row, Traced
from jobs.compare_table import markdown, to_csv

REPOSITORY = Path(__file__).parents[2]
PAIRS = "lfw_pairs"


def row(name: str, leak: float, errors: list[float], method: str | None = None, half: float = 0.01, strength: float | None = None) -> Row:
    """A made-up row: CMC@1 of ``leak`` +- ``half``, and an error for each seed."""
    found = Traced("edgeface (adaptive)", leak, max(leak - half, 0.0), min(leak + half, 1.0))
    return Row(name, method or name, strength, [found, Traced("other", leak / 2, 0.0, leak)], [], [], {PAIRS: dict(enumerate(errors))})


def record(*rows: Row) -> Record:
    """A made-up comparison with a real set that errs by 4 %."""
    return Record("Made up", seeds=[0, 1, 2], rows=[row("none", 1.0, [3.0, 4.0, 5.0], half=0.0), *rows])


def test_ratio_to_the_runner_up_by_hand() -> None:
    ours = row("facemae", 0.05, [10.0, 12.0, 14.0])
    made = record(ours, row("blur", 0.08, [20.0, 20.0, 40.0]), row("noise", 0.10, [30.0] * 3), row("weak", 0.9, [5.0] * 3))
    first = duels(made)[0]
    assert (first.ours.name, first.bound, first.runner_up and first.runner_up.name) == ("facemae", "cmc1", "blur")
    assert first.ratio == pytest.approx(12 / (80 / 3))
    assert first.by_seed == pytest.approx((14 / 40, 12 / 20))
    assert first.excess == pytest.approx((12 - 4) / (80 / 3 - 4))
    assert "ratio 0.45 (0.35 to 0.60); the paper's claim (0.5 or less) holds here" in claim(made)


def test_the_bound_decides_who_is_the_runner_up() -> None:
    ours, near = row("facemae", 0.05, [10.0] * 3, half=0.01), row("blur", 0.049, [12.0] * 3, half=0.03)
    found = {duel.bound: duel for duel in duels(record(ours, near, row("noise", 0.2, [50.0] * 3)))}
    assert found["cmc1"].runner_up is not None
    assert found["high"].runner_up is not None
    assert (found["cmc1"].runner_up.name, found["high"].runner_up.name) == ("noise", "blur")


def test_what_leaks_less_and_errs_less_undoes_the_claim() -> None:
    made = record(row("facemae", 0.05, [10.0] * 3), row("noise", 0.06, [40.0] * 3), row("blur", 0.01, [9.0] * 3))
    assert duels(made)[0].ratio == pytest.approx(0.25)
    assert duels(made)[0].beaten_by == ("blur",)
    assert "does not hold" in claim(made)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ([row("blur", 0.01, [30.0] * 3)], "every other protection leaks less"),
        ([row("blur", 0.99, [5.0] * 3)], "every other leaves more than 50 % to be traced"),
        ([row("blur", 0.2, [0.0] * 3)], "no ratio to an error of 0"),
    ],
)
def test_without_a_runner_up_it_says_what_holds(others: list[Row], words: str) -> None:
    assert words in claim(record(row("facemae", 0.05, [10.0] * 3), *others))


@pytest.mark.parametrize(("rows", "words"), [([], "has no FaceMAE point"), ([row("facemae", 0.8, [9.0] * 3)], "leaks more than 50 %")])
def test_without_a_facemae_point_it_says_so(rows: list[Row], words: str) -> None:
    assert words in claim(record(row("blur", 0.1, [9.0] * 3), *rows))


def test_no_excess_ratio_where_the_runner_up_is_no_worse_than_the_real_set() -> None:
    found = duels(record(row("facemae", 0.05, [10.0] * 3), row("blur", 0.08, [4.0] * 3)))[0]
    assert (found.ratio, found.excess) == (pytest.approx(2.5), None)


POINTS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=8)


@given(POINTS)
def test_pareto_is_what_no_other_beats(points: list[tuple[int, int]]) -> None:
    rows = [row(f"p{i}", leak / 20, [float(error)]) for i, (leak, error) in enumerate(points)]
    front = {(r.worst.cmc1 if r.worst else None, r.error(PAIRS)) for r in pareto([*rows, row("none", 0.0, [0.0])], PAIRS)}
    beaten = {a for a in points if any(b != a and b[0] <= a[0] and b[1] <= a[1] for b in points)}
    assert front == {(leak / 20, float(error)) for leak, error in set(points) - beaten}


@given(POINTS, POINTS)
def test_the_runner_up_by_brute_force(ours: list[tuple[int, int]], others: list[tuple[int, int]]) -> None:
    rows = [row(f"f{i}", leak / 20, [float(e)], "facemae") for i, (leak, e) in enumerate(ours)]
    rows += [row(f"o{i}", leak / 20, [float(e)], "blur") for i, (leak, e) in enumerate(others)]
    found = {duel.ours.name: duel for duel in duels(record(*rows)) if duel.bound == "cmc1"}
    assert set(found) == {f"f{i}" for i, (leak, _) in enumerate(ours) if leak / 20 <= MOST}
    for name, duel in found.items():
        leak, error = ours[int(name[1:])]
        able = [e for other, e in others if leak <= other <= 20 * MOST]
        assert (duel.runner_up.error(PAIRS) if duel.runner_up else None) == (min(able) if able else None)
        assert bool(duel.beaten_by) == any(other <= leak and e <= error for other, e in others)


def test_tables_hold_the_figures() -> None:
    made = record(
        row("blur-2", 0.0812, [20.0, 22.0, 24.0], "blur", strength=2.0), Row("k|same", "k_same", failed=["ValueError: no people"])
    )
    lines = markdown(made).splitlines()
    assert lines[3] == "| blur-2 | edgeface (adaptive) | 8.12 [7.12, 9.12] | - | - | 22.00 ± 2.00 |"
    assert lines[4].startswith("| k\\|same | - |")
    table = list(csv.DictReader(io.StringIO(to_csv(made))))
    blur = table[1]
    assert (blur["strength"], blur["image_cmc1"], blur["lfw_pairs_error"], blur["lfw_pairs_seed_2"]) == ("2.0", "8.12", "22.0", "24.0")
    assert float(blur["lfw_pairs_std"]) == pytest.approx(np.std([20, 22, 24], ddof=1))
    assert table[2]["failed"] == "ValueError: no people"


def test_one_seed_of_three_is_named() -> None:
    assert markdown(record(row("blur", 0.1, [9.0]))).splitlines()[3].endswith("| 9.00 (1 seed) |")


def test_record_survives_json_and_refuses_what_is_none() -> None:
    made = record(row("blur", 0.1, [9.0, 8.0]))
    assert Record.from_bytes(made.to_bytes(), "here") == made
    for data, words in [(b"[]", "no record"), (b'{"schema": 9}', "schema 9"), (b'{"schema": 1, "rows": [{"name": 3}]}', "here: ")]:
        with pytest.raises(UsageError, match=words):
            Record.from_bytes(data, "here")
    with pytest.raises(UsageError, match="finite"):
        Record.from_bytes(made.to_bytes().replace(b"9.0", b"NaN"), "here")


def test_the_picture_shows_every_panel_and_changes_with_the_figures() -> None:
    rows = [row("blur-2", 0.0, [20.0, 22.0, 21.0], "blur", strength=2.0), row("blur-4", 0.3, [30.0, 33.0, 31.0], "blur", strength=4.0)]
    one = picture(record(*rows))
    pixels = np.asarray(Image.open(io.BytesIO(one)).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert picture(record(*rows)) == one
    assert picture(record(rows[0], row("blur-4", 0.3, [35.0, 33.0, 31.0], "blur", strength=4.0))) != one
    rows[0].errors["cfp_fp"] = {0: 40.0}
    assert np.asarray(Image.open(io.BytesIO(picture(record(*rows))))).shape[1] == pytest.approx(2 * pixels.shape[1], abs=2)
    with pytest.raises(ValueError, match="nothing to draw"):
        picture(Record("empty", rows=[Row("none", "none")]))


def test_a_page_of_a_comparison_and_of_tables(tmp_path: Path) -> None:
    made = record(row("facemae", 0.05, [10.0] * 3), row("blur", 0.08, [20.0] * 3))
    (tmp_path / "made-up.json").write_bytes(made.to_bytes())
    ablation = Record("Ablation", blocks=[Block(text="Words."), Block(head=["loss", "error"], rows=[["irm", "3"]]), Block(code=["run it"])])
    (tmp_path / "ablation.json").write_bytes(ablation.to_bytes())
    written = write_page([str(tmp_path / "made-up.json"), str(tmp_path / "ablation.json")], str(tmp_path / "page.md"))
    assert written == [str(tmp_path / "page.md"), str(tmp_path / "images" / "pareto-made-up.png")]
    page = (tmp_path / "page.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "# What was measured", "## Made up", "### By the worst attacker", "### How each row was made", "## Ablation",
    ]  # fmt: skip
    assert markdown(made) in page
    assert "| irm | 3 |" in page
    assert "    run it\n" in page


def test_recognisers_alone_are_a_view_of_their_own(tmp_path: Path) -> None:
    """What compares thumbnails finds more than the paper's attackers do: the claim stands once beside each."""
    seen = row("facemae", 0.05, [10.0] * 3)
    for name in ("pixels (adaptive)", "pixels"):
        seen.leakage.insert(0, Traced(name, 0.45, 0.44, 0.46))
        seen.identity.append(Traced(name, 0.3, 0.2, 0.4))
    made = record(seen, row("blur", 0.08, [20.0] * 3))
    (whole, _, same), (alone, suffix, narrow) = made.views()
    assert (whole, alone, same) == ("By the worst attacker", "By recognisers alone, as the paper attacks", made)
    assert [[each.attacker for each in one.leakage] for one in narrow.rows] == [["edgeface (adaptive)", "other"]] * 3
    assert narrow.rows[1].identity == []
    assert narrow.rows[1].errors == seen.errors
    assert "blur has 20.00 % and leaks 8.00 %: ratio 0.50" in claim(narrow)
    assert "no runner-up leaks as much" in claim(made)
    assert [heading for heading, _, _ in record(row("facemae", 0.05, [10.0] * 3)).views()] == [whole]
    (tmp_path / "made-up.json").write_bytes(made.to_bytes())
    written = write_page([str(tmp_path / "made-up.json")], str(tmp_path / "page.md"))
    assert [Path(file).name for file in written] == ["page.md", "pareto-made-up.png", f"pareto-made-up{suffix}.png"]
    page = (tmp_path / "page.md").read_text()
    assert page.index(markdown(made)) < page.index(alone) < page.index(markdown(narrow))


def test_a_block_is_one_thing_and_its_rows_are_as_long_as_its_head() -> None:
    content = {"schema": 1, "title": "t", "blocks": [{"text": "a", "code": ["b"]}]}
    with pytest.raises(UsageError, match="one of text, code"):
        Record.from_bytes(json.dumps(content).encode(), "here")
    content["blocks"] = [{"head": ["a", "b"], "rows": [["1"]]}]
    with pytest.raises(UsageError, match="another length"):
        Record.from_bytes(json.dumps(content).encode(), "here")


def test_the_page_of_results_is_what_its_records_make(tmp_path: Path) -> None:
    files = sorted(map(str, (REPOSITORY / "docs" / "results").glob("*.json")))
    assert files
    written = write_page(files, str(tmp_path / "results.md"))
    assert (tmp_path / "results.md").read_bytes() == (REPOSITORY / "docs" / "results.md").read_bytes(), (
        "facemae compare --results docs/results/*.json --output docs/results.md"
    )
    assert all((REPOSITORY / "docs" / "images" / Path(path).name).exists() for path in written[1:])
