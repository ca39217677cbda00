"""Backbones with weights: folders of safetensors written here, and any recogniser in an ONNX file, to train on."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from facemae.recognizer.backbone import Backbone, create_backbone
from facemae.recognizer.onnx import OnnxRecognizer
from facemae.weights import CONFIG_FILE, GRAPH_FILE, WEIGHTS_FILE, check_sha256, load_weights, read_config, save_weights


class OnnxBackbone(Backbone):
    """A trainable network made of an ONNX graph. It takes [-1, 1] as all backbones do: the normalisation is inside.

    Exporters fold batch norms into the convolutions where they can: what is trained is the folded network.

    Attributes:
        graph: content of the ONNX file.
        mean: taken off value/255, one float a channel (RGB).
        std: what the difference is divided by.
    """

    def __init__(self, graph: bytes, name: str, mean: Sequence[float], std: Sequence[float], source: str) -> None:
        """Convert a graph, in evaluation mode.

        Args:
            graph: content of an ONNX file.
            name: of the recogniser.
            mean: three floats in [0, 1].
            std: three floats in (0, 1].
            source: where the graph came from, for error messages.

        Raises:
            ValueError: not a recogniser, or onnx2torch cannot convert it or converts it wrongly.
        """
        recognizer = OnnxRecognizer(graph, name, mean, std, source=source)
        frozen = recognizer.differentiable()
        super().__init__(f"onnx/{name}", recognizer.dim, _exportable(_trainable(frozen.network)))
        self.graph, self.mean, self.std = graph, recognizer.mean, recognizer.std
        # Constants of the architecture, not weights: config.json keeps mean and std.
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", frozen.scale, persistent=False)
        self.register_buffer("shift", frozen.shift, persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """See `Backbone`."""
        return self.network(images * self.scale + self.shift)[0]


def save_backbone(net: Backbone, folder: str | Path) -> str:
    """Write model.safetensors and, last, config.json {"backbone", "dim", "sha256"}; for an `OnnxBackbone` also its graph.

    Returns:
        The sha256 of model.safetensors.
    """
    folder = Path(folder)
    facts: dict[str, Any] = {"backbone": net.name, "dim": net.dim}
    if isinstance(net, OnnxBackbone):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / GRAPH_FILE).write_bytes(net.graph)
        facts |= {"mean": net.mean, "std": net.std, "graph_sha256": sha256(net.graph).hexdigest()}
    return save_weights(folder, net, facts)


def load_backbone(path: str | Path, dim: int | None = None) -> Backbone:
    """A backbone with its weights, on the CPU and in evaluation mode; all its weights can be trained.

    Args:
        path: a folder written by `save_backbone`, or FILE.onnx with FILE.json beside it (see `OnnxRecognizer.load`).
        dim: the length that its embeddings must have; None: any.

    Raises:
        FileNotFoundError: there is no such file or folder, or a part of it is missing.
        ValueError: a sha256 differs, config.json does not describe a backbone, the weights belong to another one, the
            ONNX file is not a recogniser, its normalisation is not known, onnx2torch cannot convert it, or its
            embeddings have another length.
    """
    path = Path(path)
    net = _load_onnx(path) if path.suffix == ".onnx" else _load_folder(path)
    if dim is not None and dim != net.dim:
        raise ValueError(f"{path}: its embeddings have {net.dim} numbers, not {dim}: give dim {net.dim} or another file")
    return net.eval()


def _load_onnx(path: Path) -> OnnxBackbone:
    recognizer = OnnxRecognizer.load(path)  # finds the normalisation
    return OnnxBackbone(path.read_bytes(), recognizer.name, recognizer.mean, recognizer.std, str(path))


def _load_folder(folder: Path) -> Backbone:
    try:
        config = read_config(folder, "save_backbone")
        name, dim, expected = str(config["backbone"]), int(config["dim"]), str(config["sha256"])
        made_of_graph = name.startswith("onnx/")
        start = (config["mean"], config["std"], str(config["graph_sha256"])) if made_of_graph else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} does not describe a backbone: {error!r}") from error
    check_sha256(folder / WEIGHTS_FILE, {CONFIG_FILE: expected})
    net = _load_graph(folder / GRAPH_FILE, name, *start) if start else create_backbone(name, dim)
    load_weights(folder, net, name)
    return net


def _load_graph(path: Path, name: str, mean: Sequence[float], std: Sequence[float], expected: str) -> OnnxBackbone:
    check_sha256(path, {CONFIG_FILE: expected})
    return OnnxBackbone(path.read_bytes(), name.removeprefix("onnx/"), mean, std, str(path))


def _trainable(network: nn.Module) -> nn.Module:
    """Every weight as a parameter: onnx2torch holds some (of matrix products, PReLUs, positions) as buffers."""
    network.requires_grad_(True)
    initializers = getattr(network, "initializers", None)
    if isinstance(initializers, nn.Module):
        for name, buffer in list(initializers.named_buffers()):
            if buffer.is_floating_point() and buffer.numel() > 1:  # a single number is a constant of a formula
                delattr(initializers, name)
                initializers.register_parameter(name, nn.Parameter(torch.clone(buffer)))
    return network


def _exportable(network: nn.Module) -> nn.Module:
    """Reshapes to constant shapes as torch's own: onnx2torch looks into the shape while the network runs, which no exporter can follow."""
    from onnx2torch.node_converters.reshape import OnnxReshape

    assert isinstance(network, fx.GraphModule)
    for node in network.graph.nodes:
        if node.op != "call_module" or not isinstance(network.get_submodule(str(node.target)), OnnxReshape):
            continue
        shape = attrgetter(str(node.args[1].target))(network).tolist() if node.args[1].op == "get_attr" else [0]
        if 0 not in shape:  # a zero stands for the input's own size
            node.op, node.target, node.args = "call_method", "reshape", (node.args[0], shape)
    network.recompile()
    return network
