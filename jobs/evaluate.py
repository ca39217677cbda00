"""``facemae evaluate``: recognisers on the field's verification and identification protocols."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.recognizer_file import has_sidecar, load_recognizer
from cluster.store import NotFound, open_store
from facemae.recognizer.onnx import OnnxRecognizer
from facemae.verification import VerificationError
from jobs.command import Config, UsageError, main_of
from jobs.evaluate_images import Embedded, Options, embed_images, examples
from jobs.evaluate_lists import open_protocols
from jobs.evaluate_plot import roc_picture
from jobs.evaluate_protocols import Protocol
from jobs.evaluate_table import table_of

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Config):
    """Score recognisers: 10-fold accuracy, TAR@FAR and ROC of pair lists, .bin files, CFP and templates; rank-1/5 of 1:N search.

    Reads: ONNX recognisers, lists, and aligned 112 x 112 images (folders or s3://bucket/prefix).
    Writes: OUTPUT/evaluate.json, evaluate.md, and roc.png where there are pairs. Each image is embedded once, for all lists.
    """

    recognizer: list[str]
    """ONNX files, paths or s3://; the normalisation comes from FILE.json beside each, or from the two flags below."""
    output: str
    """Root of the result, a folder or s3://bucket/prefix."""
    recognizer_mean: tuple[float, float, float] | None = None
    """Mean of value/255 for each colour, where an ONNX file has no sidecar file."""
    recognizer_std: tuple[float, float, float] | None = None
    """Standard deviation of value/255 for each colour, likewise."""
    bin: list[str] = field(default_factory=list)
    """InsightFace .bin files (lfw.bin, cfp_fp.bin, agedb_30.bin, ...)."""
    pairs: list[str] = field(default_factory=list)
    """Pair lists: LFW's pairs.txt, or CSV files of image_a,image_b,same[,fold]."""
    images: str | None = None
    """Root of the images that --pairs and --templates name."""
    cfp: str | None = None
    """Root of CFP, which holds Protocol/ and Data/."""
    cfp_protocols: list[Literal["FP", "FF"]] = field(default_factory=lambda: ["FP"])  # type: ignore[arg-type]
    """FP: frontal against profile; FF: frontal against frontal."""
    identification: str | None = None
    """Folder of one folder of images an identity, for 1:N search: the first image of each is the gallery, the others are probes."""
    distractors: str | None = None
    """Folder of images of other people, who join the gallery and are nobody's mates."""
    templates: str | None = None
    """CSV of template,subject,image[,media], as IJB's."""
    template_pairs: list[str] = field(default_factory=list)
    """CSV files of t1,t2,same: 1:1 verification of templates."""
    template_gallery: list[str] = field(default_factory=list)
    """CSV files of a column template: these are the gallery of a 1:N search, all other templates are probes."""
    flip: bool = True
    """Add the embedding of the mirrored image, as the field does."""
    skip_missing: bool = False
    """Leave out images that are absent or unreadable, and the pairs that need them; the table says how many."""
    resize: bool = False
    """Scale pictures that are not 112 x 112, as ingest does, instead of refusing them. Faces must be aligned all the same."""
    batch_size: int = 128
    """Images decoded at once; changes no figure."""
    threads: int = 0
    """CPU threads; 0 takes as many as this process may use."""
    device: str = "cpu"
    """cpu or cuda."""


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Embed, score, write evaluate.json, evaluate.md and roc.png, print the table. Returns the content of evaluate.json, and what to
    run next."""
    _require_protocols(config)
    recognizers, protocols = _recognizers(config), open_protocols(config)
    _require_images(protocols, config.skip_missing)
    with suppress(NotFound):  # an output that cannot be reached, or is a file, is found before the work
        open_store(config.output).size("evaluate.json")
    options = Options(config.flip, config.skip_missing, config.resize, config.batch_size, _threads(config))
    embedded = embed_images([source for protocol in protocols for source in protocol.sources], recognizers, options)
    report = {
        "schema": SCHEMA,
        "kind": "evaluation",
        "flip": config.flip,
        "resize": config.resize,
        "std": "population",
        "images": int(embedded.present.sum()),
        "recognizers": [
            {**recognizer.describe(), "seconds": seconds} for recognizer, seconds in zip(recognizers, embedded.seconds, strict=True)
        ],
        "protocols": [protocol.describe(embedded.rows(protocol.keys, 0)[1]) for protocol in protocols],
        "results": [_score(protocol, embedded, recognizers, number) for protocol in protocols for number in range(len(recognizers))],
    }
    _write(config, report)
    return {**report, "next": "facemae compare --help (the same of sets protected in other ways, beside what leaks)"}


def _require_protocols(config: EvaluateConfig) -> None:
    """Raises UsageError for flags that do not make a measurement."""
    if not (config.bin or config.pairs or config.cfp or config.identification or config.template_pairs or config.template_gallery):
        raise UsageError("nothing to measure: give --bin, --pairs, --cfp, --identification, --template-pairs or --template-gallery")
    if (config.pairs or config.templates) and not config.images:
        raise UsageError("--pairs and --templates name images by their path below a root: give it with --images")
    if (config.template_pairs or config.template_gallery) and not config.templates:
        raise UsageError("--template-pairs and --template-gallery name templates: give the list that says what they are with --templates")
    if config.distractors and not config.identification:
        raise UsageError("--distractors join the gallery of --identification: give that folder too")
    if Path(config.output).is_file():
        raise UsageError(f"--output {config.output} is a file: give a folder")
    output = open_store(config.output).url.rstrip("/") + "/"
    for name in ("images", "cfp", "identification", "distractors"):
        root = getattr(config, name)
        if root and output.startswith(open_store(root).url.rstrip("/") + "/"):
            raise UsageError(f"--output {config.output} lies in --{name} {root}: give a folder beside it")
    if config.batch_size < 1 or config.threads < 0:
        raise UsageError(f"--batch-size {config.batch_size} --threads {config.threads}: give 1 or more, and 0 or more")


def _threads(config: EvaluateConfig) -> int:
    return config.threads or len(os.sched_getaffinity(0))


def _recognizers(config: EvaluateConfig) -> list[OnnxRecognizer]:
    """All of them, each of a name of its own."""
    threads = _threads(config)
    found = []
    for file in config.recognizer:  # the flags are for those that have no sidecar
        normalisation = (None, None) if has_sidecar(file) else (config.recognizer_mean, config.recognizer_std)
        found.append(load_recognizer(file, *normalisation, device=config.device, threads=threads))
    names = [recognizer.name for recognizer in found]
    if len(set(names)) < max(len(names), 1):
        raise UsageError(f"--recognizer needs one file or more, each of another name, not {names}: the name is in FILE.json")
    return found


def _require_images(protocols: Sequence[Protocol], skip_missing: bool) -> None:
    """Raises UsageError where images are absent that may not be."""
    for protocol in protocols:
        absent = protocol.absent
        if absent and not skip_missing:
            raise UsageError(
                f"{protocol.name}: {len(absent)} of the {len(protocol.keys)} images that it names are absent, the first: "
                f"{examples(absent)}. Give the root that holds them (--images, --cfp), or leave their pairs out with --skip-missing"
            )


def _score(protocol: Protocol, embedded: Embedded, recognizers: Sequence[OnnxRecognizer], number: int) -> dict[str, Any]:
    """One protocol by one recogniser."""
    started = time.perf_counter()
    try:
        figures = protocol.score(*embedded.rows(protocol.keys, number))
    except VerificationError as error:
        raise VerificationError(f"{protocol.name}: {error}") from None
    names = {"protocol": protocol.name, "kind": protocol.kind, "recognizer": recognizers[number].name}
    return {**names, **figures, "seconds": time.perf_counter() - started}


def _write(config: EvaluateConfig, report: dict[str, Any]) -> None:
    """The report as JSON, table and picture."""
    output, table = open_store(config.output), "\n".join(table_of(report)) + "\n"
    output.put("evaluate.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    output.put("evaluate.md", table.encode())
    picture = roc_picture(report["results"])
    if picture:
        output.put("roc.png", picture)
    else:
        output.delete("roc.png")  # an older one would stand beside figures that it does not show
    print(f"{table}\nwritten: {output.url}/evaluate.json, evaluate.md{', roc.png' if picture else ''}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(EvaluateConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
