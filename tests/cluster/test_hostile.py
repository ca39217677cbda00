"""Everything a stranger may send, through the real ingest: which samples survive with which bytes, and which rows say what is gone."""

from __future__ import annotations

import itertools
import re
import shutil
import struct
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cluster import ingest as ingest_module
from cluster.dataset import Dataset, ShardData
from cluster.ingest import IngestProcessor
from cluster.shard import Sample, read_ledger, read_samples
from cluster.source import open_source
from cluster.tar import MAX_MEMBER_BYTES, read_members
from cluster.verify import verify
from jobs import ingest as ingest_job
from tests.cluster.test_ingest import jpeg
from tests.cluster.test_record import insightface
from tests.hostile_tars import CASES, Expected, around, face
from tests.tars import END, raw_member


def ingested(folder: Path, data: bytes, **options: bool) -> ShardData:
    """One tar through fetch and compute."""
    (folder / "their.tar").write_bytes(data)
    source = open_source(str(folder / "their.tar"))
    (unit,) = source.units(100)
    processor = IngestProcessor(source, **options)
    processor.open(1)
    return processor.compute(unit, processor.fetch(unit))


def check(made: ShardData, expected: Expected) -> None:
    """Exactly these samples and rows, in this order, each under a key of ours, and the counts add up."""
    samples = list(read_samples(made.payload)) if made.payload else []
    assert all(isinstance(item, Sample) for item in samples)
    found: dict[str, Any] = {item.key: (bytes(item.image), item.identity) for item in samples if isinstance(item, Sample)}
    found |= {row.key: row.reason for row in made.rejected}
    assert [found[key] for key in sorted(found)] == expected
    assert sorted(found) == [f"00000-{number:06d}" for number in range(len(expected))]
    assert made.samples == len(samples)
    reasons = Counter(item for item in expected if isinstance(item, str))
    assert {name: n for name, n in made.counts.items() if name.startswith("rejected:")} == {f"rejected:{r}": n for r, n in reasons.items()}
    for item in [*samples, *made.rejected]:
        assert re.fullmatch(r"their\.tar(/[^\x00-\x1f\x7f-\x9f\u2028-\u202e]{0,1014})?", str(item.source)), item.source
    assert all(row.error and len(row.error) < 500 and "\n" not in row.error for row in made.rejected)
    names = [member.name for member in read_members(made.payload)] if made.payload else []
    assert all(re.fullmatch(r"00000-[0-9]{6}\.(jpg|cls|json)", name) for name in names)


@pytest.mark.parametrize("name", CASES)
def test_a_strangers_tar_costs_what_it_must_and_no_more(name: str, tmp_path: Path):
    data, expected = CASES[name]
    check(ingested(tmp_path, data), expected)


def test_the_rows_say_what_happened_and_what_to_do(tmp_path: Path):
    said = {
        "wholes: gzip": "compressed by gzip: decompress it first",
        "wholes: bzip2": "compressed by bzip2",
        "wholes: xz": "compressed by xz",
        "wholes: zip": "compressed by zip",
        "wholes: zero bytes": "0 bytes",
        "wholes: cut in a picture": "fetch the tar again",
        "wholes: two tars joined": "tars were joined",
        "not_files: symlink, size field lies": "a symbolic link, not a regular file: make the tar again with files only",
        "not_files: PAX sparse 1.0": "a sparse file",
        "sizes: over the limit": f"the limit is {MAX_MEMBER_BYTES}",
        "names: global PAX path": "gives every member the same path",
        "names: over 64 KiB": "the limit is 65536",
        "labels: label b'-1'": "no integer from 0 to 2**63 - 1: b'-1'",
    }
    for name, text in said.items():
        (row,) = ingested(tmp_path, CASES[name][0]).rejected
        assert text in row.error, name


@pytest.mark.parametrize("options", [["--format=gnu"], *(["--format=posix", f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0"))])
def test_no_byte_of_a_sparse_file_becomes_a_picture(options: list[str], tmp_path: Path):
    """Made by GNU tar itself, its map and data being what our reader must pass over."""
    if shutil.which("tar") is None:
        pytest.skip("no tar program")
    folder = tmp_path / "in"
    folder.mkdir()
    for name, number in (("a", 1), ("z", 2)):
        (folder / f"{name}.jpg").write_bytes(jpeg(number))
        (folder / f"{name}.cls").write_text(str(number))
    (folder / "m.cls").write_text("3")
    with (folder / "m.jpg").open("wb") as file:
        for hole in range(60):  # more than the header's own map holds
            file.seek(hole * 100_000)
            file.write(jpeg(3))
        file.truncate(9_000_000)
    files = ["a.jpg", "a.cls", "m.jpg", "m.cls", "z.jpg", "z.cls"]
    subprocess.run(
        ["tar", "--sparse", *options, "-cf", str(tmp_path / "x.tar"), "-C", str(folder), *files], check=True, env={"PATH": "/usr/bin:/bin"}
    )
    data = (tmp_path / "x.tar").read_bytes()
    assert len(data) < 5_000_000, "the file system keeps holes"
    check(ingested(tmp_path, data), around("not-a-file"))


def test_a_tar_of_very_many_tiny_members_has_a_ledger_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ingest_module, "MAX_ROWS", 1000)
    tiny = raw_member(b"a.txt", b"")
    made = ingested(tmp_path, face(b"first", 1) + tiny * 20_000 + face(b"last", 2) + END)
    assert (made.samples, len(made.rejected)) == (2, 1001)
    assert (made.rejected[-1].reason, made.rejected[-1].num_samples) == ("not-listed", 19_000)
    assert sum(row.num_samples for row in made.rejected) == made.counts["rejected:no-image"] == 20_000


def test_what_would_make_a_shard_larger_than_any_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image = jpeg(3)
    monkeypatch.setattr(ingest_module, "MAX_SHARD_BYTES", 2 * (len(image) + 4096))
    made = ingested(tmp_path, b"".join(face(b"%d" % i, 3) for i in range(4)) + END)
    assert [made.samples, *(row.reason for row in made.rejected)] == [2, "shard-full", "shard-full"]
    assert len(made.payload or b"") < ingest_module.MAX_SHARD_BYTES + len(END)


@pytest.mark.scale
def test_a_million_tiny_members_cost_seconds_and_a_bounded_ledger(tmp_path: Path):
    made = ingested(tmp_path, raw_member(b"a.txt", b"") * 1_000_000 + END)
    assert (len(made.rejected), made.counts["rejected:no-image"]) == (100_001, 1_000_000)


def test_a_folder_of_hostile_tars_through_the_whole_job(tmp_path: Path, ray_session: None, capfd: pytest.CaptureFixture[str]):
    """Every case at once, on workers, into a data set that verifies; no stranger's name in a key, a path or a line of output."""
    (tmp_path / "in").mkdir()
    cases = {name: case for name, case in CASES.items() if name != "sizes: over the limit"}  # 64 MiB, tested above
    for number, (data, _) in enumerate(cases.values()):
        (tmp_path / "in" / f"{number:03d}.tar").write_bytes(data)
    out = tmp_path / "out"
    assert ingest_job.main(["--source", str(tmp_path / "in"), "--output", str(out), "--num-workers", "2"]) == 0
    shown = capfd.readouterr()
    dataset = Dataset(str(out))
    found = verify(dataset.url)
    assert found.ok, (found.problems, found.strays)
    expected = [item for _, items in cases.values() for item in items]
    reasons = Counter(item for item in expected if isinstance(item, str))
    samples = [item for item in expected if not isinstance(item, str)]
    assert (found.totals["samples"], found.totals["quarantined"]) == (len(samples), reasons.total())
    for number, (manifest, (name, (_, items))) in enumerate(zip(dataset.manifests(), cases.items(), strict=True)):
        rows = read_ledger(dataset.store.get(manifest.ledger)) if manifest.ledger else []
        here: dict[str, Any] = {row.key: row.reason for row in rows}
        here |= {i.key: (bytes(i.image), i.identity) for i in read_samples(dataset.read(manifest))} if manifest.file else {}  # type: ignore[union-attr]
        assert [here[key] for key in sorted(here)] == items, name
        assert sorted(here) == [f"{number:05d}-{i:06d}" for i in range(len(items))]
    assert f"left out: {reasons.most_common(1)[0][1]} {reasons.most_common(1)[0][0]}, " in shown.out
    assert all(f"{count} {reason}" in shown.out for reason, count in reasons.items())
    paths = [str(path.relative_to(out)) for path in out.rglob("*")]
    pattern = (
        r"(dataset|index)\.json|shards|manifests|quarantine|attempts|(shards|manifests|quarantine|attempts)/[0-9a-f-]+\.(tar|json|parquet)"
    )
    assert all(re.fullmatch(pattern, path) for path in paths)
    for text in (shown.out, shown.err):
        assert not any(word in text for word in ("evil", "secrets leaked", "passwd", "\x1b[2J", "Traceback"))


def test_the_cases_are_many_and_each_reason_is_among_them():
    assert len(CASES) > 80
    reasons = {item for _, items in CASES.values() for item in items if isinstance(item, str)}
    assert reasons == {"not-a-file", "truncated-tar", "too-large", "no-label", "no-image", "bad-label", "empty-file", "not-a-tar"}


def test_a_strangers_rec_costs_the_records_that_are_damaged(tmp_path: Path):
    written = insightface([(i // 2, jpeg(i)) for i in range(1, 13)])
    data, starts = bytearray(written.rec), written.starts
    data[starts[2]] ^= 1  # the magic number
    struct.pack_into("<I", data, starts[4] + 4, 1 << 28)  # a length past the end
    data[starts[5] + 8 : starts[6]] = bytes(starts[6] - starts[5] - 8)  # label 0, and zeros for a picture
    struct.pack_into("<I", data, starts[7] + 4, 30)  # a length that ends in the picture
    struct.pack_into("<I", data, starts[8] + 8, 1 << 20)  # more labels than there are bytes
    struct.pack_into("<f", data, starts[9] + 12, -7.0)
    data[starts[11] + 7] |= 1 << 5  # the first part of a record that never goes on
    costs = {
        2: "damaged-record",
        4: "damaged-record",
        5: "not-an-image",
        7: "damaged-record",
        8: "bad-label",
        9: "bad-label",
        11: "damaged-record",
    }
    (tmp_path / "train.rec").write_bytes(bytes(data))
    (tmp_path / "train.idx").write_bytes(written.idx)
    source = open_source(str(tmp_path / "train.rec"))
    processor = IngestProcessor(source)
    processor.open(1)
    made = [processor.compute(unit, processor.fetch(unit)) for unit in source.units(5)]
    found: dict[str, Any] = {row.key: row.reason for part in made for row in part.rejected}
    for item in itertools.chain(*(read_samples(part.payload or b"") for part in made)):
        assert isinstance(item, Sample)
        found[item.key] = (bytes(item.image), item.identity)
    assert [found[key] for key in sorted(found)] == [costs.get(i, (jpeg(i), i // 2)) for i in range(1, 13)]
    assert [part.samples for part in made] == [2, 2, 1]
