"""Writing a torch recogniser as an ONNX file with its sidecar."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import onnx
import torch
from torch import nn

from facemae.recognizer.sidecar import check_normalisation, write_sidecar


def export_onnx(
    net: nn.Module,
    path: str | Path,
    name: str | None = None,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
) -> str:
    """Write FILE.onnx (any number of pictures a call, weights inside) and FILE.json beside it.

    `OnnxRecognizer.load` reads the pair, and `differentiable()` turns it back into a torch network. The same weights
    give the same bytes. The network is exported in eval mode and left in the mode it had.

    Args:
        net: takes (N, 3, 112, 112) float32, returns (N, dim).
        path: FILE.onnx.
        name: the recogniser's name in reports; the file's stem by default.
        mean: three floats, taken off value/255; the defaults of both map pictures to [-1, 1].
        std: three floats that the difference is divided by.

    Returns:
        The sha256 of FILE.onnx.

    Raises:
        ValueError: the path does not end in .onnx, or mean or std is not on the scale of value/255.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"{path}: an ONNX recogniser must be named FILE.onnx, its sidecar will be FILE.json")
    mean, std = check_normalisation(mean, std, str(path))
    was_training = net.training
    try:
        model = _export(net.eval())
    finally:
        net.train(was_training)
    data = model.SerializeToString(deterministic=True)
    sha256 = hashlib.sha256(data).hexdigest()
    path.write_bytes(data)
    write_sidecar(path, name or path.stem, mean, std, sha256)
    return sha256


def _export(net: nn.Module) -> onnx.ModelProto:
    """The ONNX graph of a network, free of anything but the network."""
    device = next(net.parameters()).device
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        # A network that onnx2torch made asks this, and would take a way that the exporter before this one needed.
        with warnings.catch_warnings(), patch("torch.onnx.is_in_onnx_export", return_value=False):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                net,
                (torch.zeros(2, 3, 112, 112, device=device),),
                input_names=["input"],
                output_names=["embedding"],
                dynamic_shapes=({0: "n"},),
                opset_version=18,
                dynamo=True,
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)
    assert program is not None
    model = program.model_proto
    # The exporter notes its stack traces, with the paths of this machine, beside every node.
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model
