"""A folder of weights: model.safetensors, and config.json with the sha256 of it and what it takes to build the network."""

from __future__ import annotations

import json
import os
from hashlib import file_digest
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
GRAPH_FILE = "graph.onnx"
"""The network that was started from, beside the weights of a network that no name describes."""


def save_weights(folder: Path, network: nn.Module, facts: dict[str, Any]) -> str:
    """Writes model.safetensors (floats as float32) and, last, config.json: the facts and the sha256 of the weights.

    Returns:
        The sha256 of model.safetensors, in hex.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: _stored(tensor) for name, tensor in network.state_dict().items()}
    weights, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    save_file(tensors, weights.with_suffix(".tmp"))
    sha256 = file_sha256(weights.with_suffix(".tmp"))
    config.with_suffix(".tmp").write_text(json.dumps({**facts, "sha256": sha256}, indent=2) + "\n")
    os.replace(weights.with_suffix(".tmp"), weights)
    os.replace(config.with_suffix(".tmp"), config)
    return sha256


def read_config(folder: Path, writer: str) -> dict[str, Any]:
    """The content of config.json.

    Args:
        folder: holds config.json and model.safetensors.
        writer: the function that writes such folders, for error messages.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: config.json is not JSON.
    """
    for path in (folder / CONFIG_FILE, folder / WEIGHTS_FILE):
        if not path.is_file():
            reason = "holds no " + path.name if folder.is_dir() else "is not a folder"
            raise FileNotFoundError(f"{folder} {reason}: give a weights folder written by {writer}")
    return json.loads((folder / CONFIG_FILE).read_text())


def check_sha256(path: Path, expected: dict[str, str | None]) -> str:
    """Compares a file's sha256 with what each source expects of it (None: nothing), and returns it.

    Raises:
        ValueError: a source expects another one.
    """
    actual = file_sha256(path)
    for source, wanted in expected.items():
        if wanted is not None and wanted != actual:
            raise ValueError(
                f"{path} has sha256 {actual}, but {source} expects {wanted}: "
                "the weights are damaged or not the ones meant; copy the whole folder again"
            )
    return actual


def load_weights(folder: Path, network: nn.Module, name: str) -> None:
    """Fills a network from model.safetensors.

    Args:
        folder: holds the file.
        network: built as config.json says.
        name: of its architecture, for error messages.

    Raises:
        ValueError: not a safetensors file, or weights of another architecture; names the first tensor that differs.
    """
    path = folder / WEIGHTS_FILE
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    expected = network.state_dict()
    for key in sorted(expected.keys() | tensors.keys()):
        wanted = tuple(expected[key].shape) if key in expected else "absent"
        found = tuple(tensors[key].shape) if key in tensors else "absent"
        if wanted != found:
            raise ValueError(
                f"{path} holds weights of another architecture than {name} in {CONFIG_FILE}: tensor {key} is {found}, expected {wanted}"
            )
    network.load_state_dict(tensors)


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _stored(tensor: Tensor) -> Tensor:
    """Floats as float32; the counters of batch norms stay whole numbers."""
    tensor = tensor.detach().cpu()
    # A copy: safetensors refuses tensors that share memory.
    return (tensor.float() if tensor.is_floating_point() else tensor).clone().contiguous()
