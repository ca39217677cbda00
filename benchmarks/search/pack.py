"""Packs the input of the search into one file, on the machine that has the data and ONNX.

    python -m benchmarks.search.pack --train lfw --protected celeba --test lfw --pairs lfw_pairs.txt --folds lfw_identity_folds.csv \
        --leave-out same_person.csv --recognizer inside.onnx --start RUN/weights --output search.safetensors

Faces lie as PERSON/IMAGE.jpg, 112 x 112 pixels, aligned. Of the training folder the people of --train-folds are taken, and the pairs of
--test-folds; with the folds of `facemae.verification`'s list (LFW's view 2) that are other people. The final test's folds stay out of it:
what a search looks at is no test any more. The JPEGs go in as they are; the names stay here.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from benchmarks.search.bundle import Pictures, write_bundle
from benchmarks.search.packed import PackedRecognizer
from facemae.model import MaskedAutoencoder, to_tensor
from facemae.recognizer.onnx import OnnxRecognizer

_IGNORED = {"Constant", "Shape", "Gather", "Unsqueeze", "Concat", "Identity"}
"""They compute the shape that the last Reshape flattens to; `_require_equal` tells whether that reading is right."""


def main(given: list[str] | None = None) -> None:
    """Packs what the command line names."""
    arguments = _arguments(given)
    tensors, facts = pack(arguments)
    digest = write_bundle(arguments.output, tensors, facts)
    size = arguments.output.stat().st_size / (1 << 20)
    print(json.dumps(facts["counts"]), f"\n{arguments.output}: {size:.1f} MiB, sha256 {digest}")


def pack(arguments: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Collects tensors and facts.

    Raises:
        ValueError: somebody would be in two of the three sets, a set is empty, or the recogniser's graph does not unfold.
    """
    folds = {row["identity"]: int(row["fold"]) for row in csv.DictReader(arguments.folds.open())}
    doubted = {name for row in csv.reader(arguments.leave_out.open()) for name in row} if arguments.leave_out else set()
    train = _people(arguments.train, {name for name, fold in folds.items() if fold in arguments.train_folds} - doubted)
    protected = _people(arguments.protected, {person.name for person in arguments.protected.iterdir()} - doubted)
    files, pairs, test_folds, tested = _pairs(arguments)
    for (one, left), (other, right) in ((("train", train), ("protected", protected)), (("train", train), ("test", tested))):
        if both := set(left) & set(right):
            raise ValueError(f"{min(both)} and {len(both) - 1} more are in {one} and in {other}: give other folds")
    parts = {
        "train": _pictures(train, arguments.train_images, arguments.per_person),
        "protected": _pictures(protected, arguments.protected_images, arguments.per_person),
        "test": Pictures.of([file.read_bytes() for file in files], test_folds),
    }
    tensors = {f"{name}.{field}": getattr(part, field) for name, part in parts.items() for field in ("data", "ends", "people")}
    network, weights = _recognizer(arguments.recognizer)
    start = MaskedAutoencoder.from_pretrained(arguments.start).state_dict() if arguments.start else {}
    tensors |= {f"recognizer.{name}": tensor for name, tensor in weights.items()} | {f"start.{n}": t.clone() for n, t in start.items()}
    counts: dict[str, Any] = {name: {"images": len(part), "people": len(part.people.unique())} for name, part in parts.items()}
    counts |= {"test": {"images": len(files), "people": len(tested)}, "pairs": len(pairs)}
    facts = {"counts": counts, "recognizer": network, "train_folds": arguments.train_folds, "test_folds": arguments.test_folds}
    return tensors | {"pairs": torch.tensor(pairs)}, facts


def _recognizer(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a bundle says of the recogniser, and its weights."""
    steps, weights = unfold(path.read_bytes())
    reference = OnnxRecognizer.load(path)
    _require_equal(reference, PackedRecognizer(steps, weights, reference.mean, reference.std))
    return {"name": reference.name, "steps": steps, "mean": reference.mean, "std": reference.std}, weights


def unfold(model: bytes) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """An ONNX graph of convolutions as steps and weights for `PackedRecognizer`.

    Raises:
        ValueError: an operator or an option that is not known there.
    """
    graph = onnx.load_model_from_string(model).graph
    constants = {weight.name: numpy_helper.to_array(weight) for weight in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    names, steps = {graph.input[0].name: "input"}, []
    for node in graph.node:
        if node.op_type in _IGNORED:
            continue
        step, used = _step(node, constants)
        inputs = [names.get(name, name) for name in node.input if name not in constants]
        steps.append({**step, "inputs": inputs[:1] if step["op"] == "flatten" else inputs, "weights": used, "output": node.output[0]})
    weights = {name: torch.from_numpy(constants[name].astype(np.float32)) for step in steps for name in step["weights"]}
    return steps, weights


def _step(node: onnx.NodeProto, constants: dict[str, np.ndarray]) -> tuple[dict[str, Any], list[str]]:
    """The step of one node, and the names of its weights."""
    options = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    weights = [name for name in node.input if name in constants]
    pads = options.get("pads", [0, 0, 0, 0])
    match node.op_type:
        case "Conv" if pads[:2] == pads[2:] and set(options.get("dilations", [1])) == {1}:
            stride = options.get("strides", [1, 1])
            return {"op": "conv", "stride": stride, "padding": pads[:2], "groups": options.get("group", 1)}, weights
        case "Clip" if len(weights) == 2:
            return {"op": "clip", "low": float(constants[weights[0]]), "high": float(constants[weights[1]])}, []
        case "Relu" | "PRelu" | "Add" if len(weights) == (node.op_type == "PRelu"):
            return {"op": node.op_type.lower()}, weights
        case "Reshape" | "Flatten":
            return {"op": "flatten"}, []
        case "Gemm" if options.get("transB") == 1 and options.get("alpha", 1) == 1 == options.get("beta", 1):
            return {"op": "linear"}, weights
        case "BatchNormalization":
            return {"op": "norm", "eps": options.get("epsilon", 1e-5)}, weights
    raise ValueError(f"operator {node.op_type} with {options} is not known to benchmarks.search.packed: give a convolutional recogniser")


def _require_equal(reference: OnnxRecognizer, packed: PackedRecognizer) -> None:
    """Compares with onnxruntime on noise, so that a graph that was read wrongly is never searched with."""
    pictures = np.random.default_rng(0).integers(0, 256, (4, 112, 112, 3), dtype=np.uint8)
    with torch.no_grad():
        ours = packed(to_tensor(torch.from_numpy(pictures)))[0].numpy()
    if (gap := float(np.abs(ours - reference.embed(pictures)).max())) > 1e-3:
        raise ValueError(f"{reference.name}: the packed graph differs from onnxruntime by {gap:.2g}: give one of plain convolutions")


def _people(folder: Path, names: set[str]) -> dict[str, list[Path]]:
    """Files of each person, those with most pictures first: they give the relation graph its genuine edges."""
    chosen = (person for person in sorted(folder.iterdir()) if person.is_dir() and person.name in names)
    people = {person.name: sorted(person.glob("*.jpg")) for person in chosen}
    if not any(people.values()):
        raise ValueError(f"{folder} holds no PERSON/IMAGE.jpg of the people asked for: check --train-folds")
    return dict(sorted(people.items(), key=lambda item: -len(item[1])))


def _pictures(people: dict[str, list[Path]], limit: int, per_person: int) -> Pictures:
    chosen = [(file, name) for name, files in people.items() for file in files[:per_person]][:limit]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(name for _, name in chosen))}
    return Pictures.of([file.read_bytes() for file, _ in chosen], [numbers[name] for _, name in chosen])


def _pairs(arguments: argparse.Namespace) -> tuple[list[Path], list[list[int]], list[int], dict[str, None]]:
    """Files, pairs of their rows, the fold of each file and all names, from LFW's list: a head line, then blocks of equal length."""
    head, *lines = arguments.pairs.read_text().split("\n")
    block = 2 * int(head.split()[1])
    rows: dict[Path, int] = {}
    pairs, folds, names = list[list[int]](), list[int](), dict[str, None]()
    for fold in arguments.test_folds:
        for line in lines[(fold - 1) * block : fold * block]:
            fields = line.split()
            left, right = fields[:2], [fields[-2] if len(fields) == 4 else fields[0], fields[-1]]
            pair = []
            for name, number in (left, right):
                file = _picture(arguments.test / name, int(number))
                names[name] = None
                if file not in rows:
                    folds.append(arguments.test_folds.index(fold))
                pair.append(rows.setdefault(file, len(rows)))
            pairs.append([*pair, int(len(fields) == 3)])
    return list(rows), pairs, folds, names


def _picture(person: Path, number: int) -> Path:
    """LFW's own name of a picture, NAME_0001.jpg, or 0001.jpg."""
    long = person / f"{person.name}_{number:04d}.jpg"
    return long if long.exists() else person / f"{number:04d}.jpg"


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("train", "protected", "test", "pairs", "folds", "recognizer", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--leave-out", type=Path, help="CSV whose every cell is a person to leave out of training and protected people")
    parser.add_argument("--start", type=Path, help="weights folder of a masked autoencoder to start from")
    parser.add_argument("--train-folds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5, 6])
    parser.add_argument("--test-folds", type=int, nargs="+", default=[7, 8])
    parser.add_argument("--train-images", type=int, default=5000)
    parser.add_argument("--protected-images", type=int, default=2400)
    parser.add_argument("--per-person", type=int, default=10)
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
