"""What each source lists, labels and reads; every item of it comes out as a sample or a ledger row."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster import listing
from cluster import source as source_module
from cluster.dataset import Dataset
from cluster.picture import decode, encode
from cluster.shard import Rejected, Sample, ShardWriter
from cluster.source import (
    FolderSource,
    FolderUnit,
    RecordSource,
    Source,
    SyntheticSource,
    TarSource,
    open_source,
)
from cluster.store import StoredObject, StoreError, join_url, open_store
from facemae.synthetic import SyntheticFaces
from tests.cluster.test_record import insightface, numbered


def items(source: Source, shard_size: int = 100) -> list[Sample | Rejected]:
    """Everything the source gives, as a worker would read it: units and source travel by pickle."""
    found = []
    for unit in pickle.loads(pickle.dumps(source.units(shard_size))):
        for item in (there := pickle.loads(pickle.dumps(source))).samples(unit, there.fetch(unit)):
            found.append(Sample("", bytes(item.image), item.identity, item.source) if isinstance(item, Sample) else item)
    return found


def put_all(root: str, files: dict[str, bytes]) -> str:
    for key, data in files.items():
        open_store(root).put(key, data)
    return root


def tar_of(*samples: tuple[str, bytes, int]) -> bytes:
    writer = ShardWriter()
    for key, image, identity in samples:
        writer.add(Sample(key, image, identity))
    return writer.finish()


# --- which source a text names ---


@pytest.mark.parametrize(
    ("files", "text", "kind"),
    [
        ({"a/1.jpg": b"1"}, "", FolderSource),
        ({"a/1.jpg": b"1"}, "/", FolderSource),
        ({"00000.tar": b"1", "00001.tar": b"1"}, "", TarSource),
        ({"00000.tar": b"1"}, "/00000.tar", TarSource),
        ({"x-0.tar": b"1"}, "/x-*.tar", TarSource),
        ({"train.rec": b"1", "train.idx": b"1"}, "/train.rec", RecordSource),
    ],
)
def test_a_text_opens_the_right_source(tmp_path: Path, files: dict[str, bytes], text: str, kind: type[Source]):
    assert type(open_source(put_all(str(tmp_path), files) + text)) is kind


def test_a_synthetic_source_is_parsed():
    source = open_source("synthetic:ids=3,images=2,seed=5")
    assert isinstance(source, SyntheticSource)
    assert source.describe() == {"source": "synthetic", "ids": 3, "images": 2, "seed": 5}
    for text in ("synthetic:", "synthetic:ids=0,images=1", "synthetic:ids=x,images=1", "synthetic:faces=3"):
        with pytest.raises(ValueError, match=r"=|ids"):
            open_source(text)


def test_nothing_there_says_what_to_give(any_root: str):
    message = "holds no files: give a folder with one folder" if any_root.startswith("s3://") else "does not exist"
    with pytest.raises(StoreError, match=message) as caught:
        open_source(any_root)
    assert caught.value.fatal
    with pytest.raises(StoreError, match="matches") as caught:
        open_source(join_url(any_root, "*.tar")).units(10)
    assert caught.value.fatal
    with pytest.raises(StoreError, match=r"none\.idx"):
        open_source(join_url(any_root, "none.rec")).units(10)


def test_an_empty_folder_and_a_file_in_its_place(tmp_path: Path):
    with pytest.raises(StoreError, match="holds no files"):
        open_source(str(tmp_path))
    (tmp_path / "faces.tar.gz").write_bytes(b"1")
    with pytest.raises(StoreError, match=r"is a file: give a folder, FILE.rec, or a .tar that is not compressed"):
        open_source(str(tmp_path / "faces.tar.gz"))


def test_a_data_set_is_no_source_but_its_shards_are(any_root: str, make_dataset: Callable[..., Dataset]):
    first = make_dataset(join_url(any_root, "first"), "synthetic:ids=2,images=3", shard_size=4)
    with pytest.raises(StoreError, match="is a data set already") as caught:
        open_source(first.url)
    assert caught.value.fatal
    remedy = str(caught.value).rpartition("--source ")[2]
    second = make_dataset(join_url(any_root, "second"), remedy)
    assert second.description()["samples"] == first.description()["samples"] == 6
    assert [m.identities for m in second.manifests()] == [m.identities for m in first.manifests()]


def test_files_without_an_identitys_folder_are_refused_with_the_remedy(any_root: str):
    source = open_source(put_all(any_root, {"1.jpg": b"1", "2.jpg": b"2"}))
    with pytest.raises(StoreError, match=r"2 files and no folder of an identity: put each person's images into a folder") as caught:
        source.units(10)
    assert caught.value.fatal


# --- what is never opened ---


def test_a_file_or_tar_above_the_limit_is_a_row_and_is_not_fetched(any_root: str, monkeypatch: pytest.MonkeyPatch):
    for name, module in (("MAX_MEMBER_BYTES", source_module), ("MAX_SHARD_BYTES", source_module), ("MAX_SHARD_BYTES", listing)):
        monkeypatch.setattr(module, name, 5000)
    put_all(
        any_root, {"dir/a/1.jpg": bytes(5001), "dir/a/2.jpg": bytes(5000), "tar/a.tar": bytes(5001), "tar/b.tar": tar_of(("k", b"1", 0))}
    )
    fetched: list[str] = []
    get = type(open_store(any_root)).get
    monkeypatch.setattr(type(open_store(any_root)), "get", lambda self, key: (fetched.append(key), get(self, key))[1])
    for part, large, good in (("dir", "a/1.jpg", "a/2.jpg"), ("tar", "a.tar", "b.tar/k")):
        source = open_source(join_url(any_root, part))
        found = [item for unit in source.units(10) for item in source.samples(unit, source.fetch(unit))]
        assert [(item.reason, item.source, item.num_bytes) for item in found if isinstance(item, Rejected)] == [("too-large", large, 5001)]
        assert [item.source for item in found if isinstance(item, Sample)] == [good]
    assert fetched == ["a/2.jpg", "b.tar"]


def test_units_are_cut_by_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (source_module, listing):
        monkeypatch.setattr(module, "MAX_SHARD_BYTES", 1000)
    source = open_source(
        put_all(str(tmp_path / "dir"), {f"a/{i}.jpg": bytes(size) for i, size in enumerate((400, 600, 1, 1000, 1500, 3, 2))})
    )
    assert [unit.num_samples for unit in source.units(100)] == [2, 1, 1, 1, 2]
    sizes = [300, 400, 2000, 100, 900]
    url = insightface([(i, bytes([65 + i]) * size) for i, size in enumerate(sizes)]).save(tmp_path)
    records = open_source(url)
    assert [unit.num_samples for unit in records.units(100)] == [2, 1, 1, 1]
    found = items(records)
    assert [item.reason if isinstance(item, Rejected) else len(item.image) for item in found] == [300, 400, "too-large", 100, 900]


@pytest.mark.parametrize("offsets", [[0], [0, 5], [0, 0, 0], [0, 10, 10, 25, 26, 40], list(range(0, 500, 7))])
@pytest.mark.parametrize("shard_size", [1, 3, 1000])
def test_pieces_cover_everything_once_and_keep_both_limits(offsets: list[int], shard_size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listing, "MAX_SHARD_BYTES", 20)
    pieces = listing.cut(np.array(offsets), shard_size)
    assert [i for start, stop in pieces for i in range(start, stop)] == list(range(len(offsets) - 1))
    for start, stop in pieces:
        assert stop - start <= shard_size
        assert stop - start == 1 or offsets[stop] - offsets[start] <= 20


def test_pipes_and_devices_are_never_opened(tmp_path: Path):
    put_all(str(tmp_path), {"a/1.jpg": b"1"})
    os.mkfifo(tmp_path / "a" / "2.jpg")
    (tmp_path / "a" / "3.jpg").symlink_to("/dev/zero")
    (tmp_path / "a" / "5.jpg").symlink_to("/etc/hostname")
    (tmp_path / "a" / "6.jpg").symlink_to(tmp_path / "a" / "1.jpg")
    (tmp_path / "elsewhere").symlink_to("/usr/share")
    put_all(str(tmp_path), {"a/4.jpg": b"4"})
    found = items(open_source(str(tmp_path)))
    assert [bytes(item.image) for item in found if isinstance(item, Sample)] == [b"1", b"4", b"1"]
    rows = [(item.source, item.reason) for item in found if isinstance(item, Rejected)]
    assert rows == [(name, "not-a-file") for name in ("a/2.jpg", "a/3.jpg", "a/5.jpg", "elsewhere")]
    os.mkfifo(tmp_path / "x.tar")
    assert [item.reason for item in items(open_source(str(tmp_path / "x.tar"))) if isinstance(item, Rejected)] == ["not-a-file"]


def test_names_that_leave_the_root_are_never_opened(monkeypatch: pytest.MonkeyPatch):
    """An S3 listing may hold any name; the stores raise a fatal error for these, and a stranger's object must not end the run."""
    names = ["../up/1.jpg", "/abs/1.jpg", "a/../../1.jpg", "a/1.jpg", "b/", "a/..", "..a/1.jpg"]

    class Listed:
        url = "s3://bucket"

        def list(self, prefix: str = "") -> Iterator[StoredObject]:
            return (StoredObject(name, 0 if name.endswith("/") else 5) for name in names if name.startswith(prefix))

        def get(self, key: str) -> bytes:
            assert key in ("a/1.jpg", "..a/1.jpg")
            return b"image"

    monkeypatch.setattr(source_module, "open_store", lambda url: Listed())
    source = open_source("s3://bucket")
    found = [item for unit in source.units(10) for item in source.samples(unit, source.fetch(unit))]
    assert {str(item.source) for item in found if isinstance(item, Rejected) and item.reason == "bad-name"} == {*names[:3], "a/.."}
    assert {item.source for item in found if isinstance(item, Sample)} == {"a/1.jpg", "..a/1.jpg"}


def test_a_name_is_shown_on_one_line_whatever_it_holds(tmp_path: Path):
    name = "a\nERROR root: \x1b[31mred\u202egpj.x\x7f" + "\u2028"
    put_all(str(tmp_path), {f"{name}/1.jpg": b"1"})
    (item,) = items(open_source(str(tmp_path)))
    assert item.source == "a\ufffdERROR root: \ufffd[31mred\ufffdgpj.x\ufffd\ufffd/1.jpg"
    assert len(listing.printable("x" * 10**6)) == 1024


# --- folders ---


def test_folders_are_identities_in_name_order(any_root: str):
    keys = ["al/1.jpg", "al/2.jpg", "al-b/1.jpg", "zoe/x/deep.jpg", "zoe/1.jpg", "Bob Ü/1.jpg"]
    found = items(FolderSource(put_all(any_root, {key: key.encode() for key in keys})))
    ordered = sorted(keys)
    folders = [key.rpartition("/")[0] for key in ordered]
    labels = list(dict.fromkeys(folders))
    assert found == [Sample("", key.encode(), labels.index(f), key) for key, f in zip(ordered, folders, strict=True)]


def test_labels_do_not_depend_on_where_the_folder_lies(s3_root: str, tmp_path: Path):
    files = {f"{name}/{i}.jpg": name.encode() for name in ("a", "a b", "a-b", "a.b", "a0", "a_b", "ab") for i in range(2)}
    local, remote = (FolderSource(put_all(root, files)) for root in (str(tmp_path), s3_root))
    assert items(local, 3) == items(remote, 3)
    assert local.describe() == remote.describe()


@pytest.mark.parametrize("shard_size", [1, 3, 4, 5, 100])
def test_units_cover_every_file_once(tmp_path: Path, shard_size: int):
    source = FolderSource(put_all(str(tmp_path), {f"{i // 4}/{i:02d}.jpg": b"%d" % i for i in range(13)}))
    units = source.units(shard_size)
    assert [unit.name for unit in units] == [f"{i:05d}" for i in range(len(units))]
    assert all(unit.num_samples == len(unit.files) <= shard_size for unit in units if isinstance(unit, FolderUnit))
    assert [len(units), sum(unit.num_samples for unit in units)] == [-(-13 // shard_size), 13]
    assert len(items(source, shard_size)) == 13


def test_a_file_at_the_top_has_no_identity(any_root: str):
    found = items(FolderSource(put_all(any_root, {"a/1.jpg": b"1", "readme.txt": b"hello"})))
    assert found[0] == Sample("", b"1", 0, "a/1.jpg")
    assert isinstance(found[1], Rejected)
    assert (found[1].reason, found[1].num_bytes, found[1].source) == ("no-label", 5, "readme.txt")


def test_a_file_that_vanishes_is_a_row(any_root: str):
    source = FolderSource(put_all(any_root, {"a/1.jpg": b"1", "a/2.jpg": b"2"}))
    (unit,) = source.units(10)
    open_store(any_root).delete("a/1.jpg")
    found = list(source.samples(unit, source.fetch(unit)))
    assert [item.reason if isinstance(item, Rejected) else item.source for item in found] == ["vanished", "a/2.jpg"]


def test_links_to_nowhere_and_names_that_are_no_unicode_cost_nothing_else(tmp_path: Path):
    put_all(str(tmp_path), {"a/1.jpg": b"1", "a/3.jpg": b"3"})
    (tmp_path / "a" / "2.jpg").symlink_to("/nowhere/2.jpg")
    with open(os.path.join(os.fsencode(tmp_path), b"a", b"caf\xe9.jpg"), "wb") as file:
        file.write(b"4")
    found = items(FolderSource(str(tmp_path)))
    assert [item.reason if isinstance(item, Rejected) else item.image for item in found] == [b"1", "not-a-file", b"3", b"4"]
    assert str(found[3].source).encode() == "a/caf\N{REPLACEMENT CHARACTER}.jpg".encode()  # can be written as JSON and parquet


def test_the_description_tells_folders_apart_and_names_no_path(tmp_path: Path):
    def digest(files: dict[str, bytes]) -> str:
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        source = FolderSource(put_all(str(root), files))
        source.units(10)
        assert str(tmp_path) not in json.dumps(source.describe())
        return json.dumps(source.describe())

    base = {"a/1.jpg": b"1", "a/2.jpg": b"22"}
    assert digest(base) == digest(dict(base))
    changes = [{**base, "b/1.jpg": b"1"}, {"a/1.jpg": b"1"}, {"a/1.jpg": b"11", "a/2.jpg": b"2"}, {"b/1.jpg": b"1", "a/2.jpg": b"22"}]
    assert len({digest(files) for files in [base, *changes]}) == 5


# --- records ---


@pytest.mark.parametrize("shard_size", [1, 4, 100])
def test_records_come_in_units_of_bytes(tmp_path: Path, shard_size: int):
    source = open_source(insightface(numbered(10)).save(tmp_path))
    assert [unit.num_samples for unit in source.units(shard_size)] == [min(shard_size, 10 - i) for i in range(0, 10, shard_size)]
    assert items(source, shard_size) == [Sample("", image, int(label), f"record {i}") for i, (label, image) in enumerate(numbered(10), 1)]


def test_a_damaged_record_costs_itself_alone(tmp_path: Path):
    written = insightface(numbered(10))
    data = bytearray(written.rec)
    for number in (6, 7, 10):
        data[written.starts[number]] ^= 1  # the magic number
    data[written.starts[2] + 4] ^= 0x40  # the length
    put_all(str(tmp_path), {"train.rec": bytes(data), "train.idx": written.idx})
    found = items(open_source(str(tmp_path / "train.rec")), 4)
    assert [item.source for item in found if isinstance(item, Sample)] == [f"record {i}" for i in (1, 3, 4, 5, 8, 9)]
    rows = [item for item in found if isinstance(item, Rejected)]
    assert [(row.reason, row.num_samples) for row in rows] == [("damaged-record", 1)] * 4
    places = [(written.starts[i], written.starts[i + 1]) for i in (2, 6, 7, 10)]
    assert [row.source for row in rows] == [f"bytes {start} to {stop}" for start, stop in places]
    assert [row.num_bytes for row in rows] == [stop - start for start, stop in places]


def test_a_record_that_the_index_gives_no_bytes_is_counted(tmp_path: Path):
    written = insightface(numbered(4), header=False)
    lines = written.idx.splitlines()
    lines[2] = lines[2].split(b"\t")[0] + b"\t" + lines[1].split(b"\t")[1]
    put_all(str(tmp_path), {"train.rec": written.rec, "train.idx": b"\n".join(lines)})
    found = items(open_source(str(tmp_path / "train.rec")))
    assert [item.reason if isinstance(item, Rejected) else item.source for item in found] == [
        "record 1",
        "damaged-record",
        "record 2",
        "record 3",
        "record 4",
    ]


def test_a_label_that_is_none_is_a_row(tmp_path: Path):
    insightface([(0, b"x"), (0.5, b"y"), (float("nan"), b"z")]).save(tmp_path)
    found = items(open_source(str(tmp_path / "train.rec")))
    assert [(item.reason, item.source) for item in found if isinstance(item, Rejected)] == [
        ("bad-label", "record 2"),
        ("bad-label", "record 3"),
    ]


# --- tars ---


def test_tars_are_one_unit_each_in_name_order(any_root: str):
    tars = {f"{name}.tar": tar_of((f"{name}k", name.encode(), i)) for i, name in enumerate(("b", "a", "c"))}
    source = open_source(put_all(any_root, tars))
    assert [unit.name for unit in source.units(1)] == ["00000", "00001", "00002"]
    assert items(source) == [Sample("", n.encode(), i, f"{n}.tar/{n}k") for n, i in (("a", 1), ("b", 0), ("c", 2))]
    assert items(open_source(join_url(any_root, "b.tar"))) == [Sample("", b"b", 0, "b.tar/bk")]
    assert len(items(open_source(join_url(any_root, "[ab]*.tar")))) == 2


def test_a_tars_name_is_taken_literally_before_it_is_a_pattern(tmp_path: Path):
    put_all(str(tmp_path), {"faces[1].tar": tar_of(("k", b"1", 0)), "faces1.tar": tar_of(("k", b"2", 0))})
    assert b"1" in [item.image for item in items(open_source(str(tmp_path / "faces[1].tar"))) if isinstance(item, Sample)]


def test_a_damaged_tar_gives_what_came_before_and_a_row(any_root: str):
    whole = tar_of(*((f"k{i}", b"%d" % i * 600, i) for i in range(5)))
    found = items(open_source(put_all(any_root, {"a.tar": whole[:7300], "b.tar": tar_of(("k", b"b", 9))})))
    reasons = [item.reason if isinstance(item, Rejected) else item.identity for item in found]
    assert reasons == [0, 1, 2, "truncated-tar", 9]
    row = found[3]
    assert isinstance(row, Rejected)
    assert (row.source, row.num_bytes) == ("a.tar", 7300)
    assert "fetch the tar again" in row.error


def test_what_is_no_tar_and_what_has_no_label_are_rows(tmp_path: Path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("x.jpg", "y.txt"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    put_all(str(tmp_path), {"a.tar": b"text", "b.tar": file.getvalue(), "c.tar": b""})
    found = items(open_source(str(tmp_path)))
    assert [(item.reason, item.source) for item in found if isinstance(item, Rejected)] == [
        ("not-a-tar", "a.tar"),
        ("no-label", "b.tar/x"),
        ("no-image", "b.tar/y"),
        ("not-a-tar", "c.tar"),
    ]


# --- synthetic faces ---


@pytest.mark.parametrize("shard_size", [1, 7, 100])
def test_synthetic_faces_are_those_of_the_renderer(shard_size: int):
    faces = SyntheticFaces(5, 3, seed=2)
    source = SyntheticSource(faces)
    assert sum(unit.num_samples for unit in source.units(shard_size)) == 15
    found = items(source, shard_size)
    expected = faces.render(np.arange(15))
    assert [item.identity for item in found if isinstance(item, Sample)] == [i // 3 for i in range(15)]
    assert [item.image for item in found if isinstance(item, Sample)] == [encode(picture) for picture in expected]
    assert all(decode(item.image).shape == (112, 112, 3) for item in found if isinstance(item, Sample))
