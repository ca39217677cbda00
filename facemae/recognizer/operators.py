"""Operators of ONNX that onnx2torch does not know, in its own registry; importing this module adds them."""

from __future__ import annotations

from contextlib import suppress

from onnx2torch.node_converters.reduce import OnnxReduceStaticAxes
from onnx2torch.node_converters.registry import add_converter
from onnx2torch.onnx_graph import OnnxGraph
from onnx2torch.onnx_node import OnnxNode
from onnx2torch.utils.common import OnnxMapping, OperationConverterResult, get_const_value


def convert_reduce_mean(node: OnnxNode, graph: OnnxGraph) -> OperationConverterResult:
    """ReduceMean of opset 18, whose axes are an input: how torch's exporter writes the global pooling of timm's networks.

    Raises:
        KeyError: the axes are computed while the network runs.
    """
    axes = get_const_value(node.input_values[1], graph).tolist() if len(node.input_values) > 1 else None
    return OperationConverterResult(
        torch_module=OnnxReduceStaticAxes("ReduceMean", axes, node.attributes.get("keepdims", 1)),
        onnx_mapping=OnnxMapping(inputs=(node.input_values[0],), outputs=node.output_values),
    )


with suppress(ValueError):  # raised where a newer onnx2torch has learnt it itself
    add_converter(operation_type="ReduceMean", version=18)(convert_reduce_mean)
