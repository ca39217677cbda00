"""``facemae leakage``: how many protected images can be traced to their originals, over the full output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from cluster.dataset import Dataset
from cluster.embed import EmbedProcessor
from cluster.embedded import EmbeddedSet, GalleryError
from cluster.index import Gallery, GalleryOptions
from cluster.inputs import input_units
from cluster.leakage import run_search, summarise
from cluster.secret import key_map_of
from cluster.session import session
from cluster.stage import StageOptions, StageResult, run_stage
from cluster.store import NotFound, join_url, open_store
from facemae.curve import DEPTH
from facemae.interval import CONFIDENCE
from facemae.linking import HISTOGRAM_RANGE, NUM_BINS
from jobs.command import RayConfig, main_of

SCHEMA = 2
SEARCHES = {"original": {"leakage": "protected", "reference": "original"}, "protected": {"utility": "protected"}}
"""For each gallery: name of a search in leakage.json -> the set that is searched for."""


@dataclass(frozen=True, kw_only=True)
class LeakageConfig(RayConfig):
    """Search every protected image among all originals with one or more recognisers, exactly, and say how many are found.

    Reads: an original data set, a protected one made from it, and ONNX recognisers the protection was not trained against.
    Embeddings that are missing are computed first, those that are there are used.
    Writes: OUTPUT/leakage.json, and the rank of every image in OUTPUT/<recogniser>/<search>/shards/*.parquet.
    Next: facemae report.
    """

    original: str
    """Root of the original data set."""
    protected: str
    """Root of the protected data set."""
    recognizer: list[str]
    """ONNX files of the attackers; give several, the worst one counts."""
    output: str
    """Root of the result, a folder or s3://bucket/prefix."""
    recognizer_mean: tuple[float, float, float] | None = None
    """Mean of value/255 for each colour, where an ONNX file has no sidecar FILE.json."""
    recognizer_std: tuple[float, float, float] | None = None
    """Standard deviation of value/255 for each colour, likewise."""
    device: str = "cpu"
    """cpu or cuda, for embeddings that are missing."""
    seed: int = 0
    """Of the random pairs of images in the histograms."""
    index: str = "auto"
    """How the gallery is searched: Flat (every image, exact), IVF<cells>,<codes> as FAISS writes it (IVF4096,SQfp16 or IVF65536,PQ64), or
    auto: Flat up to 262,144 images, cells beyond. Cells that are not searched can only make the leakage look larger."""
    recall: float = 0.99
    """With cells: the share of queries that must be answered as by an exact search; it decides how many cells are searched."""
    gallery_actors: int = 0
    """Actors that hold the gallery; 0 takes one a node, and as many as it needs for none to hold more than 4 GiB."""
    cpus_per_gallery_actor: float = 0.0
    """CPU cores set aside for each; 0 lets them share the workers' (they take turns), which always fits."""
    gpus_per_gallery_actor: float = 0.0
    """GPUs of each; FAISS then searches on the GPU, with the same result."""
    rekey: str | None = None
    """For a protected set made with --rekey: the same secret, at env:NAME or file:PATH."""

    def gallery_options(self) -> GalleryOptions:
        """The same as options of a gallery."""
        return GalleryOptions(self.index, self.recall, self.gallery_actors, self.cpus_per_gallery_actor, self.gpus_per_gallery_actor)


def run(config: LeakageConfig) -> dict[str, Any]:
    """Embed what is missing, run the searches, write leakage.json, print the table and return the summary."""
    embedders = _embedders(config)
    images = {"original": Dataset(config.original), "protected": Dataset(config.protected)}
    lineage = {role: _lineage(dataset) for role, dataset in images.items()}
    _require_origin(lineage)
    new_key = key_map_of(lineage["protected"]["config"], config.rekey, config.protected)
    rekey = (config.rekey, new_key.check) if config.rekey and new_key else None
    failed: list[str] = []
    with session(config.address):
        attackers = [_attack(config, embedder, lineage, failed, rekey) for embedder in embedders]
    report = _report(lineage, attackers)
    output = open_store(config.output)
    output.put("leakage.json", (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
    print("\n".join(_table(report)))
    for shard in failed:
        print(f"given up: {shard}: its manifest says why")
    again = f" --rekey {config.rekey}" if config.rekey else ""
    print(f"written: {output.url}/leakage.json\nnext:    facemae report --output {config.output}{again}")
    return {"url": output.url, "worst_attacker": report["worst_attacker"], "failed_shards": failed}


Embedders = Mapping[str, EmbedProcessor]


def _embedders(config: LeakageConfig) -> list[Embedders]:
    """For each attacker, the processors that embed the two sets.

    Raises:
        ValueError: no attacker, two of one name, or a file that is no recogniser.
    """
    roots = {"original": config.original, "protected": config.protected}
    found: list[Embedders] = [
        {role: EmbedProcessor(root, file, config.recognizer_mean, config.recognizer_std, config.device) for role, root in roots.items()}
        for file in config.recognizer
    ]
    names = [embedder["original"].name for embedder in found]
    if len(set(names)) < max(len(names), 1):
        raise ValueError(f"--recognizer needs one file or more, each of another name, not {names}: the name is in FILE.json")
    return found


def _lineage(dataset: Dataset) -> dict[str, Any]:
    """What leakage.json says of one set of images."""
    content = dataset.description()
    return {
        "url": dataset.url,
        **{name: content[name] for name in ("samples", "quarantined", "identities", "shards")},
        **content["lineage"],
    }


def _require_origin(lineage: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise GalleryError when the protected set was made from other originals."""
    original, protected = lineage["original"], lineage["protected"]
    parent, source = protected.get("parent"), original.get("parent")
    if source and source["fingerprint"] == protected["fingerprint"]:
        raise GalleryError(f"{original['url']} was made from {protected['url']}: --original and --protected are swapped")
    if parent and parent["fingerprint"] != original["fingerprint"]:
        raise GalleryError(
            f"{protected['url']} was made from {parent.get('url', 'others')}, not from {original['url']} as it is now: "
            "give its own originals"
        )


def _attack(
    config: LeakageConfig, embedders: Embedders, lineage: Mapping[str, Any], failed: list[str], rekey: tuple[str, str] | None
) -> dict[str, Any]:
    """All searches of one attacker; appends to ``failed`` the shards that were given up."""
    sets = {role: _embedded(config, lineage[role]["url"], embedder, failed) for role, embedder in embedders.items()}
    recognizer = sets["original"].recognizer
    found: dict[str, Any] = {"recognizer": dict(recognizer)}
    options = StageOptions(num_workers=config.num_workers or _default_workers())
    for role, searches in SEARCHES.items():
        with Gallery(sets[role].dataset, recognizer["dim"], config.gallery_options()) as gallery:
            for part, query_role in searches.items():
                folder = f"{recognizer['name']}/{query_role}-{role}"
                output = Dataset(join_url(config.output, folder), ".parquet")
                name = f"{query_role} -> {role} ({recognizer['name']})"
                shared: dict[str, Any] = {
                    "name": name,
                    "seed": config.seed,
                    "options": options,
                    "rekey": rekey if part == "leakage" else None,
                }
                result = run_search(sets[query_role], sets[role], gallery, output, **shared)
                failed += _failures(output, result)
                found[part] = _search_part(output, folder, lineage[query_role]["samples"], result, len(gallery))
    return found


def _embedded(config: LeakageConfig, root: str, processor: EmbedProcessor, failed: list[str]) -> EmbeddedSet:
    """The embeddings of one set, computed now where they are not finished."""
    output = Dataset(root).embeddings(processor.name)
    try:
        output.store.size("dataset.json")
    except NotFound:
        units, parent = input_units(Dataset(root))
        name = f"embed ({processor.name})"
        result = run_stage(processor, units, output, name=name, kind="embeddings", parent=parent, options=config.stage_options())
        failed += _failures(output, result)
    found = EmbeddedSet.open(root, processor.name)
    given = processor.describe()["recognizer"]
    if dict(found.recognizer) != given:
        raise GalleryError(
            f"{output.url} was made by another recogniser of the same name ({dict(found.recognizer)}, given: {given}): delete it, or give "
            "the recogniser another name in FILE.json"
        )
    return found


def _default_workers() -> int:
    """A few: they only keep the gallery supplied with queries."""
    return max(1, min(4, int(ray.cluster_resources().get("CPU", 1))))


def _failures(output: Dataset, result: StageResult) -> list[str]:
    return [f"{output.url}/manifests/{shard}.json" for shard in result.failed_shards]


def _search_part(output: Dataset, folder: str, num_images: int, result: StageResult, num_gallery: int) -> dict[str, Any]:
    """One search in leakage.json."""
    measured = result.description["samples"]
    counts = {"ranks": f"{folder}/shards", "images": num_images, "queries": measured, "left_out": num_images - measured}
    return {**counts, "fingerprint": result.description["lineage"]["fingerprint"], **summarise(output).to_json(num_gallery)}


def _report(lineage: Mapping[str, Any], attackers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of leakage.json; the worst attacker leads."""

    def harm(attacker: Mapping[str, Any]) -> tuple[float, ...]:
        curves = [attacker["leakage"][mate] for mate in ("image", "identity")]
        return tuple(curve["cmc"][k] if curve else 0.0 for k in (0, DEPTH - 1) for curve in curves)

    ordered = sorted(attackers, key=harm, reverse=True)
    return {
        "schema": SCHEMA,
        "kind": "leakage",
        "search": "exact",
        "confidence": CONFIDENCE,
        "histogram": {"low": HISTOGRAM_RANGE[0], "high": HISTOGRAM_RANGE[1], "bins": NUM_BINS},
        **lineage,
        "worst_attacker": ordered[0]["recognizer"]["name"],
        "attackers": ordered,
    }


def _table(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as lines of plain text."""
    num_queries, num_gallery = report["protected"]["samples"], report["original"]["samples"]
    yield f"every protected image ({num_queries}) searched among all originals ({num_gallery}), exactly"
    head = ("attacker", "finds", "CMC@1 % [95 %]", "CMC@5", "CMC@10", "chance@1", "orig->orig@1")
    rows = [head]
    for attacker in report["attackers"]:
        name, reference = attacker["recognizer"]["name"], attacker["reference"]["identity"]
        rows.append((name, "the same image", *_cells(attacker["leakage"]["image"]), "-"))
        ceiling = _percent(reference["cmc"][0]) if reference else "-"
        rows.append((name, "another image of the identity", *_cells(attacker["leakage"]["identity"]), ceiling))
        rows.append((name, "utility: protected -> protected", *_cells(attacker["utility"]["identity"]), ceiling))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        yield "  ".join(cells).rstrip()
    for attacker in report["attackers"]:
        if attacker["leakage"]["left_out"]:
            count, name = attacker["leakage"]["left_out"], attacker["recognizer"]["name"]
            yield f"{name}: {count} protected images have no rank (their embedding or their original's is in quarantine)"
    yield f"worst attacker: {report['worst_attacker']}. A low leakage means something only beside a utility well above chance."


def _cells(curve: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    """CMC@1 with its interval, CMC@5, CMC@10 and chance at 1."""
    if curve is None:
        return ("no identity has two images", "-", "-", "-")
    first = f"{_percent(curve['cmc'][0])} [{_percent(curve['low'][0])}, {_percent(curve['high'][0])}]"
    return first, _percent(curve["cmc"][4]), _percent(curve["cmc"][9]), _percent(curve["chance"][0])


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(LeakageConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
