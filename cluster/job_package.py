"""What travels with a job to a Ray cluster: this installation's own modules and the job's YAML, in one zip."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

PACKAGES = ("facemae", "cluster", "jobs")
SUFFIXES = frozenset({".py", ".yaml", ".html", ".css"})
"""Modules and the files that they read. Everything else (caches, data, weights, editors' and users' files) stays where it is."""
CONFIG = "job.yaml"
"""Name of the job's YAML in the package, which is the job's working directory."""
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same content is the same package, which Ray then uploads once


def write_package(path: Path, config: str, *, code: bool = True, root: Path | None = None) -> int:
    """Write the zip. Returns its bytes.

    Args:
        path: of the zip; Ray wants the ending ``.zip``.
        config: the job's YAML.
        code: whether the modules travel, or the cluster has its own.
        root: folder of the packages; by default where this module was imported from.
    """
    files = {CONFIG: config.encode()} | (_modules(root or Path(__file__).parents[1]) if code else {})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            package.writestr(entry, content)
    return path.stat().st_size


def _modules(root: Path) -> Mapping[str, bytes]:
    """Every file of the packages that a run needs, by its place. Links are left out: they may lead anywhere."""
    found = dict[str, bytes]()
    for package in PACKAGES:
        for path in (root / package).rglob("*"):
            parts = path.relative_to(root).parts
            plain = not any(part.startswith(".") or part == "__pycache__" or (root.joinpath(*parts[: i + 1])).is_symlink() for i, part in enumerate(parts))
            if plain and path.suffix in SUFFIXES and path.is_file():
                found["/".join(parts)] = path.read_bytes()
    return found
