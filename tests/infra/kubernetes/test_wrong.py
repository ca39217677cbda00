"""The checker: one good bundle, and the many ways to break it."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.infra.kubernetes.__main__ import main
from tests.infra.kubernetes.check import check, definitions, definitions_folder, load
from tests.infra.kubernetes.crd import Definitions
from tests.infra.kubernetes.problem import Object
from tests.infra.kubernetes.quantity import quantity
from tests.infra.kubernetes.wrong import GROUP, KUBERAY, SCHEMA, WRONG, Wrong, change

GOOD = Path(__file__).with_name("good.yaml")
OUTSIDE = ("Secret/facemae-s3",)


@pytest.fixture(scope="module")
def good() -> list[Object]:
    return load(GOOD.read_text())


@pytest.fixture(scope="module")
def crd() -> Definitions:
    found = definitions()
    if found is None:
        pytest.skip(f"no KubeRay definitions in {definitions_folder()}: set FACEMAE_SHARED")
    return found


def test_nothing_is_wrong_with_the_good_bundle(good: list[Object], crd: Definitions) -> None:
    before = copy.deepcopy(good)
    assert check(good, OUTSIDE, crd=crd) == []
    assert good == before  # defaults are set in a copy


def test_nothing_is_wrong_without_kuberays_definitions(good: list[Object]) -> None:
    assert check(good, OUTSIDE) == []


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_manifest_is_refused_with_its_path(good: list[Object], wrong: Wrong, request: pytest.FixtureRequest) -> None:
    found = check(wrong.apply(good), OUTSIDE, crd=request.getfixturevalue("crd") if wrong.crd else None)
    assert any(problem.path.startswith(wrong.must_name) and wrong.reason in str(problem) for problem in found), found


def test_an_object_that_is_there_twice(good: list[Object]) -> None:
    assert any("twice" in str(problem) and problem.place == "Secret/redis" for problem in check([*good, good[2]], OUTSIDE))


def test_a_field_that_has_a_default_may_be_left_out(good: list[Object], crd: Definitions) -> None:
    objects = copy.deepcopy(good)
    for field in ("replicas", "minReplicas", "maxReplicas"):
        del objects[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0][field]
    assert check(objects, OUTSIDE, crd=crd) == []


@pytest.mark.parametrize("port", ["http", 8265])
def test_a_port_is_an_integer_or_a_string(good: list[Object], crd: Definitions, port: int | str) -> None:
    objects = copy.deepcopy(good)
    head = objects[-1]["spec"]["rayClusterSpec"]["headGroupSpec"]
    head["headService"] = {"spec": {"ports": [{"port": 8265, "targetPort": port}]}}
    assert check(objects, OUTSIDE, crd=crd) == []
    head["headService"]["spec"]["ports"][0]["targetPort"] = 1.5
    assert [problem.path for problem in check(objects, OUTSIDE, crd=crd)] == [
        "spec.rayClusterSpec.headGroupSpec.headService.spec.ports[0].targetPort"
    ]


def test_a_key_that_is_there_twice_is_no_yaml() -> None:
    with pytest.raises(yaml.YAMLError, match="'a' is there twice"):
        load("a: 1\nb: 2\na: 3\n")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("500m", 0.5),
        ("26Gi", 26 * 2**30),
        ("1e3", 1000),
        (2, 2),
        ("-1", -1),
        ("1.5k", 1500),
        ("1GiB", None),
        ("", None),
        (True, None),
        ("m", None),
    ],
)
def test_quantities(text: str | int, number: float | None) -> None:
    assert quantity(text) == number


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOOD), "--outside", *OUTSIDE]) == 0
    bad = tmp_path / "bad.yaml"
    objects = load(GOOD.read_text())
    change(objects[-1], f"{GROUP}.replicas", 99)
    bad.write_text(yaml.safe_dump_all(objects))
    capsys.readouterr()
    assert main([str(bad), "--outside", "Secret/*"]) == 1
    assert f"RayJob/protect {GROUP}.replicas: 0 <= 0 (minReplicas) <= 99 (replicas) <= 16" in capsys.readouterr().out
    assert main([str(tmp_path / "nowhere.yaml")]) == 1


def test_another_checker_agrees_on_kuberays_schema(good: list[Object], crd: Definitions, tmp_path: Path) -> None:
    """A handful in one run. What it does not look at is left out: the width of integers, members that are there twice."""
    tool = definitions_folder().parent / "tools" / "kuberay_check.py"
    if not tool.is_file():
        pytest.skip(f"no {tool} to compare with: set FACEMAE_SHARED")
    refused = [wrong for wrong in SCHEMA if wrong.crd and wrong.reason != "outside"]
    jobs = [good[-1], *(wrong.apply(good)[-1] for wrong in (*refused, *KUBERAY[:5]))]
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump_all(jobs))
    done = subprocess.run([sys.executable, str(tool), str(tmp_path / "jobs.yaml")], capture_output=True, text=True, timeout=200)
    theirs = [line.startswith("OK") for line in done.stdout.splitlines() if line.startswith(("OK", "BAD"))]
    assert theirs == [True, *[False] * len(refused), *[True] * 5], done.stderr
    assert theirs == [not list(crd.check(job)) for job in jobs]
