"""The protected bytes depend on nothing but input, weights, seed and configuration."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import facemae.model  # noqa: F401  # registers the architectures
from cluster.attempt import Attempt
from cluster.dataset import Dataset
from cluster.inputs import input_units
from cluster.picture import decode, encode
from cluster.protect import ProtectProcessor, describe_protection
from cluster.shard import Sample, ShardWriter, read_ledger, read_samples
from cluster.stage import StageOptions, run_stage
from cluster.verify import verify
from facemae.masking import random_mask
from facemae.model import MaskedAutoencoder
from tests.training import initial

MakeDataset = Callable[..., Dataset]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    initial().save_pretrained(folder)
    return str(folder)


def _protect(source: Dataset, root: str, options: dict[str, Any], batch_size: int = 64, method: str = "facemae", **stage: Any) -> Any:
    units, parent = input_units(source)
    processor = ProtectProcessor(source.url, method, options, describe_protection(method, options), batch_size)
    stage_options = StageOptions(**stage)
    return run_stage(processor, units, Dataset(root), name="protect", kind="images", parent=parent, options=stage_options)


def _sha256(root: str) -> dict[str, str | None]:
    return {manifest.shard: manifest.sha256 for manifest in Dataset(root).manifests()}


@pytest.mark.s3
def test_same_bytes_for_any_workers_batches_and_stores(make_dataset: MakeDataset, tmp_path: Path, s3_root: str, weights: str) -> None:
    local, remote = make_dataset(str(tmp_path / "original"), shard_size=25), make_dataset(f"{s3_root}/original", shard_size=25)
    options = {"weights": weights, "seed": 3, "device": "cpu"}
    _protect(local, str(tmp_path / "a"), options, batch_size=16, num_workers=1)
    _protect(local, str(tmp_path / "c"), {**options, "threads": 2}, batch_size=7, num_workers=1, cpus_per_worker=2)
    _protect(remote, f"{s3_root}/d", options, batch_size=64, num_workers=2)
    expected = _sha256(str(tmp_path / "a"))
    assert len(expected) == 3
    for root in (str(tmp_path / "c"), f"{s3_root}/d"):
        assert _sha256(root) == expected
        assert verify(root).ok
    _protect(local, str(tmp_path / "e"), {**options, "seed": 4}, num_workers=2)
    assert _sha256(str(tmp_path / "e")) != expected


def test_output_is_the_model_s_and_nothing_of_the_original_but_the_label(make_dataset: MakeDataset, tmp_path: Path, weights: str) -> None:
    source = make_dataset(str(tmp_path / "original"))
    result = _protect(source, str(tmp_path / "out"), {"weights": weights, "seed": 1, "device": "cpu"}, num_workers=2)
    model = MaskedAutoencoder.from_pretrained(weights).eval()
    output = Dataset(str(tmp_path / "out"))
    for before, after in zip(source.manifests(), output.manifests(), strict=True):
        pairs = zip(read_samples(source.read(before)), read_samples(output.read(after)), strict=True)
        for original, protected in pairs:
            assert isinstance(original, Sample)
            assert isinstance(protected, Sample)
            assert (original.key, original.identity, protected.source) == (protected.key, protected.identity, None)
            assert not Image.open(io.BytesIO(protected.image)).getexif()
            # an independent path to the same pixels: one picture, no tile
            image = torch.from_numpy(decode(original.image)).permute(2, 0, 1)[None] / 127.5 - 1
            visible = torch.from_numpy(random_mask([original.key], 49, 0.75, 1))
            with torch.no_grad():
                expected = ((model(image, visible)[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            difference = np.abs(decode(protected.image).astype(int) - decode(encode(expected)).astype(int))
            assert difference.mean() < 0.05
        assert b".json" not in output.read(after)
    assert result.description["lineage"]["config"]["protection"]["weights_sha256"]


def test_a_damaged_picture_costs_itself_alone(tmp_path: Path, ray_session: None) -> None:
    from cluster.dataset import Labels, ShardData

    source, writer = Dataset(str(tmp_path / "in")), ShardWriter()
    good = io.BytesIO()
    Image.new("RGB", (112, 112), "red").save(good, "JPEG")
    for key, data in {"a": good.getvalue(), "b": good.getvalue()[:-60], "c": good.getvalue()}.items():
        writer.add(Sample(key, data, 1, "people/secret name.jpg"))
    source.commit("00000", ShardData(writer.finish(), 3, Labels.of([1])), fingerprint="f", attempt=Attempt("run", 1), seconds={})
    source.finish("images", {"parent": None, "fingerprint": "f"}, source.manifests())
    result = _protect(source, str(tmp_path / "out"), {}, method="none", num_workers=1)
    assert (result.description["samples"], result.description["quarantined"]) == (2, 1)
    output = Dataset(str(tmp_path / "out"))
    ledger = output.store.get(str(output.manifest("00000").ledger))
    (row,) = read_ledger(ledger)
    assert (row.key, row.reason, row.source) == ("b", "damaged-image", None)
    assert b"secret" not in ledger


@pytest.mark.faults
def test_killed_at_any_moment_and_run_again(long: None, make_dataset: MakeDataset, tmp_path: Path, weights: str) -> None:
    """The whole job, driver and workers, is killed with SIGKILL; the second run does only what was not committed."""
    source = make_dataset(str(tmp_path / "original"), "synthetic:ids=20,images=20", shard_size=20)
    options = {"weights": weights, "device": "cpu"}
    _protect(source, str(tmp_path / "undisturbed"), options, num_workers=2)
    root = str(tmp_path / "out")
    script = textwrap.dedent(f"""
        from cluster.dataset import Dataset
        from cluster.session import session
        from tests.cluster.test_protect import _protect
        with session(num_cpus=1):
            _protect(Dataset({source.url!r}), {root!r}, {options!r}, num_workers=1)
    """)
    job = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "RAY_ADDRESS": ""}, start_new_session=True)
    manifests, deadline = Path(root) / "manifests", time.monotonic() + 90
    while (len(list(manifests.glob("*.json"))) if manifests.is_dir() else 0) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    time.sleep(1)
    committed = len(list(manifests.glob("*.json")))
    assert 4 <= committed < 20
    result = _protect(source, root, options, num_workers=2)
    assert (result.resumed, result.committed) == (committed, 20 - committed)
    assert _sha256(root) == _sha256(str(tmp_path / "undisturbed"))
    assert verify(root).ok
