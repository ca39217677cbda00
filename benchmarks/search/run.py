"""Trains and measures every setting of a grid in one process, on a machine that has torch, torchvision, timm and safetensors alone.

    python -m benchmarks.search.run --bundle search.safetensors --output found --settings gpu --minutes 9.5

For each setting: FaceMAE trained on the bundle's training people, the protected people redrawn, the leakage by three attackers, the
utility, and the accuracy on the test pairs of a recogniser trained on what was redrawn. After each the table is written anew; started
again, it goes on with the settings that are missing. Time left is shared among the settings to come; one that was cut short says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.search.bundle import Bundle, read_bundle
from benchmarks.search.learn import Faces, embed, recognizer_of, redraw, train
from benchmarks.search.measure import leakage, utility, verification
from benchmarks.search.settings import GRIDS, Setting
from benchmarks.search.table import table
from facemae.recognizer.compact import CompactNet
from facemae.relation import relation_loss

PIXELATED = 8
"""Side in pixels of the blocks of the reference: as recognisable to the eye as what the first networks draw."""
_MEASURING = 0.4
"""Share of a setting's time kept for redrawing, attacking and the recogniser."""


@dataclass
class Search:
    """Everything that the settings share, on the device.

    Attributes:
        bundle: the input.
        output: folder of the results.
        device: "cpu" or "cuda".
        recognizer_samples, width: of the recognisers trained here.
        bf16: mixed precision in FaceMAE's training.
    """

    bundle: Bundle
    output: Path
    device: torch.device
    recognizer_samples: int
    width: int
    bf16: bool
    attackers: dict[str, nn.Module] = field(default_factory=dict)

    def prepare(self) -> None:
        """Decodes, embeds the training faces, trains the attacker that has seen originals of other people."""
        bundle = self.bundle
        self.recognizer = bundle.recognizer.to(self.device)
        pictures = bundle.train.decode().to(self.device)
        both = torch.stack([embed(self.recognizer, side) for side in (pictures, pictures.flip(2))])
        self.train = Faces(pictures, bundle.train.people.numpy(), both)
        self.protected, self.people = bundle.protected.decode().to(self.device), bundle.protected.people.numpy()
        self.test, self.folds, self.pairs = bundle.test.decode().to(self.device), bundle.test.people.numpy(), bundle.pairs.numpy()
        self.attackers = {bundle.facts["recognizer"]["name"]: self.recognizer, "compact": self._attacker()}
        self.gallery = {name: embed(network, self.protected) for name, network in self.attackers.items()}

    def _attacker(self) -> CompactNet:
        """Kept in the output folder, so that all settings of a search, resumed or not, meet the same one."""
        path = self.output / f"attacker-{self.bundle.sha256[:12]}-{self.width}-{self.recognizer_samples}.safetensors"
        if not path.exists():
            net = recognizer_of(self.train.pictures, self.train.people, self.recognizer_samples, self.width, seed=1)
            save_file({name: tensor.contiguous().cpu() for name, tensor in net.state_dict().items()}, path.with_suffix(".new"))
            os.replace(path.with_suffix(".new"), path)
        net = CompactNet(dim=128, width=self.width, block="residual").to(self.device)
        net.load_state_dict(load_file(path))
        return net.eval()

    def measure(self, drawn: Tensor) -> dict[str, Any]:
        """Attacks redrawn pictures, uint8 (N, 112, 112, 3) in the order of the protected ones, and trains on them."""
        began = time.monotonic()
        net = recognizer_of(drawn, self.people, self.recognizer_samples, self.width, seed=2)
        rows = {name: embed(network, drawn) for name, network in self.attackers.items()}
        attacks = {name: leakage(rows[name], self.gallery[name], self.people) for name in rows}
        attacks["trained on the protected"] = leakage(embed(net, drawn), embed(net, self.protected), self.people)
        inside, original = next(iter(rows)), next(iter(self.gallery.values()))
        error = (drawn.float() - self.protected.float()).div_(127.5).square_().mean()
        return {
            "pixel_error": round(float(error), 5),
            "relation_error": round(float(relation_loss(original, rows[inside])), 5),
            "leakage_cmc1": attacks,
            "utility": {name: utility(found, self.people) for name, found in rows.items()},
            "verification": verification(net, self.test, self.folds, self.pairs),
            "measuring_seconds": round(time.monotonic() - began, 1),
        }

    def references(self) -> dict[str, Callable[[], Tensor]]:
        """What the settings are compared with: no protection, and the plainest one."""
        return {"original": lambda: self.protected, f"pixelate {PIXELATED}": lambda: _pixelate(self.protected)}

    def run(self, setting: Setting, seconds: float) -> dict[str, Any]:
        """Trains and measures one setting in about so many seconds; writes its weights."""
        until = time.monotonic() + (1 - _MEASURING) * seconds
        trained = train(setting, self.bundle.start, self.train, self.recognizer, self.bf16, until)
        trained.model.save_pretrained(self.output / folder_of(setting.name) / "weights")
        figures = self.measure(redraw(trained.model, self.protected, setting.mask_ratio))
        done = {"samples_seen": trained.samples, "cut_short": trained.samples < setting.samples}
        return {
            **done,
            "training_seconds": round(trained.seconds, 1),
            "last_terms": {name: round(value, 5) for name, value in trained.terms.items()},
            **figures,
        }


def search(work: Search, settings: list[Setting], minutes: float, began: float) -> dict[str, Any]:
    """All references and settings, each kept as it is done; returns the whole result.

    Raises:
        ValueError: the output folder holds results that were measured otherwise.
    """
    end = began + 60 * minutes
    about = {"schema": 1, "bundle": {"sha256": work.bundle.sha256, **_counts(work.bundle)}, **_where(work), "command": _command()}
    jobs: list[tuple[str, Callable[[float], dict[str, Any]]]] = [
        (name, partial(_reference, work, draw)) for name, draw in work.references().items()
    ]
    jobs += [(setting.name, partial(work.run, setting)) for setting in settings]
    known = {setting.name: dataclasses.asdict(setting) for setting in settings}
    rows: dict[str, Any] = {}
    for number, (name, job) in enumerate(jobs):
        conditions = {"bundle": work.bundle.sha256, "recognizer": [work.recognizer_samples, work.width], "setting": known.get(name)}
        row = _kept(work, name, conditions) or _keep(work, name, {**conditions, **job((end - time.monotonic()) / (len(jobs) - number))})
        rows[name] = row
        result = {**about, "seconds": round(time.monotonic() - began, 1), "rows": rows}
        (work.output / "search.json").write_text(json.dumps(result, indent=1) + "\n")
        (work.output / "search.md").write_text(table(rows))
        print(table({name: row}).splitlines()[-1], flush=True)
    return result


def _reference(work: Search, draw: Callable[[], Any], _seconds: float) -> dict[str, Any]:
    return work.measure(draw())


def _kept(work: Search, name: str, conditions: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier run measured, or None.

    Raises:
        ValueError: it was measured on another bundle, by other recognisers or with other fields of the setting.
    """
    path = work.output / folder_of(name) / "result.json"
    if not path.exists():
        return None
    row, wanted = json.loads(path.read_text()), json.loads(json.dumps(conditions))
    if different := [field for field in wanted if row.get(field) != wanted[field]]:
        raise ValueError(f"{path} was measured with another {different[0]} ({row.get(different[0])}): give another --output")
    return row


def _keep(work: Search, name: str, row: dict[str, Any]) -> dict[str, Any]:
    path = work.output / folder_of(name) / "result.json"
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(row, indent=1) + "\n")
    os.replace(path.with_suffix(".new"), path)
    return row


def _pixelate(pictures: Tensor) -> Tensor:
    small = nn.functional.avg_pool2d(pictures.permute(0, 3, 1, 2).float(), PIXELATED)
    large = nn.functional.interpolate(small.round(), scale_factor=PIXELATED, mode="nearest")
    return large.to(torch.uint8).permute(0, 2, 3, 1)


def folder_of(name: str) -> str:
    """The folder of a setting's results."""
    return name.replace(" ", "_").replace(",", "")


def _counts(bundle: Bundle) -> dict[str, Any]:
    return {key: value for key, value in bundle.facts.items() if key != "recognizer"} | {"recognizer": bundle.facts["recognizer"]["name"]}


def _where(work: Search) -> dict[str, Any]:
    known = machine() if shutil.which("git") else {}
    gpu = torch.cuda.get_device_name(work.device) if work.device.type == "cuda" else None
    return {"machine": {**known, "gpu": gpu, "threads": torch.get_num_threads(), "torch": torch.__version__, "bf16": work.bf16}}


def _command() -> str:
    """The command without the folders of this machine."""
    return "python -m benchmarks.search.run " + shlex.join(Path(part).name if "/" in part else part for part in sys.argv[1:])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs what the command line says.

    Raises:
        ValueError: no such setting, or the bundle is not what it should be.
    """
    began = time.monotonic()
    given = _parser().parse_args(arguments)
    settings = [setting for setting in GRIDS[given.settings] if not given.only or setting.name in given.only]
    if len(settings) < len(given.only or settings):
        raise ValueError(f"not all of {given.only} are in {given.settings}: there are {[s.name for s in GRIDS[given.settings]]}")
    if given.samples is not None:
        settings = [dataclasses.replace(setting, samples=given.samples) if setting.samples else setting for setting in settings]
    cuda = given.device == "cuda"
    samples, width = given.recognizer_samples or (400_000 if cuda else 20_000), given.width or (32 if cuda else 16)
    bundle, bf16 = read_bundle(given.bundle, given.sha256), cuda if given.bf16 is None else given.bf16
    given.output.mkdir(parents=True, exist_ok=True)
    work = Search(bundle, given.output, torch.device(given.device), samples, width, bf16)
    work.prepare()
    return search(work, settings, given.minutes, began)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--sha256", help="of the bundle; by default what FILE.sha256 says")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--settings", choices=sorted(GRIDS), default="gpu")
    parser.add_argument("--only", nargs="+", help="names of settings of the grid")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="mixed precision; by default on CUDA alone")
    parser.add_argument("--samples", type=int, help="instead of each setting's own number")
    parser.add_argument("--recognizer-samples", type=int, help="of each recogniser trained here; 20,000 on the CPU, 400,000 on CUDA")
    parser.add_argument("--width", type=int, help="of those recognisers; 16 on the CPU, 32 on CUDA")
    return parser


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"search: {error}")
