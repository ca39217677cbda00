"""``facemae protect``: which flags reach which method, and what is refused. No Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from facemae.protection import PROTECTIONS, protection_class
from jobs.command import parse
from jobs.protect import ProtectConfig, method_options, require_pixel_loss
from jobs.repair import settled

SHA256 = {"seed_sha256": "0" * 64}


def config(**changes: Any) -> ProtectConfig:
    return ProtectConfig(**{"input": "in", "output": "out", **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "none"}, {}),
        ({"method": "blur"}, {"strength": 4.0}),
        ({"method": "pixelate", "strength": 16.0}, {"strength": 16}),
        ({"method": "noise", "seed": 5}, {"seed": 5, "strength": 50.0}),
        ({"method": "random_mask", "options": {"patch_size": 8}}, {"seed": 0, "strength": 0.75, "patch_size": 8}),
        ({"method": "k_same", "strength": 3}, {"strength": 3}),
        ({"method": "pixel_dp", "options": {"block": 8}}, {"seed": 0, "strength": 0.5, "block": 8}),
        ({"weights": "w"}, {"weights": "w", "mask_ratio": 0.75, "seed": 0, "device": "auto", "threads": 1}),
        ({"weights": "w", "mask_ratio": 0.6}, {"weights": "w", "mask_ratio": 0.6, "seed": 0, "device": "auto", "threads": 1}),
        (
            {"method": "mae", "weights": "w", "strength": 0.6},
            {"weights": "w", "mask_ratio": 0.6, "seed": 0, "device": "auto", "threads": 1},
        ),
    ],
)
def test_every_method_gets_the_flags_that_it_knows(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert method_options(config(**changes)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "none", "weights": "w"}, "--weights: none has none, leave it out"),
        ({"method": "blur", "seed": 5}, "--seed: blur has none, leave it out"),
        ({"weights": "w", "strength": 0.5, "mask_ratio": 0.5}, "--strength and --mask-ratio are the same"),
        ({"method": "blur", "mask_ratio": 0.5}, "--mask-ratio is for facemae and mae: blur takes --strength"),
        ({"method": "none", "strength": 2.0}, "--strength 2: the method none has no strength"),
        ({"method": "none", "mask_ratio": 0.5}, "none takes no --mask-ratio"),
        ({"method": "mae"}, "--method mae needs --weights"),
        ({"weights": "w", "strength": 75.0}, "facemae: strength is 75: give from 0 to below 1"),
        ({"method": "blur", "strength": -1.0}, "blur: strength is -1"),
        ({"method": "blur", "options": {"block": 8}}, "--options block: blur takes none there"),
        ({"method": "pixel_dp", "options": {"seed": 8}}, "--options seed: pixel_dp takes neighborhood, block there"),
        ({"method": "blurr"}, "unknown protection 'blurr'"),
    ],
)
def test_a_flag_that_does_not_belong_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_options(config(**changes))


def test_the_help_and_the_page_teach_every_dial(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(ProtectConfig, ["--help"], "facemae protect")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    page = (Path(__file__).parents[2] / "docs" / "protections.md").read_text()
    for method in PROTECTIONS:
        assert method in text
        assert f"`{method}`" in page
        dial = protection_class(method).dial
        assert dial is None or f"({dial.default:g})" in text
        assert dial is None or f"| {dial.range} | {dial.default:g} |" in page


def test_flags_of_the_command_line_arrive() -> None:
    flags = "--input i --output o --method pixel_dp --strength 2 --options block 8 neighborhood 4"
    found = parse(ProtectConfig, [*flags.split(), "--seed", str(2**94)], "facemae protect")
    assert method_options(found) == {"strength": 2.0, "block": 8, "neighborhood": 4, "seed": 2**94}


def test_mae_refuses_a_run_that_was_trained_with_another_loss(tmp_path: Path) -> None:
    require_pixel_loss(str(tmp_path))  # a weights folder says nothing
    recipe = {"loss.relation": 0.0, "loss.instance": 0.0, "loss.pixel": 1.0, "loss.pixel_kind": "mse"}
    for change, wrong in (({}, False), ({"loss.relation": 1.0}, True), ({"loss.instance": 0.1}, True), ({"loss.pixel_kind": "ssim"}, True)):
        (tmp_path / "run.json").write_text(json.dumps({"config": {**recipe, **change}}))
        if not wrong:
            require_pixel_loss(str(tmp_path))
            continue
        with pytest.raises(ValueError, match="was not trained with --loss mse"):
            require_pixel_loss(str(tmp_path))


@pytest.mark.parametrize(
    ("protection", "given", "expected"),
    [
        ({"method": "facemae", "mask_ratio": 0.6, "seed": 2}, {}, {"mask_ratio": 0.6, "strength": None, "seed": 2}),
        ({"method": "facemae", "mask_ratio": 0.6, "seed": 2}, {"strength": 0.6}, {"mask_ratio": 0.6, "strength": None}),
        ({"method": "blur", "strength": 2.0}, {}, {"strength": 2.0, "mask_ratio": None}),
        ({"method": "noise", "strength": 9.0, **SHA256}, {"seed": 77}, {"strength": 9.0, "seed": 77}),
        (
            {"method": "random_mask", "strength": 0.5, "seed": 3, "options": {"patch_size": 8}},
            {},
            {"seed": 3, "options": {"patch_size": 8}},
        ),
    ],
)
def test_a_repair_takes_the_measured_set_s_settings(protection: dict[str, Any], given: dict[str, Any], expected: dict[str, Any]) -> None:
    found = settled(config(**given), protection, "SET")
    assert found.method == protection["method"]
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("protection", "given", "message"),
    [
        ({"method": "facemae", "mask_ratio": 0.6, "seed": 2}, {"strength": 0.5}, "--mask-ratio 0.5, but SET was made with 0.6"),
        ({"method": "blur", "strength": 2.0}, {"strength": 3.0}, "--strength 3.0, but SET was made with 2.0"),
        ({"method": "blur", "strength": 2.0}, {"method": "noise"}, "--method noise, but SET was made with blur"),
    ],
)
def test_a_repair_with_other_settings_is_refused(protection: dict[str, Any], given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settled(config(**given), protection, "SET")
