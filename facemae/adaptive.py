"""The adaptive attacker's maps: from the embedding of a protected image to an estimate of its original's embedding. numpy only.

Whoever has FaceMAE can protect faces of his own, embed both sides, and learn how a protection moves embeddings. What he learns is used
here on people he has not seen: identities are divided in two halves, and each half is searched for by a map that was fitted on the other
(facemae/adaptive_fit.py fits them).

Applying a map is exact arithmetic, as facemae.leakage.similarity is: every weight is a multiple of GRID, so that each product and partial
sum of a row is a number that float64 holds. The result is therefore the same bytes for any division into batches, any number of threads
and any machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

SCHEMA = 1
GRID = 2.0**-22
"""Weights are multiples of it and at most about 1, which float32 holds exactly; so are the hidden layer's values."""
MAX_DIM = 4096
"""Of an embedding and of the hidden layer: up to here the sums below are exact."""
LINEAR = {"linear", "offset"}
RESIDUAL = {"hidden", "bias", "out"}
KINDS = {frozenset[str](): "identity", frozenset(LINEAR): "ridge", frozenset(LINEAR | RESIDUAL): "mlp"}
_MAX_BYTES = 1 << 30
_BLOCK_ROWS = 4096
_UNIT_GRID = 2.0**-20


class AdaptiveError(ValueError):
    """Vectors or maps that cannot be used; the message says which, why, and what would help."""


def identity_hash(identities: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """A 64-bit hash of each label, uint64 (N,): the mixing of SplitMix64 (doi 10.1145/2660193.2660195), keyed by seed and purpose."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little")
    mixed = np.asarray(identities, np.int64).astype(np.uint64) ^ np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed


def half(identities: np.ndarray, seed: int) -> np.ndarray:
    """The half, 0 or 1, that each label belongs to, int64 (N,): a function of the label and the seed alone."""
    return (identity_hash(identities, seed, "half") >> np.uint64(63)).astype(np.int64)


@dataclass(frozen=True)
class AdaptiveMap:
    """x -> unit(x W + c + relu(x U + b) V), for unit rows x; without tensors x itself, without U, b and V a linear map.

    Attributes:
        dim: D, the length of an embedding.
        tensors: none, or "linear" W (D, D) and "offset" c (D,), or these with "hidden" U (D, H), "bias" b (H,) and "out" V (H, D);
            float32, multiples of GRID, columns of length at most 1 up to rounding.

    Raises:
        AdaptiveError: the tensors are anything else.
    """

    dim: int
    tensors: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        if not 0 < self.dim <= MAX_DIM:
            raise AdaptiveError(f"embeddings of {self.dim} dimensions: 1 to {MAX_DIM} are possible")
        if frozenset(self.tensors) not in KINDS:
            raise AdaptiveError(f"tensors {sorted(self.tensors)} make no map")
        width = self.tensors["bias"].size if "bias" in self.tensors else 0
        dim, shapes = self.dim, {"hidden": (self.dim, width), "bias": (width,), "out": (width, self.dim)}
        shapes |= {"linear": (dim, dim), "offset": (dim,)}
        for name, tensor in self.tensors.items():
            if tensor.dtype != np.float32 or tensor.shape != shapes[name] or width > MAX_DIM:
                raise AdaptiveError(f"{name} is {tensor.dtype} {tensor.shape}, not float32 {shapes[name]} (at most {MAX_DIM})")
            if not (np.isfinite(tensor).all() and _length(tensor) < 1.01 and np.array_equal(tensor, _on_grid(tensor, GRID))):
                raise AdaptiveError(f"{name} holds values that no map has: not finite, too large or not rounded")

    @classmethod
    def of(cls, dim: int, tensors: Mapping[str, np.ndarray]) -> AdaptiveMap:
        """The map of these float tensors, scaled (the result's direction stays) and rounded to the grid. Raises AdaptiveError."""
        wide = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
        if "hidden" in wide:  # relu(s x) = s relu(x) for s > 0
            scale = max(_length(wide["hidden"]), _length(wide["bias"]), 1e-30)
            wide |= {"hidden": wide["hidden"] / scale, "bias": wide["bias"] / scale, "out": wide["out"] * scale}
        ends = {"linear", "offset", "out"} & wide.keys()
        scale = max([1e-30, *(_length(wide[name]) for name in ends)])
        wide |= {name: wide[name] / scale for name in ends}
        return cls(dim, {name: _on_grid(tensor, GRID).astype(np.float32) for name, tensor in wide.items()})

    @property
    def kind(self) -> str:
        """ "identity", "ridge" or "mlp"."""
        return KINDS[frozenset(self.tensors)]

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Map unit rows (N, D) of float16, or of float32, which are rounded to float16 first. Returns float16 (N, D), unit rows; a row that
        is mapped to zero stays what it is. Each row's bytes depend on that row alone."""
        rows = np.asarray(vectors).astype(np.float16)
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise AdaptiveError(f"vectors of shape {rows.shape} for a map of {self.dim} dimensions: of another recogniser?")
        if not self.tensors or not len(rows):
            return rows
        return np.concatenate([self._block(rows[start : start + _BLOCK_ROWS]) for start in range(0, len(rows), _BLOCK_ROWS)])

    def _block(self, rows: np.ndarray) -> np.ndarray:
        estimates = self.estimates(rows)
        top = np.abs(estimates).max(axis=1, keepdims=True)
        estimates = _on_grid(estimates / np.where(top > 0, top, 1), _UNIT_GRID)  # at most 1: squares of 2^-40, their sum below 2^12: exact
        length = np.sqrt(np.einsum("nd,nd->n", estimates, estimates))[:, None]
        return np.where(top > 0, estimates / np.where(top > 0, length, 1), rows).astype(np.float16)

    def estimates(self, rows: np.ndarray) -> np.ndarray:
        """x W + c + relu(x U + b) V before it is brought to unit length: float16 (N, D) -> float64 (N, D), not for the identity."""
        wide = {name: tensor.astype(np.float64) for name, tensor in self.tensors.items()}
        x = rows.astype(np.float64)  # multiples of 2^-24, so x W of 2^-46 and, with rows and columns of length 1, below 2: exact
        linear = x @ wide["linear"] + wide["offset"]
        if "hidden" not in wide:
            return linear
        hidden = _on_grid(np.maximum(x @ wide["hidden"] + wide["bias"], 0), GRID)
        return linear + hidden @ wide["out"]  # hidden rows are up to 2^7 long, the products multiples of 2^-44: exact


def _length(tensor: np.ndarray) -> float:
    """The length of the longest column; of a vector, its largest value."""
    wide = np.atleast_2d(tensor.astype(np.float64))
    return float(np.sqrt(np.einsum("id,id->d", wide, wide).max(initial=0)))


def _on_grid(values: np.ndarray, grid: float) -> np.ndarray:
    """The nearest multiples of a power of two."""
    return np.rint(values / grid) * grid


@dataclass(frozen=True)
class AdaptiveMaps:
    """The two maps of a cross-fitted attacker.

    Attributes:
        maps: ``maps[h]`` is for the identities of half h and was fitted on those of the other one.
        seed: of the halves.
        fitted: what each map was fitted on and how it was chosen, in the order of ``maps``; JSON-able.
    """

    maps: tuple[AdaptiveMap, AdaptiveMap]
    seed: int
    fitted: Sequence[Mapping[str, Any]] = ({}, {})

    def apply(self, vectors: np.ndarray, identities: np.ndarray) -> np.ndarray:
        """Each row by the map that has not seen its identity: (N, D) unit rows and labels (N,) -> float16 (N, D) unit rows.

        Raises:
            AdaptiveError: the rows have another length, or there are not as many labels.
        """
        if len(vectors) != len(identities):
            raise AdaptiveError(f"{len(vectors)} vectors and {len(identities)} identities")
        halves = half(identities, self.seed)
        mapped = np.empty(np.shape(vectors), np.float16)
        for which, one in enumerate(self.maps):
            mapped[halves == which] = one(vectors[halves == which])
        return mapped

    def to_bytes(self) -> bytes:
        """The maps as safetensors with JSON in its metadata; equal maps give equal bytes."""
        tensors = {f"{which}.{name}": tensor for which, one in enumerate(self.maps) for name, tensor in one.tensors.items()}
        content = {"schema": SCHEMA, "dim": self.maps[0].dim, "seed": self.seed, "fitted": list(self.fitted)}
        return save(tensors, {"adaptive": json.dumps(content, sort_keys=True, allow_nan=False)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "the maps") -> AdaptiveMaps:
        """The inverse of to_bytes. Raises AdaptiveError, naming ``where``, for bytes that are no such file."""
        try:
            if len(data) > _MAX_BYTES:
                raise AdaptiveError(f"{len(data)} bytes, more than any maps have")
            tensors = load(data)
            content = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["adaptive"])
            dim, seed, fitted = (content[name] for name in ("dim", "seed", "fitted"))
            if content["schema"] != SCHEMA or type(dim) is not int or type(seed) is not int or len(fitted) != 2:
                raise AdaptiveError(f"its metadata is of another schema than {SCHEMA}")
            parts = [{name[2:]: tensor for name, tensor in tensors.items() if name.startswith(f"{which}.")} for which in (0, 1)]
            if sum(map(len, parts)) != len(tensors):
                raise AdaptiveError(f"its tensors are {sorted(tensors)}")
            return cls((AdaptiveMap(dim, parts[0]), AdaptiveMap(dim, parts[1])), seed, fitted)
        except (SafetensorError, AdaptiveError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise AdaptiveError(f"{where} is no file of adaptive maps ({error}): fit them again") from None
