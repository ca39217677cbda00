"""What `facemae ingest` prints of what it left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.attempt import Attempt
from cluster.dataset import Dataset, Labels, ShardData
from cluster.shard import Rejected
from jobs import ingest
from tests.cluster.test_ingest import jpeg, write_files


def test_the_reasons_are_counted_from_the_manifests_alone(tmp_path: Path):
    dataset = Dataset(str(tmp_path))
    made = [
        ShardData(None, 0, Labels(), [Rejected("a", "wrong-size", "", 1)] * 3, {"rejected:wrong-size": 3, "kept_bytes": 9}),
        ShardData(None, 0, Labels(), [Rejected("b", "no-label", "", 1)], {"rejected:no-label": 1, "rejected:wrong-size": 1}),
        ShardData(None, 0, Labels(), [Rejected("c", "failed-shard", "", 1, None, 50)], failure="it burns"),
    ]
    for number, data in enumerate(made):
        dataset.commit(f"{number:05d}", data, fingerprint="f", attempt=Attempt("run", 1), seconds={})
    assert list(ingest._reasons(dataset).items()) == [("failed-shard", 50), ("wrong-size", 4), ("no-label", 1)]


def test_a_run_prints_them_and_a_clean_run_does_not(tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]):
    files = {"a/1.jpg": jpeg(1), "a/2.jpg": jpeg(2, 90), "a/3.jpg": b"no", "b/1.jpg": jpeg(3, 70), "top.jpg": jpeg(1)}
    source = write_files(tmp_path / "in", files)
    assert ingest.main(["--source", source, "--output", str(tmp_path / "out")]) == 0
    assert "left out: 2 wrong-size, 1 not-an-image, 1 no-label (docs/ingest.md says what to do)" in capsys.readouterr().out
    write_files(tmp_path / "clean", {"a/1.jpg": jpeg(1)})
    assert ingest.main(["--source", str(tmp_path / "clean"), "--output", str(tmp_path / "out2")]) == 0
    assert "left out" not in capsys.readouterr().out
