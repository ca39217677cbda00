"""A recogniser without ONNX: the few steps of its graph as data, its weights as tensors, run by torch alone.

The bare machine has neither onnx nor onnx2torch, and a pickled network would run code. So `pack` writes down the steps of the graph, and
this module knows the handful of operators that a convolutional recogniser is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Step = Mapping[str, Any]
"""{"op", "inputs": names of values, "weights": names of tensors, "output": name, and the operator's own options}."""


class PackedRecognizer(nn.Module):
    """Embeds images by the steps of a packed graph, with a gradient to the images and never to the weights."""

    def __init__(self, steps: Sequence[Step], tensors: Mapping[str, Tensor], mean: Sequence[float], std: Sequence[float]) -> None:
        """Check the steps and freeze the weights.

        Args:
            steps: in the order to run them; the first reads "input", the last gives the embedding.
            tensors: the weights that the steps name.
            mean, std: three floats each, the normalisation of value/255.

        Raises:
            ValueError: an operator that is not known here, a weight that is missing, or a value read before it is made.
        """
        super().__init__()
        self.steps = list(steps)
        _check(self.steps, tensors)
        self._slots = {name: f"w{number}" for number, name in enumerate(tensors)}
        for name, slot in self._slots.items():
            self.register_buffer(slot, tensors[name])
        # x in [-1, 1] is picture/127.5 - 1: ((x + 1)/2 - mean)/std = x * scale + shift
        self.scale: Tensor
        self.shift: Tensor
        center, spread = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        self.register_buffer("scale", 0.5 / spread)
        self.register_buffer("shift", (0.5 - center) / spread)
        self._last_use = {name: number for number, step in enumerate(self.steps) for name in step["inputs"]}
        self.layers: tuple[int, ...] = ()
        self.eval()

    def train(self, mode: bool = True) -> PackedRecognizer:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Embed images. On the CPU in float32 under autocast too: bfloat16 convolutions took 1.5 times as long there.

        Args:
            images: (N, 3, 112, 112) in [-1, 1].

        Returns:
            Unit rows in float32: (N, dim) embeddings, then (N, features) after each step in `layers`, counted from the end as -1, -2, ...
        """
        with torch.autocast(images.device.type, enabled=images.is_cuda and torch.is_autocast_enabled("cuda")):
            return [functional.normalize(output.flatten(1).float()) for output in self._run(images if images.is_cuda else images.float())]

    def _run(self, images: Tensor) -> list[Tensor]:
        """The embedding and the wanted maps as the steps give them."""
        values = {"input": (images * self.scale + self.shift).contiguous(memory_format=torch.channels_last)}
        wanted = {len(self.steps) + layer: layer for layer in self.layers}
        features = {}
        for number, step in enumerate(self.steps):
            arguments = [values[name] for name in step["inputs"]]
            weights = [getattr(self, self._slots[name]) for name in step["weights"]]
            values[step["output"]] = OPERATORS[step["op"]](step, arguments, weights)
            for name in {name for name in step["inputs"] if self._last_use[name] == number}:
                del values[name]  # without this the maps of all layers stay in memory where no gradient needs them
            if number in wanted:
                features[wanted[number]] = values[step["output"]]
        return [values[self.steps[-1]["output"]], *(features[layer] for layer in self.layers)]


class _Clip(torch.autograd.Function):
    """Clamp whose backward pass is one product with a mask: torch's own for ReLU6 took 40 % of the network's time on a CPU."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, low: float, high: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward((values > low) & (values < high))
        return values.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


def _conv(step: Step, inputs: list[Tensor], weights: list[Tensor]) -> Tensor:
    bias = weights[1] if len(weights) > 1 else None
    # under autocast the input may be bfloat16 while these buffers are float32: conv2d casts both
    return functional.conv2d(inputs[0], weights[0], bias, step["stride"], step["padding"], 1, step["groups"])


OPERATORS: dict[str, Callable[[Step, list[Tensor], list[Tensor]], Tensor]] = {
    "conv": _conv,
    "clip": lambda step, inputs, weights: _Clip.apply(inputs[0], step["low"], step["high"]),
    "relu": lambda step, inputs, weights: inputs[0].relu(),
    "prelu": lambda step, inputs, weights: functional.prelu(inputs[0], weights[0].flatten().to(inputs[0].dtype)),
    "add": lambda step, inputs, weights: inputs[0] + inputs[1],
    "flatten": lambda step, inputs, weights: inputs[0].flatten(1),
    "linear": lambda step, inputs, weights: functional.linear(inputs[0], *weights),
    "norm": lambda step, inputs, weights: functional.batch_norm(inputs[0], weights[2], weights[3], weights[0], weights[1], eps=step["eps"]),
}


def _check(steps: Sequence[Step], tensors: Mapping[str, Tensor]) -> None:
    made = {"input"}
    for step in steps:
        missing = [name for name in step["weights"] if name not in tensors] + [name for name in step["inputs"] if name not in made]
        if step["op"] not in OPERATORS or missing:
            reason = f"misses {missing}" if missing else f"has an unknown operator; known: {', '.join(OPERATORS)}"
            raise ValueError(f"step {step['op']} -> {step['output']} of the packed recogniser {reason}: pack it again")
        made.add(step["output"])
