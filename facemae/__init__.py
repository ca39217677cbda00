"""FaceMAE: masked autoencoding of faces with instance relation matching (arXiv 2205.11090), without any distribution."""

from __future__ import annotations

__version__ = "0.1.0"
