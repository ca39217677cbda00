"""An attacker that knows nothing of faces: pictures compared as thumbnails.

A recogniser is trained to look past light, background and clothes; a protection that leaves those alone can be traced by them, and no
recogniser will say so. This one is what anybody can write in a minute, so no protection should fall to it.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper

PIXELS = "pixels"
"""The name under which `OnnxRecognizer.load` gives it, in place of a file."""
BLOCK = 8
"""Side of a block of the thumbnail, in pixels: 14 x 14 blocks of a 112 x 112 picture. 4 and 16 find about as much."""
_DIM = 3 * (112 // BLOCK) ** 2


@cache
def pixel_graph() -> bytes:
    """The content of an ONNX file: block means of each colour without the colour's mean over the picture, (N, 588).

    One more number, the same small one for every picture, keeps the embedding of a picture of one colour from being zero.
    """
    nodes = [
        helper.make_node("AveragePool", ["input"], ["blocks"], kernel_shape=[BLOCK, BLOCK], strides=[BLOCK, BLOCK]),
        helper.make_node("ReduceMean", ["blocks", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["blocks", "mean"], ["differences"]),
        helper.make_node("Flatten", ["differences"], ["rows"]),
        helper.make_node("Pad", ["rows", "one_more", "small"], ["embedding"]),
    ]
    constants = {"axes": np.array([2, 3]), "one_more": np.array([0, 0, 0, 1]), "small": np.array(1e-3, np.float32)}
    picture = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, 112, 112])
    embedding = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", _DIM + 1])
    weights = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, PIXELS, [picture], [embedding], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    checker.check_model(model)
    return model.SerializeToString(deterministic=True)
