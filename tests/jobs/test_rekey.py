"""``--rekey`` from protect to the report: new keys, the same pixels and the same ranks, and nothing that leads back."""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import facemae.model  # noqa: F401  # registers the architectures
from cluster.attempt import Attempt
from cluster.dataset import Dataset, Labels, ShardData
from cluster.picture import decode, encode
from cluster.protect import require_same_keys
from cluster.ranks import read_ranks
from cluster.secret import KeyMap, SecretError
from cluster.shard import Rejected, Sample, ShardWriter, read_samples
from cluster.store import open_store
from cluster.verify import verify
from facemae.synthetic import SyntheticFaces
from jobs import leakage, pipeline, protect, report
from jobs.command import UsageError, from_mapping
from jobs.pipeline import PipelineConfig
from tests.jobs.test_leakage_job import write_recognizer
from tests.training import initial

SECRET = "9c3f" * 16


def new_key(key: str) -> str:
    """The key that must come out, by the standard library."""
    return hmac.digest(SECRET.encode(), key.encode(), hashlib.sha256).hex()[:32]


def samples(root: str) -> dict[str, list[Sample]]:
    """Samples by shard, in the shard's order."""
    dataset = Dataset(root)
    shards = {manifest.shard: dataset.read(manifest) for manifest in dataset.manifests()}
    return {name: [item for item in read_samples(data) if isinstance(item, Sample)] for name, data in shards.items() if data}


def objects(root: str) -> dict[str, bytes]:
    """Every object below a root, parquet also as the text of its rows, which lie compressed in the file."""
    store = open_store(root)
    found = {stored.key: store.get(stored.key) for stored in store.list()}
    tables = {key: data for key, data in found.items() if key.endswith(".parquet")}
    return found | {f"{key}#rows": repr(pq.read_table(io.BytesIO(data)).to_pylist()).encode() for key, data in tables.items()}


class Sets:
    """An original with a damaged picture, protected with and without new keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "secret").write_text(SECRET + "\n")
        (folder / "other").write_text("0" * 64)
        self.secret, self.other = f"file:{folder}/secret", f"file:{folder}/other"
        self.original = str(folder / "the original place")
        initial().save_pretrained(folder / "weights")
        self.plain, self.released = str(folder / "plain"), str(folder / "released")

    def protect(self, output: str, rekey: str | None = None, source: str | None = None) -> None:
        """One run of the job."""
        settings: dict[str, Any] = {"weights": str(self.folder / "weights"), "seed": 5, "device": "cpu", "batch_size": 5, "num_workers": 1}
        protect.run(protect.ProtectConfig(input=source or self.original, output=output, rekey=rekey, **settings))


@pytest.fixture(scope="module")
def sets(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Sets:
    sets = Sets(tmp_path_factory.mktemp("rekey"))
    source, faces = Dataset(sets.original), SyntheticFaces.parse("ids=8,images=4").render(range(32))
    for shard in range(2):
        writer = ShardWriter()
        for number in range(16):
            picture = encode(faces[shard * 16 + number])
            picture = picture[:300] if (shard, number) == (1, 3) else picture
            writer.add(Sample(f"{shard:05d}-{number:07d}", picture, shard * 4 + number // 4, f"people/no {number}.jpg"))
        data = ShardData(writer.finish(), 16, Labels.of(writer.labels))
        source.commit(f"{shard:05d}", data, fingerprint="f", attempt=Attempt("run", 1), seconds={})
    source.finish("images", {"parent": None, "config": {"stage": "ingest"}, "fingerprint": "f"}, source.manifests())
    sets.protect(sets.plain)
    sets.protect(sets.released, sets.secret)
    return sets


def test_new_keys_the_same_pixels_in_the_order_of_the_keys(sets: Sets) -> None:
    plain, released = samples(sets.plain), samples(sets.released)
    assert [len(shard) for shard in released.values()] == [16, 15]
    for name, shard in plain.items():
        expected = {new_key(s.key): (s.identity, bytes(s.image)) for s in shard}
        assert {s.key: (s.identity, bytes(s.image)) for s in released[name]} == expected
        assert [s.key for s in released[name]] == sorted(expected)
        assert [s.key for s in released[name]] != list(expected), "the order of the originals shows"
    assert verify(sets.released).ok


def _ledger(dataset: Dataset) -> list[Rejected]:
    return dataset.ledger(dataset.manifest("00001"))


def test_the_ledger_keeps_the_reason_alone(sets: Sets) -> None:
    (plain,), (row,) = (_ledger(Dataset(root)) for root in (sets.plain, sets.released))
    assert (row.key, row.reason) == (new_key("00001-0000003"), plain.reason)
    assert (row.error, row.num_bytes, row.source) == ("", 0, None)
    assert plain.num_bytes == 300


def test_nothing_in_the_released_set_leads_back(sets: Sets) -> None:
    lineage = Dataset(sets.released).description()["lineage"]
    assert lineage["parent"] == {"fingerprint": "f", "samples": 32}
    assert lineage["config"]["rekey"] == KeyMap(sets.secret).describe()
    keys = [s.key.encode() for shard in samples(sets.original).values() for s in shard]
    marks = [*keys, b"the original place", b"people/", SECRET.encode(), bytes.fromhex(SECRET), str(sets.folder / "secret").encode()]
    assert [mark for mark in marks if any(mark in data for data in objects(sets.plain).values())], "the search finds what is there"
    for key, data in objects(sets.released).items():
        assert [mark for mark in marks if mark in data] == [], key


def test_a_shard_given_up_does_not_name_the_original(sets: Sets, tmp_path: Path) -> None:
    source = str(tmp_path / "the original place")
    for key, data in {k: v for k, v in objects(sets.original).items() if "#" not in k}.items():
        open_store(source).put(key, data if key.endswith(".json") or "00000" in key else data[:-512])
    for output, rekey, named in ((tmp_path / "plain", None, True), (tmp_path / "released", sets.secret, False)):
        sets.protect(str(output), rekey, source)
        failure = Dataset(str(output)).manifest("00001").failure
        assert failure is not None
        assert ("the original place" in failure) is named
        assert any(b"the original place" in data for data in objects(str(output)).values()) is named
        assert "ShardError" in failure


def test_another_secret_is_refused_by_name_finished_or_not(sets: Sets, tmp_path: Path) -> None:
    unfinished = str(tmp_path / "unfinished")
    for key, data in objects(sets.released).items():
        if "#" not in key and key not in ("dataset.json", "manifests/00001.json"):
            open_store(unfinished).put(key, data)
    for output in (sets.released, unfinished, sets.plain):
        with pytest.raises(SecretError, match=f"was begun with another secret than {sets.other}"):
            sets.protect(output, sets.other)
    sets.protect(unfinished, sets.secret)
    assert [m.sha256 for m in Dataset(unfinished).manifests()] == [m.sha256 for m in Dataset(sets.released).manifests()]
    require_same_keys(Dataset(sets.original), Dataset(str(tmp_path / "new")), sets.secret)


def test_workers_read_the_secret_for_themselves(sets: Sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLY_THE_DRIVER_HAS_IT", SECRET)
    with pytest.raises(Exception, match="env:ONLY_THE_DRIVER_HAS_IT: the environment variable is not set here; driver and workers each"):
        sets.protect(str(tmp_path / "out"), "env:ONLY_THE_DRIVER_HAS_IT")
    assert list(Dataset(str(tmp_path / "out")).names()) == []


def _measure(sets: Sets, protected: str, output: Path, rekey: str | None) -> dict[str, tuple[object, ...]]:
    """The job's leakage ranks, all columns, by key."""
    recognizer = write_recognizer(sets.folder / "alpha.onnx", 0)
    roots: dict[str, Any] = {"original": sets.original, "protected": protected, "output": str(output)}
    leakage.run(leakage.LeakageConfig(**roots, recognizer=[str(recognizer)], pixels=False, rekey=rekey, num_workers=1))
    ranks = Dataset(str(output / "alpha" / "protected-original"), ".parquet")
    rows: dict[str, tuple[object, ...]] = {}
    for manifest in ranks.manifests():
        table, _ = read_ranks(ranks.read(manifest))
        columns = (table.identity, table.rank_image, table.rank_identity, table.others)
        similarities = (table.mate_similarity, table.identity_similarity, table.top_similarity)
        rows |= dict(zip(table.key, zip(*(c.tolist() for c in (*columns, *similarities)), strict=True), strict=True))
    return rows


def test_ranks_are_those_of_the_same_set_under_its_own_keys(long: None, sets: Sets, tmp_path: Path) -> None:
    plain = _measure(sets, sets.plain, tmp_path / "plain", None)
    released = _measure(sets, sets.released, tmp_path / "released", sets.secret)
    assert len(plain) == 31
    assert {new_key(key): row for key, row in plain.items()} == released
    before, after = (json.loads((tmp_path / name / "leakage.json").read_text())["attackers"][0] for name in ("plain", "released"))
    for search in ("leakage", "reference", "utility"):
        for mate in ("image", "identity"):
            assert after[search][mate] == before[search][mate]
        assert after[search]["left_out"] == before[search]["left_out"] == (search == "reference")  # the damaged one
    assert after["leakage"]["histograms"]["mate"] == before["leakage"]["histograms"]["mate"]
    _check_report(sets, tmp_path / "released")


def _check_report(sets: Sets, output: Path) -> None:
    """Each protected picture of the page stands beside its own original; without the secret a sentence says what is missing."""
    measurement, _ = report.read_measurement(open_store(str(output)))
    pictures = report.choose_pictures(measurement, str(output), 6, 0, sets.secret)
    own = {new_key(s.key): s for shard in samples(sets.original).values() for s in shard}
    released = {s.key: s for shard in samples(sets.released).values() for s in shard}
    assert len(pictures) == 6
    for picture in pictures:
        assert picture.protected.endswith(_base64(bytes(released[picture.key].image)))
        assert picture.original.endswith(_base64(_again(own[picture.key])))
        assert picture.masked is not None
        assert picture.outcome
    for rekey, message in ((None, "give --rekey"), (sets.other, "another secret than")):
        report.run(report.ReportConfig(output=str(output), rekey=rekey))
        assert message in (output / "report.html").read_text()
    report.run(report.ReportConfig(output=str(output), rekey=sets.secret))
    assert pictures[0].protected in (output / "report.html").read_text()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _again(sample: Sample) -> bytes:
    return encode(decode(sample.image))


@pytest.mark.parametrize(
    ("protected", "rekey", "message"),
    [
        ("released", None, "were replaced for a release: give --rekey env:NAME or file:PATH of the same secret"),
        ("released", "other", "another secret than the one that the keys were replaced with"),
        ("plain", "secret", "were not replaced: leave out --rekey"),
    ],
)
def test_a_measurement_needs_the_secret_that_made_the_set(
    sets: Sets, tmp_path: Path, protected: str, rekey: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--original", sets.original, "--protected", getattr(sets, protected), "--output", str(tmp_path / "out")]
    flags += ["--recognizer", str(write_recognizer(tmp_path / "alpha.onnx", 0))]
    assert leakage.main([*flags, *(["--rekey", getattr(sets, rekey)] if rekey else [])]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_pipeline_hands_the_reference_on(tmp_path: Path) -> None:
    source = {"source": "synthetic:ids=2,images=2"}
    content = {"root": str(tmp_path), "recognizer": "in.onnx", "attackers": ["a.onnx"], "training": source, "original": source}

    def plan(**changes: object) -> dict[str, object]:
        config = from_mapping(PipelineConfig, {**content, **changes}, where="test", complete=True)
        return {name: getattr(settings, "rekey", None) for name, _, settings in pipeline.plan(config)}

    found = plan(protect={"rekey": "env:REKEY"})
    assert {name for name, rekey in found.items() if rekey == "env:REKEY"} == {"protect", "leakage", "report"}
    assert set(plan().values()) == {None}
    with pytest.raises(UsageError, match="section leakage: 'rekey' is filled in by the pipeline"):
        plan(protect={"rekey": "env:REKEY"}, leakage={"rekey": "env:OTHER"})
