"""FILE.json beside FILE.onnx: the recogniser's name and the normalisation of its input."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Triple = tuple[float, float, float]


def check_normalisation(mean: Sequence[float], std: Sequence[float], source: str) -> tuple[Triple, Triple]:
    """Three floats in [0, 1] and three in (0, 1], or a ValueError that names the source and the values."""
    values = []
    for label, triple in (("mean", mean), ("std", std)):
        try:
            numbers = [float(value) for value in triple]
        except (TypeError, ValueError):
            numbers = []
        valid = len(numbers) == 3 and all(math.isfinite(n) and 0 <= n <= 1 for n in numbers)
        if not valid or (label == "std" and min(numbers) == 0):
            raise ValueError(
                f"{source}: {label} must be three floats on the scale of value/255 (0 to 1), not {triple!r}; "
                "divide values for the 0 .. 255 scale by 255"
            )
        values.append((numbers[0], numbers[1], numbers[2]))
    return values[0], values[1]


def read_sidecar(model_path: Path, sha256: str) -> dict[str, Any]:
    """The content of FILE.json, {} where there is none.

    Args:
        model_path: FILE.onnx.
        sha256: of FILE.onnx; a sidecar that states one must state this one.

    Raises:
        ValueError: see `parse_sidecar`.
    """
    path = model_path.with_suffix(".json")
    return parse_sidecar(path.read_bytes(), str(model_path), sha256) if path.exists() else {}


def parse_sidecar(data: bytes, model: str, sha256: str) -> dict[str, Any]:
    """The same from the bytes of FILE.json.

    Args:
        data: UTF-8 JSON.
        model: path or URL of FILE.onnx, for messages.

    Raises:
        ValueError: the sidecar is not a JSON object, or it belongs to another file.
    """
    path = sidecar_of(model)
    try:
        sidecar = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}): mend it, or remove it and give mean and std") from error
    if not isinstance(sidecar, dict):
        raise ValueError(f'{path}: must hold an object {{"name", "mean", "std"}}, not a {type(sidecar).__name__}')
    if sidecar.get("sha256", sha256) != sha256:
        raise ValueError(
            f"{path}: describes another file (sha256 {sidecar['sha256']}) than {model} ({sha256}): "
            "put the two that belong together side by side"
        )
    return sidecar


def sidecar_of(model: str) -> str:
    """FILE.json beside FILE.onnx, whatever its ending; a path or a URL."""
    folder, slash, name = model.rpartition("/")
    return f"{folder}{slash}{Path(name).stem}.json"


def write_sidecar(model_path: Path, name: str, mean: Triple, std: Triple, sha256: str) -> None:
    """Write FILE.json beside FILE.onnx, readable by `read_sidecar`."""
    sidecar = {"name": name, "mean": list(mean), "std": list(std), "sha256": sha256}
    model_path.with_suffix(".json").write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")
