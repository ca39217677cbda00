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
    files = package_files(config, code=code, root=root)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            package.writestr(entry, content)
    return path.stat().st_size


def package_files(config: str, *, code: bool = True, root: Path | None = None) -> dict[str, bytes]:
    """What the zip holds, by name: see ``write_package``."""
    return {CONFIG: config.encode(), **(_modules(root or Path(__file__).parents[1]) if code else {})}


def _modules(root: Path) -> Mapping[str, bytes]:
    """Every file of the packages that a run needs, by its place. Links are left out: they may lead anywhere."""
    found = dict[str, bytes]()
    for package in PACKAGES:
        for path in (root / package).rglob("*"):
            parts = path.relative_to(root).parts
            linked = any(root.joinpath(*parts[:depth]).is_symlink() for depth in range(1, len(parts) + 1))
            hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
            if path.suffix in SUFFIXES and not linked and not hidden and path.is_file():
                found["/".join(parts)] = path.read_bytes()
    return found
