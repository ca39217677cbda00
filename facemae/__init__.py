"""FaceMAE (arXiv 2205.11090): masked autoencoding of faces with instance relation matching."""

from __future__ import annotations

import os

__version__ = "0.1.0"

# Read when the library is imported: otherwise it makes an id of this machine, keeps it in the home folder and may report to its maker.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
