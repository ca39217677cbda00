"""The gate as the job calls it: dataset.json and the exit code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.dataset import Dataset
from jobs.command import Config, main_of
from jobs.gate import gate
from tests.cluster.test_verify import build
from tests.facemae.test_release import attacker, curve


@dataclass(frozen=True, kw_only=True)
class Gated(Config):
    """A job with a gate."""

    limit: float | None = None
    """The limit."""


def measured(dataset: Dataset) -> dict[str, Any]:
    protected = {"url": dataset.url, "fingerprint": "f", "samples": 12, "config": {}}
    return {"protected": protected, "attackers": [attacker("alpha", curve(0.02, 12))]}


@pytest.mark.parametrize(("limit", "code", "released"), [(None, 0, False), (0.02, 0, True), (0.019, 4, False), (1.5, 2, False)])
def test_the_exit_code_and_the_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: float | None, code: int, released: bool
) -> None:
    dataset = build(str(tmp_path / "set"))
    report = {
        "original": {"fingerprint": "o"},
        "protected": {"url": dataset.url, "fingerprint": "f", "samples": 12, "config": {}, "parent": {"fingerprint": "o"}},
        "attackers": [attacker("alpha", curve(0.02, 12))],
    }
    written = json.dumps(report).encode()

    def run(config: Gated) -> dict[str, Any]:
        print("the table")
        return {"url": "x", "failed_shards": [], **gate(report, written, "results/leakage.json", config.limit, None)}

    assert main_of(Gated, run, [] if limit is None else ["--limit", str(limit)]) == code
    shown = capsys.readouterr()
    assert "the table" in shown.out
    assert ("release withheld: up to 2 % of the images" in shown.err) is (code == 4)
    content = dataset.description()
    assert content["released"] is released
    assert ("release" in content) is (code in (0, 4) and limit is not None)
    assert ("released: true" in shown.out) is released


def test_a_set_that_fails_later_is_withheld_again(tmp_path: Path) -> None:
    dataset = build(str(tmp_path / "set"))
    report = {
        "original": {"fingerprint": "o"},
        "protected": {"url": dataset.url, "fingerprint": "f", "samples": 12, "config": {}, "parent": {"fingerprint": "o"}},
        "attackers": [attacker("alpha", curve(0.02, 12))],
    }
    assert gate(report, b"", "x", 0.05, None) == {"released": True, "withheld": None}
    report["attackers"] = [attacker("alpha", curve(0.02, 12)), attacker("stronger", curve(0.9, 12))]
    found = gate(report, b"", "x", 0.05, None)
    assert found["released"] is dataset.description()["released"] is False
    assert "by stronger" in found["withheld"]
