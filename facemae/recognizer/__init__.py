"""Face recognisers: pretrained ones in ONNX files, and small ones trained here."""

from __future__ import annotations

from facemae.recognizer.compact import CompactNet
from facemae.recognizer.export import export_onnx
from facemae.recognizer.frozen import FrozenRecognizer
from facemae.recognizer.margin import ArcFace, CosFace, MarginHead
from facemae.recognizer.onnx import OnnxRecognizer
from facemae.recognizer.train import fit_recognizer

__all__ = [
    "ArcFace",
    "CompactNet",
    "CosFace",
    "FrozenRecognizer",
    "MarginHead",
    "OnnxRecognizer",
    "export_onnx",
    "fit_recognizer",
]
