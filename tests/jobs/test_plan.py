from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cluster.index_choice import Choice
from jobs import plan as plan_module
from jobs.__main__ import JOBS
from jobs.plan import SEARCHES, PlanConfig, main, plan
from jobs.plan_line import Line
from jobs.rates import Rate, load_rates

NAMES = ("ingest", "embed", "protect_path", "protect_facemae", "similarities", "index_build", "index_search", "index_probes")
RATES = {name: Rate(1000.0, "a second", 2, "w", "c", "h", load_rates()["protect_path"].date, "0") for name in NAMES}
BASES = {"measured", "extrapolated", "computed", "given", "not measured"}


def _lines(rates: dict[str, Rate] | None = None, **options: Any) -> dict[tuple[str, str], Line]:
    found = plan(PlanConfig(**{"images": 260e6, **options}), RATES if rates is None else rates)
    lines = {(line.part, line.name): line for line in found}
    assert len(lines) == len(found)
    return lines


def _value(lines: dict[tuple[str, str], Line], part: str, name: str) -> float:
    value = lines[part, name].value
    assert value is not None
    return value


def test_the_time_of_all_steps_is_their_sum() -> None:
    times = [line.value for (part, _), line in _lines().items() if part == "time"]
    assert len(times) == 9
    *steps, total = (value for value in times if value is not None)
    assert total == pytest.approx(sum(steps))


def test_hours_are_images_by_rate_by_cores() -> None:
    lines = _lines(images=7.2e6, nodes=3, cores_per_node=4)  # 500 a second and core, 12 cores
    assert _value(lines, "time", "ingest") == pytest.approx(7.2e6 / (500 * 12) / 3600)
    assert _value(lines, "time", "embed x 2") == pytest.approx(2 * 7.2e6 / (500 * 12) / 3600)


def test_twice_the_images_is_twice_of_what_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    same = Choice("IVF64,SQfp16", 64, 16, 4, 1036, "")
    monkeypatch.setattr(plan_module, "choose", lambda *_, **__: same)
    once, twice = _lines(images=1e6), _lines(images=2e6)
    linear = [key for key in once if key[0] == "disk" or (key[0] == "time" and not key[1].startswith(("search x", "quantiser", "all")))]
    linear += [("index", "memory of an actor"), ("index", "memory of all actors"), ("traffic", "all searches")]
    assert len(linear) == 12
    for part, name in linear:
        assert _value(twice, part, name) == pytest.approx(2 * _value(once, part, name)), name
    assert _value(twice, "time", f"search x {SEARCHES}") > 2 * _value(once, "time", f"search x {SEARCHES}")
    assert _value(twice, "time", "quantiser x 2") == _value(once, "time", "quantiser x 2")


def test_every_actor_together_is_the_whole_memory_and_traffic_stays_below_all_actors() -> None:
    lines = _lines(probes=20)
    actors, each = _value(lines, "index", "actors"), _value(lines, "index", "memory of an actor")
    assert actors * each == pytest.approx(_value(lines, "index", "memory of all actors"))
    asked, query = _value(lines, "traffic", "actors asked by a query"), _value(lines, "traffic", "a query")
    assert 1 < asked < min(actors, 20)
    assert _value(lines, "traffic", "all searches") == pytest.approx(query * 260e6 * SEARCHES)


@pytest.mark.parametrize("gpus", [0, 64])
@pytest.mark.parametrize("images", [1e4, 260e6])
def test_every_line_has_a_label_and_what_is_not_measured_has_no_number(gpus: int, images: float) -> None:
    for rates in (RATES, {}, load_rates()):
        for line in _lines(rates, images=images, gpus=gpus).values():
            assert line.basis in BASES
            assert line.why
            assert line.basis.upper() in line.text()
            assert (line.value is None) == (line.basis == "not measured")
            assert line.basis != "measured" or line.name in rates


def test_a_gpu_rate_is_never_invented() -> None:
    without, given = _lines(gpus=64), _lines(gpus=64, gpu_images_per_second=100.0, gpu_embeddings_per_second=2e3)
    for name, flag in (("protect", "--gpu-images-per-second"), ("embed x 2", "--gpu-embeddings-per-second")):
        assert without["time", name].basis == "not measured"
        assert flag in without["time", name].why
        assert given["time", name].basis == "given"
    assert _value(given, "time", "protect") == pytest.approx(260e6 / (64 * 100) / 3600)
    assert without["time", "at least"].why.count(",") == 1  # it says which two are missing


def test_gpus_are_no_faster_than_the_path_that_feeds_them() -> None:
    line = _lines(gpus=64, nodes=1, cores_per_node=2, gpu_images_per_second=1e6)["time", "protect"]
    assert line.basis == "extrapolated"
    assert line.value == pytest.approx(260e6 / 1000 / 3600)


def test_another_recall_needs_the_number_of_probes() -> None:
    assert _lines(recall=0.99)["index", "cells probed by a query"].basis == "extrapolated"
    assert _lines(recall=0.95)["index", "cells probed by a query"].basis == "not measured"
    assert _lines(recall=0.95)["time", f"search x {SEARCHES}"].basis == "not measured"
    assert _lines(recall=0.95, probes=8)["index", "cells probed by a query"].value == 8


def test_what_does_not_fit_is_said() -> None:
    assert "DOES NOT FIT" in _lines(nodes=1, node_memory=16.0)["index", "memory of all actors"].why
    assert "DOES NOT FIT" not in _lines(nodes=8)["index", "memory of all actors"].why


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "0"], "--images 0.0: give 1 or more"),
        (["--images", "nan"], "--images nan: give 1 or more"),
        (["--images", "1e6", "--gpus", "-1"], "--gpus -1: give 0 or more"),
        (["--images", "1e6", "--recall", "1.5"], "--recall 1.5: give a share"),
        (["--images", "1e6", "--node-memory", "0"], "--node-memory 0.0: give a number above 0"),
        (["--images", "1e6", "--gpu-images-per-second", "inf"], "--gpu-images-per-second inf: give a number above 0"),
    ],
)
def test_wrong_input_is_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(flags)
    shown = capsys.readouterr()
    assert message in " ".join((shown.out + shown.err).split())


def test_the_job_prints_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--images", "260e6", "--gpus", "64"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("260,000,000 images")
    for part in ("rates", "disk", "index", "traffic", "time"):
        assert f"\n{part}\n" in shown
    assert "plan" in JOBS


def test_the_committed_rates_say_where_they_are_from() -> None:
    for name, rate in load_rates().items():
        assert name in NAMES
        assert all(getattr(rate, field.name) for field in dataclasses.fields(Rate))
        assert rate.commit in rate.source()
        assert str(rate.date) in rate.source()


@pytest.mark.parametrize(("text", "message"), [("a: {value: 1}\n", "a.unit"), ("a: 3\n", "a: "), ("- 1\n", "valid dictionary")])
def test_a_wrong_file_of_rates_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rates.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rates(tmp_path / "rates.yaml")
