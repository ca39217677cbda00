from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cluster.scheduler import Interrupted, StageError
from jobs.command import SETTLED, Config, UsageError, from_mapping, main_of, parse


@dataclass(frozen=True, kw_only=True)
class Example(Config):
    """Does a thing."""

    source: str
    """Where from."""
    count: int = 3
    """How many."""
    ratio: float = 0.5
    """Share."""
    files: tuple[str, ...] = ()
    """Files."""
    section: dict[str, Any] = field(default_factory=dict)
    """More."""


def _file(folder: Path, text: str) -> str:
    (folder / "job.yaml").write_text(text)
    return str(folder / "job.yaml")


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = _file(tmp_path, "source: a\ncount: 7\nfiles: [x, y]\n")
    config = parse(Example, ["--config", file, "--count", "9"], "example")
    assert config == Example(source="a", count=9, files=("x", "y"))
    assert parse(Example, [f"--config={file}"], "example").count == 7


def test_what_the_file_leaves_out_the_flags_may_give(tmp_path: Path) -> None:
    file = _file(tmp_path, "count: 7\n")
    assert parse(Example, ["--config", file, "--source", "b"], "example") == Example(source="b", count=7)
    with pytest.raises(SystemExit):
        parse(Example, ["--config", file], "example")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source: a\ncuont: 1\n", "unknown field 'cuont'; the fields are source, count"),
        ("source: a\ncount: many\n", r"count: .*integer.*'many'"),
        ("source: [1\n", "is no YAML: line 2, column 1: expected"),
        ("- a\n", "must be a mapping"),
        ("# nothing\n", "job.yaml is empty: write the job's fields into it"),
        ("source: a\ncount: 1\ncount: 2\n", "line 3, column 1: the key 'count' is given twice"),
        ("source: a\nsection: {x: 1, x: 2}\n", "line 2, column 17: the key 'x' is given twice"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(Example, ["--config", _file(tmp_path, text), "--source", "x"], "example")


def test_a_complete_mapping_needs_every_required_field() -> None:
    with pytest.raises(UsageError, match="'source' is missing"):
        from_mapping(Example, {}, where="section x", complete=True)


def _raises(error: Exception) -> Any:
    def run(config: Example) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (StageError("wrong key"), 2, "error: wrong key"),
        (ValueError("bad value"), 2, "error: bad value"),
        (Interrupted("stopped as asked"), 143, "stopped as asked"),
    ],
)
def test_exit_codes_and_one_clear_line(capsys: pytest.CaptureFixture[str], error: Exception, code: int, text: str) -> None:
    assert main_of(Example, _raises(error), ["--source", "a"]) == code
    shown = capsys.readouterr().err
    assert text in shown
    assert "Traceback" not in shown


def test_a_bug_is_not_dressed_up_as_a_user_error() -> None:
    with pytest.raises(AttributeError):
        main_of(Example, _raises(AttributeError("oops")), ["--source", "a"])


def test_shards_given_up_make_the_exit_code_three() -> None:
    assert main_of(Example, lambda config: {"failed_shards": ["00001"]}, ["--source", "a"]) == 3
    assert main_of(Example, lambda config: {"failed_shards": []}, ["--source", "a"]) == 0


def test_what_to_run_next_is_the_last_line_whatever_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    for more, code in (({}, 0), ({"failed_shards": ["00001"]}, 3), ({"withheld": "the bound is above the limit"}, 4)):
        assert main_of(Example, lambda config, more=more: {"next": "facemae protect", **more}, ["--source", "a"]) == code  # type: ignore[misc]
        assert capsys.readouterr().out == "next:    facemae protect\n"


def test_one_file_is_taken_and_no_folder(tmp_path: Path) -> None:
    file = _file(tmp_path, "source: a\n")
    with pytest.raises(UsageError, match="--config is given 2 times"):
        parse(Example, ["--config", file, f"--config={file}"], "example")
    with pytest.raises(UsageError, match="is a folder"):
        parse(Example, ["--config", str(tmp_path)], "example")
    with pytest.raises(UsageError, match="--config needs a file"):
        parse(Example, ["--config"], "example")


@dataclass(frozen=True, kw_only=True)
class HandsOn(Config):
    """Hands its file on."""

    takes_file: ClassVar[bool] = False
    config: str
    """The other job's file."""


def test_a_job_with_a_config_of_its_own_takes_no_file_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(HandsOn, ["--config", "there/is/none.yaml"], "example").config == "there/is/none.yaml"
    for kind, offered in ((HandsOn, False), (Example, True)):
        with pytest.raises(SystemExit):
            parse(kind, ["--help"], "example")
        assert ("gives the same fields as a file" in capsys.readouterr().out) == offered


def test_a_settled_result_ends_with_zero_where_somebody_tries_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACEMAE_RETRIED", "1")
    cases: list[tuple[dict[str, Any], int]] = [({"failed_shards": ["00001"]}, 3), ({"samples": 0}, 3), ({"withheld": "why"}, 4)]
    for result, code in cases:
        assert main_of(Example, lambda config, result=result: result, ["--source", "a"]) == 0  # type: ignore[misc]
        found = SETTLED.search(capsys.readouterr().out)
        assert found is not None
        assert (found["job"], int(found["code"])) == ("test_command", code)
    assert main_of(Example, _raises(ValueError("no network")), ["--source", "a"]) == 2, "an error is tried again"
    assert main_of(Example, lambda config: {}, ["--source", "a"]) == 0
    assert SETTLED.search(capsys.readouterr().out) is None


def test_a_message_ends_once(capsys: pytest.CaptureFixture[str]) -> None:
    for given, shown in (("no. Wait..", "no. Wait."), ("wait...", "wait..."), ("go", "go")):
        main_of(Example, _raises(ValueError(given)), ["--source", "a"])
        assert capsys.readouterr().err.endswith(f"error: {shown}\n")
