"""Training under faults: whatever dies and whatever is damaged, training goes on from the last published checkpoint, no sample of an
epoch comes twice or never, and the end is that of an undisturbed run. ``--kills N`` does N // 3 kills in trainings chosen by a seed."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog

from cluster.checkpoint import Checkpoint, Checkpoints
from cluster.seaweedfs import Endpoint
from cluster.store import Store, open_store
from cluster.verify_training import verify_training
from tests.faults.report import Case
from tests.faults.training_killer import TrainingKill, TrainingKiller, alive, family, trainers_of
from tests.training import assert_as_undisturbed, plan, reference, write_training_set

pytestmark = [pytest.mark.faults, pytest.mark.s3]

STEPS, EVERY = 24, 3  # 6 epochs of 4 steps: every second checkpoint lies in mid-epoch
KEYS = {f"k{number:03d}" for number in range(60)}
FLAGS = (
    "--loss irm+pixel --architecture facemae_tiny_patch16_112 --batch-size 16 --images-per-identity 2 --samples 360 --lr 1e-2 "
    f"--log-every 1 --grid-every 0 --checkpoint-every {EVERY} --max-failures 20"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_training_set(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Any:
    """Loss by step, and final weights."""
    return reference(plan(folder, str(folder / "nowhere"), workers=1, stage=0, recipe={"samples": 360}))


class Training:
    """One run, by ``facemae train`` in processes of its own, and what was done to it."""

    def __init__(self, folder: Path, url: str, scratch: Path, seed: int) -> None:
        self.folder, self.url, self.scratch, self.seed = folder, url, scratch, seed
        self.store = open_store(url)
        self.kills: list[TrainingKill] = []
        scratch.mkdir(exist_ok=True)

    def attempt(self, workers: int, *deeds: tuple[int, str]) -> int:
        """Start the job, do the deeds, wait for its end. Returns the exit code. It must have gone on from the newest checkpoint."""
        newest = Checkpoints(self.store).latest()
        before = 0 if newest is None else newest.step
        files = {stored.key for stored in self.store.list("tensorboard/")}
        command = [sys.executable, "-m", "jobs.train", "--data", str(self.folder / "data"), "--recognizer", str(self.folder / "toy.onnx")]
        started = time.time()
        with (self.scratch / f"log-{time.time_ns()}").open("w+") as log:
            flags = ["--output", self.url, "--num-workers", str(workers), *FLAGS]
            driver = subprocess.Popen([*command, *flags], stdout=log, stderr=log)
            killer = TrainingKiller(self.url, driver.pid, deeds, self.seed + len(self.kills))
            killer.start()
            relatives = self._wait(driver)
            killer.join()
            log.seek(0)
            printed = log.read()
        self.kills += killer.kills
        assert [kill.what for kill in killer.kills] == [what for _, what in deeds], printed[-3000:]
        starts = self._starts(files)
        seconds = [round(moment - started, 1) for moment in (*(moment for moment, _ in starts), time.time())]
        print(f"attempt on {workers} workers: first steps and end after {seconds} s")
        assert starts[0][1] == before, printed[-3000:]
        for kill in killer.kills:
            assert all(step >= kill.step for moment, step in starts if moment > kill.seconds), f"went on before what was published: {kill}"
        assert not relatives, "workers outlived their driver"
        return driver.returncode

    def _wait(self, driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
        """Wait for the driver's end and remove what it left behind. Returns the training workers among that, after 20 s."""
        process, relatives, trainers = psutil.Process(driver.pid), dict[int, psutil.Process](), set[int]()
        limit = time.monotonic() + 240
        while driver.poll() is None and time.monotonic() < limit:
            relatives.update({child.pid: child for child in family(process)})
            trainers.update(child.pid for child in trainers_of(process))
            time.sleep(0.1)
        if driver.poll() is None:
            driver.kill()
            driver.wait()
        workers, limit = [each for each in relatives.values() if each.pid in trainers], time.monotonic() + 20
        while any(map(alive, workers)) and time.monotonic() < limit:
            time.sleep(0.1)
        left = [each for each in workers if alive(each)]
        for each in filter(alive, relatives.values()):
            each.kill()  # Ray's own helpers take their time
        return left

    def _starts(self, known: set[str]) -> list[tuple[float, int]]:
        """(time, steps done before) of every start since, by the TensorBoard files that are not known yet."""
        starts = list[tuple[float, int]]()
        for stored in self.store.list("tensorboard/"):
            if stored.key not in known:
                path = self.scratch / Path(stored.key).name
                path.write_bytes(self.store.get(stored.key))
                events = [e for e in LegacyEventFileLoader(str(path)).Load() if e.session_log.status == SessionLog.START]
                starts += [(event.wall_time, event.step - 1) for event in events]
        return sorted(starts)

    def check(self, undisturbed: Any) -> int:
        """The end is that of an undisturbed run, and the log of keys adds up. Returns how many samples the log holds."""
        verified = verify_training(self.url, KEYS)
        assert verified.ok, verified.problems
        assert verified.finished
        assert verified.keys is not None
        assert (verified.keys.steps, verified.keys.samples, verified.keys.epochs) == (STEPS, 360, 6)
        curves = self.scratch / "curves"
        curves.mkdir()
        assert_as_undisturbed(self.url, curves, undisturbed)
        return verified.keys.samples


def report(kills: Sequence[TrainingKill], case: Case) -> None:
    for kill in kills:
        case.note(f"{'SIGTERM' if kill.what == 'stop' else 'kill'} {kill.what.split(' after')[0]}", killed=kill.what != "stop")
        print(f"kill {kill.what} at {kill.seconds:.2f} s, pids {kill.pids}, newest published step {kill.step}, seed {kill.seed}")


@pytest.mark.timeout(900)
def test_workers_and_driver_die_the_newest_checkpoint_is_damaged_and_the_number_of_workers_changes(
    long: None, s3_server: Endpoint, folder: Path, s3_root: str, tmp_path: Path, undisturbed: Any, fault_case: Case
):
    training = Training(folder, s3_root, tmp_path / "run", seed=1)
    assert training.attempt(1, (9, "driver")) == -signal.SIGKILL
    newest = Checkpoints(training.store).steps()[-1]
    cut(training.store, newest)
    assert training.attempt(2, (newest + EVERY, "workers")) == 0
    fault_case.note("newest checkpoint cut short")
    fault_case.seed = 1
    fault_case.tally.samples = training.check(undisturbed)
    report(training.kills, fault_case)


@pytest.mark.timeout(4 * 3600)
def test_many_kills_chosen_by_a_seed(
    long: None, request: pytest.FixtureRequest, s3_server: Endpoint, folder: Path, tmp_path: Path, undisturbed: Any,
    fault_case: Case,
):  # fmt: skip
    fault_case.seed = 1000
    wanted, kills, seed = request.config.getoption("--kills") // 3, list[TrainingKill](), 1000  # a kill costs a training half a minute
    while len(kills) < wanted:
        training = Training(folder, f"s3://tests/many-kills-{seed}", tmp_path / str(seed), seed)
        disturb(training, random.Random(seed))
        fault_case.tally.samples += training.check(undisturbed)
        kills += training.kills
        seed += 100
    report(kills, fault_case)


def disturb(training: Training, chance: random.Random) -> None:
    """Attempts, of which each but the last is disturbed, on 1 or 2 workers, until the run is finished."""
    step = 0
    while step + 4 * EVERY < STEPS:
        deeds = list[tuple[int, str]]()
        for _ in range(chance.randint(0, 1)):
            step += EVERY
            deeds.append((step, chance.choice(("worker", "workers"))))
        step += EVERY
        deeds.append((step, chance.choice(("driver", "driver", "stop"))))
        assert training.attempt(chance.choice((1, 2)), *deeds) == (143 if deeds[-1][1] == "stop" else -signal.SIGKILL)
        step = Checkpoints(training.store).steps()[-1]
        if chance.random() < 0.5:
            chance.choice(DAMAGES)(training.store, step)
    assert training.attempt(chance.choice((1, 2))) == 0


def data_of(store: Store, step: int) -> str:
    return Checkpoints(store).describe(step)["file"]


def cut(store: Store, step: int) -> None:
    data = store.get(data_of(store, step))
    store.put(data_of(store, step), data[: len(data) // 2])


def flip(store: Store, step: int) -> None:
    data = bytearray(store.get(data_of(store, step)))
    data[-3] ^= 1
    store.put(data_of(store, step), bytes(data))


def lose(store: Store, step: int) -> None:
    store.delete(data_of(store, step))


def cut_commit(store: Store, step: int) -> None:
    data = store.get(f"checkpoints/{step:08d}.json")
    store.put(f"checkpoints/{step:08d}.json", data[: len(data) // 2])


def age(store: Store, step: int) -> None:
    content = json.loads(store.get(f"checkpoints/{step:08d}.json"))
    store.put(f"checkpoints/{step:08d}.json", json.dumps({**content, "schema": 0}).encode())


def swap(store: Store, step: int) -> None:
    """The commit of another step stands in its place."""
    other = Checkpoints(store).steps()[0]
    content = json.loads(store.get(f"checkpoints/{other:08d}.json"))
    store.put(f"checkpoints/{step:08d}.json", json.dumps({**content, "file": "../" + content["file"]}).encode())


DAMAGES = (cut, flip, lose, cut_commit, age, swap)


def checkpoint(step: int, value: float = 0.0, size: int = 100) -> Checkpoint:
    return Checkpoint(step, {}, {f"{part}/a": torch.full((size,), step + value) for part in ("weight", "exp_avg", "exp_avg_sq")})


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_never_taken_and_never_costs_a_whole_one(any_root: str, damage: Callable[[Store, int], None]):
    store = open_store(any_root)
    checkpoints = Checkpoints(store, keep=2)
    for step in (1, 2, 4, 6):
        Checkpoints(store, keep=9).save(checkpoint(step))
    for broken, whole in ((6, 4), (4, 2)):
        damage(store, broken)
        assert newest(checkpoints) == whole
    checkpoints.save(checkpoint(3, 0.5))  # stopped there, for example
    assert newest(checkpoints) == 3
    assert 2 in checkpoints.steps()
    checkpoints.save(checkpoint(4, 0.5))
    assert newest(checkpoints) == 4
    assert checkpoints.load(4).tensors["weight/a"][0] == 4.5
    checkpoints.save(checkpoint(6, 0.5))
    assert newest(checkpoints) == 6
    assert {int(stored.key[12:20]) for stored in store.list("checkpoints/")} == {4, 6}


def newest(checkpoints: Checkpoints) -> int:
    """Step of the newest whole checkpoint, whose content must be that of its step."""
    found = checkpoints.latest()
    if found is None:
        return 0
    values = {float(value) for tensor in found.tensors.values() for value in tensor.unique()}
    assert len(values) == 1
    assert int(values.pop()) == found.step
    return found.step


class Mortal:
    """A store whose process dies before or after its nth change."""

    def __init__(self, store: Store, nth: int, before: bool) -> None:
        self._store, self._left, self._before = store, nth, before
        self.url, self.get, self.list, self.size, self.get_range = store.url, store.get, store.list, store.size, store.get_range
        self.unfinished, self.discard, self.entries, self.age = store.unfinished, store.discard, store.entries, store.age

    def put(self, key: str, data: bytes, *, if_absent: bool = False, sha256: str | None = None) -> None:
        self._change(lambda: self._store.put(key, data, if_absent=if_absent, sha256=sha256))

    def delete(self, key: str) -> None:
        self._change(lambda: self._store.delete(key))

    def _change(self, change: Callable[[], None]) -> None:
        self._left -= 1
        if self._left == 0 and self._before:
            os.kill(os.getpid(), signal.SIGKILL)
        change()
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(url: str, nth: int, before: bool) -> None:
    Checkpoints(Mortal(open_store(url), nth, before), keep=1).save(checkpoint(2))


def save_until(url: str, step: int, size: int, seconds: float, ready: Any) -> None:
    """Begin to save a checkpoint, and die after so many seconds."""
    store = open_store(url)
    list(store.list())  # connected
    ready.set()
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    Checkpoints(store, keep=2).save(checkpoint(step, size=size))
    time.sleep(60)


@pytest.fixture(scope="module")
def processes(s3_server: Endpoint) -> Iterator[Any]:
    """Processes that start fast, from one that has imported torch. It inherits the S3 server's address."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.test_training"])
    yield context
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("nth", "before", "expected"),
    [
        (1, True, 1),  # before the data
        (1, False, 1),  # between the data and the commit
        (2, True, 1),
        (2, False, 2),  # committed; then the old one goes, commit first
        (3, True, 2),
        (3, False, 2),
        (4, True, 2),
    ],
)
def test_a_death_at_any_moment_of_a_save_leaves_the_old_checkpoint_or_the_new(
    processes: Any, any_root: str, nth: int, before: bool, expected: int
):
    store = open_store(any_root)
    checkpoints = Checkpoints(store, keep=1)
    checkpoints.save(checkpoint(1))
    saver = processes.Process(target=save_and_die, args=(any_root, nth, before))
    saver.start()
    saver.join(60)
    assert saver.exitcode == -signal.SIGKILL
    assert newest(checkpoints) == expected
    checkpoints.save(checkpoint(2, 0.5))  # the same step on other ranks rounds differently
    assert newest(checkpoints) == 2
    checkpoints.save(checkpoint(3))
    assert newest(checkpoints) == 3
    assert [stored.key[:20] for stored in store.list("checkpoints/")] == ["checkpoints/00000003"] * 2  # nothing of the dead is left


@pytest.mark.timeout(3600)
def test_a_death_at_a_random_moment_of_a_save(request: pytest.FixtureRequest, processes: Any, s3_root: str, fault_case: Case):
    checkpoints, kills, size = Checkpoints(open_store(s3_root), keep=2), list[TrainingKill](), 2_000_000  # 24 MB
    started = time.perf_counter()
    checkpoints.save(checkpoint(1, size=size))
    duration = time.perf_counter() - started
    wanted = max(5, request.config.getoption("--kills"))
    for seed in range(2 * wanted):
        before, ready = newest(checkpoints), processes.Event()
        moment = random.Random(seed).uniform(0, 1.2 * duration)
        saver = processes.Process(target=save_until, args=(s3_root, before + 1, size, moment, ready))
        saver.start()
        saver.join(60)
        assert ready.is_set()
        assert saver.exitcode == -signal.SIGKILL
        assert newest(checkpoints) in (before, before + 1)
        kills.append(TrainingKill(f"saver after {moment:.3f} s", time.time(), (saver.pid,), newest(checkpoints), seed))
        late = len({kill.step for kill in kills}) > 1
        if late and len(kills) >= wanted:
            break
        duration *= 1 if late else 1.5  # the machine is slower than it was for the first save
    assert late, "no kill came after its save"
    checkpoints.save(checkpoint(1000, size=size))
    assert len(list(open_store(s3_root).list("checkpoints/"))) <= 5  # two checkpoints, and perhaps a dead attempt's data between them
    report(kills, fault_case)
