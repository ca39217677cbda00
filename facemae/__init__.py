"""FaceMAE (arXiv 2205.11090): masked autoencoding of faces with instance relation matching."""

from __future__ import annotations

__version__ = "0.1.0"
