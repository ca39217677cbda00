"""``facemae leakage``: how many protected images can be traced to their originals, over the full output."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.dataset import Dataset
from cluster.embedded import GalleryError
from cluster.index import GalleryOptions
from cluster.index_choice import choose
from cluster.inputs import require_apart
from cluster.secret import key_map_of
from cluster.session import session
from cluster.store import open_store
from facemae.curve import DEPTH
from facemae.interval import CONFIDENCE
from facemae.linking import HISTOGRAM_RANGE, NUM_BINS
from facemae.recognizer.pixels import PIXELS
from facemae.release import limits_of
from jobs.attack import attack, embedders_of
from jobs.beside import beside
from jobs.command import RayConfig, main_of
from jobs.gate import gate
from jobs.leakage_table import table_of

SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class LeakageConfig(RayConfig):
    """Search every protected image among all originals with one or more recognisers, and say how many are found.

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
    """ONNX files of the attackers, paths or s3://; give several, the worst one counts."""
    output: str
    """Root of the result, a folder or s3://bucket/prefix."""
    pixels: bool = True
    """Attack with `pixels` too, which compares pictures as thumbnails: protections that fool every recogniser may hide nothing from it."""
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
    """GPUs of each: it then searches there, with the same result."""
    beside: list[str] = field(default_factory=list)
    """Roots of measurements of other protections of the same originals, by the same recognisers: their figures stand beside these."""
    adaptive: bool = True
    """Also attack with a map that is fitted to how this protection moves embeddings, on other people than those it is used on."""
    max_cmc1: float | None = None
    """The gate: release the protected set (released: true in its dataset.json) only if the upper end of the share of images traced to
    their originals, by the worst attacker, is at most this. Above it the exit code is 4."""
    max_identity_cmc1: float | None = None
    """The same for another image of the person."""
    rekey: str | None = None
    """For a protected set made with --rekey: the same secret, at env:NAME or file:PATH."""

    def check(self) -> None:
        """See Config."""
        limits_of(self.max_cmc1, self.max_identity_cmc1)
        if not 0 < self.recall <= 1:
            raise ValueError(f"recall is {self.recall}: give a share of the queries, above 0 to 1")

    def attackers(self) -> list[str]:
        """What attacks."""
        return [*self.recognizer, *([PIXELS] if self.pixels and PIXELS not in self.recognizer else [])]

    def gallery_options(self) -> GalleryOptions:
        """The same as options of a gallery."""
        return GalleryOptions(self.index, self.recall, self.gallery_actors, self.cpus_per_gallery_actor, self.gpus_per_gallery_actor)


def run(config: LeakageConfig) -> dict[str, Any]:
    """Embed what is missing, run the searches, write leakage.json, print the table and return the summary."""
    config.check()  # refused now, not after hours
    for root in (config.original, config.protected):
        require_apart(root, config.output)  # ranks in a set that is handed out would lead back to the originals
    embedders = embedders_of(config)
    images = {"original": Dataset(config.original), "protected": Dataset(config.protected)}
    lineage = {role: _lineage(dataset) for role, dataset in images.items()}
    _require_origin(lineage)
    for embedder in embedders:  # refused now too
        choose(lineage["original"]["samples"], embedder["original"].describe()["recognizer"]["dim"], factory=config.index)
    new_key = key_map_of(lineage["protected"]["config"], config.rekey, config.protected)
    rekey = (config.rekey, new_key.check) if config.rekey and new_key else None
    networks = [embedder["original"].describe()["recognizer"]["sha256"] for embedder in embedders]
    others = [beside(url, lineage["original"], networks) for url in config.beside]
    failed: list[str] = []
    with session(config.address):
        attackers = [found for embedder in embedders for found in attack(config, embedder, lineage, failed, rekey)]
    report = _report(lineage, attackers, others)
    output, written = open_store(config.output), (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()
    output.put("leakage.json", written)
    print("\n".join(table_of(report)))
    for shard in failed:
        print(f"given up: {shard}: its manifest says why")
    again = f" --rekey {config.rekey}" if config.rekey else ""
    print(f"written: {output.url}/leakage.json")
    next_step = f"facemae report --output {config.output}{again}"
    if config.max_cmc1 is None and config.max_identity_cmc1 is None:
        next_step += "\n         the same command with --max-cmc1 0.01 releases the set, or withholds it, by what was measured"
    verdict = gate(report, written, f"{output.url}/leakage.json", config.max_cmc1, config.max_identity_cmc1)
    return {"url": output.url, "worst_attacker": report["worst_attacker"], "failed_shards": failed, "next": next_step, **verdict}


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
    if not parent:
        raise GalleryError(
            f"{protected['url']} was made from no data set: what is measured is a set that facemae protect made from {original['url']}, "
            "whose images have the keys of their originals"
        )
    if parent["fingerprint"] != original["fingerprint"]:
        raise GalleryError(
            f"{protected['url']} was made from {parent.get('url', 'others')}, not from {original['url']} as it is now: "
            "give its own originals"
        )


def _report(lineage: Mapping[str, Any], attackers: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The content of leakage.json; the worst attacker leads."""

    def harm(attacker: Mapping[str, Any]) -> tuple[float, ...]:
        curves = [attacker["leakage"][mate] for mate in ("image", "identity")]
        return tuple(curve["cmc"][k] if curve else 0.0 for k in (0, DEPTH - 1) for curve in curves)  # of equal ones the plain leads

    ordered = sorted(attackers, key=harm, reverse=True)
    exact = all(
        part["search"] == "exact" for attacker in attackers for part in (attacker["leakage"], attacker["reference"], attacker["utility"])
    )
    return {
        "schema": SCHEMA,
        "kind": "leakage",
        "search": "exact" if exact else "approximate",
        "confidence": CONFIDENCE,
        "histogram": {"low": HISTOGRAM_RANGE[0], "high": HISTOGRAM_RANGE[1], "bins": NUM_BINS},
        **lineage,
        "worst_attacker": ordered[0]["name"],
        "attackers": ordered,
        "beside": list(others),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(LeakageConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
