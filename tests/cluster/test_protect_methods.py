"""The protections that FaceMAE is compared with, through the stage's processor: bytes, labels, ledger, refusals. No Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.attempt import Attempt
from cluster.dataset import Dataset, Labels, ShardData
from cluster.inputs import input_units
from cluster.picture import decode, encode
from cluster.processor import Unit
from cluster.protect import REASON, ProtectProcessor, describe_protection, require_people
from cluster.shard import Sample, ShardWriter, read_samples
from facemae.protection.k_same import KSameProtection
from facemae.synthetic import SyntheticFaces

IDENTITIES = [0] * 3 + [1] * 3 + [2] * 4 + [3] * 2 + [4] * 8 + [5] * 3
BROKEN = 7
"""This image does not decode."""


def write_set(root: Path, identities: Sequence[int] = IDENTITIES, broken: int | None = BROKEN) -> Dataset:
    """A data set of one shard, committed without a stage."""
    dataset, writer = Dataset(str(root)), ShardWriter()
    for row, picture in enumerate(SyntheticFaces(len(identities), 1).render(np.arange(len(identities)))):
        image = encode(picture)
        writer.add(Sample(f"00000-{row:07d}", image[:-60] if row == broken else image, identities[row], f"people/{row}.jpg"))
    data = ShardData(writer.finish(), writer.samples, Labels.of(writer.labels))
    dataset.commit("00000", data, fingerprint="f", attempt=Attempt("run", 1), seconds={})
    dataset.finish("images", {"parent": None, "fingerprint": "f"}, dataset.manifests())
    return dataset


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_set(tmp_path_factory.mktemp("original"))


def protect(source: Dataset, method: str, batch_size: int = 64, threads: int = 1, rekey: str | None = None, **options: Any) -> ShardData:
    description = describe_protection(method, options)
    processor = ProtectProcessor(source.url, method, options, description, batch_size, rekey)
    processor.open(threads)
    (unit,) = input_units(source)[0]
    assert isinstance(unit, Unit)
    return processor.compute(unit, processor.fetch(unit))


def samples_of(data: bytes | memoryview | None) -> list[Sample]:
    return [item for item in read_samples(data or b"") if isinstance(item, Sample)]


SETTINGS: dict[str, dict[str, Any]] = {
    "blur": {"strength": 3},
    "pixelate": {"strength": 9},
    "noise": {"strength": 30, "seed": 2**100},
    "random_mask": {"seed": 4, "patch_size": 8},
    "fixed_mask": {"strength": 1.5},
    "k_same": {"strength": 3},
    "pixel_dp": {"strength": 2, "seed": 2**100},
}


@pytest.mark.parametrize("method", SETTINGS)
def test_the_same_bytes_for_any_batch_size_and_threads(source: Dataset, method: str) -> None:
    expected = protect(source, method, **SETTINGS[method])
    for batch_size, threads in ((1, 1), (5, 2), (22, 3)):
        found = protect(source, method, batch_size, threads, **SETTINGS[method])
        assert found == expected
    originals = {item.key: item for item in read_samples(source.read(source.manifest("00000"))) if isinstance(item, Sample)}
    for sample in samples_of(expected.payload):
        assert sample.identity == originals[sample.key].identity
        assert sample.source is None
    assert "damaged-image" in {row.reason for row in expected.rejected}
    assert len(samples_of(expected.payload)) + len(expected.rejected) == len(IDENTITIES)


def test_k_same_shows_its_averages_and_quarantines_who_fits_in_no_group(source: Dataset) -> None:
    data = protect(source, "k_same", batch_size=4, strength=3)
    rows = [row for row in range(len(IDENTITIES)) if row != BROKEN]
    originals = [item for item in read_samples(source.read(source.manifest("00000"))) if isinstance(item, Sample)]
    pictures = np.stack([decode(originals[row].image) for row in rows])
    keys, labels = [originals[row].key for row in rows], [IDENTITIES[row] for row in rows]
    expected = KSameProtection(3).protect_shard(pictures, keys, labels)
    kept = [place for place in range(len(rows)) if place not in expected.left_out]
    found = samples_of(data.payload)
    assert [(s.key, s.identity, bytes(s.image)) for s in found] == [
        (keys[place], labels[place], encode(expected.pictures[place])) for place in kept
    ]
    assert len({bytes(sample.image) for sample in found}) == 7, "22 images: of the person with 8, one fits in none of the 7 groups"
    lost = {row.key: (row.error, row.num_bytes, row.source) for row in data.rejected if row.reason == REASON}
    assert lost == {keys[place]: (why, 0, None) for place, why in expected.left_out.items()}
    assert len(lost) == 1


def test_new_keys_keep_the_evidence_out_of_the_ledger(source: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REKEY", "0123456789abcdef" * 4)
    plain, data = protect(source, "k_same", strength=3), protect(source, "k_same", rekey="env:REKEY", strength=3)
    assert sorted(bytes(s.image) for s in samples_of(data.payload)) == sorted(bytes(s.image) for s in samples_of(plain.payload))
    assert {(row.error, row.num_bytes) for row in data.rejected} == {("", 0)}
    assert not {row.key for row in data.rejected} & {row.key for row in plain.rejected}


def test_a_shard_of_too_few_people_is_refused_before_the_work_and_in_it(source: Dataset, tmp_path: Path) -> None:
    description = describe_protection("k_same", {"strength": 7})
    remedy = "lower --strength, or ingest with a larger --shard-size"
    with pytest.raises(ValueError, match=rf"k_same with k = 7 needs 7 identities .*1 have fewer \(00000 has 6\): {remedy}"):
        require_people(source, description)
    require_people(source, describe_protection("k_same", {"strength": 6}))
    require_people(source, describe_protection("blur", {}))
    lost = write_set(tmp_path / "lost", identities=[0, 1, 1, 2], broken=0)  # the manifest counts three people, two decode
    require_people(lost, describe_protection("k_same", {"strength": 3}))
    with pytest.raises(ValueError, match=f"needs 3 identities in a shard, this one has 2: {remedy}"):
        protect(lost, "k_same", strength=3)
