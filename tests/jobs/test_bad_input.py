"""What a user gets for what goes wrong most: one line that names the file, the reason and the remedy; never a traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import facemae.model  # noqa: F401  # registers the architectures
from cluster.dataset import Dataset
from cluster.seaweedfs import Endpoint
from jobs import embed, ingest, protect, verify
from tests.training import initial

MakeDataset = Callable[..., Dataset]


def _fails(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown.splitlines()[-1]


def test_a_root_that_is_not_there(tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing")
    shown = _fails(capsys, protect.main, "--input", missing, "--output", str(tmp_path / "out"), "--method", "none")
    assert missing in shown
    assert "holds no data set" in shown
    assert f"{missing} does not exist" in _fails(capsys, ingest.main, "--source", missing, "--output", str(tmp_path / "out"))


@pytest.mark.s3
def test_a_bucket_that_is_not_there(ray_session: None, capsys: pytest.CaptureFixture[str]) -> None:
    shown = _fails(capsys, ingest.main, "--source", "synthetic:ids=2,images=2", "--output", "s3://no-such-bucket/x")
    assert "the bucket does not exist" in shown


@pytest.mark.s3
def test_wrong_credentials_show_the_remedy_and_no_secret(s3_server: Endpoint, tmp_path: Path) -> None:
    secret = "not-the-secret-0123456789"
    command = [sys.executable, "-m", "jobs", "ingest", "--source", "synthetic:ids=2,images=2", "--output", "s3://tests/x"]
    environment = {**os.environ, **s3_server.environment, "AWS_SECRET_ACCESS_KEY": secret}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "AWS_SECRET_ACCESS_KEY" in done.stderr
    assert secret not in done.stderr + done.stdout
    assert s3_server.secret_key not in done.stderr + done.stdout


def test_weights_of_another_architecture(make_dataset: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_dataset(str(tmp_path / "original"), "synthetic:ids=2,images=2")
    for name in ("facemae_tiny_patch16_112", "facemae_tiny_patch8_112"):
        initial(name).save_pretrained(tmp_path / name)
    mixed = tmp_path / "mixed"
    shutil.copytree(tmp_path / "facemae_tiny_patch16_112", mixed)
    shutil.copy(tmp_path / "facemae_tiny_patch8_112" / "model.safetensors", mixed)
    base = ("--input", source.url, "--output", str(tmp_path / "out"), "--weights")
    assert str(mixed) in _fails(capsys, protect.main, *base, str(mixed))
    assert "holds no weights" in _fails(capsys, protect.main, *base, str(tmp_path / "nowhere"))
    assert "needs --weights" in _fails(capsys, protect.main, "--input", source.url, "--output", str(tmp_path / "out"))


def test_a_recogniser_without_normalisation(
    make_dataset: MakeDataset, tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_dataset(str(tmp_path / "original"), "synthetic:ids=2,images=2")
    model = str(shared / "models" / "edgeface_xxs.onnx")
    assert "never guessed" in _fails(capsys, embed.main, "--input", source.url, "--recognizer", model)


def test_a_damaged_set_does_not_verify(make_dataset: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_dataset(str(tmp_path / "original"), "synthetic:ids=4,images=4", shard_size=8)
    assert verify.main([source.url]) == 0
    tar = next((tmp_path / "original" / "shards").glob("00001-*.tar"))
    tar.write_bytes(tar.read_bytes()[:-3000])
    assert verify.main([source.url]) == 2
    assert "00001" in capsys.readouterr().out


def test_cleaning_up_from_the_command_line(make_dataset: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_dataset(str(tmp_path / "original"), "synthetic:ids=4,images=4", shard_size=8)
    left = tmp_path / "original" / "shards" / "00001-0123456789ab.tar"
    left.write_bytes(b"of a dead attempt")
    assert verify.main([source.url]) == 2
    assert "--clean removes what dead attempts left" in capsys.readouterr().out
    assert left.exists()
    assert verify.main([source.url, "--clean"]) == 0
    assert f"removed {source.url}/shards/{left.name}" in capsys.readouterr().out
    assert not left.exists()


def test_an_unknown_job_and_the_help() -> None:
    run = [sys.executable, "-m", "jobs"]
    assert subprocess.run([*run, "--version"], capture_output=True, text=True, timeout=60).stdout.startswith("facemae 0.")
    shown = subprocess.run([*run, "--help"], capture_output=True, text=True, timeout=60).stdout
    for job in ("ingest", "train", "protect", "embed", "leakage", "verify", "report", "pipeline"):
        assert f"  {job}" in shown
    failed = subprocess.run([*run, "protekt"], capture_output=True, text=True, timeout=60)
    assert failed.returncode == 2
    assert "the jobs are plan, ingest" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-workers", "-1"), "give 0 or more"),
        (("--max-failures", "0"), "give 1 or more"),
        (("--output", "s3:/bucket/x"), "two slashes"),
    ],
)
def test_values_that_look_right_and_are_not(tmp_path: Path, arguments: tuple[str, str], message: str) -> None:
    command = [sys.executable, "-m", "jobs", "ingest", "--source", "synthetic:ids=2,images=2", "--output", str(tmp_path / "o"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split()) + done.stdout
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_every_job_explains_itself() -> None:
    for job in ("ingest", "leakage", "pipeline"):
        shown = subprocess.run([sys.executable, "-m", "jobs", job, "--help"], capture_output=True, text=True, timeout=60)
        assert (shown.returncode, "--config" in shown.stdout) == (0, True), job


@pytest.mark.parametrize(("source", "output"), [("in", "in"), ("in", "in/out"), ("out/in", "out"), ("in/*.tar", "in/out")])
def test_an_output_in_its_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, output: str) -> None:
    folder = tmp_path / source.removesuffix("/*.tar")
    (folder / "person").mkdir(parents=True)
    (folder / "person" / "a.jpg").write_bytes(b"x")
    assert "lie in each other" in _fails(capsys, ingest.main, "--source", str(tmp_path / source), "--output", str(tmp_path / output))
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.jpg"], "nothing was written"


def test_a_protected_set_in_its_original_is_refused(make_dataset: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_dataset(str(tmp_path / "original"), "synthetic:ids=2,images=2")
    message = _fails(capsys, protect.main, "--input", source.url, "--output", f"{source.url}/protected", "--method", "none")
    assert "choose an output beside it" in message


def test_a_source_without_one_usable_image_is_no_success(ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / "person").mkdir(parents=True)
    (tmp_path / "in" / "person" / "a.jpg").write_bytes(b"no picture")
    assert ingest.main(["--source", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--num-workers", "1"]) == 3
    assert "not a single image could be used" in capsys.readouterr().out


def test_a_run_on_a_set_that_was_damaged_since_says_so(
    make_dataset: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "synthetic:ids=4,images=4"
    source = make_dataset(str(tmp_path / "original"), text, shard_size=8)
    tar = next((tmp_path / "original" / "shards").glob("00001-*.tar"))
    tar.unlink()
    again = ["--source", text, "--output", source.url, "--shard-size", "8", "--num-workers", "1"]
    assert "is gone, its manifest says" in _fails(capsys, ingest.main, *again)
    (tmp_path / "original" / "manifests" / "00001.json").unlink()
    assert ingest.main(again) == 0
    assert verify.main([source.url]) == 0


@pytest.mark.parametrize("damage", ['{"samples": "x"}', "{", "[]"])
def test_damaged_metadata_is_a_problem_and_no_traceback(
    make_dataset: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    source = make_dataset(str(tmp_path / "original"), "synthetic:ids=4,images=4", shard_size=8)
    (tmp_path / "original" / "manifests" / "00001.json").write_text(damage)
    assert verify.main(["--clean", source.url]) == 2
    shown = capsys.readouterr().out
    assert "manifests/00001.json is not a manifest" in shown
    assert "delete it and dataset.json, and run its job again" in shown
    assert "STRAY    manifests" not in shown
    (tmp_path / "original" / "dataset.json").write_text('{"schema": 2, "lineage": null}')
    assert verify.main([source.url]) == 2


def test_strangers_files_are_strays_wherever_they_lie(
    make_dataset: MakeDataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_dataset(str(tmp_path / "original"), "synthetic:ids=4,images=4", shard_size=8)
    strangers = ["attempts/SECRET.txt", "embeddings/faces.jpg", "embeddings/x/photo.jpg"]
    for name in strangers:
        (tmp_path / "original" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "original" / name).write_bytes(b"photograph")
    assert verify.main([source.url]) == 2
    shown = capsys.readouterr().out
    assert all(f"STRAY    {name}" in shown for name in strangers)
