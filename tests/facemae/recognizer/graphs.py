"""Tiny ONNX graphs, built node by node, that real recognisers resemble in one habit each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

INPUT = ("n", 3, 112, 112)


def graph_file(
    path,
    nodes: Sequence[onnx.NodeProto],
    input_shape: Sequence[str | int] = INPUT,
    input_type: int = TensorProto.FLOAT,
    outputs: Sequence[str] = ("embedding",),
    **weights: np.ndarray,
):
    """Write a graph that reads "input"; its outputs are float32 of unstated shape."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("input", input_type, input_shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def mean_colour(output: str = "embedding") -> list[onnx.NodeProto]:
    """The mean of each colour plane: (N, 3), zero for a black picture where the normalisation subtracts nothing."""
    return [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], [output], name="flatten"),
    ]
