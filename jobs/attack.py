"""What one recogniser finds, plain and adaptive: the searches behind ``facemae leakage``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from cluster.adaptive import QueryMap, fit_adaptive
from cluster.dataset import Dataset
from cluster.embed import EmbedProcessor
from cluster.embedded import EmbeddedSet, GalleryError
from cluster.index import Gallery
from cluster.inputs import input_units
from cluster.leakage import run_search, summarise
from cluster.stage import StageOptions, StageResult, run_stage
from cluster.store import NotFound, join_url, open_store

if TYPE_CHECKING:
    from jobs.leakage import LeakageConfig

SEARCHES = {"original": {"leakage": "protected", "reference": "original"}, "protected": {"utility": "protected"}}
"""For each gallery: name of a search in leakage.json -> the set that is searched for."""

Embedders = Mapping[str, EmbedProcessor]


def embedders_of(config: LeakageConfig) -> list[Embedders]:
    """For each attacker, the processors that embed the two sets.

    Raises:
        ValueError: no attacker, two of one name or of one network, or a file that is no recogniser.
    """
    roots = {"original": config.original, "protected": config.protected}
    found: list[Embedders] = [
        {role: EmbedProcessor(root, file, config.recognizer_mean, config.recognizer_std, config.device) for role, root in roots.items()}
        for file in config.attackers()
    ]
    names = [embedder["original"].name for embedder in found]
    if len(set(names)) < max(len(names), 1):
        raise ValueError(f"--recognizer needs one file or more, each of another name, not {names}: the name is in FILE.json")
    networks = {embedder["original"].describe()["recognizer"]["sha256"]: embedder["original"].name for embedder in found}
    if len(networks) < len(found):
        twice = sorted(set(names) - set(networks.values()))
        raise ValueError(f"--recognizer: {', '.join(twice)} is the network of another one under a new name: it would find the same")
    return found


def attack(
    config: LeakageConfig, embedders: Embedders, lineage: Mapping[str, Any], failed: list[str], rekey: tuple[str, str] | None
) -> list[dict[str, Any]]:
    """All searches of one recogniser: the plain attacker's part of leakage.json and, where it learnt something, the adaptive one's. Appends
    to ``failed`` the shards that were given up. Ray must be connected.

    Raises:
        GalleryError: embeddings are missing, damaged or of other images.
        StageError, Interrupted, StoreError: as run_stage.
    """
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
