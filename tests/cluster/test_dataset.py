"""The commit protocol: one manifest a shard whatever attempts run, immutable data, sums that add up."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.accounting import totals
from cluster.attempt import Attempt
from cluster.dataset import SCHEMA, Dataset, Labels, Manifest, ShardData, fingerprint
from cluster.shard import Rejected, Sample, ShardError, ShardWriter, read_ledger, sha256_hex
from cluster.store import NotFound, StoreError
from cluster.verify import verify

BAD = Rejected("00000-000009", "not-an-image", "no picture", 12, "x.txt")


def shard_of(*labels: int, rejected: tuple[Rejected, ...] = (), tag: str = "k") -> ShardData:
    writer = ShardWriter()
    for number, label in enumerate(labels):
        writer.add(Sample(f"{tag}{number}", b"%d" % label * 50, label))
    return ShardData(writer.finish() if labels else None, len(labels), Labels.of(labels), rejected, {"kept_bytes": len(labels)})


def commit(dataset: Dataset, shard: str, data: ShardData, attempt: int = 1) -> Manifest:
    return dataset.commit(shard, data, fingerprint="f", attempt=Attempt("run", attempt), seconds={"fetch": 0.1})


def keys(dataset: Dataset, prefix: str = "") -> list[str]:
    return [stored.key for stored in dataset.store.list(prefix)]


@pytest.fixture
def dataset(any_root: str) -> Dataset:
    return Dataset(any_root)


def test_a_commit_is_a_tar_named_by_its_content_a_ledger_and_a_manifest(dataset: Dataset):
    data = shard_of(3, 3, 7, rejected=(BAD, replace(BAD, key="x", num_samples=4)))
    manifest = commit(dataset, "00042", data)
    digest = sha256_hex(data.payload or b"")
    assert manifest.file == f"shards/00042-{digest[:12]}.tar"
    assert manifest.ledger is not None
    assert keys(dataset) == ["manifests/00042.json", manifest.ledger, manifest.file]
    assert manifest.ledger == f"quarantine/00042-{sha256_hex(dataset.store.get(manifest.ledger))[:12]}.parquet"
    assert (manifest.run, manifest.attempt) == ("run", 1)
    assert dataset.store.get(manifest.file) == data.payload == dataset.read(manifest)
    assert (manifest.samples_in, manifest.samples, manifest.quarantined) == (8, 3, 5)
    assert (manifest.sha256, manifest.num_bytes, manifest.identities) == (digest, len(data.payload or b""), Labels(2, 3, 7))
    assert manifest.ledger is not None
    assert read_ledger(dataset.store.get(manifest.ledger)) == list(data.rejected)
    assert dataset.manifest("00042") == manifest == dataset.manifests()[0]
    assert set(manifest.seconds) == {"fetch", "publish"}


def test_a_shard_of_nothing_but_rejects_has_a_manifest_and_no_tar(dataset: Dataset):
    manifest = commit(dataset, "00000", shard_of(rejected=(BAD,)))
    assert (manifest.file, manifest.sha256, manifest.num_bytes, manifest.samples_in) == (None, None, 0, 1)
    assert manifest.identities == Labels()
    assert dataset.read(manifest) == b""
    assert keys(dataset) == ["manifests/00000.json", manifest.ledger]


def test_two_attempts_with_equal_bytes_leave_one_tar(dataset: Dataset):
    first = commit(dataset, "00000", shard_of(1, 2, rejected=(BAD,)), 1)
    second = commit(dataset, "00000", shard_of(1, 2, rejected=(BAD,)), 2)
    assert second == first
    assert second.attempt == 1
    assert keys(dataset) == ["manifests/00000.json", first.ledger, first.file]


@pytest.mark.parametrize("later", [shard_of(1, 2, 3), shard_of(rejected=(BAD,)), shard_of(5, 6, tag="other", rejected=(BAD, BAD))])
def test_a_loser_whose_bytes_differ_takes_all_of_its_own_away(dataset: Dataset, later: ShardData):
    winner = commit(dataset, "00000", shard_of(1, 2, rejected=(BAD,)), 1)
    before = {stored.key: dataset.store.get(stored.key) for stored in dataset.store.list()}
    assert commit(dataset, "00000", later, 2) == winner
    assert {stored.key: dataset.store.get(stored.key) for stored in dataset.store.list()} == before


def test_a_loser_does_not_touch_the_winners_ledger(dataset: Dataset):
    """An attempt that gives a shard up meets one that could do it: the ledger must be that of the manifest."""
    given_up = Rejected("00000", "failed-shard", "out of memory", 0, None, 3)
    winner = commit(dataset, "00000", shard_of(1, 2, rejected=(BAD,)), 1)
    commit(dataset, "00000", ShardData(None, 0, Labels(), [given_up], failure="out of memory"), 2)
    dataset.finish("images", {"fingerprint": "f"}, dataset.manifests())
    assert winner.ledger is not None
    assert read_ledger(dataset.store.get(winner.ledger)) == [BAD]
    assert verify(dataset.url).ok


def test_a_winner_beside_a_crashed_attempts_ledger_has_its_own(dataset: Dataset):
    stray = "quarantine/00000-0123456789ab.parquet"
    dataset.store.put(stray, b"of an attempt that died before its manifest")
    winner = commit(dataset, "00000", shard_of(1, rejected=(BAD,)))
    assert winner.ledger is not None
    assert read_ledger(dataset.store.get(winner.ledger)) == [BAD]
    dataset.finish("images", {}, dataset.manifests())
    assert verify(dataset.url).strays == [stray]


@pytest.mark.parametrize("distinct", [1, 3])
def test_eight_live_attempts_commit_a_shard_once(dataset: Dataset, distinct: int):
    barrier = threading.Barrier(8)

    def attempt(number: int) -> Manifest:
        rows = tuple(replace(BAD, key=f"r{i}") for i in range(number % distinct))
        data = shard_of(*range(number % distinct + 1), rejected=rows)
        barrier.wait()
        return commit(Dataset(dataset.url), "00000", data, number)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(attempt, range(8)))
    (manifest,) = dataset.manifests()
    assert all(result == manifest for result in results)
    dataset.finish("images", {}, [manifest])
    found = verify(dataset.url)
    assert found.ok, (found.problems, found.strays)
    assert dataset.read(manifest)


def test_a_lost_answer_to_our_own_put_is_no_loss(dataset: Dataset):
    """A retried PUT meets its own first try: the data it names must stay."""
    manifest = commit(dataset, "00000", shard_of(1, rejected=(BAD,)))
    assert dataset.publish(manifest) == manifest
    assert dataset.read(manifest)
    assert manifest.ledger in keys(dataset)


def test_changed_data_is_noticed(dataset: Dataset):
    manifest = commit(dataset, "00000", shard_of(1, 2))
    assert manifest.file is not None
    data = dataset.store.get(manifest.file)
    for changed in (data[:-1], data + b"\0", data[:600] + bytes([data[600] ^ 1]) + data[601:], b""):
        dataset.store.put(manifest.file, changed)
        with pytest.raises(ShardError, match=r"00000.*run its job again"):
            dataset.read(manifest)
    dataset.store.delete(manifest.file)
    with pytest.raises(NotFound):
        dataset.read(manifest)


def test_finish_describes_the_set_and_lists_its_tars(dataset: Dataset):
    for shard, labels in {"00000": (1, 1, 2), "00001": (2, 3), "00002": ()}.items():
        commit(dataset, shard, shard_of(*labels, rejected=() if labels else (BAD,)))
    lineage = {"parent": None, "config": {"stage": "ingest"}, "fingerprint": "f"}
    content = dataset.finish("images", lineage, dataset.manifests())
    assert dataset.description() == content == json.loads(dataset.store.get("dataset.json"))
    sums = {"shards": 2, "samples_in": 6, "samples": 5, "quarantined": 1, "identities": 3}
    sizes = {stored.key: stored.size for stored in dataset.store.list("shards/")}
    assert content == {
        "schema": SCHEMA, "kind": "images", **sums, "bytes": sum(sizes.values()), "released": False, "lineage": lineage
    }  # fmt: skip
    index = json.loads(dataset.store.get("index.json"))
    assert index["wids_version"] == 1
    assert [(shard["url"], shard["nsamples"], shard["filesize"]) for shard in index["shardlist"]] == [
        (key, count, size) for (key, size), count in zip(sizes.items(), (3, 2), strict=True)
    ]


def test_the_same_work_gives_the_same_dataset_json(tmp_path: Path):
    written = []
    for attempt in (1, 2):
        dataset = Dataset(str(tmp_path / str(attempt)))
        for shard in ("00000", "00001"):
            commit(dataset, shard, shard_of(1, 2, rejected=(BAD,)), attempt)
        dataset.finish("images", {"fingerprint": "f"}, dataset.manifests())
        written.append([dataset.store.get(key) for key in ("dataset.json", "index.json", *keys(dataset, "quarantine/"))])
    assert written[0] == written[1]


def test_a_set_that_is_not_complete_says_what_to_do(dataset: Dataset):
    with pytest.raises(StoreError, match="holds no data set"):
        dataset.description()
    commit(dataset, "00000", shard_of(1))
    with pytest.raises(StoreError, match=r"is unfinished, 1 shards are committed: let its job end, or run it again"):
        dataset.description()
    for content in (b"", b"{", b"[1]", b"null", b'{"schema": 99}', b"{}", b"\xff"):
        dataset.store.put("dataset.json", content)
        with pytest.raises(StoreError, match=r"dataset\.json") as caught:
            dataset.description()
        assert caught.value.fatal


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'"x"', b'{"identities": 5}', b'{"identities": {"count": 1}}', b"\xff"])
def test_what_is_no_manifest_is_named(dataset: Dataset, content: bytes):
    dataset.store.put("manifests/00007.json", content)
    with pytest.raises(StoreError, match=r"manifests/00007\.json is not a manifest") as caught:
        dataset.manifests()
    assert caught.value.fatal


manifests = st.builds(
    Manifest,
    shard=st.integers(0, 10**6).map("{:05d}".format),
    file=st.none() | st.text(),
    sha256=st.none() | st.text(),
    num_bytes=st.integers(0),
    samples_in=st.integers(0),
    samples=st.integers(0),
    quarantined=st.integers(0),
    identities=st.builds(Labels, st.integers(0), st.integers(-1), st.integers(-1)),
    fingerprint=st.text(),
    run=st.text(),
    attempt=st.integers(1),
    seconds=st.dictionaries(st.text(), st.floats(0, 1e6)),
    counts=st.dictionaries(st.text(), st.integers()),
    failure=st.none() | st.text(),
    ledger=st.none() | st.text(),
    ledger_sha256=st.none() | st.text(),
)


@given(manifests)
@settings(max_examples=80)
def test_manifests_come_back(manifest: Manifest):
    assert Manifest.from_bytes(manifest.to_bytes(), "here") == manifest


def test_names_are_in_the_order_of_their_numbers(dataset: Dataset):
    for shard in ("100000", "00002", "99999", "00010", "00001"):
        commit(dataset, shard, shard_of(1))
    dataset.store.put("manifests/notes.txt", b"")
    assert dataset.names() == ["00001", "00002", "00010", "99999", "100000"]
    assert [manifest.shard for manifest in dataset.manifests()] == dataset.names()
    assert [manifest.shard for manifest in dataset.manifests(["00010", "00002"])] == ["00010", "00002"]


def test_embeddings_are_a_data_set_below(dataset: Dataset):
    below = dataset.embeddings("toy")
    assert (below.url, below.suffix) == (f"{dataset.url}/embeddings/toy", ".parquet")
    assert str(commit(below, "00000", shard_of(1)).file).endswith(".parquet")
    assert dataset.names() == []


# --- sums ---


def brute_force(shards: list[list[int]]) -> dict[str, Any]:
    distinct = {label for labels in shards for label in labels}
    return {"samples": sum(map(len, shards)), "identities": len(distinct)}


def committed(labels: list[int], rejected: int = 0) -> Manifest:
    count = len(labels)
    file = "f" if labels else None
    return Manifest("00000", file, "s", 10 * count, count + rejected, count, rejected, Labels.of(labels), "f", "run", 1)


@given(st.lists(st.integers(0, 30), max_size=60).map(sorted), st.lists(st.integers(0, 60), max_size=8), st.integers(0, 3))
@settings(max_examples=300)
def test_identities_in_order_are_counted_exactly(labels: list[int], cuts: list[int], rejected: int):
    bounds = [0, *sorted(min(cut, len(labels)) for cut in cuts), len(labels)]
    shards = [labels[a:b] for a, b in pairwise(bounds)]
    sums = totals([committed(shard, rejected) for shard in shards])
    assert {name: sums[name] for name in ("samples", "identities")} == brute_force(shards)
    assert sums["samples_in"] == len(labels) + rejected * len(shards)
    assert (sums["quarantined"], sums["bytes"]) == (rejected * len(shards), 10 * len(labels))
    assert sums["shards"] == sum(map(bool, shards))


@given(st.lists(st.lists(st.integers(0, 12), max_size=8), max_size=6))
@settings(max_examples=300)
def test_identities_in_any_order_are_counted_exactly_or_not_at_all(shards: list[list[int]]):
    counted = totals([committed(labels) for labels in shards])["identities"]
    assert counted in (None, brute_force(shards)["identities"])


def test_labels_are_summarised():
    assert Labels.of([]) == Labels(0, -1, -1)
    assert Labels.of([5, 3, 5, 9]) == Labels(3, 3, 9)
    assert asdict(Labels.of(iter([0]))) == {"count": 1, "first": 0, "last": 0}


def test_fingerprints_depend_on_content_not_on_order():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert len({fingerprint(c) for c in ({"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": [1]}, {"a": None}, {})}) == 7
