"""``facemae compare``: the plan and what it refuses, what is recorded and done again, and one failure that costs one cell.

Where trainings stand in the way of the scheduling, small functions take their place; the real ones run in the test marked ``long``."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from cluster.dataset import Dataset
from cluster.scheduler import Interrupted, StageError
from cluster.store import open_store
from jobs import compare
from jobs.command import UsageError, from_mapping
from jobs.compare import CompareConfig
from jobs.compare_cell import Cell, recorded
from jobs.compare_plan import commands, plan
from jobs.compare_row import Record
from tests.jobs.test_leakage_job import write_recognizer

PROTECTIONS = [{"method": "blur", "strength": [2, 4]}, {"method": "noise", "seed": 3}]


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A configuration whose files are there, over the description of a data set."""
    data = tmp_path / "original"
    data.mkdir()
    counts = dict.fromkeys(("samples_in", "samples", "quarantined", "shards", "identities"), 8)
    (data / "dataset.json").write_text(json.dumps({"schema": 2, **counts, "lineage": {"fingerprint": "of the originals"}}))
    images = tmp_path / "images"
    for name in "abcd":
        (images / name).mkdir(parents=True)
        for number in (1, 2):
            Image.new("RGB", (112, 112), (ord(name), 80 * number, 0)).save(images / name / f"{number}.jpg")
    rows = [f"{a}/1.jpg,{b}/2.jpg,{int(a == b)},{i % 2}" for i, (a, b) in enumerate((a, b) for a in "abcd" for b in "abcd")]
    (tmp_path / "pairs.csv").write_text("\n".join(["image_a,image_b,same,fold", *rows, ""]))
    return {
        "root": str(tmp_path / "root"),
        "folder": str(tmp_path / "results"),
        "data": str(data),
        "attackers": [str(write_recognizer(tmp_path / f"{name}.onnx", seed)) for seed, name in enumerate(("one", "two"))],
        "protections": PROTECTIONS,
        "seeds": [0, 1],
        "evaluate": {"pairs": [str(tmp_path / "pairs.csv")], "images": str(images)},
    }


def config_of(content: dict[str, Any], **changes: Any) -> CompareConfig:
    return from_mapping(CompareConfig, {**content, **changes}, where="test", complete=True)


def by_name(content: dict[str, Any], **changes: Any) -> dict[str, Cell]:
    return {cell.name: cell for cell in plan(config_of(content, **changes))}


def test_a_cell_for_every_strength_and_the_reference(content: dict[str, Any]) -> None:
    cells = by_name(content)
    assert list(cells) == ["none", "blur-2", "blur-4", "noise"]
    assert [cells["blur-4"].protect.method, cells["blur-4"].protect.strength] == ["blur", 4.0]
    assert [trial.seed for trial in cells["noise"].trials] == [0, 1]
    trial = cells["noise"].trials[1]
    assert trial.pretrain.data == cells["noise"].protect.output == cells["noise"].leakage.protected
    assert trial.pretrain.seed == 1
    assert trial.evaluate.recognizer == [f"{trial.pretrain.output}/weights/recognizer.onnx"]
    own = by_name(content, protections=[{"method": "none", "name": "real"}, {"method": "blur", "strength": 2, "name": "soft"}])
    assert list(own) == ["real", "soft"]
    assert len({cell.protect.output for cell in cells.values()}) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attackers": []}, "missing in --config FILE.yaml: attackers"),
        ({"evaluate": {}}, "missing in --config FILE.yaml: evaluate"),
        ({"seeds": [1, 1]}, "seeds: .* each once"),
        ({"protections": [{"method": "blurr", "name": "mild"}]}, "protections, mild: unknown protection 'blurr'"),
        ({"protections": [{"method": "blur", "strength": "much"}]}, "blur: strength is 'much'"),
        ({"protections": [{"method": "blur", "strength": [-1]}]}, "blur: strength is -1"),
        ({"protections": [{"method": "blur", "sigma": 2}]}, "protections blur: unknown field 'sigma'"),
        ({"protections": [{"method": "blur", "output": "x"}]}, "'output' is filled in"),
        ({"protections": [{"method": "blur", "name": "a/b"}]}, "entry 1: .*'a/b'"),
        ({"protections": [{"method": "blur"}, {"method": "blur", "seed": 1}]}, "two cells are named 'blur'"),
        ({"protections": [{"method": "facemae"}]}, "--weights"),
        ({"pretrain": {"sead": 1}}, "section pretrain: unknown field 'sead'"),
        ({"pretrain": {"seed": 1}}, "section pretrain: 'seed' is filled in"),
        ({"leakage": {"max_cmc1": 0.1}}, "section leakage: 'max_cmc1'"),
        ({"evaluate": {"pairs": ["nowhere.csv"], "images": "."}}, "nowhere.csv"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_starts(content: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, ValueError, FileNotFoundError, RuntimeError), match=message):
        compare.run(config_of(content, **changes))
    assert not Path(content["root"]).exists()
    assert not Path(content["folder"]).exists()


def test_one_attacker_and_absent_images_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"one\.onnx alone: give two"):
        plan(config_of(content, attackers=content["attackers"][:1]))
    Path(content["evaluate"]["images"], "a", "1.jpg").unlink()
    with pytest.raises(UsageError, match=r"section evaluate: pairs names 1 absent images, the first: .*a/1\.jpg"):
        plan(config_of(content))


def test_settings_change_with_what_decides_and_with_nothing_else(content: dict[str, Any]) -> None:
    before = by_name(content)
    assert by_name(content, num_workers=3, cpus_per_pretrain=2, folder=content["folder"])["noise"].settings == before["noise"].settings
    same = by_name(content, protections=[*PROTECTIONS[:1], {"method": "noise", "seed": 3, "batch_size": 7}])
    assert same["noise"].settings == before["noise"].settings
    other = by_name(content, protections=[*PROTECTIONS[:1], {"method": "noise", "seed": 4}])
    assert other["noise"].settings != before["noise"].settings
    assert other["noise"].protect.output != before["noise"].protect.output
    assert other["blur-2"] == before["blur-2"]
    pairs = Path(content["evaluate"]["pairs"][0])
    pairs.write_text(pairs.read_text() + "a/1.jpg,b/1.jpg,0,0\n")
    edited = by_name(content)["noise"]
    assert edited.settings == before["noise"].settings, "the leakage does not depend on the pairs"
    assert edited.trials[0].settings != before["noise"].trials[0].settings
    assert edited.trials[0].pretrain == before["noise"].trials[0].pretrain, "nor does the training"


def test_commands_name_no_place_of_this_machine(content: dict[str, Any], tmp_path: Path) -> None:
    lines = commands(by_name(content, seeds=[1, 2])["blur-2"])
    assert lines[0] == "facemae protect --input DATA --output PROTECTED --method blur --strength 2.0"
    assert lines[1] == "facemae leakage --original DATA --protected PROTECTED --recognizer one.onnx two.onnx --output OUT"
    assert lines[-1] == "facemae evaluate --recognizer RUN/weights/recognizer.onnx --output OUT --pairs pairs.csv --images images"
    assert lines[2] == "facemae pretrain --data PROTECTED --output RUN --seed SEED  # SEED: 1, 2"
    assert str(tmp_path) not in "\n".join(lines)


def test_a_secret_seed_is_in_no_record_and_no_command(content: dict[str, Any]) -> None:
    secret = 987654321987654321
    cell = by_name(content, protections=[{"method": "noise", "seed": secret}, {"method": "pixel_dp", "seed": secret}])["noise"]
    shown = json.dumps([cell.settings, [trial.settings for trial in cell.trials], commands(cell), cell.protect.output])
    assert str(secret) not in shown
    assert cell.protect.seed == secret, "the job itself has it"
    assert "--seed SECRET" in commands(cell)[0]


def test_nor_is_the_place_of_a_secret_seed(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "hidden").write_text("s" * 32)
    reference = f"file:{tmp_path}/hidden"
    cell = by_name(content, protections=[{"method": "noise", "secret_seed": reference, "strength": 9}])["noise-9"]
    shown = json.dumps([cell.settings, [trial.settings for trial in cell.trials], commands(cell), cell.protect.output])
    assert "hidden" not in shown
    assert cell.protect.secret_seed == reference, "the job itself has it"
    assert "--secret-seed SECRET" in commands(cell)[0]


class Fakes:
    """Small functions in the place of protecting, measuring and training, counted by the files that they leave."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log, self.poison = folder / "fakes", folder / "poison"
        self.log.mkdir()
        self.unprotectable = ""
        monkeypatch.setattr(compare, "make_protected", self.protect)
        monkeypatch.setattr(compare, "measure", self.measure)
        monkeypatch.setattr(compare, "CALLS_PER_PROCESS", 0)  # as many as there are: a process takes seconds to start
        monkeypatch.setattr(compare.pretrain, "prepare", lambda config: config, raising=False)
        monkeypatch.setattr(compare, "train_and_verify", _trainer(str(self.log), str(self.poison)))

    def count(self) -> Counter[str]:
        """What ran since the last time it was asked."""
        found = Counter(path.name.partition("~")[0] for path in self.log.iterdir())
        for path in self.log.iterdir():
            path.unlink()
        return found

    def protect(self, cell: Cell) -> None:
        (self.log / f"protect {cell.name}").touch()
        if cell.name == self.unprotectable:
            raise StageError("protect: 1 shards were given up")

    def measure(self, cell: Cell) -> dict[str, Any]:
        (self.log / f"measure {cell.name}").touch()
        share = {"cmc1": 0.125, "low": 0.1, "high": 0.2}
        counts = {"samples": 8, "identities": 4}
        return {"attackers": [{"name": "one", "image": share, "identity": None, "utility": None}], "original": counts}


def _trainer(log: str, poison: str) -> Any:
    def train(config: Any, evaluation: Any) -> dict[str, Any]:
        name = Path(evaluation.output).parent.name
        Path(log, f"train {name} {config.seed}").touch()
        if Path(poison).exists() and Path(poison).read_text() == f"{name} {config.seed}":
            raise ValueError("no two images of anybody\nand more")
        return {"protocols": {"pairs": {"accuracy": 0.75 + config.seed / 8}}, "seconds": {"training": 1.0}}

    return train


def test_a_rerun_does_what_is_not_recorded_and_one_failure_costs_one_cell(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes = Fakes(tmp_path, monkeypatch)
    fakes.unprotectable = "blur-2"
    fakes.poison.write_text("noise 1")
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(content))
    arguments = ["--config", str(tmp_path / "compare.yaml")]
    assert compare.main([*arguments, "--hardware", "the first"]) == 3
    assert fakes.count() == {
        **{f"protect {name}": 1 for name in ("none", "blur-2", "blur-4", "noise")},
        **{f"measure {name}": 1 for name in ("none", "blur-4", "noise")},
        **{f"train {name} {seed}": 1 for name in ("none", "blur-4", "noise") for seed in (0, 1)},
    }
    store = open_store(content["folder"])
    rows = {row.name: row for row in Record.from_bytes(store.get("compare.json"), "compare.json").rows}
    assert rows["blur-2"].failed == ["StageError: protect: 1 shards were given up"]
    assert rows["noise"].failed == ["seed 1: ValueError: no two images of anybody"]
    assert rows["noise"].errors == {"pairs": {0: 25.0}}
    assert rows["blur-4"].errors == {"pairs": {0: 25.0, 1: 12.5}}
    assert (rows["blur-4"].strength, rows["noise"].strength) == (4.0, 50.0)
    assert "failed: noise: seed 1" in capsys.readouterr().out
    fakes.unprotectable = ""
    fakes.poison.unlink()
    assert compare.main([*arguments, "--hardware", "the second"]) == 0
    assert fakes.count() == {
        "protect blur-2": 1,
        "measure blur-2": 1,
        "protect noise": 1,
        "train blur-2 0": 1,
        "train blur-2 1": 1,
        "train noise 1": 1,
    }
    assert compare.main([*arguments, "--hardware", "a third, which only draws"]) == 0
    assert fakes.count() == {}
    assert Record.from_bytes(store.get("compare.json"), "compare.json").hardware == "the first, the second", "what made the figures"
    page = store.get("compare.md").decode()
    assert "| noise | one | 12.50 [10.00, 20.00] | - | - | 18.75 ± 8.84 |" in page
    assert store.get("pareto.png").startswith(b"\x89PNG")
    capsys.readouterr()
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump({**content, "evaluate": {**content["evaluate"], "flip": False}}))
    assert compare.main(arguments) == 0
    assert fakes.count() == {
        **{f"protect {name}": 1 for name in ("none", "blur-2", "blur-4", "noise")},
        **{f"train {name} {seed}": 1 for name in ("none", "blur-2", "blur-4", "noise") for seed in (0, 1)},
    }
    assert "cells/noise/seed-1.json is done again, as other settings made it: evaluate.flip (True -> False)" in capsys.readouterr().out


def test_the_example_is_a_configuration() -> None:
    file = Path(compare.__file__).parent / "compare_example.yaml"
    config = from_mapping(CompareConfig, yaml.safe_load(file.read_text()), where=file.name, complete=True)
    assert {section["method"] for section in config.protections} == {"blur", "k_same"}


def test_a_record_cut_short_is_done_again(content: dict[str, Any]) -> None:
    cell, store = by_name(content)["noise"], open_store(content["folder"])
    compare.keep(store, cell.key, cell.settings, {"attackers": []})
    assert recorded(store, cell.key, cell.settings) is not None
    store.put(cell.key, store.get(cell.key)[:-9])
    assert recorded(store, cell.key, cell.settings) is None


def test_end_to_end_stopped_and_gone_on(
    long: None, content: dict[str, Any], tmp_path: Path, make_dataset: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(tmp_path / "faces")
    make_dataset(data, "synthetic:ids=10,images=6,seed=2", shard_size=30)
    recipe = {"backbone": "compact-plain-8", "dim": 32, "margin_value": 0.2, "scale": 32.0, "samples": 96, "batch_size": 32}
    protections = [{"method": "blur", "strength": 4}]
    config = config_of(content, data=data, protections=protections, seeds=[0], pretrain=recipe, num_workers=1, cpus_per_pretrain=2)
    folder = Path(content["folder"])
    records = [folder / "cells" / name / file for name in ("none", "blur-4") for file in ("leakage.json", "seed-0.json")]
    threading.Thread(target=_stop_after, args=(records[1],), daemon=True).start()
    with pytest.raises(Interrupted, match="1 of 2 recognisers are left"):
        compare.run(config)
    assert [path.exists() for path in records] == [True, True, True, False]
    before = {path: path.read_bytes() for path in records[:3]}
    assert compare.run(config)["failed_cells"] == []
    assert {path: path.read_bytes() for path in records[:3]} == before, "nothing that was recorded was done again"
    rows = {row.name: row for row in Record.from_bytes((folder / "compare.json").read_bytes(), "compare.json").rows}
    for row in rows.values():
        measured = json.loads((folder / "cells" / row.name / "leakage" / "leakage.json").read_bytes())
        assert row.worst is not None
        assert row.worst.cmc1 == measured["attackers"][0]["leakage"]["image"]["cmc"][0]
        scored = json.loads((folder / "cells" / row.name / "seed-0" / "evaluate.json").read_bytes())
        assert row.errors == {"pairs": {0: pytest.approx(100 - 100 * scored["results"][0]["accuracy"])}}
    assert rows["none"].worst is not None
    assert rows["none"].worst.cmc1 == 1.0
    monkeypatch.setattr(compare, "make_protected", None)
    monkeypatch.setattr(compare, "run_trials", None)
    assert compare.run(config)["failed_cells"] == [], "a third time there is nothing to do"


def _stop_after(path: Path) -> None:
    """SIGTERM to this process once a file is there."""
    while not path.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
