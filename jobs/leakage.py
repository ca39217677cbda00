"""``facemae leakage``: how many protected images can be traced to their originals, over the full output."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from cluster.adaptive import QueryMap, fit_adaptive
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
from facemae.release import limits_of
from jobs.command import RayConfig, main_of
from jobs.gate import gate
from jobs.leakage_table import table_of

SCHEMA = 2
SEARCHES = {"original": {"leakage": "protected", "reference": "original"}, "protected": {"utility": "protected"}}
"""For each gallery: name of a search in leakage.json -> the set that is searched for."""


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
    adaptive: bool = True
    """Also attack with a map that is fitted to how this protection moves embeddings, on other people than those it is used on."""
    max_cmc1: float | None = None
    """The gate: release the protected set (released: true in its dataset.json) only if the upper end of the share of images traced to
    their originals, by the worst attacker, is at most this. Above it the exit code is 4."""
    max_identity_cmc1: float | None = None
    """The same for another image of the person."""
    rekey: str | None = None
    """For a protected set made with --rekey: the same secret, at env:NAME or file:PATH."""

    def gallery_options(self) -> GalleryOptions:
        """The same as options of a gallery."""
        return GalleryOptions(self.index, self.recall, self.gallery_actors, self.cpus_per_gallery_actor, self.gpus_per_gallery_actor)


def run(config: LeakageConfig) -> dict[str, Any]:
    """Embed what is missing, run the searches, write leakage.json, print the table and return the summary."""
    limits_of(config.max_cmc1, config.max_identity_cmc1)  # refused now, not after hours
    embedders = _embedders(config)
    images = {"original": Dataset(config.original), "protected": Dataset(config.protected)}
    lineage = {role: _lineage(dataset) for role, dataset in images.items()}
    _require_origin(lineage)
    new_key = key_map_of(lineage["protected"]["config"], config.rekey, config.protected)
    rekey = (config.rekey, new_key.check) if config.rekey and new_key else None
    failed: list[str] = []
    with session(config.address):
        attackers = [found for embedder in embedders for found in _attack(config, embedder, lineage, failed, rekey)]
    report = _report(lineage, attackers)
    output, written = open_store(config.output), (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()
    output.put("leakage.json", written)
    print("\n".join(table_of(report)))
    for shard in failed:
        print(f"given up: {shard}: its manifest says why")
    again = f" --rekey {config.rekey}" if config.rekey else ""
    print(f"written: {output.url}/leakage.json\nnext:    facemae report --output {config.output}{again}")
    verdict = gate(report, written, f"{output.url}/leakage.json", config.max_cmc1, config.max_identity_cmc1)
    return {"url": output.url, "worst_attacker": report["worst_attacker"], "failed_shards": failed, **verdict}


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
) -> list[dict[str, Any]]:
    """All searches of one recogniser, plain and adaptive; appends to ``failed`` the shards that were given up."""
    sets = {role: _embedded(config, lineage[role]["url"], embedder, failed) for role, embedder in embedders.items()}
    recognizer = sets["original"].recognizer
    plain: dict[str, Any] = {"name": recognizer["name"], "recognizer": dict(recognizer), "adaptive": None}
    adapted: dict[str, Any] | None = None
    for role, searches in SEARCHES.items():
        with Gallery(sets[role].dataset, recognizer["dim"], config.gallery_options()) as gallery:
            if role == "original":
                print(f"{recognizer['name']}: index {gallery.choice.why}")
            for part, query_role in searches.items():
                keys = rekey if part == "leakage" else None
                search = _Search(f"{query_role}-{role}", sets[query_role], sets[role], gallery, keys)
                plain[part] = _run(config, search, lineage[query_role]["samples"], failed)
            if role == "original" and config.adaptive:
                adapted = _adapt(config, sets, gallery, lineage["protected"]["samples"], failed, rekey)
    return [plain, {**plain, **adapted}] if adapted else [plain]


@dataclass(frozen=True)
class _Search:
    """One set searched in another, or in itself; ``name`` is its folder below the recogniser's."""

    name: str
    queries: EmbeddedSet
    gallery_set: EmbeddedSet
    gallery: Gallery
    rekey: tuple[str, str] | None
    query_map: QueryMap | None = None


def _run(config: LeakageConfig, search: _Search, num_images: int, failed: list[str]) -> dict[str, Any]:
    """Run a search, and return its part of leakage.json."""
    recognizer = search.gallery_set.recognizer["name"]
    folder = f"{recognizer}/{search.name}"
    output = Dataset(join_url(config.output, folder), ".parquet")
    result = run_search(
        search.queries,
        search.gallery_set,
        search.gallery,
        output,
        name=f"{search.name.replace('-', ' -> ')} ({recognizer})",
        seed=config.seed,
        options=StageOptions(num_workers=config.num_workers or _default_workers()),
        rekey=search.rekey,
        query_map=search.query_map,
    )
    failed += _failures(output, result)
    return _search_part(output, folder, num_images, result, len(search.gallery))


def _adapt(
    config: LeakageConfig,
    sets: Mapping[str, EmbeddedSet],
    gallery: Gallery,
    num_images: int,
    failed: list[str],
    rekey: tuple[str, str] | None,
) -> dict[str, Any] | None:
    """The adaptive attacker's part of an attacker; None where there was nothing for it to learn."""
    name = sets["original"].recognizer["name"]
    file, description = _maps(config, name, sets, rekey)
    if all(each["kind"] == "identity" for each in description["maps"]):
        print(f"{name}: no map finds people it has not seen better than none does: the adaptive attacker is the plain one")
        return None
    query_map = QueryMap(join_url(config.output, file), description["sha256"])
    search = _Search("adapted-original", sets["protected"], sets["original"], gallery, rekey, query_map)
    found = _run(config, search, num_images, failed)
    return {"name": f"{name} (adaptive)", "adaptive": {"file": file, **description}, "leakage": found}


def _maps(config: LeakageConfig, name: str, sets: Mapping[str, EmbeddedSet], rekey: tuple[str, str] | None) -> tuple[str, dict[str, Any]]:
    """The adaptive attacker's maps, fitted unless an earlier run of this measurement did: their file below the output, and what
    determined them. Fitted again, on another processor, they might differ in a last bit, and the searches begun would not go on."""
    store, made_of = open_store(config.output), {role: found.fingerprint for role, found in sets.items()}
    file, record = f"{name}/adaptive.safetensors", f"{name}/adaptive.json"
    try:
        found = json.loads(store.get(record))
        if found["of"] == made_of and found["maps"]["seed"] == config.seed:
            return file, found["maps"]
    except (NotFound, ValueError, LookupError, TypeError):
        pass  # none, or cut short: fitted now
    print(f"{name}: fitting the adaptive attacker")
    maps, description = fit_adaptive(sets["protected"], sets["original"], config.seed, rekey=rekey)
    store.put(file, maps)
    store.put(record, (json.dumps({"of": made_of, "maps": description}, indent=1) + "\n").encode())
    return file, description


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
    search = result.description["lineage"]["config"]["search"]
    counts = {"ranks": f"{folder}/shards", "search": search, "images": num_images, "queries": measured, "left_out": num_images - measured}
    return {**counts, "fingerprint": result.description["lineage"]["fingerprint"], **summarise(output).to_json(num_gallery)}


def _report(lineage: Mapping[str, Any], attackers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    return main_of(LeakageConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main())
