"""A recogniser inside a loss: an ONNX graph turned into a frozen torch network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional


class FrozenRecognizer(nn.Module):
    """Embeds images with a gradient to the images, never to the weights; always in eval mode."""

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        """Freeze a network.

        Args:
            network: takes normalised (N, 3, 112, 112) float32, returns a sequence: the embedding, then features.
            mean: three floats, taken off value/255.
            std: three floats that the difference is divided by.
        """
        super().__init__()
        self.network = network.requires_grad_(False)
        # x in [-1, 1] is the picture/127.5 - 1: ((x + 1)/2 - mean)/std = x * scale + shift
        mean_column, std_column = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", 0.5 / std_column)
        self.register_buffer("shift", (0.5 - mean_column) / std_column)
        self.eval()

    def train(self, mode: bool = True) -> FrozenRecognizer:
        """Stay in eval mode, also when a module that contains this one is set to train."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Embed images.

        Args:
            images: (N, 3, 112, 112) in [-1, 1].

        Returns:
            Unit rows in float32: (N, dim) embeddings, then (N, features) for each layer in the order it was asked for.
        """
        normalised = images * self.scale + self.shift
        if not normalised.is_cuda:  # on the CPU the backward pass is 2 to 4 times as fast with the channels innermost
            normalised = normalised.contiguous(memory_format=torch.channels_last)
        return [functional.normalize(output.flatten(1).float()) for output in self.network(normalised)]


def convert_graph(model: bytes, layers: Sequence[str], source: str) -> fx.GraphModule:
    """Turn an ONNX graph into a torch network that returns (embedding, *layers).

    Args:
        model: the content of an ONNX file with one image input and one output.
        layers: names of inner values of the graph.
        source: where it came from, for error messages.

    Raises:
        ValueError: onnx2torch cannot convert the graph, or there is no such layer.
    """
    # Imported here: only losses need it, and it takes as long as everything else together.
    from onnx2torch import convert
    from onnx2torch.onnx_graph import OnnxGraph

    from facemae.recognizer import operators  # noqa: F401  (teaches onnx2torch what it lacks)

    graph = _simplify(onnx.load_model_from_string(model))
    # fx calls a node by onnx2torch's name for it; users know the graph's own names.
    value_of_node = {name: node.output_values[0] for name, node in OnnxGraph(graph.graph).nodes.items()}
    try:
        network = convert(graph).eval()
        features = _FeatureFinder(network).find(value_of_node)
    except Exception as error:  # whatever an operator raises that onnx2torch does not know, or half knows
        raise ValueError(
            f"{source}: onnx2torch cannot convert this graph ({type(error).__name__}: {error}), so it can embed but "
            "gives no gradients. Give another recogniser for the loss or to train on, and keep this one for measuring"
        ) from error
    unknown = [layer for layer in layers if layer not in features]
    if unknown:
        raise ValueError(f"{source}: no layer {', '.join(map(repr, unknown))}. There are: {', '.join(features)}")
    output = next(node for node in network.graph.nodes if node.op == "output")
    output.args = ((output.args[0], *(features[layer] for layer in layers)),)
    network.recompile()
    return network


def _simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite three harmless habits of torch's exporters that onnx2torch stumbles over."""
    weights = {weight.name: weight for weight in model.graph.initializer}
    del model.graph.value_info[:]  # states the old shapes; they are inferred anew
    same_as = {}
    for node in model.graph.node:
        weight = weights.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type == "Identity" and node.input[0] in weights:  # a weight used twice, copied by name
            same_as[node.output[0]] = node.input[0]
        elif node.op_type == "Reshape" and weight is not None and numpy_helper.to_array(weight).all():
            # allowzero=1 says how to read a zero in the shape: without one it says nothing
            kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)
        elif node.op_type == "PRelu" and weight is not None and len(weight.dims) == 4 and weight.dims[0] == 1:
            # (1, C, 1, 1) broadcasts as (C, 1, 1) does, but only the latter becomes torch's fast prelu
            del weight.dims[0]
    for node in model.graph.node:
        node.input[:] = [same_as.get(name, name) for name in node.input]
    kept_nodes = [node for node in model.graph.node if not set(node.output) & set(same_as)]
    del model.graph.node[:]
    model.graph.node.extend(kept_nodes)
    return model


class _FeatureFinder(fx.Interpreter):
    """Runs a network once to see which of its nodes hold features: float tensors with a row for each picture."""

    _NUM_PICTURES = 3

    def find(self, value_of_node: dict[str, str]) -> dict[str, fx.Node]:
        """The feature nodes in the order of the graph, by the name of their value."""
        self._found: dict[str, fx.Node] = {}
        with torch.no_grad():
            self.run(torch.zeros(self._NUM_PICTURES, 3, 112, 112))
        return {value_of_node[target]: node for target, node in self._found.items() if target in value_of_node}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        is_float = n.op == "call_module" and isinstance(value, Tensor) and value.is_floating_point()
        if is_float and value.dim() > 1 and len(value) == self._NUM_PICTURES:
            self._found[str(n.target)] = n
        return value
