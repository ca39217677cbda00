"""The stream's promises: every sample once an epoch, the same global batches for any number of ranks, resume by arithmetic."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cluster.attempt import Attempt
from cluster.dataset import Dataset, Labels, ShardData
from cluster.embedding import Embeddings, write_embeddings
from cluster.order import OrderError, Plan, read_counts, shard_order
from cluster.shard import Sample, ShardWriter
from cluster.stream import Stream, StreamError, require_embeddings

RECOGNIZER = {"name": "toy", "sha256": "a" * 64, "dim": 4, "mean": [0.5] * 3, "std": [0.5] * 3}


def picture(number: int) -> bytes:
    """A JPEG of one grey that tells the sample's number."""
    file = io.BytesIO()
    Image.fromarray(np.full((112, 112, 3), number % 256, np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()


def vector(number: int) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[number % 4]


def write_dataset(root: Path, counts: list[int], per_identity: int = 3, embedded: bool = True) -> Dataset:
    """A data set of numbered samples, with embeddings whose rows lie in another order than the shard's."""
    dataset, number = Dataset(str(root)), 0
    for shard, count in enumerate(counts):
        writer, numbers = ShardWriter(), list(range(number, number + count))
        for n in numbers:
            writer.add(Sample(f"k{n:04d}", picture(n), n // per_identity))
        name, number = f"{shard:05d}", number + count
        commit: dict[str, Any] = {"fingerprint": "f", "attempt": Attempt("run", 1), "seconds": {}}
        dataset.commit(name, ShardData(writer.finish(), count, Labels.of(writer.labels)), **commit)
        if embedded:
            numbers.reverse()
            rows = Embeddings([f"k{n:04d}" for n in numbers], np.array(numbers) // per_identity, np.stack([vector(n) for n in numbers]))
            dataset.embeddings("toy").commit(name, ShardData(write_embeddings(rows), count, Labels.of(writer.labels)), **commit)
    for each in (dataset, dataset.embeddings("toy")) if embedded else (dataset,):
        each.finish("images", {"fingerprint": "f", "config": {"recognizer": RECOGNIZER}}, each.manifests())
    return dataset


plans = st.builds(
    lambda counts, lanes, images, per_lane, seed: (counts, lanes, images, lanes * images * per_lane, seed),
    st.lists(st.integers(0, 40), min_size=1, max_size=6),
    st.sampled_from([1, 2, 4, 6]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 9),
)


@given(plans, st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_an_epoch_is_every_place_once_in_batches_of_the_asked_size(case, epoch: int):
    counts, lanes, images, batch_size, seed = case
    shards = tuple((f"{i:05d}", count) for i, count in enumerate(counts))
    if -(-sum(counts) // images) < lanes:
        with pytest.raises(OrderError, match="too few"):
            Plan(shards, batch_size, images, lanes, seed)
        return
    plan = Plan(shards, batch_size, images, lanes, seed)
    seen, sizes = list[tuple[str, int]](), list[int]()
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    for step in steps:
        places = [(s.shard, place) for lane in range(lanes) for s in plan.segments(lane, step) for place in range(s.start, s.stop)]
        assert plan.samples_before(step) == epoch * sum(counts) + len(seen)
        for lane in range(lanes):
            assert plan.segments(lane, step)
            assert all(s.epoch == epoch for s in plan.segments(lane, step))
        seen += places
        sizes.append(len(places))
    assert sorted(seen) == [(name, place) for name, count in shards for place in range(count)]
    assert plan.samples_before(steps.stop) == (epoch + 1) * sum(counts)
    # only where there are hardly more tuples than lanes may a batch be larger than asked
    assert max(sizes) <= batch_size or plan.num_tuples // lanes < -(-plan.num_tuples // lanes)
    assert max(sizes) - min(sizes) <= lanes * images


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 5), st.integers(0, 3))
def test_a_shards_order_is_a_permutation_of_one_identity_tuples_first(labels: list[int], images: int, epoch: int):
    order = shard_order(labels, images, 7, epoch, "00000")
    assert sorted(order.tolist()) == list(range(len(labels)))
    full = sum(labels.count(label) // images for label in set(labels))
    for i in range(full):
        assert len({labels[place] for place in order[i * images : (i + 1) * images]}) == 1
    left = [labels[place] for place in order[full * images :]]
    assert all(left.count(label) < images for label in left)


def test_epochs_and_seeds_change_the_order():
    plan, other = (Plan(tuple((f"{i:05d}", 8) for i in range(20)), 8, 2, 2, seed) for seed in (0, 1))
    first = [s.shard for step in range(plan.steps_per_epoch) for s in plan.segments(0, step)]
    assert first != [s.shard for step in range(plan.steps_per_epoch) for s in other.segments(0, step)]
    assert first != [s.shard for step in range(plan.steps_per_epoch, 2 * plan.steps_per_epoch) for s in plan.segments(0, step)]
    orders = {tuple(shard_order(list(range(30)), 2, seed, epoch, "00000")) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("faces"), [17, 30, 9, 22])


def global_batches(dataset: Dataset, plan: Plan, world_size: int, first: int, last: int) -> list[list[str]]:
    ranks = [Stream(dataset, plan, "toy", rank, world_size, threads=2).batches(first, last) for rank in range(world_size)]
    return [sorted(key for batch in step for key in batch.keys) for step in zip(*ranks, strict=True)]


def test_global_batches_are_the_same_for_any_number_of_ranks_and_from_any_step(dataset: Dataset):
    plan = Plan(read_counts(dataset), 16, 2, 4, seed=3)
    steps = 2 * plan.steps_per_epoch
    whole = global_batches(dataset, plan, 1, 0, steps)
    for epoch in range(2):
        keys = [key for step in whole[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch] for key in step]
        assert sorted(keys) == [f"k{n:04d}" for n in range(78)]
    for world_size in (2, 4):
        assert global_batches(dataset, plan, world_size, 0, steps) == whole
    for step in (1, plan.steps_per_epoch - 1, plan.steps_per_epoch, steps - 1):
        assert global_batches(dataset, plan, 2, step, steps) == whole[step:]


def test_a_batch_carries_its_own_pictures_labels_embeddings_and_epoch(dataset: Dataset):
    plan = Plan(read_counts(dataset), 16, 2, 4)
    for step, batch in enumerate(Stream(dataset, plan, "toy").batches(0, plan.steps_per_epoch + 1)):
        assert batch.epoch == step // plan.steps_per_epoch
        numbers = np.array([int(key[1:]) for key in batch.keys])
        np.testing.assert_array_equal(batch.identities, numbers // 3)
        assert isinstance(batch.embeddings, np.ndarray)
        assert isinstance(batch.images, np.ndarray)
        np.testing.assert_array_equal(batch.embeddings, np.stack([vector(n) for n in numbers]))
        assert batch.embeddings.dtype == np.float32
        assert batch.images.shape == (len(numbers), 112, 112, 3)
        assert np.abs(batch.images[:, 50, 50, 0].astype(int) - numbers).max() <= 2


def test_only_the_shards_of_the_asked_steps_are_read(dataset: Dataset, monkeypatch: pytest.MonkeyPatch):
    plan, read = Plan(read_counts(dataset), 8, 1, 1), list[str]()
    original = Dataset.read
    monkeypatch.setattr(Dataset, "read", lambda self, manifest: read.append(manifest.shard) or original(self, manifest))  # type: ignore[func-returns-value]
    last = plan.steps_per_epoch
    list(Stream(dataset, plan).batches(last - 1, last))
    assert read == [segment.shard for segment in plan.segments(0, last - 1)]


def test_what_cannot_be_is_refused_with_the_remedy(tmp_path: Path, dataset: Dataset):
    plan = Plan(read_counts(dataset), 16, 2, 4)
    with pytest.raises(OrderError, match="3 workers do not divide 4 lanes"):
        Stream(dataset, plan, rank=0, world_size=3)
    with pytest.raises(OrderError, match="multiple of lanes x images per identity = 8"):
        Plan(read_counts(dataset), 12, 2, 4)
    bare = write_dataset(tmp_path / "bare", [12], embedded=False)
    with pytest.raises(StreamError, match="facemae embed --x"):
        require_embeddings(bare, "toy", "a" * 64, "facemae embed --x")
    with pytest.raises(StreamError, match=r"no shard 00000.*facemae embed"):
        list(Stream(bare, Plan(read_counts(bare), 4, 1, 4), "toy").batches(0, 1))
    require_embeddings(dataset, "toy", "a" * 64, "facemae embed --x")
    with pytest.raises(StreamError, match="another recogniser"):
        require_embeddings(dataset, "toy", "b" * 64, "facemae embed --x")


def test_a_sample_without_embedding_is_named(tmp_path: Path):
    dataset = write_dataset(tmp_path, [6], embedded=False)
    rows = Embeddings(["k0000"], np.array([0]), np.stack([vector(0)]))
    data = ShardData(write_embeddings(rows), 1, Labels.of([0]))
    dataset.embeddings("toy").commit("00000", data, fingerprint="f", attempt=Attempt("run", 1), seconds={})
    with pytest.raises(StreamError, match=r"shard 00000: no embedding for 'k000\d'"):
        list(Stream(dataset, Plan(read_counts(dataset), 4, 1, 4), "toy").batches(0, 1))


def test_a_damaged_picture_is_named(tmp_path: Path):
    dataset, writer = Dataset(str(tmp_path)), ShardWriter()
    for n in range(4):
        writer.add(Sample(f"k{n}", picture(n) if n else b"no picture", n))
    dataset.commit("00000", ShardData(writer.finish(), 4, Labels.of(range(4))), fingerprint="f", attempt=Attempt("run", 1), seconds={})
    dataset.finish("images", {}, dataset.manifests())
    with pytest.raises(StreamError, match=r"the picture of k0 .*facemae verify"):
        list(Stream(dataset, Plan(read_counts(dataset), 4, 1, 4)).batches(0, 1))
