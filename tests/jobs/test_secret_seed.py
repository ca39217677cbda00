"""``--secret-seed``: noise from a secret that each process reads for itself, and that nothing repeats."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest

from cluster.dataset import Dataset
from cluster.picture import decode, encode
from cluster.protect import describe_variants
from cluster.secret import SecretError, SeedReference
from cluster.shard import Sample, read_samples
from cluster.stage import StageError
from facemae.protection.noise import NoiseProtection
from jobs import ingest, protect
from jobs.command import from_mapping
from jobs.protect import ProtectConfig, method_options


@pytest.fixture(scope="module")
def original(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("original"))
    ingest.run(ingest.IngestConfig(source="synthetic:ids=3,images=4,seed=1", output=root, shard_size=6, num_workers=1))
    return root


@pytest.fixture
def reference(tmp_path: Path) -> str:
    (tmp_path / "secret").write_text(secrets.token_hex(32))
    return f"file:{tmp_path}/secret"


def _run(original: str, output: Path, **changes: Any) -> Dataset:
    protect.run(ProtectConfig(input=original, output=str(output), method="noise", num_workers=2, **changes))
    return Dataset(str(output))


def _pictures(dataset: Dataset) -> dict[str, bytes]:
    samples = (sample for manifest in dataset.manifests() for sample in read_samples(dataset.read(manifest)))
    return {sample.key: bytes(sample.image) for sample in samples if isinstance(sample, Sample)}


def test_every_worker_draws_the_noise_of_the_secret_and_says_nothing_of_it(original: str, reference: str, tmp_path: Path) -> None:
    made = _run(original, tmp_path / "made", secret_seed=reference)
    seed = SeedReference.of(reference).read()
    assert seed.bit_length() > 96
    before, after = _pictures(Dataset(original)), _pictures(made)
    noise = NoiseProtection(seed=seed)
    assert after == {key: encode(noise.protect(decode(image)[None], [key])[0]) for key, image in before.items()}
    protection = made.description()["lineage"]["config"]["protection"]
    assert protection == noise.describe()
    assert "warning" not in protection
    secret = Path(reference.removeprefix("file:")).read_text()
    for path in (tmp_path / "made").rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        assert not any(text.encode() in data for text in (secret, str(seed), reference)), path


def test_another_secret_is_another_run(original: str, reference: str, tmp_path: Path) -> None:
    _run(original, tmp_path / "made", secret_seed=reference)
    Path(reference.removeprefix("file:")).write_text("x" * 40)
    with pytest.raises(StageError, match="another run"):
        _run(original, tmp_path / "made", secret_seed=reference)


def test_a_worker_with_another_secret_refuses(reference: str) -> None:
    found = SeedReference.of(reference)
    Path(reference.removeprefix("file:")).write_text("y" * 40)
    with pytest.raises(SecretError, match="another secret here"):
        found.read()


SECRET = secrets.token_hex(32)
NUMBER = 2**127 + secrets.randbits(127)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"secret_seed": SECRET}, "--secret-seed: the secret is given by its place, env:NAME or file:PATH"),
        ({"rekey": SECRET}, "--rekey: the secret is given by its place, env:NAME or file:PATH"),
        ({"seed": NUMBER}, "--secret-seed env:NAME or file:PATH"),
        ({"secret_seed": NUMBER}, "should be a valid string"),
        ({"seed": SECRET}, "should be a valid integer"),
    ],
)
def test_a_literal_secret_is_refused_and_not_repeated(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_mapping(ProtectConfig, {"input": "i", "output": "o", "method": "noise", **fields}, where="section protect", complete=True)
    assert str(next(iter(fields.values()))) not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "blur"}, "--secret-seed: blur has no seed"),
        ({"method": "noise", "seed": 5}, "--secret-seed: --seed is given too"),
        ({"method": "noise", "secret_seed": "env:FACEMAE_NOT_SET"}, "the environment variable is not set here"),
    ],
)
def test_what_does_not_fit_is_refused(reference: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_options(ProtectConfig(**{"input": "i", "output": "o", "secret_seed": reference, **changes}))


def test_a_seed_that_the_lineage_would_tell_takes_no_secret(original: str, reference: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the seed of random_mask is no secret, its lineage says it"):
        protect.run(ProtectConfig(input=original, output=str(tmp_path / "made"), method="random_mask", secret_seed=reference))
    assert not (tmp_path / "made").exists()


def test_the_rounds_of_a_repair_are_drawn_from_the_secret_too(reference: str) -> None:
    options = method_options(ProtectConfig(input="i", output="o", method="noise", secret_seed=reference))
    seed = SeedReference.of(reference).read()
    expected = [NoiseProtection(seed=seed + number).describe() for number in range(5)]
    assert describe_variants("noise", options) == expected
    assert str(seed) not in repr(options)
