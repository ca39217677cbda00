"""What is fuzzed. A target makes case ``number`` of ``seed``, reads it, checks what must hold, and names the outcome.

It raises for anything that must not be: an exception other than the reader's own, a sample that lies outside its input, a picture that
later stages could not decode, a count that does not add up.
"""

from __future__ import annotations

import io
import random
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from cluster.ingest import REJECTED, IngestProcessor
from cluster.picture import PictureError, align, decode
from cluster.shard import Rejected, Sample, read_samples
from cluster.source import RecordSource, RecordUnit, TarSource, TarUnit
from cluster.store import StoreError
from cluster.tar import NotATarError, ShardError, read_members
from facemae.bin_file import BinFileError, read_bin
from tests.cluster.test_record import Written
from tests.fuzz import corpus
from tests.fuzz.mutate import edit_jpeg, edit_png, edit_tar, mutated

Target = Callable[[random.Random], str]


class Broken(AssertionError):
    """A property that does not hold."""


def require(condition: object, message: str) -> None:
    """Raises Broken unless the condition holds (assert would vanish under python -O)."""
    if not condition:
        raise Broken(message)


def inside(view: memoryview | bytes, whole: bytes) -> bool:
    """Whether a view's bytes lie within the input's."""
    if len(view) == 0:
        return True
    here, begin = (np.frombuffer(data, np.uint8).__array_interface__["data"][0] for data in (view, whole))
    return begin <= here and here + len(view) <= begin + len(whole)


def tar(rng: random.Random) -> str:
    """Broken tars through the sample reader."""
    data = mutated(rng.choice(corpus.tars()), corpus.tars(), rng, edit_tar)
    rows = 0
    try:
        for item in read_samples(data):
            if isinstance(item, Sample):
                require(inside(item.image, data), f"a picture of {len(item.image)} bytes lies outside the tar")
                require(0 <= item.identity < 1 << 63, f"identity {item.identity}")
            rows += isinstance(item, Rejected)
            item.key.encode()  # ledger and json could not hold a name that is no Unicode
    except NotATarError:
        return "not-a-tar"
    except ShardError:
        return "truncated-tar"
    return "rows" if rows else "whole"


def valid_tar(rng: random.Random) -> str:
    """Tars that tarfile writes: names, sizes and bytes as tarfile reads them."""
    data = _any_tar(rng)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [
            (info.name, archive.extractfile(info).read() if info.isreg() and info.type != tarfile.CONTTYPE else None)  # type: ignore[union-attr]
            for info in archive
            if not info.isdir()
        ]
    found = [(member.name, None if member.problem else bytes(member.data)) for member in read_members(data)]
    require(found == expected, f"tarfile reads {expected!r:.500}, ours {found!r:.500}")
    return "as tarfile"


def _any_tar(rng: random.Random) -> bytes:
    file = io.BytesIO()
    kind = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    comment = {"comment": "ü" * rng.randrange(300)} if kind == tarfile.PAX_FORMAT and rng.random() < 0.3 else None
    with tarfile.open(fileobj=file, mode="w", format=kind, pax_headers=comment) as archive:
        for _ in range(rng.randint(1, 8)):  # of a global header alone tarfile says that it is no tar
            letters = "ab.jc/é漢 \n\udce9" if kind != tarfile.USTAR_FORMAT else "ab.jc/"
            length = rng.choice((1, 5, 90, 99, 100, 101, 155, 255, 300)) if kind != tarfile.USTAR_FORMAT else rng.randint(1, 90)
            info = tarfile.TarInfo("n" + "".join(rng.choices(letters, k=length)) + "n")
            info.type = rng.choice((tarfile.REGTYPE,) * 6 + (tarfile.AREGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE))
            info.type = rng.choice((info.type,) * 5 + (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE))
            if info.type == tarfile.AREGTYPE:  # tarfile takes one for a folder whose long name has a slash at its hundredth byte
                info.name = info.name.replace("/", "-")
            content = rng.randbytes(rng.choice((0, 1, 511, 512, 513, 2000))) if info.isreg() else b""
            info.size, info.mtime = len(content), rng.choice((0, 1700000000, 1.5) if kind == tarfile.PAX_FORMAT else (0, 1700000000))
            if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname = "l" * rng.choice((1, 90) if kind == tarfile.USTAR_FORMAT else (1, 90, 101, 400))
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def record(rng: random.Random) -> str:
    """Broken .rec files behind a right index: a record that is whole comes out as before, whatever its neighbours are."""
    written = rng.choice(corpus.records())
    data = mutated(written.rec, [w.rec for w in corpus.records()], rng, None).ljust(len(written.rec), b"\0")[: len(written.rec)]
    offsets = np.array([*sorted(written.starts.values()), len(written.rec)])
    source = RecordSource("x.rec")
    rows = 0
    for start, stop in pairwise(offsets.tolist()):
        unit = RecordUnit("00000", 1, np.array([start, stop]))
        found = list(source.samples(unit, data[start:stop]))
        if data[start:stop] == written.rec[start:stop]:
            require(found == list(source.samples(unit, written.rec[start:stop])), f"the whole record at {start} reads otherwise")
        rows += sum(isinstance(item, Rejected) for item in found)
    whole = list(source.samples(RecordUnit("00000", len(offsets) - 1, offsets), data))
    require(sum(isinstance(item, Rejected) for item in whole) == rows, "a record's damage spread to others")
    return "rows" if rows else "whole"


def index(rng: random.Random) -> str:
    """Broken .idx files through the whole source: refused by name, or every record that it lists is a sample or a row."""
    written = rng.choice(corpus.records())
    with tempfile.TemporaryDirectory() as folder:
        url = Written(written.rec, mutated(written.idx, [w.idx for w in corpus.records()], rng, None), {}).save(Path(folder))
        source = RecordSource(url)
        try:
            units = source.units(rng.choice((1, 4, 1000)))
        except StoreError as error:
            require(error.fatal and folder in str(error), str(error))
            return "refused"
        found = [item for unit in units for item in source.samples(unit, source.fetch(unit))]
    listed = sum(unit.num_samples for unit in units)
    people = len(written.starts) - 7 if 0 in written.starts else 0  # index records hold no image
    require(len(found) >= listed - people - 1, f"{listed} records listed, {len(found)} came out")
    return "rows" if any(isinstance(item, Rejected) for item in found) else "whole"


def picture(kind: str, rng: random.Random) -> str:
    """Broken pictures: an aligned JPEG that every later stage decodes, or a PictureError."""
    files = corpus.pictures()[kind]
    data = mutated(rng.choice(files), files, rng, {"jpeg": edit_jpeg, "png": edit_png}.get(kind))
    try:
        aligned = align(data, resize=rng.random() < 0.8)
    except PictureError as error:
        require("MemoryError" not in str(error), str(error))
        require(error.reason and str(error) and len(str(error)) < 400, f"{error.reason!r}: {error}")
        return error.reason
    require(decode(aligned.jpeg).shape == (112, 112, 3), "an aligned picture that does not decode")
    require(not aligned.kept or bytes(aligned.jpeg) == data, "kept, but not byte for byte")
    return "kept" if aligned.kept else "made over"


def ingest(rng: random.Random) -> str:
    """Broken tars of pictures through the whole of ingest's work on one shard."""
    data = mutated(rng.choice(corpus.face_tars()), corpus.face_tars(), rng, edit_tar)
    processor = IngestProcessor(TarSource("/nowhere", "x.tar"), resize=True)
    processor.open(1)
    made = processor.compute(TarUnit("00000", 0, "x.tar", len(data)), data)
    back = list(read_samples(made.payload)) if made.payload else []
    require(len(back) == made.samples, f"{made.samples} samples written, {len(back)} read")
    for item in back:
        require(isinstance(item, Sample) and item.key.startswith("00000-") and decode(item.image).shape == (112, 112, 3), f"{item.key!r}")
    quarantined = sum(row.num_samples for row in made.rejected)
    require(quarantined == sum(n for name, n in made.counts.items() if name.startswith(REJECTED)), "counts by reason")
    require(all("\n" not in str(row.source) for row in made.rejected), "a name with a line end")
    return "rows" if quarantined else "whole"


def bin_file(rng: random.Random) -> str:
    """Broken verification files."""
    data = mutated(rng.choice(corpus.bins()), corpus.bins(), rng, None)
    try:
        pairs = read_bin(data)
    except BinFileError:
        return "refused"
    require(len(pairs.images) == 2 * len(pairs.same), "counts")
    require(all(type(image) is bytes for image in pairs.images), "an image is no bytes")
    return "read"


TARGETS: dict[str, tuple[Target, int]] = {
    "tar": (tar, 30),
    "tar, valid": (valid_tar, 10),
    "record": (record, 12),
    "index": (index, 3),
    "jpeg": (partial(picture, "jpeg"), 15),
    "png": (partial(picture, "png"), 12),
    "webp": (partial(picture, "webp"), 8),
    "bmp": (partial(picture, "bmp"), 2),
    "bin": (bin_file, 5),
    "ingest": (ingest, 3),
}
"""Each target and its share of the cases in percent."""


def case_random(seed: int, target: str, number: int) -> random.Random:
    """The random numbers of one case, and with them the case."""
    return random.Random(f"{seed}/{target}/{number}")


def names() -> Sequence[str]:
    """The targets in the order of the table."""
    return list(TARGETS)
