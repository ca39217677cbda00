"""Re-reads a training run from its bucket: are the weights, the checkpoints and the log of keys what they claim to be?"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.centers import check_parts
from cluster.checkpoint import CheckpointError, Checkpoints, files_of
from cluster.key_log import KeyLogCheck, check_key_log
from cluster.shard import sha256_hex
from cluster.store import NotFound, Store, StoreError, open_store


@dataclass
class TrainingVerification:
    """What was found.

    Attributes:
        url: the run's root.
        finished: there is a run.json.
        steps: that the run, or its newest checkpoint, stands for.
        checkpoints: steps of the whole ones.
        keys: what the log of keys says; None where none was kept.
        problems: empty when the run is what it claims to be.
        strays: checkpoint data without a commit, left by a dead attempt; harmless.
    """

    url: str
    finished: bool = False
    steps: int = 0
    checkpoints: list[int] = field(default_factory=list)
    keys: KeyLogCheck | None = None
    problems: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when nothing is missing, damaged, repeated or skipped."""
        return not self.problems

    def lines(self) -> Iterator[str]:
        """The same in words."""
        state = "finished" if self.finished else "unfinished"
        yield f"{self.url} (training, {state}): {self.steps} steps, whole checkpoints at {', '.join(map(str, self.checkpoints)) or 'none'}"
        if self.keys is None:
            yield "  no log of keys: which samples a step saw was not written down (facemae train --log-keys)"
        else:
            yield (
                f"  {self.keys.steps} steps consumed {self.keys.samples} samples; {self.keys.epochs} whole epochs, "
                f"{self.keys.repeated} steps logged again by a restart"
            )
        yield from (f"  PROBLEM {problem}" for problem in self.problems)
        yield from (f"  STRAY   {stray}: no checkpoint names it; the next checkpoints of this run remove it" for stray in self.strays)
        if self.ok:
            yield "  weights and checkpoints have their sha256" + ("" if self.keys is None else "; no sample repeated, none skipped")


def holds_training(url: str) -> bool:
    """True when there is a training run at ``url``, finished or not."""
    store = open_store(url)
    try:
        store.size("run.json")
    except NotFound:
        return any(True for folder in ("checkpoints/", "keys/") for _ in store.list(folder))
    return True


def verify_training(url: str, keys: Collection[str] | None = None) -> TrainingVerification:
    """Read weights, checkpoints and the log of keys of a run again.

    Args:
        url: the run's root, local or s3://.
        keys: the data set's keys, to compare the log with; without them its epochs are compared with each other.

    Raises:
        StoreError: the root cannot be read, or holds no training.
    """
    store = open_store(url)
    if not holds_training(url):
        raise StoreError(f"{store.url} holds no training: neither run.json nor a checkpoint. Give the --output of a facemae train")
    found = TrainingVerification(store.url)
    facts = _check_checkpoints(store, found)
    finished = _check_result(store, found)
    found.steps = int((finished or facts).get("steps" if finished else "step", 0))
    parent = (finished or facts).get("parent")
    if parent is not None and any(True for _ in store.list("keys/")):
        found.keys = check_key_log(store, found.steps, int(parent["samples"]), keys)
        found.problems += found.keys.problems
        samples = (finished or facts)["samples"]
        if found.keys.samples != samples:
            found.problems.append(f"the log holds {found.keys.samples} samples of {found.steps} steps, the run says {samples}")
    return found


def _check_checkpoints(store: Store, found: TrainingVerification) -> dict[str, Any]:
    """What the newest whole checkpoint says. Adds damaged ones to the problems and data without a commit to the strays."""
    checkpoints, facts = Checkpoints(store), dict[str, Any]()
    named = set[str]()
    for step in checkpoints.steps():
        try:
            named |= files_of(checkpoints.describe(step))
            facts = dict(checkpoints.load(step).facts)
            check_parts(store, facts.get("parts", ()))
            found.checkpoints.append(step)
        except (CheckpointError, NotFound) as error:
            found.problems.append(f"checkpoint {step}: {error}")
    data = (stored.key for stored in store.list("checkpoints/") if not stored.key.endswith(".json"))
    found.strays = sorted(set(data) - named)
    return facts


def _check_result(store: Store, found: TrainingVerification) -> dict[str, Any] | None:
    """The content of run.json, or None where training has not finished; compares the weights with it."""
    try:
        content = json.loads(store.get("run.json"))
        expected = {"run.json": content["weights"]["sha256"]}
    except NotFound:
        return None
    except (ValueError, KeyError, TypeError):
        found.problems.append("run.json is cut short or no training's")
        return None
    found.finished = True
    try:
        expected["weights/config.json"] = json.loads(store.get("weights/config.json"))["sha256"]
        actual = sha256_hex(store.get("weights/model.safetensors"))
    except (NotFound, ValueError, KeyError, TypeError) as error:
        found.problems.append(f"weights: {error}")
        return content
    for name, sha256 in expected.items():
        if sha256 != actual:
            found.problems.append(f"weights/model.safetensors has sha256 {actual}, {name} says {sha256}")
    return content
