"""Our tar reader against tarfile, and against everything that can be wrong with a tar."""

from __future__ import annotations

import io
import json
import random
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import tar
from cluster.shard import Rejected, Sample, read_samples
from cluster.tar import BLOCK, ShardError, read_members
from tests.hostile_tars import CASES
from tests.tars import END, foreign_tar, raw_member, read, read_damaged, some, write

foreign_names = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=60)


# --- written by others, read by us ---


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(st.lists(st.tuples(st.builds("/".join, st.lists(foreign_names, min_size=1)), st.binary(max_size=2000)), max_size=6))
@settings(max_examples=30, deadline=None)
def test_members_of_any_tar_format(tar_format: int, members: list[tuple[str, bytes]]):
    try:
        data = foreign_tar(members, tar_format)
    except ValueError:  # USTAR: the name is too long
        return
    assert [(member.name, bytes(member.data)) for member in read_members(data)] == members


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_unicode_names(tar_format: int):
    members = [("d" * 150 + "/" + "n" * 200 + ".jpg", b"1"), ("short.cls", b"2"), ("漢" * 60 + "/ü.jpg", b"3"), ("ü.cls", b"4")]
    data = foreign_tar(members, tar_format)
    assert [(member.name, bytes(member.data)) for member in read_members(data)] == members


def test_the_prefix_field_is_part_of_the_name():
    name = "p" * 90 + "/" + "n" * 80 + ".jpg"  # over 100 bytes, so that tarfile splits it
    assert [member.name for member in read_members(foreign_tar([(name, b"1")]))] == [name]


def test_folders_and_global_headers_are_passed_over():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "hello"}) as tar:
        folder = tarfile.TarInfo("images")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in [("images/a.jpg", b"image"), ("images/a.cls", b"7")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert read(file.getvalue()) == [Sample("images/a", b"image", 7)]


def test_the_last_path_of_a_pax_header_counts():
    record = b"17 path=first.aa\n18 path=other.jpg\n"
    data = raw_member(b"pax", record, b"x") + raw_member(b"short", b"1") + END
    assert [member.name for member in read_members(data)] == ["other.jpg"]


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6", b"7", b"S", b"D", b"M", b"V", b"Z", b"\xff"])
def test_what_is_no_regular_file_costs_its_own_row(kind: bytes):
    data = write(some(2))[: -2 * BLOCK] + raw_member(b"evil.jpg", b"", kind) + raw_member(b"evil.cls", b"1") + write(some(2, first=2))
    found, error = read_damaged(data)
    assert not error
    assert [item for item in found if isinstance(item, Sample)] == some(4)
    (row,) = [item for item in found if isinstance(item, Rejected)]
    assert (row.key, row.reason, found.index(row)) == ("evil", "not-a-file", 2)


# --- damage ---


def test_a_tar_cut_anywhere_gives_the_samples_before_the_cut():
    samples = some(4, source="origin")
    data = write(samples)
    ends, offset = [], 0  # where each sample's label, and with it the sample, is whole
    for sample in samples:
        for size in (len(sample.image), len(b"%d" % sample.identity), len(json.dumps({"source": sample.source}))):
            offset += BLOCK + size + -size % BLOCK
        ends.append(offset)
    assert offset == len(data) - 2 * BLOCK
    rng = random.Random(0)
    places = {0, 1, BLOCK - 1, BLOCK, BLOCK + 1, *ends, *(e + 1 for e in ends), *(e - 1 for e in ends), *rng.sample(range(offset), 200)}
    for cut in sorted(places):
        found, error = read_damaged(data[:cut])
        assert error, cut
        whole = [Sample(s.key, s.image, s.identity, s.source) for s, end in zip(samples, ends, strict=True) if end <= cut]
        assert found[: len(whole)] == whole, cut
        # the sample at the cut is there only with its whole image and label; its .json may be lost
        for extra in found[len(whole) :]:
            expected = samples[len(whole)]
            assert isinstance(extra, Sample), cut
            assert (extra.key, extra.image, extra.identity) == (expected.key, expected.image, expected.identity), cut
        assert len(found) <= len(whole) + 1
    assert read_damaged(data[: offset + BLOCK]) == (samples, "")  # one end block is enough, as for tarfile


def test_every_flipped_bit_of_a_header_is_noticed():
    samples = some(3)
    data = bytearray(write(samples))
    second = 2 * BLOCK * 2  # the header of the second sample's image: each of the first one's members fills one block
    assert bytes(data[second : second + 5]) == b"k0001"
    for offset in range(second, second + BLOCK):
        for bit in (0, 6):
            data[offset] ^= 1 << bit
            found, error = read_damaged(bytes(data))
            data[offset] ^= 1 << bit
            if 148 <= offset - second < 156 and not error:  # the checksum's own padding may change without harm
                assert found == samples
            else:
                assert error
                assert found == samples[:1]


@pytest.mark.parametrize(
    "size",
    [b"-0000001000", b"-1", b"+1", b"0o17", b"1_0", b"00000000009", b"77777777777", b"\x80" + b"\0" * 5 + b"\1" * 6, b"\xff" * 12, b"1 1"],
)
def test_lying_sizes_end_the_tar(size: bytes):
    found, error = read_damaged(write(some(1))[: -2 * BLOCK] + raw_member(b"b.jpg", b"1", size=size) + END)
    assert found == some(1)
    assert error


def test_a_member_above_the_limit_costs_its_own_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tar, "MAX_MEMBER_BYTES", 1000)
    found = read(foreign_tar([("a.jpg", bytes(1001)), ("a.cls", b"1"), ("b.jpg", bytes(1000)), ("b.cls", b"2")]))
    assert [item.reason if isinstance(item, Rejected) else item.identity for item in found] == ["too-large", 2]


def test_a_claim_above_the_limit_is_refused_before_it_is_touched():
    with pytest.raises(ShardError, match="cut short"):
        list(read_members(raw_member(b"a.jpg", b"", size=b"%011o" % (65 << 20)) + END))
    with pytest.raises(ShardError, match="claims 70000"):
        list(read_members(raw_member(b"a", b"n" * 70_000, b"L") + END))


@pytest.mark.parametrize(
    "record",
    [b"x", b"0 a=b\n", b"3 a\n", b"99 path=a\n", b"1 " * 30_000, b"9" * 5000 + b" path=a\n", b"-5 path=a\n", b"12\xffpath=a\n", b"\0" * 50],
)
def test_damaged_pax_headers(record: bytes):
    with pytest.raises(ShardError):
        list(read_members(raw_member(b"pax", record, b"x") + raw_member(b"a.jpg", b"1") + END))


def test_a_wiped_header_does_not_end_the_tar_in_silence():
    data = bytearray(write(some(4)))
    third = next(i for i in range(0, len(data), BLOCK) if data[i : i + 9] == b"k0002.jpg")
    data[third : third + BLOCK] = bytes(BLOCK)
    found, error = read_damaged(bytes(data))
    assert found == some(2)
    assert "end-of-archive" in error
    assert read_damaged(write(some(2)) + write(some(2, first=2)))[1]  # joined tars: no sample is dropped without a word
    assert read(write(some(2)) + bytes(20 * BLOCK)) == some(2)  # the padding that tar programs write


@pytest.mark.parametrize("data", [b"", b"x", bytes(511), b"not a tar " * 200, b"\x1f\x8b" + bytes(2000)])
def test_what_is_no_tar_is_a_shard_error(data: bytes):
    with pytest.raises(ShardError):
        list(read_samples(data))


@given(st.binary(max_size=1500))
@settings(max_examples=300, deadline=None)
def test_random_bytes_raise_nothing_but_shard_error(data: bytes):
    read_damaged(data)


def test_thousands_of_mutated_tars_raise_nothing_but_shard_error():
    rng = random.Random(1)
    members = [
        ("a" * 150 + ".jpg", b"1" * 700),
        ("a" * 150 + ".cls", b"5"),
        ("b.jpg", b"2"),
        ("b.cls", b"x"),
        ("b.json", b'{"source": "s"}'),
    ]
    originals = [write(some(3, source="s")), *(foreign_tar(members, kind) for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))]
    for _ in range(3000):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 4)):
            block = rng.randrange(0, len(data) // BLOCK) * BLOCK
            field = rng.choice([(0, 100), (124, 136), (156, 157), (345, 500), (0, 512)])
            at = block + rng.randrange(*field)
            data[at] = rng.choice([0, 0x30, 0x37, 0x2D, 0x20, 0x4C, 0x78, 0x80, 0xFF, rng.randrange(256)])
            if rng.random() < 0.8:  # a right checksum lets the damage through to the code behind it
                data[block + 148 : block + 156] = b" " * 8
                data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + BLOCK])
        read_damaged(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]))


def test_the_reader_agrees_with_tarfile_where_tarfile_reads_on():
    """The corpus's well-formed tars, member by member: what both read must have the same name and bytes."""
    compared = 0
    for name, (data, _) in CASES.items():
        try:
            ours = [(m.name, bytes(m.data)) for m in read_members(data) if not m.problem]
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
                theirs = [(i.name, archive.extractfile(i).read()) for i in archive if i.type in (b"0", b"\0") and not i.issparse()]  # type: ignore[union-attr]
        except (ValueError, tarfile.TarError):  # ShardError is one, and tarfile's map of a sparse file that is none
            continue
        if "over the limit" in name or "NUL" in name or "two tars" in name:
            continue
        assert ours == theirs, name
        compared += 1
    assert compared > 40
