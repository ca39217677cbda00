"""The promise for an index of cells: built and searched while workers die and requests fail, it is the same to the byte.

The embeddings are there before; kills hit the index and its intermediate set, failing requests anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.policy import FLAKY, FirstOf, KillAt, Random
from tests.faults.report import Case
from tests.faults.servers import client
from tests.faults.world import BUCKET, MANY, World
from tests.jobs.test_leakage_job import write_recognizer

pytestmark = [pytest.mark.faults, pytest.mark.s3, pytest.mark.timeout(900)]


def objects(world: World, prefix: str) -> dict[str, str]:
    """ETags by key, asked of the server itself."""
    s3: Any = client(world.endpoint)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return {entry["Key"]: entry["ETag"] for page in pages for entry in page.get("Contents", [])}


def data_below(world: World, prefix: str) -> dict[str, str]:
    """ETags of shards and quantisers by what follows ``prefix``: all that is to be the same every time."""
    found = objects(world, prefix)
    return {key.removeprefix(prefix): tag for key, tag in found.items() if "/shards/" in key or key.endswith("/quantizer.safetensors")}


def measurement(world: World, root: str) -> Any:
    """The attackers of a leakage.json, without what depends on where and when."""
    s3: Any = client(world.endpoint)
    report = json.loads(s3.get_object(Bucket=BUCKET, Key=f"{root.removeprefix(f's3://{BUCKET}/')}/leakage.json")["Body"].read())
    return json.loads(json.dumps(report["attackers"]).replace(root, "ROOT"))


def test_an_index_is_the_same_whatever_dies(here: World, kills: int, long: None, fault_case: Case, tmp_path: Path) -> None:
    protected = here.new_root()
    here.must("protect", here.protect(protected))
    recognizer = str(write_recognizer(tmp_path / "alpha.onnx", 0))

    def leakage(output: str) -> list[str]:
        sets = ["--original", here.original, "--protected", protected, "--recognizer", recognizer, "--output", output]
        return [*sets, "--no-pixels", "--index", "IVF16,SQfp16", "--gallery-actors", "2", "--max-failures", MANY]

    calm, stormy = here.new_root(), here.new_root()
    embeddings = f"{here.original.removeprefix(f's3://{BUCKET}/')}/embeddings/"
    here.must("leakage", leakage(calm))
    indices, ranks = data_below(here, embeddings), data_below(here, calm.removeprefix(f"s3://{BUCKET}/"))
    assert any(".index-" in key for key in indices)
    s3: Any = client(here.endpoint)
    for key in objects(here, ""):
        if ".index-" in key:
            s3.delete_object(Bucket=BUCKET, Key=key)
    fault_case.seed = here.proxy.seed
    of_an_index = r"\.(cells|index)-[0-9a-f]+/(shards|manifests)/"
    killing = [KillAt(phase, 0.3, keys=of_an_index, limit=max(1, kills // 8)) for phase in ("get", "put", "before", "after")]
    actors = KillAt("get", 0.3, keys=of_an_index, victims="ray::IndexShard", limit=2)
    with here.faults(FirstOf(*killing, actors, Random(0.05, FLAKY, seconds=1.0))) as happened:
        here.must("leakage", leakage(stormy), timeout=600)
    fault_case.injected(happened)
    assert sum(each.pid is not None for each in happened) >= 3
    assert data_below(here, embeddings) == indices
    assert data_below(here, stormy.removeprefix(f"s3://{BUCKET}/")) == ranks
    assert measurement(here, stormy) == measurement(here, calm)
    assert [key for key in objects(here, "") if ".cells-" in key] == []
