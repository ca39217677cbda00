"""The status of data sets and trainings in every state, on a folder and on S3; whom it believes; what it reads."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import attempt as attempts
from cluster.attempt import Attempt, attempting
from cluster.dataset import Dataset, Labels, ShardData
from cluster.processor import Unit
from cluster.pulse import Pulse, Tally
from cluster.scheduler import Interrupted
from cluster.shard import Rejected, Sample, ShardWriter
from cluster.status import DatasetStatus, State, Status, Watch
from cluster.status_dataset import vouched
from cluster.status_text import brief, duration, lines, to_json
from cluster.status_training import TrainingStatus
from cluster.store import StoreError, open_store

UNITS = [Unit(f"{number:05d}", 4) for number in range(8)]
OLD = {"run": "abc", "attempt": 1, "fingerprint": "f", "state": "running", "beat": 7, "started": "2026-01-01T00:00:00Z"}
NOBODY = "nobody is at work on it: run the same command again"


@pytest.fixture(autouse=True)
def _no_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """The records say what the test says, until an attempt ends."""
    monkeypatch.setattr(attempts, "BEAT_SECONDS", 1000.0)


def old_hearts(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on a record that did not end is an old one."""
    monkeypatch.setattr(attempts, "PATIENCE_SECONDS", -1.0)


class Work:
    """One attempt at a data set of 8 shards with 4 samples each, as a driver goes about it."""

    def __init__(self, root: str, attempt: Attempt, pulse: Pulse) -> None:
        self.dataset, self.attempt, self.pulse = Dataset(root), attempt, pulse

    def commit(self, *shards: int, told: bool = True) -> Work:
        """``told``: the driver learns of it before it dies."""
        for shard in shards:
            self._commit(shard, ShardData(*_tar(shard), [Rejected("x", "not-an-image", "", 1)]), told)
        return self

    def give_up(self, shard: int, told: bool = True) -> Work:
        row = Rejected(f"{shard:05d}", "failed-shard", "it burns", 0, None, 4)
        self.pulse.given_up(f"{shard:05d}", ["it burns"])
        self._commit(shard, ShardData(None, 0, Labels(), [row], failure="it\x1b[2J burns"), told)
        return self

    def _commit(self, shard: int, data: ShardData, told: bool) -> None:
        manifest = self.dataset.commit(f"{shard:05d}", data, fingerprint="f", attempt=self.attempt, seconds={})
        if told:
            self.pulse.committed(manifest, mine=True, idle=0.0)

    def beat(self) -> None:
        """As the heartbeat's thread does it."""
        record = attempts.records(self.dataset.store)[self.attempt.number]
        record = replace(record, beat=record.beat + 1, tally=self.pulse.tally())
        self.dataset.store.put(f"attempts/{self.attempt.number:05d}.json", record.to_bytes())


def _tar(shard: int) -> tuple[bytes, int, Labels]:
    writer = ShardWriter()
    for number in range(3):
        writer.add(Sample(f"{shard:05d}-{number}", b"%d" % number, number))
    return writer.finish(), 3, Labels.of(writer.labels)


@contextlib.contextmanager
def working(root: str) -> Iterator[Work]:
    """An attempt from its beginning to its end."""
    pulse = Pulse("protect", UNITS, Dataset(root).names())
    with attempting(open_store(root), "f", tally=pulse.tally) as attempt:
        yield Work(root, attempt, pulse)


def killed(root: str, *shards: int, told: bool = True) -> Work:
    """An attempt that left no last word; its last beat came before or after its last commit."""
    record = {**OLD, "attempt": len(attempts.records(open_store(root))) + 1}
    open_store(root).put(f"attempts/{record['attempt']:05d}.json", json.dumps(record).encode())
    work = Work(root, Attempt("abc", int(str(record["attempt"]))), Pulse("protect", UNITS, Dataset(root).names()))
    work.commit(*shards, told=told).beat()
    return work


def look(at: str | Watch) -> DatasetStatus:
    (part,) = (at if isinstance(at, Watch) else Watch(at)).look().parts
    assert isinstance(part, DatasetStatus)
    return part


def text(at: str | Watch) -> str:
    return "\n".join(lines((at if isinstance(at, Watch) else Watch(at)).look()))


def finish(root: str) -> Dataset:
    dataset = Dataset(root)
    dataset.finish("images", {"fingerprint": "f"}, dataset.manifests())
    return dataset


def forbid_manifests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dataset, "manifest", lambda _, name: pytest.fail(f"manifest {name} was read"))


# --- a data set ---


@pytest.mark.s3
def test_a_run_from_its_first_second_to_its_end(any_root: str, monkeypatch: pytest.MonkeyPatch):
    watch = Watch(any_root)
    with working(any_root) as work:
        found = look(watch)
        assert (found.state, found.shards, found.shards_total, found.samples_total) == (State.RUNNING, 0, 8, 32)
        work.pulse.workers(0, 2)
        work.beat()
        found = look(watch)
        assert found.seconds_left is None
        assert found.waiting is not None
        assert "waiting for workers: 0 of 2 for " in text(watch)
        assert "waiting for workers: 0 of 2" in brief(watch.look())[0]
        work.pulse.workers(2, 2)
        work.commit(0, 1, 2).give_up(3).beat()
        found = look(watch)
        assert (found.shards, found.samples, found.quarantined, found.waiting) == (4, 9, 7, None)
        assert found.samples_per_second is not None
        assert found.seconds_left == pytest.approx(16 / found.samples_per_second)
        assert found.next == f"facemae status {found.url} --watch"
        work.commit(4, 5, 6, 7).beat()
        assert "running, about to finish" in text(watch)
        finish(any_root)
    found = look(watch)
    assert (found.state, found.shards, found.shards_total, found.samples, found.quarantined) == (State.COMPLETE, 8, 8, 21, 11)
    assert found.samples_total == 32
    assert found.given_up == {"00003": "it\N{REPLACEMENT CHARACTER}[2J burns"}
    assert found.next == f"facemae verify {found.url}"
    assert "complete, but for 1 shard given up" in text(watch)
    assert watch.look().given_up == [f"{found.url}: 00003"]


@pytest.mark.s3
def test_a_killed_run_has_neither_rate_nor_time_left_and_says_how_to_go_on(any_root: str, monkeypatch: pytest.MonkeyPatch):
    watch = Watch(any_root)
    killed(any_root, 0, 1, 2)
    alive = look(watch)
    assert (alive.state, alive.samples_per_second is None) == (State.RUNNING, False)
    old_hearts(monkeypatch)
    found = look(watch)
    assert (found.state, found.shards, found.shards_total, found.samples) == (State.UNFINISHED, 3, 8, 9)
    assert (found.samples_per_second, found.seconds_left, found.waiting) == (None, None, None)
    assert found.next == f"attempt 1 died; {NOBODY}, it goes on with the 5 shards that are left"
    assert "attempt  1 died (its heartbeat stopped), began 2026-01-01T00:00:00Z, 3 shards in " in text(watch)


@pytest.mark.parametrize(("error", "how"), [(Interrupted("now"), "was stopped"), (ValueError("/home/me"), "failed (ValueError)")])
def test_how_an_attempt_ended_is_told(tmp_path: Path, error: Exception, how: str):
    with contextlib.suppress(type(error)), working(str(tmp_path)) as work:
        work.commit(0)
        raise error
    assert f"unfinished, the last attempt {how}" in text(str(tmp_path))
    assert "/home/me" not in text(str(tmp_path))


def test_the_tallies_spare_the_manifests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    killed(str(tmp_path), 0, 1)
    with working(str(tmp_path)) as work:
        work.commit(2, 3).beat()
        work.commit(4)  # since the last beat
        forbid_manifests(monkeypatch)
        old = attempts.is_alive
        monkeypatch.setattr("cluster.status_part.is_alive", lambda store, record: record.attempt == 2 and old(store, record))
        found = look(str(tmp_path))
    assert (found.shards, found.samples) == (5, 12)


@pytest.mark.parametrize("case", ["not told", "old record", "damaged record", "deleted manifest", "overlap"])
def test_where_the_tallies_do_not_add_up_the_manifests_are_read(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch):
    root, store = str(tmp_path), open_store(str(tmp_path))
    killed(root, 0, 1, told=case != "not told")
    if case == "overlap":
        first, second = killed(root), killed(root)
        first.commit(2).beat()
        second.commit(3).beat()
        store.delete("manifests/00003.json")
    else:
        killed(root, 2)
    if case == "deleted manifest":
        store.delete("manifests/00000.json")
        killed(root, 0)
    if case == "old record":
        store.put("attempts/00001.json", json.dumps(OLD).encode())
    if case == "damaged record":
        store.put("attempts/00001.json", b"{")
    old_hearts(monkeypatch)
    found = look(root)
    assert (found.shards, found.samples, found.quarantined, found.shards_total) == (3, 9, 3, 8)
    assert (case == "damaged record") == ("1 left a damaged record, began at an unknown time" in text(root))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=5), st.integers(0, 3), st.booleans())
def test_tallies_are_believed_only_where_they_count_every_shard(steps: list[tuple[int, int]], more: int, lives: bool):
    """Attempts one after another: each commits some shards and tells of fewer or all of them."""
    committed, tallies = 0, list[tuple[bool, Tally]]()
    for done, told in steps:
        own = min(done, told)
        blank = Pulse("x", UNITS, []).tally()
        tally = Tally.of({**blank, "resumed": committed, "own_shards": own})
        assert tally is not None
        tallies.append((False, tally))
        committed += done
    whole = all(told >= done for done, told in steps)
    if lives:  # the last one has committed more since its last beat
        tallies[-1] = (True, tallies[-1][1])
        assert vouched(committed + more, tallies) == all(told >= done for done, told in steps[:-1])
    else:
        assert vouched(committed, tallies) == whole
        assert not vouched(committed + more + 1, tallies)


def test_a_second_look_reads_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = open_store(str(tmp_path))
    work = killed(str(tmp_path), 0, 1)
    store.put("attempts/00001.json", json.dumps(OLD).encode())
    watch = Watch(str(tmp_path))
    assert watch.look().parts[0].state is State.RUNNING
    work.commit(2)
    seen, before = list[str](), Dataset.manifest
    monkeypatch.setattr(Dataset, "manifest", lambda self, name: (seen.append(name), before(self, name))[1])
    (found,) = watch.look().parts
    assert isinstance(found, DatasetStatus)
    assert (seen, found.samples, found.shards_total, found.samples_total) == (["00002"], 9, None, None)
    store.delete("manifests/00002.json")
    (found,) = watch.look().parts
    assert isinstance(found, DatasetStatus)
    assert (found.shards, found.samples) == (2, 6)
    assert "of an unknown number" in text(str(tmp_path))


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b'{"schema": 2}', b'{"schema": 1, "shards": 3}'])
def test_a_damaged_description_is_damaged_not_about_to_finish(tmp_path: Path, content: bytes):
    with working(str(tmp_path)) as work:
        work.commit(*range(8))
        finish(str(tmp_path))
    Path(tmp_path / "dataset.json").write_bytes(content)
    found = look(str(tmp_path))
    assert (found.state, found.shards, found.samples) == (State.DAMAGED, 8, 24)
    assert "dataset.json" in found.problems[0]
    assert found.next == "run the command that wrote the set again: it goes on with what is committed and writes dataset.json anew"
    assert "finish" not in text(str(tmp_path))


def test_other_damage_is_named_with_its_remedy(tmp_path: Path):
    with working(str(tmp_path)) as work:
        work.commit(*range(7)).give_up(7)
        finish(str(tmp_path))
    (tmp_path / "manifests" / "00007.json").write_text("{")
    assert look(str(tmp_path)).state is State.DAMAGED
    assert "manifests/00007.json is not a manifest of schema 2" in text(str(tmp_path))
    (tmp_path / "manifests" / "00007.json").unlink()
    (tmp_path / "manifests" / "00001.json").unlink()
    found = look(str(tmp_path))
    assert found.problems[0].startswith("dataset.json counts 7 shards, 6 manifests are there: run the command")
    (tmp_path / "index.json").unlink()
    assert "index.json is missing or damaged" in text(str(tmp_path))


def test_a_release_and_a_refusal_are_told(tmp_path: Path):
    with working(str(tmp_path)) as work:
        work.commit(0)
        dataset = finish(str(tmp_path))
    dataset.describe({**dataset.description(), "released": False, "release": {"withheld": "CMC@1 up to 3 %, the limit is 1 %"}})
    assert Watch(str(tmp_path)).look().withheld == "CMC@1 up to 3 %, the limit is 1 %"
    assert "complete, release withheld: CMC@1 up to 3 %" in text(str(tmp_path))
    dataset.describe({**dataset.description(), "released": True, "release": {"bounds": []}})
    assert (Watch(str(tmp_path)).look().withheld, look(str(tmp_path)).released) == (None, True)
    assert "complete, released" in text(str(tmp_path))


def test_json_leaves_out_what_is_not_known(tmp_path: Path):
    store = open_store(str(tmp_path))
    killed(str(tmp_path), 0)
    store.put("attempts/00001.json", json.dumps(OLD).encode())
    content = json.loads(json.dumps(to_json(Watch(str(tmp_path)).look())))
    (part,) = content["parts"]
    assert (content["state"], part["state"], part["shards"], part["samples"]) == ("running", "running", 1, 3)
    assert not {"samples_total", "shards_total", "seconds_left", "withheld"} & set(part)
    finish(str(tmp_path))
    (part,) = to_json(Watch(str(tmp_path)).look())["parts"]
    assert (part["samples_total"], part["shards_total"]) == (4, 1)


# --- trainings, folders of several, and no root at all ---


def training(root: Path, checkpoint: int | None = None, run: str | None = None) -> None:
    store = open_store(str(root))
    store.put("keys/00000.parquet", b"")
    if checkpoint is not None:
        store.put(f"checkpoints/{checkpoint:08d}.json", json.dumps({"samples": 10 * checkpoint, "step": checkpoint}).encode())
        store.put("checkpoints/00000999.json", b"{")
    if run is not None:
        store.put("run.json", run.encode())


def test_a_training_without_a_record_stands_at_its_checkpoint(tmp_path: Path):
    training(tmp_path, checkpoint=40)
    (found,) = Watch(str(tmp_path)).look().parts
    assert isinstance(found, TrainingStatus)
    assert (found.state, found.step, found.steps, found.samples, found.checkpoint) == (State.UNFINISHED, 40, None, 400, 40)
    assert "whether anybody trains it is not known" in found.next


TALLY = {
    "training": "train", "step": 55, "steps": 80, "samples": 550, "samples_total": 800, "metrics": {"loss": 0.5}, "workers": 2,
    "waiting": None, "seconds": 60.0, "samples_per_second": 10.0,
}  # fmt: skip


def test_a_training_by_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = open_store(str(tmp_path))
    waiting = {**TALLY, "step": None, "samples": None, "metrics": {}, "waiting": 33.0, "samples_per_second": None}
    store.put("attempts/00001.json", json.dumps({**OLD, "tally": waiting}).encode())
    assert "rate     none: waiting for 2 workers for 33 s" in text(str(tmp_path))
    training(tmp_path, checkpoint=40)
    store.put("attempts/00001.json", json.dumps({**OLD, "tally": TALLY}).encode())
    (found,) = Watch(str(tmp_path)).look().parts
    assert isinstance(found, TrainingStatus)
    assert (found.state, found.step, found.steps, found.seconds_left, found.metrics) == (State.RUNNING, 55, 80, 25.0, {"loss": 0.5})
    assert "  rate     10 samples/s, 25 s left\n  saved    checkpoint of step 40\n" in text(str(tmp_path))
    old_hearts(monkeypatch)
    (found,) = Watch(str(tmp_path)).look().parts
    assert isinstance(found, TrainingStatus)
    assert (found.state, found.step, found.steps, found.samples_per_second) == (State.UNFINISHED, 40, 80, None)
    assert found.next == f"attempt 1 died; {NOBODY}, it goes on with the checkpoint of step 40"


@pytest.mark.parametrize("content", ["{", "[]", '{"steps": 3}'])
def test_a_damaged_result_of_a_training_is_damaged(tmp_path: Path, content: str):
    training(tmp_path, run=content)
    (found,) = Watch(str(tmp_path)).look().parts
    assert found.state is State.DAMAGED
    assert "run.json is damaged: delete it" in found.problems[0]


def test_a_pipelines_root_shows_each_and_what_lies_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("original", "original/embeddings/toy", "original/embeddings/toy.index-abc"):
        with working(str(tmp_path / name)) as work:
            work.commit(0)
            finish(str(tmp_path / name))
    (tmp_path / "original" / "embeddings" / "toy.onnx").write_bytes(b"")
    training(tmp_path / "run", run=json.dumps({"steps": 8, "samples": 80, "weights": {}, "metrics": {"loss": 1.0}}))
    killed(str(tmp_path / "protected"), 0)
    found = Watch(str(tmp_path)).look()
    below = [part.url.removeprefix(f"{tmp_path}/") for part in found.parts]
    assert below == ["original", "original/embeddings/toy", "original/embeddings/toy.index-abc", "protected", "run"]
    assert found.state is State.RUNNING
    old_hearts(monkeypatch)
    assert Watch(str(tmp_path)).look().state is State.UNFINISHED
    assert Status("x", [part for part in found.parts if part.state is State.COMPLETE]).state is State.COMPLETE


@pytest.mark.parametrize("role", ["records", "listing"])
def test_who_may_not_read_the_records_of_attempts_still_sees_the_shards(tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch):
    from cluster.s3 import AccessDenied

    def deny(*_: Any) -> Any:
        raise AccessDenied("access denied", fatal=True)

    killed(str(tmp_path), 0, 1)
    monkeypatch.setattr("cluster.status_part.records", deny)
    found = look(str(tmp_path))
    assert (found.state, found.shards, found.samples, found.attempts) == (State.UNKNOWN, 2, 6, None)
    assert "these credentials may not read" in text(str(tmp_path))


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (lambda folder: "", "ROOT is empty: give the --output"),
        (lambda folder: "  ", "ROOT is empty"),
        (lambda folder: str(folder / "none"), "does not exist: correct ROOT"),
        (lambda folder: str(folder / "file"), "is a file: give the folder that it lies in, .*"),
        (lambda folder: str(folder), "holds neither a data set nor a training: correct ROOT, or begin with `facemae ingest"),
        (lambda folder: "ftp://x/y", "only s3://bucket/prefix and local folders"),
        (lambda folder: "s3://", "names no bucket"),
        (lambda folder: "s3://key:secret@tests/x", "holds a user or password"),
    ],
)
def test_a_root_that_is_none_is_one_clear_line(tmp_path: Path, root: Callable[[Path], str], message: str):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=message) as caught:
        Watch(root(tmp_path)).look()
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.s3
def test_on_s3_too(s3_root: str, monkeypatch: pytest.MonkeyPatch):
    open_store(s3_root).put("data/dataset.json", b"{")
    for root, message in {
        f"{s3_root}/data/dataset.json": f"is a file: give the folder that it lies in, {s3_root}/data",
        f"{s3_root}/nothing": "holds neither a data set nor a training",
        "s3://no-such-bucket-here/x": "the bucket does not exist: create it, or correct the URL",
    }.items():
        with pytest.raises(StoreError, match=re.escape(message)):
            Watch(root).look()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match="the secret key is wrong: check AWS_SECRET_ACCESS_KEY"):
        Watch(f"{s3_root}/data").look()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (18420, "5 h 7 min"), (183600, "2 d 3 h"), (86399.9, "1 d")],
)
def test_durations_are_words(seconds: float, words: str):
    assert duration(seconds) == words
