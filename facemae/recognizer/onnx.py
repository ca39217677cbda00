"""Face recognisers in ONNX files: embeddings that do not depend on the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
from onnx.external_data_helper import uses_external_data

from facemae.recognizer.pixels import PIXELS, pixel_graph
from facemae.recognizer.sidecar import Triple, check_normalisation, read_sidecar, sidecar_of

if TYPE_CHECKING:
    from facemae.recognizer.frozen import FrozenRecognizer

# Pictures in each call of the network. Always the same number (the last tile is padded), so that no kernel is chosen by
# the batch size. Small on the CPU, where the feature maps of 8 pictures still fit its cache: measured fastest.
_TILE = {"cpu": 8, "cuda": 128}
# By default CUDA picks its kernels by a stopwatch and rounds to TF32: two runs would differ.
_CUDA = ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"})
_PROVIDERS: dict[str, list[Any]] = {"cpu": ["CPUExecutionProvider"], "cuda": [_CUDA, "CPUExecutionProvider"]}


def read_model(path: str | Path) -> bytes:
    """The content of FILE.onnx, or of the network that goes by "pixels".

    Raises:
        FileNotFoundError: there is no such file; a folder says where a pretraining run has it.
    """
    if str(path) == PIXELS:
        return pixel_graph()
    if Path(path).is_dir():
        raise FileNotFoundError(f"{path} is a folder: give FILE.onnx, of a run of facemae pretrain {path}/weights/recognizer.onnx")
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: there is no such recogniser: give the path of FILE.onnx, on this machine")
    return Path(path).read_bytes()


class OnnxRecognizer:
    """A frozen recogniser: pictures in, unit embeddings out. Picklable: it carries the bytes of its file.

    Attributes:
        name: for reports and embedding manifests.
        dim: length of an embedding.
        sha256: of the ONNX file.
        mean: taken off value/255, one float a channel (RGB).
        std: what the difference is divided by.
    """

    def __init__(
        self,
        model: bytes,
        name: str,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        device: str = "cpu",
        threads: int = 1,
        source: str = "",
    ) -> None:
        """Start an onnxruntime session; `load` is the usual way in.

        Args:
            model: the content of an ONNX file.
            name: for reports.
            mean: three floats in [0, 1].
            std: three floats in (0, 1].
            device: "cpu", "cuda" (an error without onnxruntime's CUDA provider) or "auto" (CUDA where there is one).
            threads: tiles embedded at the same time on the CPU, each by one thread.
            source: where the model came from, for error messages.

        Raises:
            ValueError: not an ONNX recogniser of 112 x 112 RGB pictures, a bad normalisation, or no such device.
        """
        self._model, self._source = model, source or name
        self.name, self.threads = name, threads
        self.mean, self.std = check_normalisation(mean, std, self._source)
        self.device = _resolve_device(device)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._session = _start_session(model, self.device, self._source)
        self._input = _check_signature(self._session, self._source)
        scale = 1 / (255 * np.array(self.std, dtype=np.float64))
        self._scale = scale.astype(np.float32).reshape(3, 1, 1)
        self._shift = (-np.array(self.mean) / np.array(self.std)).astype(np.float32).reshape(3, 1, 1)
        self.dim = self._measure_dim()

    @classmethod
    def load(
        cls,
        path: str | Path,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        name: str | None = None,
        *,
        device: str = "cpu",
        threads: int = 1,
    ) -> OnnxRecognizer:
        """Read FILE.onnx, and what is not given as an argument from FILE.json beside it.

        Args:
            path: FILE.onnx, weights inside; or "pixels", the attacker of `facemae.recognizer.pixels`, whose normalisation is its own.
            mean: three floats, taken off value/255.
            std: three floats that the difference is divided by.
            name: for reports; the file's stem when neither argument nor sidecar gives one.
            device: "cpu", "cuda" or "auto".
            threads: tiles embedded at the same time on the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: mean or std is nowhere to be found (they are never guessed), the sidecar is broken or belongs to
                another file, or the file is not a recogniser (see the constructor).
        """
        if str(path) == PIXELS:
            return cls(read_model(path), PIXELS, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), device=device, threads=threads)
        path, model = Path(path), read_model(path)
        sidecar = read_sidecar(path, hashlib.sha256(model).hexdigest())
        return cls.of(model, sidecar, str(path), mean, std, name, device=device, threads=threads)

    @classmethod
    def of(
        cls,
        model: bytes,
        sidecar: Mapping[str, Any],
        source: str,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        name: str | None = None,
        *,
        device: str = "cpu",
        threads: int = 1,
    ) -> OnnxRecognizer:
        """The same from content that was read already: FILE.onnx and FILE.json ({} for none) at the path or URL ``source``.

        Raises:
            ValueError: as `load`.
        """
        mean = sidecar.get("mean") if mean is None else mean
        std = sidecar.get("std") if std is None else std
        stem = Path(source).stem
        if mean is None or std is None:
            raise ValueError(
                f"{source}: the normalisation of this recogniser is not known, and it is never guessed. Give mean and "
                "std, three floats each, applied as (value/255 - mean)/std, or write them into "
                f"{sidecar_of(source)}, for example "
                f'{{"name": "{stem}", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}'
            )
        return cls(model, name or sidecar.get("name") or stem, mean, std, device=device, threads=threads, source=source)

    def __reduce__(self) -> tuple[Any, ...]:
        """Sessions cannot travel between processes; the file's bytes and the settings can."""
        return _rebuild, (self._model, self.name, self.mean, self.std, self.device, self.threads, self._source)

    def on(self, device: str, threads: int) -> OnnxRecognizer:
        """The same recogniser on another device or number of threads; see `load`."""
        return OnnxRecognizer(self._model, self.name, self.mean, self.std, device=device, threads=threads, source=self._source)

    def describe(self) -> dict[str, Any]:
        """What an embedding's manifest records of its recogniser: {"name", "sha256", "dim", "mean", "std"}."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "dim": self.dim,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def embed(self, pictures: np.ndarray) -> np.ndarray:
        """Embed pictures. A picture's row is the same, bit for bit, in any batch and with any number of threads.

        Args:
            pictures: uint8 (N, 112, 112, 3) RGB, aligned faces; N may be 0.

        Returns:
            float32 (N, dim), rows of length 1.

        Raises:
            ValueError: other pictures than that, or a picture whose embedding is zero or not finite.
        """
        return self._unit_rows(self.features(pictures))

    def features(self, pictures: np.ndarray) -> np.ndarray:
        """What the network gives for pictures, of any length: float32 (N, dim). Otherwise as `embed`."""
        if pictures.dtype != np.uint8 or pictures.shape[1:] != (112, 112, 3):
            raise ValueError(f"{self.name}: pictures must be uint8 (N, 112, 112, 3), not {pictures.dtype} {pictures.shape}")
        rows = np.empty((len(pictures), self.dim), dtype=np.float32)

        def embed_tile(start: int) -> None:
            tile = pictures[start : start + _TILE[self.device]]
            rows[start : start + len(tile)] = self._run(tile)[: len(tile)]

        starts = range(0, len(pictures), _TILE[self.device])
        if self.threads > 1 and len(starts) > 1:
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(embed_tile, starts))
        else:
            for start in starts:
                embed_tile(start)
        return rows

    def differentiable(self, layers: Sequence[str] = ()) -> FrozenRecognizer:
        """The same network in torch, for a loss (on the CPU; move it with `.to(device)`).

        Args:
            layers: names of inner values of the ONNX graph (the outputs of its nodes, as a viewer like Netron shows
                them) whose features are wanted beside the embedding.

        Raises:
            ValueError: onnx2torch cannot convert the graph or converts it wrongly, or there is no such layer.
        """
        import torch  # embedding alone does not pay for it

        from facemae.recognizer.frozen import FrozenRecognizer, convert_graph

        frozen = FrozenRecognizer(convert_graph(self._model, layers, self._source), self.mean, self.std)
        noise = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), dtype=np.uint8)
        with torch.no_grad():
            images = torch.from_numpy(noise).permute(0, 3, 1, 2) / 127.5 - 1
            gap = float(np.abs(frozen(images)[0].numpy() - self.embed(noise)).max())
        if not gap < 1e-3:
            raise ValueError(
                f"{self._source}: the network that onnx2torch makes of it differs from onnxruntime's by {gap:.1g}: "
                "give another recogniser for the loss"
            )
        return frozen

    def _run(self, pictures: np.ndarray) -> np.ndarray:
        """Normalise up to one tile of pictures, pad it and run the network: float32 (tile, dim)."""
        tile = np.zeros((_TILE[self.device], 3, 112, 112), dtype=np.float32)
        images = tile[: len(pictures)]
        images[:] = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))  # three times as fast as a strided cast
        images *= self._scale
        images += self._shift
        return self._session.run(None, {self._input: tile})[0]

    def _measure_dim(self) -> int:
        """The length of an embedding, from a run: the shapes that files declare are often wrong."""
        tile = _TILE[self.device]
        try:
            shape = self._run(np.zeros((tile, 112, 112, 3), dtype=np.uint8)).shape
        except Exception as error:  # onnxruntime has no common base class
            raise ValueError(f"{self._source}: the network fails on {tile} pictures of 112 x 112: {error}") from error
        if len(shape) != 2 or shape[0] != tile:
            raise ValueError(f"{self._source}: {tile} pictures must give ({tile}, dim) embeddings, got {shape}")
        return int(shape[1])

    def _unit_rows(self, rows: np.ndarray) -> np.ndarray:
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(bad):
            raise ValueError(
                f"{self.name}: the embedding of picture {', '.join(map(str, bad[:10]))} of this batch of {len(rows)} "
                "is zero or not finite: look at the picture, and whether mean and std are this recogniser's"
            )
        return rows / lengths


def _rebuild(model: bytes, name: str, mean: Triple, std: Triple, device: str, threads: int, source: str) -> OnnxRecognizer:
    return OnnxRecognizer(model, name, mean, std, device=device, threads=threads, source=source)


def _resolve_device(device: str) -> str:
    """One of the keys of _TILE."""
    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device == "auto":
        return "cuda" if has_cuda else "cpu"
    if device not in _TILE:
        raise ValueError(f"unknown device {device!r}: give cpu, cuda or auto")
    if device == "cuda" and not has_cuda:
        raise ValueError("this onnxruntime has no CUDA provider: install onnxruntime-gpu, or give device cpu or auto")
    return device


def _start_session(model: bytes, device: str, source: str) -> onnxruntime.InferenceSession:
    """A session whose calls use one thread each: several calls may run side by side."""
    try:
        graph = onnx.load_model_from_string(model).graph
        if any(uses_external_data(weight) for weight in graph.initializer):
            raise ValueError("its weights are in another file; save it again with save_as_external_data=False")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors only: many files declare a wrong output shape, which is harmless
        return onnxruntime.InferenceSession(model, options, providers=_PROVIDERS[device])
    except Exception as error:  # neither protobuf nor onnxruntime has a base class to catch
        raise ValueError(f"{source}: not an ONNX network that onnxruntime can run: {error}") from error


def _check_signature(session: onnxruntime.InferenceSession, source: str) -> str:
    """The name of the only input, float32 N x 3 x 112 x 112; one output."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise ValueError(
            f"{source}: a recogniser has one input and one output, this file has {len(inputs)} and {len(outputs)} "
            f"({', '.join(value.name for value in [*inputs, *outputs])}): is it a detector?"
        )
    shape, kind = inputs[0].shape, inputs[0].type
    if kind != "tensor(float)" or len(shape) != 4 or isinstance(shape[0], int) or shape[1:] != [3, 112, 112]:
        raise ValueError(
            f"{source}: the input must be N x 3 x 112 x 112 float32 with N left open, this one is {kind} {shape}: "
            "export the network again for aligned 112 x 112 RGB faces and a dynamic batch axis"
        )
    return str(inputs[0].name)
