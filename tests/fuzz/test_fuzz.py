"""A short run of the fuzzer, and proof that it finds what it looks for."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys

import pytest

from tests.fuzz import child, corpus
from tests.fuzz.__main__ import run
from tests.fuzz.runner import ROOT, fuzz
from tests.fuzz.targets import TARGETS, case_random


def test_three_thousand_cases_hold_every_property():
    reports = run(3000, seed=int(os.environ.get("FACEMAE_FUZZ_SEED", "7")))
    assert [(report.target, report.failures) for report in reports if report.failures] == []
    assert sum(report.cases for report in reports) == 3000
    for report in reports:
        assert sum(report.outcomes.values()) == report.cases
        assert report.peak_growth < child.MEMORY
    outcomes = {report.target: report.outcomes for report in reports}
    assert outcomes["tar"].keys() >= {"whole", "rows", "truncated-tar", "not-a-tar"}  # the mutations reach every answer
    assert outcomes["jpeg"].keys() >= {"kept", "made over", "damaged-image", "not-an-image", "wrong-size"}
    assert outcomes["png"].keys() >= {"made over", "too-large", "not-an-image"}
    assert outcomes["record"].keys() == {"whole", "rows"}


def unlucky(rng: random.Random) -> bool:
    return rng.random() < 0.1


def planted_error(rng: random.Random) -> str:
    return {False: "fine"}[unlucky(rng)]


def planted_segfault(rng: random.Random) -> str:
    return str(ctypes.string_at(0)) if unlucky(rng) else "fine"


def planted_hang(rng: random.Random) -> str:
    bad = unlucky(rng)
    while bad:
        pass
    return "fine"


def planted_memory(rng: random.Random) -> str:
    return str(len(bytearray(child.MEMORY + (1 << 20)))) if unlucky(rng) else "fine"


@pytest.mark.parametrize(
    ("name", "outcome", "text"),
    [
        ("planted_error", "FAILED", "KeyError: True"),
        ("planted_memory", "FAILED", "MemoryError"),
        ("planted_segfault", "DIED", "SIGSEGV"),
        ("planted_hang", "DIED", "hangs"),
    ],
)
def test_what_is_planted_is_found_and_named(name: str, outcome: str, text: str):
    """Each failure by its case's number, and the cases after it are run as well."""
    target = f"tests.fuzz.test_fuzz:{name}"
    first = next(number for number in range(1000) if unlucky(case_random(1, target, number)))
    bad = [number for number in range(first + 4) if unlucky(case_random(1, target, number))]
    report = fuzz(target, seed=1, start=0, stop=first + 4)
    assert sorted(number for number, _ in report.failures) == bad
    assert all(text in found for _, found in report.failures)
    assert report.outcomes == {outcome: len(bad), "fine": first + 4 - len(bad)}
    assert report.cases == first + 4


def test_a_case_is_the_same_in_every_process():
    code = "import hashlib; from tests.fuzz.targets import case_random, corpus, edit_tar, mutated\n"
    code += "print(hashlib.sha256(mutated(corpus.tars()[2], corpus.tars(), case_random(5, 'tar', 77), edit_tar)).hexdigest())"
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert runs[0] == runs[1]


def test_the_corpus_itself_is_whole():
    rng = random.Random(0)
    assert all(percent > 0 for _, percent in TARGETS.values())
    assert sum(percent for _, percent in TARGETS.values()) == 100
    assert len(corpus.tars()) + len(corpus.face_tars()) + len(corpus.records()) + len(corpus.bins()) == 13
    assert TARGETS["tar, valid"][0](rng) == "as tarfile"
