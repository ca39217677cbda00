"""Ingest from every source to both stores: every file is a sample or a ledger row, and the work is the same each time."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cluster.dataset import Dataset
from cluster.ingest import IngestProcessor
from cluster.picture import encode
from cluster.shard import Rejected, Sample, ShardWriter, read_ledger, read_members, read_samples
from cluster.source import open_source
from cluster.stage import StageError
from cluster.store import open_store
from cluster.verify import verify
from facemae.synthetic import SyntheticFaces
from tests.cluster.test_record import insightface

Make = Callable[..., Dataset]


def jpeg(number: int, size: int = 112) -> bytes:
    """A JPEG of one colour that tells its number."""
    file = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), (number % 256, number // 256 % 256, 99), np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((112, 112, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def samples_of(dataset: Dataset) -> list[Sample]:
    found = []
    for manifest in dataset.manifests():
        for sample in read_samples(dataset.read(manifest)) if manifest.file else []:
            assert isinstance(sample, Sample)
            found.append(Sample(sample.key, bytes(sample.image), sample.identity, sample.source))
    return found


def ledger_of(dataset: Dataset) -> list[Rejected]:
    return [row for m in dataset.manifests() if m.ledger for row in read_ledger(dataset.store.get(m.ledger))]


def stored(dataset: Dataset) -> dict[str, bytes]:
    """Everything but the manifests and the records of attempts, which hold times."""
    return {s.key: dataset.store.get(s.key) for s in dataset.store.list() if not s.key.startswith(("manifests/", "attempts/"))}


def write_files(root: Path, files: Mapping[str, bytes]) -> str:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def assert_sound(dataset: Dataset, samples: int, quarantined: int) -> None:
    found = verify(dataset.url)
    assert found.ok, (found.problems, found.strays)
    assert (found.totals["samples"], found.totals["quarantined"]) == (samples, quarantined)
    assert found.totals["samples_in"] == samples + quarantined


MESSY = {
    **{f"{name}/{i}.jpg": jpeg(10 * n + i) for n, name in enumerate(("ann", "ann-b", "cy/deep", "dé")) for i in range(3)},
    "ann/notes.txt": b"not a picture",
    "ann/zero.jpg": b"",
    "cy/large.jpg": jpeg(77, 150),
    "cy/cut.jpg": jpeg(78)[:-100],
    "dé/drawn.png": png(5),
    "top.jpg": jpeg(79),
}
BAD = {
    "ann/notes.txt": "not-an-image",
    "ann/zero.jpg": "empty-file",
    "cy/large.jpg": "wrong-size",
    "cy/cut.jpg": "damaged-image",
    "top.jpg": "no-label",
}


def test_a_messy_folder_is_accounted_for_file_by_file(tmp_path: Path, any_root: str, make_dataset: Make):
    source = write_files(tmp_path / "in", MESSY)
    dataset = make_dataset(any_root, source, shard_size=4)
    good = sorted(MESSY.keys() - BAD.keys())
    assert_sound(dataset, len(good), len(BAD))
    samples, rows = samples_of(dataset), ledger_of(dataset)
    assert [sample.source for sample in samples] == good  # in key order, each once
    assert {str(row.source): row.reason for row in rows} == BAD
    assert {str(row.source): row.num_bytes for row in rows} == {name: len(MESSY[name]) for name in BAD}
    keys = [*(sample.key for sample in samples), *(row.key for row in rows)]
    assert len(set(keys)) == len(MESSY)
    for sample in samples:
        kept = not str(sample.source).endswith(".png")
        assert sample.image == MESSY[str(sample.source)] if kept else encode(np.full((112, 112, 3), 5, np.uint8))
    labels: dict[str, set[int]] = {}
    for sample in samples:
        labels.setdefault(str(sample.source).rpartition("/")[0], set()).add(sample.identity)
    assert all(len(found) == 1 for found in labels.values())
    assert len(set.union(*labels.values())) == len(labels) == 4
    counts = [manifest.counts for manifest in dataset.manifests()]
    assert (sum(c["kept_bytes"] for c in counts), sum(c["reencoded"] for c in counts)) == (len(good) - 1, 1)
    assert dataset.description()["kind"] == "images"
    assert source not in dataset.store.get("dataset.json").decode()


def test_resize_takes_pictures_of_other_sizes(tmp_path: Path, make_dataset: Make):
    source = write_files(tmp_path / "in", {"a/1.jpg": jpeg(1), "a/2.jpg": jpeg(2, 150), "a/3.txt": b"no"})
    dataset = make_dataset(str(tmp_path / "out"), source, resize=True)
    assert_sound(dataset, 2, 1)
    assert Image.open(io.BytesIO(samples_of(dataset)[1].image)).size == (112, 112)


def test_without_keep_source_nothing_leads_back(tmp_path: Path, make_dataset: Make):
    source = write_files(tmp_path / "in", {"secretname/secretfile.jpg": jpeg(1), "secretname/bad.txt": b"x", "secrettop.jpg": b""})
    dataset = make_dataset(str(tmp_path / "out"), source, keep_source=False)
    (manifest,) = dataset.manifests()
    assert [member.name.rpartition(".")[2] for member in read_members(dataset.read(manifest))] == ["jpg", "cls"]
    assert [row.source for row in ledger_of(dataset)] == [None, None]
    assert not any(b"secret" in data for data in stored(dataset).values())
    assert_sound(dataset, 1, 2)


def test_the_source_stands_in_the_json(tmp_path: Path, make_dataset: Make):
    dataset = make_dataset(str(tmp_path / "out"), write_files(tmp_path / "in", {"Zoë/1.jpg": jpeg(1)}))
    members = {member.name: bytes(member.data) for member in read_members(dataset.read(dataset.manifests()[0]))}
    assert members == {
        "00000-000000.jpg": jpeg(1),
        "00000-000000.cls": b"0",
        "00000-000000.json": json.dumps({"source": "Zoë/1.jpg"}).encode(),
    }


def test_records_become_a_data_set(any_root: str, make_dataset: Make):
    images: list[tuple[Any, bytes]] = [(i // 4, jpeg(i)) for i in range(10)]
    images[3] = (0, b"no jpeg")
    images[7] = (0.5, jpeg(7))
    written = insightface(images)
    data = bytearray(written.rec)
    data[written.starts[10]] ^= 1
    for name, content in {"train.rec": bytes(data), "train.idx": written.idx}.items():
        open_store(any_root).put(f"in/{name}", content)
    dataset = make_dataset(f"{any_root}/out", f"{any_root}/in/train.rec", shard_size=3)
    good = [i for i in range(10) if i not in (3, 7, 9)]
    assert_sound(dataset, len(good), 3)
    assert [(s.source, s.identity, s.image) for s in samples_of(dataset)] == [(f"record {i + 1}", i // 4, jpeg(i)) for i in good]
    assert [row.reason for row in ledger_of(dataset)] == ["not-an-image", "bad-label", "damaged-record"]


def test_tars_become_a_data_set_and_a_cut_one_is_a_row(any_root: str, make_dataset: Make):
    store = open_store(any_root)
    for part in range(3):
        writer = ShardWriter()
        for i in range(4):
            writer.add(Sample(f"their/{part}{i}", jpeg(10 * part + i), 5 * part + i // 2))
        data = writer.finish()
        store.put(f"in/part-{part}.tar", data[: len(data) // 2] if part == 1 else data)
    dataset = make_dataset(f"{any_root}/out", f"{any_root}/in/part-*.tar", shard_size=999)
    samples = samples_of(dataset)
    assert_sound(dataset, len(samples), 1)
    assert Counter(str(s.source).split("/")[0] for s in samples) == {"part-0.tar": 4, "part-1.tar": 2, "part-2.tar": 4}
    for sample in samples:
        name = str(sample.source).rpartition("/")[2]
        assert (sample.image, sample.identity) == (jpeg(int(name)), 5 * int(name[0]) + int(name[1]) // 2)
    (row,) = ledger_of(dataset)
    assert (row.reason, row.source) == ("truncated-tar", "part-1.tar")


def test_synthetic_faces_become_a_data_set_that_is_the_same_everywhere(tmp_path: Path, s3_root: str, make_dataset: Make):
    text = "synthetic:ids=4,images=5,seed=3"
    local, remote = (make_dataset(root, text, shard_size=8) for root in (str(tmp_path / "out"), s3_root))
    assert stored(local) == stored(remote)
    assert_sound(local, 20, 0)
    faces = SyntheticFaces(4, 5, seed=3)
    expected = [encode(picture) for picture in faces.render(np.arange(20))]
    assert [(s.image, s.identity) for s in samples_of(local)] == [(image, i // 5) for i, image in enumerate(expected)]
    assert local.description()["identities"] == 4


def test_the_same_folder_gives_the_same_objects_and_a_changed_one_is_refused(tmp_path: Path, make_dataset: Make):
    files = {**{f"{i // 3}/{i}.jpg": jpeg(i) for i in range(6)}, "1/bad.txt": b"bad", "1/cut.jpg": jpeg(1)[:400]}
    source = write_files(tmp_path / "in", files)
    first = make_dataset(str(tmp_path / "first"), source, shard_size=3)
    second = make_dataset(str(tmp_path / "second"), shutil.copytree(source, tmp_path / "elsewhere").as_posix(), shard_size=3)
    assert stored(first) == stored(second)  # ledger and dataset.json included

    before = {s.key: first.store.get(s.key) for s in first.store.list()}
    make_dataset(first.url, source, shard_size=3)  # finished: nothing is done again
    first.store.delete("manifests/00001.json")
    make_dataset(first.url, source, shard_size=3)  # resumed: the same shard again
    assert stored(first) == {key: data for key, data in before.items() if not key.startswith(("manifests/", "attempts/"))}

    (tmp_path / "in" / "2").mkdir()
    (tmp_path / "in" / "2" / "new.jpg").write_bytes(jpeg(9))
    for options in ({}, {"resize": True}):
        with pytest.raises(StageError, match=r"another run|not of this input"):
            make_dataset(first.url, source, shard_size=3, **options)
    assert_sound(first, 6, 2)


@pytest.mark.faces
def test_real_aligned_faces_are_kept_byte_for_byte(shared: Path, tmp_path: Path, make_dataset: Make):
    people = [folder for folder in sorted((shared / "faces" / "lfw").iterdir()) if len(list(folder.iterdir())) >= 4][:5]
    (tmp_path / "in").mkdir()
    for folder in people:
        (tmp_path / "in" / folder.name).mkdir()
        for file in folder.iterdir():
            shutil.copy(file, tmp_path / "in" / folder.name)
    files = {f"{folder.name}/{file.name}": file.read_bytes() for folder in people for file in folder.iterdir()}
    dataset = make_dataset(str(tmp_path / "out"), str(tmp_path / "in"), shard_size=16)
    assert_sound(dataset, len(files), 0)
    found = {sample.source: hashlib.sha256(sample.image).hexdigest() for sample in samples_of(dataset)}
    assert found == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    assert dataset.description()["identities"] == len(people)
    assert sum(manifest.counts["reencoded"] for manifest in dataset.manifests()) == 0


# --- the processor alone ---


@pytest.mark.parametrize("threads", [1, 4])
def test_the_number_of_threads_changes_no_byte(tmp_path: Path, threads: int):
    source = open_source(write_files(tmp_path, {f"{i // 50}/{i:03d}.png": png(i % 250) for i in range(150)}))
    (unit,) = source.units(1000)
    processor = IngestProcessor(source)
    processor.open(threads)
    data = processor.compute(unit, processor.fetch(unit))
    assert [int(str(s.source)[2:5]) for s in read_samples(data.payload or b"") if isinstance(s, Sample)] == list(range(150))
    digest = hashlib.sha256(data.payload or b"").hexdigest()
    processor.open(2)
    assert hashlib.sha256(processor.compute(unit, processor.fetch(unit)).payload or b"").hexdigest() == digest


def test_a_shard_of_nothing_usable_has_no_tar(tmp_path: Path):
    source = open_source(write_files(tmp_path, {"a/1.txt": b"1", "a/2.txt": b"2"}))
    (unit,) = source.units(10)
    processor = IngestProcessor(source)
    processor.open(1)
    data = processor.compute(unit, processor.fetch(unit))
    assert (data.payload, data.samples, len(data.rejected)) == (None, 0, 2)


def test_options_that_shape_the_output_are_in_the_description(tmp_path: Path):
    source = open_source(write_files(tmp_path, {"a/1.jpg": jpeg(1)}))
    described = [json.dumps(IngestProcessor(source, resize=r, keep_source=k).describe()) for r in (False, True) for k in (False, True)]
    assert len(set(described)) == 4
