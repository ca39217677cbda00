"""The repair of a shard against one picture at a time: rounds, attackers, and what is left as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import repair
from cluster.adaptive import QueryMap
from cluster.dataset import Dataset, Labels, ShardData
from cluster.embedding import Embeddings, write_embeddings
from cluster.index import Gallery
from cluster.neighbours import Neighbours
from cluster.picture import decode, encode
from cluster.processor import Unit
from cluster.repair import REASON, Attacker, Repair, RepairProcessor, traced
from cluster.secret import KeyMap
from cluster.shard import Rejected, Sample, ShardError, ShardWriter, read_samples
from facemae.recognizer.onnx import OnnxRecognizer
from facemae.synthetic import SyntheticFaces
from tests.cluster.test_verify import COMMIT
from tests.jobs.test_leakage_job import write_recognizer
from tests.jobs.test_rekey import SECRET, new_key

COUNT, PER_SHARD = 24, 12
KEYS = [f"{i // PER_SHARD:05d}-{i % PER_SHARD:07d}" for i in range(COUNT)]
DAMAGED, WITHOUT_MATE = KEYS[14], KEYS[4]


class BruteForce:
    """A gallery in one array."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors, self.calls = vectors, 0

    def search(self, vectors: np.ndarray, k: int, thresholds: np.ndarray) -> Neighbours:
        assert (k, thresholds.shape[1]) == (0, 1)
        self.calls += 1
        scores = (vectors.astype(np.float64) @ self.vectors.astype(np.float64).T).astype(np.float32)
        found = Neighbours.none(len(vectors), 0, 1)
        found.nearer[:] = np.count_nonzero(scores > thresholds, axis=1)[:, None]
        return found


class Negate:
    """An adaptive attacker who knows that pictures were inverted."""

    opened = False

    def open(self) -> None:
        self.opened = True

    def __call__(self, vectors: np.ndarray, identities: np.ndarray) -> np.ndarray:
        assert self.opened
        assert identities.dtype == np.int64
        return -vectors


class Round:
    """A made-up protection: in each round some pictures come out as they were, inverted, or as noise."""

    def __init__(self, number: int) -> None:
        self.number = number

    def protect(self, pictures: np.ndarray, keys: Sequence[str]) -> np.ndarray:
        return np.stack([self.one(picture, KEYS.index(key)) for picture, key in zip(pictures, keys, strict=True)])

    def one(self, picture: np.ndarray, place: int) -> np.ndarray:
        if place % 5 == 0:
            return picture
        if self.number == 1:
            return 255 - picture if place % 2 else picture
        return np.random.default_rng([place, self.number]).integers(0, 255, picture.shape, np.uint8)


class Method:
    def __init__(self, num_rounds: int) -> None:
        self.num_rounds = num_rounds

    def variants(self, skip: int = 0) -> list[Round]:
        return [Round(skip + number) for number in range(1, self.num_rounds + 1)]


class World:
    """24 originals; the first shard's protected pictures are copies of them, those of the second noise, and all hangs on a made-up rank."""

    def __init__(self, folder: Path, rekey: bool = False) -> None:
        self.folder, self.name = folder, new_key if rekey else str
        self.rekey = (f"file:{folder}/secret", KeyMap(f"file:{folder}/secret").check) if rekey else None
        faces = SyntheticFaces.parse("ids=8,images=3").render(range(COUNT))
        self.jpegs = [encode(face) for face in faces]
        seen = np.stack([decode(jpeg) for jpeg in self.jpegs])
        self.recognizers = [OnnxRecognizer.load(write_recognizer(folder / f"{name}.onnx", n)) for n, name in enumerate(("alpha", "beta"))]
        self.vectors = [recognizer.embed(seen).astype(np.float16) for recognizer in self.recognizers]
        self.original, self.protected = Dataset(f"{folder}/original"), Dataset(f"{folder}/protected")
        damaged = [j[:300] if key == DAMAGED else j for key, j in zip(KEYS, self.jpegs, strict=True)]
        self.write(self.original, dict(zip(KEYS, damaged, strict=True)))
        noise = [encode(np.random.default_rng(n).integers(0, 255, faces[0].shape, np.uint8)) for n in range(COUNT)]
        made = {self.name(key): self.jpegs[n] if n < PER_SHARD else noise[n] for n, key in enumerate(KEYS)}
        self.write(self.protected, made)
        self.ranks = [{key: 1 if n < PER_SHARD else 7 for n, key in enumerate(KEYS)} for _ in range(2)]
        self.ranks[0][KEYS[2]] = self.ranks[1][KEYS[2]] = 3  # a copy that the measurement does not call traced
        self.ranks[1][KEYS[13]] = self.ranks[1][DAMAGED] = 1  # traced by one attacker alone

    def write(self, dataset: Dataset, pictures: Mapping[str, bytes]) -> None:
        for shard in range(2):
            writer, rows = ShardWriter(), list(pictures.items())[shard * PER_SHARD : (shard + 1) * PER_SHARD]
            labels = {key: (shard * PER_SHARD + n) // 3 for n, (key, _) in enumerate(rows)}
            for key, picture in sorted(rows):
                writer.add(Sample(key, picture, labels[key]))
            ledger = [Rejected("x", "damaged-image", "cut off", 7)] if dataset is getattr(self, "protected", None) and shard == 0 else []
            dataset.commit(f"{shard:05d}", ShardData(writer.finish(), PER_SHARD, Labels.of(writer.labels), ledger), **COMMIT)
        dataset.finish("images", {"fingerprint": "f"}, dataset.manifests())

    def attackers(self) -> list[Attacker]:
        found = []
        for recognizer, vectors, ranks in zip(self.recognizers, self.vectors, self.ranks, strict=True):
            mates, places = Dataset(f"{self.folder}/mates/{recognizer.name}", ".parquet"), range(COUNT)
            output = Dataset(f"{self.folder}/ranks/{recognizer.name}", ".parquet")
            for shard in range(2):
                rows = [n for n in places if n // PER_SHARD == shard and not (recognizer.name == "beta" and KEYS[n] == WITHOUT_MATE)]
                keys = [KEYS[n] for n in rows]
                table = write_embeddings(Embeddings(keys, np.array(rows) // 3, vectors[rows]))
                mates.commit(f"{shard:05d}", ShardData(table, len(rows), Labels()), **COMMIT)
                sink = pa.BufferOutputStream()
                pq.write_table(pa.table({"key": [self.name(k) for k in keys], "rank_image": [ranks[k] for k in keys]}), sink)
                output.commit(f"{shard:05d}", ShardData(sink.getvalue().to_pybytes(), len(rows), Labels()), **COMMIT)
            gallery = cast(Gallery, BruteForce(vectors))
            found.append(Attacker(recognizer, output.url, mates.url, gallery))
        return [*found, replace(found[0], transform=cast(QueryMap, Negate()))]

    def repair(self, num_rounds: int, shard: str = "00000", attackers: Sequence[Attacker] | None = None, **options: Any) -> ShardData:
        """One shard, in this process."""
        roots = self.original.url, self.protected.url
        plan = Repair(*roots, "made up", {}, 0, self.attackers() if attackers is None else attackers, 1, {}, self.rekey)
        processor = RepairProcessor(replace(plan, **options))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(repair, "load_protection", lambda method, options: Method(num_rounds))
            processor.open(options.get("threads", 1))
        unit = Unit(shard)
        return processor.compute(unit, processor.fetch(unit))

    def expected(self, place: int, num_rounds: int, rank: int = 1) -> tuple[int, bytes]:
        """The first round of one picture that nobody traces, by itself."""
        for number in range(1, num_rounds + 1):
            jpeg = encode(Round(number).one(decode(self.jpegs[place]), place))
            if not any(self.traces(jpeg, place, attacker, sign, rank) for attacker, sign in ((0, 1), (1, 1), (0, -1))):
                return number, jpeg
        return 0, b""

    def traces(self, jpeg: bytes, place: int, attacker: int, sign: int, rank: int) -> bool:
        if (attacker, KEYS[place]) == (1, WITHOUT_MATE):
            return False
        vector = sign * self.recognizers[attacker].embed(decode(jpeg)[None])[0].astype(np.float16).astype(np.float64)
        scores = (self.vectors[attacker].astype(np.float64) @ vector).astype(np.float32)
        return bool(np.sum(scores > scores[place]) < rank)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repair")
    (folder / "secret").write_text(SECRET)
    return folder


@pytest.fixture(scope="module")
def world(folder: Path) -> World:
    return World(folder)


@pytest.fixture(scope="module")
def released(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    other = tmp_path_factory.mktemp("released")
    (other / "secret").write_text(SECRET)
    return World(other, rekey=True)


def pictures(data: ShardData | bytes) -> dict[str, bytes]:
    payload = data.payload if isinstance(data, ShardData) else data
    return {s.key: bytes(s.image) for s in read_samples(payload or b"\0" * 1024) if isinstance(s, Sample)}


@pytest.mark.parametrize("num_rounds", [2, 4])
@pytest.mark.parametrize("threads", [1, 3])
def test_rounds_equal_one_picture_at_a_time(world: World, num_rounds: int, threads: int) -> None:
    roots = world.original.url, world.protected.url
    processor = RepairProcessor(Repair(*roots, "made up", {}, 0, world.attackers(), 1, {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repair, "load_protection", lambda method, options: Method(num_rounds))
        patch.setattr(repair, "BATCH_SIZE", 5)
        processor.open(threads)
        found = processor.compute(Unit("00000"), processor.fetch(Unit("00000")))
    after, exposed = pictures(found), [n for n in range(PER_SHARD) if n != 2]
    expected = {n: world.expected(n, num_rounds) for n in exposed}
    assert {KEYS[n]: jpeg for n, (number, jpeg) in expected.items() if number} == {k: v for k, v in after.items() if k != KEYS[2]}
    assert after[KEYS[2]] == world.jpegs[2], "what the measurement does not trace is copied, whatever it is"
    rounds = [number for number, _ in expected.values()]
    counts = {f"repaired_{number:02d}": rounds.count(number) for number in set(rounds) if number}
    assert found.counts == {"exposed": 11, "copied": 1, **counts}
    assert len(set(rounds)) > 1, "the case has several kinds"
    lost = {KEYS[n] for n, (number, _) in expected.items() if not number}
    assert {row.key for row in found.rejected if row.reason == REASON} == lost
    assert {KEYS[0], KEYS[5], KEYS[10]} <= lost
    assert found.samples + len(found.rejected) == PER_SHARD + 1


def test_an_adaptive_attacker_keeps_a_picture_from_passing(world: World) -> None:
    with_it, without = (pictures(world.repair(1, attackers=attackers)) for attackers in (world.attackers(), world.attackers()[:2]))
    inverted = {KEYS[n] for n in (1, 3, 7, 9, 11)}
    assert inverted <= set(without)
    assert not inverted & set(with_it)


def test_one_attacker_is_enough_and_untouched_ones_stay(world: World) -> None:
    before = pictures(world.protected.read(world.protected.manifest("00001")))
    found = world.repair(4, "00001")
    after = pictures(found)
    assert {key for key in after if after[key] != before[key]} == {KEYS[13]}
    assert found.counts["exposed"] == 2
    (row,) = found.rejected
    assert (row.key, row.reason, row.source) == (DAMAGED, "not-an-image", None), "its original no longer decodes"
    assert list(after) == [key for key in before if key != DAMAGED]


def test_a_shard_nobody_is_traced_in_is_the_same_shard(world: World) -> None:
    attackers = [replace(world.attackers()[0])]
    found = world.repair(4, "00001", attackers)
    assert found.payload == world.protected.read(world.protected.manifest("00001"))
    assert (found.counts, found.rejected) == ({"exposed": 0, "copied": PER_SHARD}, [])


def test_earlier_quarantine_stays_and_a_method_without_variants_gives_up_at_once(world: World) -> None:
    attackers = world.attackers()
    found = world.repair(0, attackers=attackers)
    assert {row.key: row.reason for row in found.rejected} == {"x": "damaged-image", **{k: REASON for k in KEYS[:12] if k != KEYS[2]}}
    assert {row.error for row in found.rejected if row.reason == REASON} == {"traced at rank 1 or better, and made up has nothing to vary"}
    assert [cast(BruteForce, attacker.gallery).calls for attacker in attackers] == [0, 0, 0]


def test_a_shard_given_up_before_stays_given_up(world: World) -> None:
    ledger = [Rejected("00002", "failed-shard", "no", 0, None, 5)]
    world.protected.commit("00002", ShardData(None, 0, Labels(), ledger, failure="no"), **COMMIT)
    found = world.repair(4, "00002")
    assert (found.payload, found.samples, found.failure, found.rejected) == (None, 0, "no", ledger)


@pytest.mark.parametrize("rank", [2, 6])
def test_a_wider_rank_protects_more(world: World, rank: int) -> None:
    found = world.repair(4, rank=rank)
    exposed = [n for n in range(PER_SHARD) if n != 2 or rank >= 3]
    expected = {KEYS[n]: world.expected(n, 4, rank)[1] for n in exposed}
    assert {k: v for k, v in pictures(found).items() if k in expected} == {k: v for k, v in expected.items() if v}


def test_new_keys_are_found_again_and_nothing_names_the_originals(world: World, released: World) -> None:
    plain, found = world.repair(4), released.repair(4)
    assert pictures(found) == {new_key(key): picture for key, picture in pictures(plain).items()}
    assert list(pictures(found)) == sorted(pictures(found))
    rows = [row for row in found.rejected if row.reason == REASON]
    assert {row.key for row in rows} == {new_key(row.key) for row in plain.rejected if row.reason == REASON}
    assert len({row.error for row in rows}) == 1
    assert [row.key for row in found.rejected] == sorted(row.key for row in found.rejected)
    (Path(released.original.url) / str(released.original.manifest("00000").file)).write_bytes(b"x")
    with pytest.raises(ShardError, match=r"^ShardError in shard 00000 of the original; the worker's log tells more$"):
        released.repair(4)


def test_ties_count_for_the_attacker() -> None:
    vectors = np.eye(4, dtype=np.float16)[[0, 0, 1]]
    gallery = cast(Gallery, BruteForce(np.eye(4, dtype=np.float16)[[0, 0, 2]]))
    assert traced(gallery, vectors, np.array([1, 0, 0], np.float32), 1).tolist() == [True, False, True]
    assert traced(gallery, vectors, np.array([1, 0, 0], np.float32), 3).tolist() == [True, True, True]
