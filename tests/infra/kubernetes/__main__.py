"""`python -m tests.infra.kubernetes FILE... [--outside Kind/name ...]`: what is wrong with manifests; `-` reads standard input."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml

from tests.infra.kubernetes.check import check, definitions, definitions_folder, load


def main(arguments: list[str] | None = None) -> int:
    """Print what is wrong; 0 where nothing is, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m tests.infra.kubernetes", description="Check manifests that are applied together.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="YAML, or - for standard input")
    parser.add_argument("--outside", nargs="*", default=[], metavar="KIND/NAME", help="what is in the cluster already; KIND/* for any")
    given = parser.parse_args(arguments)
    objects = []
    for file in given.files:
        try:
            objects += load(sys.stdin.read() if file == "-" else Path(file).read_text())
        except (OSError, yaml.YAMLError) as error:
            print(f"{file}: {error}", file=sys.stderr)
            return 1
    crd = definitions()
    if crd is None:
        print(f"no KubeRay definitions in {definitions_folder()} (set FACEMAE_SHARED): its schema is left out", file=sys.stderr)
    problems = check(objects, given.outside, crd=crd)
    print(*problems, f"{len(objects)} objects, {len(problems)} problems", sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
