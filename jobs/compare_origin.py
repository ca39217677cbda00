"""When, where and by which code a result was made: recorded with it, so that drawing it again a month later does not make it younger."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path

Origin = Mapping[str, str]
FIELDS = ("hardware", "date", "commit")


def origin_here(hardware: str, address: str | None) -> Origin:
    """Of what is made now.

    Args:
        hardware: in words; empty asks this machine.
        address: of the Ray cluster that works, whose machines nobody asks.
    """
    cluster = address or os.environ.get("RAY_ADDRESS")
    return {
        "hardware": hardware or ("a Ray cluster" if cluster else _machine()),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
    }


def joined(origins: Iterable[Origin]) -> dict[str, str]:
    """Several as one: each different value of a field, in order."""
    found = list(origins)
    return {name: ", ".join(sorted({origin[name] for origin in found})) for name in FIELDS}


def _machine() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} cores ({platform.processor() or platform.machine()}), {', '.join(gpus) or 'no GPU'}"


def _commit() -> str:
    """The commit that the code is of, where it is run from a repository, else its version."""
    folder = Path(__file__).parents[1]
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return version("facemae")
    found = subprocess.run(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or version("facemae")
