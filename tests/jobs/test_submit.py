from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.kubernetes.nodes import PRESETS
from jobs.command import UsageError
from jobs.submit import main
from jobs.submit_job import JOBS, InnerJob, read_job, with_workers

IMAGE = ("--to", "kubernetes", "--image", "registry.example.org/facemae:1.0", "--dry-run")
RAY = ("--to", "http://127.0.0.9:8265", "--dry-run")
INGEST = "source: synthetic:ids=4,images=4\noutput: s3://bucket/original\n"
TRAIN = "data: s3://bucket/original\noutput: s3://bucket/run\nloss: mse\n"
PROTECT = "input: s3://bucket/original\noutput: s3://bucket/safe\nmethod: blur\n"
PIPELINE = """
root: s3://bucket/pipeline
folder: s3://bucket/results
recognizer: inside
attackers: [outside]
training: {source: "synthetic:ids=4,images=4"}
original: {source: "synthetic:ids=4,images=4,seed=1"}
pretrain: {inside: {lanes: 4}, outside: {lanes: 6, batch_size: 132, cpus_per_worker: 7}}
train: {lanes: 8, gpus_per_worker: 0}
protect: {cpus_per_worker: 3}
"""
SECRET = "topsecret-4711"


def file(folder: Path, text: str) -> str:
    (folder / "job.yaml").write_text(text)
    return str(folder / "job.yaml")


def submit(folder: Path, job: str, text: str, *flags: str) -> int:
    return main([job, "--config", file(folder, text), *flags])


def test_kubernetes_gets_the_job_with_as_many_workers_as_its_pods_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(tmp_path, "ingest", f"# a note\n{INGEST}", *IMAGE, "--preset", "cpu", "--name", "mine") == 0
    config, run = yaml.safe_load_all(capsys.readouterr().out)
    assert (run["kind"], run["metadata"]["name"]) == ("RayJob", "mine")
    assert yaml.safe_load(config["data"]["job.yaml"]) == {**yaml.safe_load(INGEST), "num_workers": 28}
    assert "a note" not in str(config)


def test_a_ray_cluster_gets_the_same_file_and_this_installations_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(tmp_path, "ingest", INGEST, *RAY, "--s3-endpoint", "http://s3:8333", "--env", "OMP_NUM_THREADS", "2") == 0
    asked, config = yaml.safe_load_all(capsys.readouterr().out)
    assert config == yaml.safe_load(INGEST)
    assert asked["entrypoint"] == "exec python -m jobs ingest --config job.yaml"
    assert asked["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "300", "OMP_NUM_THREADS": "2", "AWS_ENDPOINT_URL": "http://s3:8333"}
    assert asked["package"]["files"] > 100
    assert submit(tmp_path, "ingest", INGEST, *RAY, "--installed") == 0
    asked, _ = yaml.safe_load_all(capsys.readouterr().out)
    assert (asked["entrypoint"], asked["package"]["files"]) == ("exec facemae ingest --config job.yaml", 1)


@pytest.mark.parametrize(
    ("job", "text", "message"),
    [
        ("demo", INGEST, "no job 'demo' can be submitted"),
        ("compare", "root: s3://bucket/c\n", "no job 'compare' can be submitted"),
        ("ingest", "source: faces\noutput: s3://bucket/x\n", "source: other machines do not reach faces"),
        ("ingest", "source: synthetic:ids=2,images=2\noutput: out\n", "output: out would go with the machine"),
        ("ingest", "source: s3://bucket/x\noutput: s3:/bucket/x\n", "give s3://bucket/prefix"),
        ("ingest", "source: s3://bucket/x\noutput: s3://bucket/x/\n", "lie in each other"),
        ("ingest", "source: s3://bucket/x\n", "the field 'output' is missing"),
        ("ingest", INGEST + "shard_sizes: 4\n", "unknown field 'shard_sizes'"),
        ("ingest", INGEST + "output: s3://b/c\n", "the key 'output' is given twice"),
        ("ingest", INGEST + "address: auto\n", "a submitted job finds the Ray"),
        ("ingest", INGEST + "num_workers: -1\n", "give 0 or more"),
        ("protect", PROTECT.replace("s3://bucket/safe", "s3://bucket/original/safe"), "lie in each other"),
        ("protect", PROTECT + "strength: -4\n", "blur"),
        ("protect", PROTECT.replace("blur", "facemae") + "weights: run\n", "weights: other machines do not reach run"),
        ("train", TRAIN + "num_workers: 3\n", "3 does not divide lanes: 4: give 2"),
        ("train", TRAIN + "batch_size: 1000\nlanes: 64\n", "a batch of 1000 does not divide into 64 lanes"),
        ("train", TRAIN + "mask_ratio: 1.5\n", "mask_ratio is 1.5"),
        ("pipeline", PIPELINE.replace("lanes: 8", "lanes: 8, epochs: -1"), "section train: epochs is -1"),
        ("pipeline", PIPELINE.replace("batch_size: 132", "batch_size: 128"), "section pretrain outside: a batch of 128"),
        ("pipeline", PIPELINE.replace("[outside]", "[nobody]"), "'nobody' is neither an ONNX file nor the name of a section of pretrain"),
        ("pipeline", PIPELINE + "leakage: {max_cmc1: 5}\n", "section leakage: --max-cmc1 5.0"),
        ("protect", PROTECT + "batch_size: 0\n", "batch_size is 0"),
        ("ingest", INGEST + "shard_size: 0\n", "shard_size is 0"),
        ("train", TRAIN + "deepspeed: zero.json\n", "deepspeed: other machines do not reach zero.json"),
        ("embed", "input: s3://bucket/x\nrecognizer: a.onnx\n", "recognizer: other machines do not reach a.onnx"),
        ("verify", "root: original\n", "root: original would go"),
        ("report", "output: ''\n", "output: a folder would go"),
        ("pipeline", PIPELINE.replace("[outside]", "[inside]"), "inside sits in the loss and attacks too"),
        ("pipeline", PIPELINE.replace("s3://bucket/results", "results"), "folder: results would go"),
        ("pipeline", PIPELINE.replace("lanes: 8", "lanes: 8, loss: mes"), "section train: loss"),
        ("pipeline", PIPELINE.replace("lanes: 8", "lanes: 8, num_workers: 3"), "3 "),
        ("pipeline", PIPELINE.replace('"synthetic:ids=4,images=4"', "faces"), "section training: source: other machines"),
    ],
)
@pytest.mark.parametrize("target", [IMAGE, RAY], ids=["kubernetes", "ray"])
def test_a_file_that_cannot_run_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: tuple[str, ...], job: str, text: str, message: str
) -> None:
    assert submit(tmp_path, job, text, *target) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert not shown.out


@pytest.mark.parametrize(
    ("job", "text"),
    [
        ("protect", PROTECT + f"rekey: {SECRET}\n"),
        ("protect", PROTECT.replace("blur", "noise") + f"secret_seed: {SECRET}\n"),
        ("protect", PROTECT.replace("blur", "noise") + f"seed: 0x{'4711abcd' * 4}\n"),
        ("protect", PROTECT.replace("s3://bucket/original", f"s3://KEY:{SECRET}@bucket/original")),
        ("protect", PROTECT + f"password: {SECRET}\n"),
        ("protect", PROTECT + f"rekey: {{{SECRET}: 1}}\n"),
        ("protect", PROTECT + f"s3://KEY:{SECRET}@bucket/original: 1\n"),
        ("embed", f"input: s3://bucket/x\nrecognizer: s3://KEY:{SECRET}@bucket/a.onnx\n"),
        ("evaluate", f"recognizer: ['s3://bucket/a.onnx', 's3://KEY:{SECRET}@b/a.onnx']\noutput: s3://bucket/e\n"),
        ("pipeline", PIPELINE.replace("cpus_per_worker: 3", f"rekey: {SECRET}")),
    ],
)
@pytest.mark.parametrize("target", [IMAGE, RAY], ids=["kubernetes", "ray"])
def test_a_secret_in_the_file_is_refused_and_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: tuple[str, ...], job: str, text: str
) -> None:
    assert submit(tmp_path, job, text, *target) == 2
    shown = "".join(capsys.readouterr())
    assert "not repeated here" in " ".join(shown.split())
    assert SECRET not in shown
    assert str(int("4711abcd" * 4, 16)) not in shown


@pytest.mark.parametrize(
    "flags",
    [
        ("--s3-endpoint", f"http://user:{SECRET}@s3:8333"),
        ("--s3-endpoint", f"{SECRET}@s3:8333"),
        ("--gcs-redis", f"redis://:{SECRET}@redis:6379"),
        ("--gcs-redis", f":{SECRET}@redis:6379"),
        ("--image", f"user:{SECRET}@registry.example.org/facemae:1"),
        ("--env", "DATABASE", f"postgres://user:{SECRET}@db/x"),
        ("--env", "MY_PASSWORD", SECRET),
        ("--to", f"http://user:{SECRET}@head:8265"),
    ],
)
@pytest.mark.parametrize("target", [IMAGE, RAY], ids=["kubernetes", "ray"])
def test_a_secret_in_a_flag_is_refused_and_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: tuple[str, ...], flags: tuple[str, ...]
) -> None:
    assert submit(tmp_path, "ingest", INGEST, *target, *flags) == 2
    shown = "".join(capsys.readouterr())
    assert "error: --" in shown
    assert SECRET not in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--to", "kubernetes", "--dry-run"), "--to kubernetes needs --image"),
        ((*IMAGE, "--installed"), "--installed is for a Ray cluster"),
        ((*IMAGE, "--name", "Mine"), "--name 'Mine'"),
        ((*IMAGE, "--pods", "0"), "--pods 0"),
        ((*IMAGE, "--retries", "-1"), "--retries -1"),
        ((*IMAGE, "--node-selector", "a b", "c"), "--node-selector"),
        ((*RAY, "--preset", "gpu"), "--preset is for --to kubernetes"),
        ((*RAY, "--image", "a/b:1"), "--image is for --to kubernetes"),
        ((*RAY, "--name", "a b"), "--name 'a b'"),
        ((*RAY, "--s3-endpoint", "s3:8333"), "--s3-endpoint"),
        ((*RAY, "--env", "HOME", "/x"), "--env HOME"),
        (("--to", "127.0.0.9:8265", "--dry-run"), "give kubernetes, http://HOST:8265"),
        (("--to", "http://head:port", "--dry-run"), "give kubernetes, http://HOST:8265"),
        (("--to", "kubernets", "--dry-run"), "give kubernetes, http://HOST:8265"),
    ],
)
def test_a_flag_that_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str) -> None:
    assert submit(tmp_path, "ingest", INGEST, *flags) == 2
    assert message in capsys.readouterr().err


def rendered(folder: Path, job: str, text: str, preset: str = "cpu", pods: int | None = None) -> dict[str, Any]:
    nodes = PRESETS[preset] if pods is None else PRESETS[preset].with_pods(pods)
    return dict(with_workers(read_job(job, file(folder, text)), nodes, preset, "job.yaml").content)


def test_the_workers_of_a_training_divide_its_lanes(tmp_path: Path) -> None:
    assert rendered(tmp_path, "train", TRAIN + "lanes: 8\n")["num_workers"] == 8
    assert rendered(tmp_path, "train", TRAIN + "lanes: 9\nbatch_size: 252\ncpus_per_worker: 7\n")["num_workers"] == 3  # of 4 that fit
    assert rendered(tmp_path, "train", TRAIN + "lanes: 64\ngpus_per_worker: 1\n", "large")["num_workers"] == 64
    assert rendered(tmp_path, "train", TRAIN + "num_workers: 2\n")["num_workers"] == 2


def test_each_step_of_a_pipeline_gets_what_fits_it(tmp_path: Path) -> None:
    content = rendered(tmp_path, "pipeline", PIPELINE)
    given = {name: content[name]["num_workers"] for name in ("training", "original", "embed", "train", "protect", "leakage")}
    assert given == {"training": 28, "original": 28, "embed": 28, "train": 8, "protect": 8, "leakage": 28}
    assert {name: section["num_workers"] for name, section in content["pretrain"].items()} == {"inside": 4, "outside": 3}


@pytest.mark.parametrize(
    ("job", "text", "preset", "message"),
    [
        ("ingest", INGEST + "num_workers: 4000\n", "cpu", "num_workers: 4000, and 28 fit"),
        (
            "train",
            TRAIN + "lanes: 4000\nbatch_size: 16000\nnum_workers: 4000\ngpus_per_worker: 1\n",
            "large",
            "num_workers: 4000, and 64 fit",
        ),
        ("ingest", INGEST + "cpus_per_worker: 8\n", "cpu", "cpus_per_worker: 8 and gpus_per_worker: 0 fit no pod"),
        ("ingest", INGEST + "gpus_per_worker: 1\n", "cpu", "fit no pod of --preset cpu (7 cores and 0 GPUs)"),
        ("ingest", INGEST + "gpus_per_worker: 2\n", "gpu", "fit no pod"),
        ("pipeline", PIPELINE.replace("cpus_per_worker: 3", "cpus_per_worker: 9"), "gpu", "section protect: cpus_per_worker: 9"),
        ("pipeline", PIPELINE + "leakage: {cpus_per_gallery_actor: 7.5}\n", "gpu", "section leakage: cpus_per_gallery_actor: 7.5"),
    ],
)
def test_what_does_not_fit_the_pods_is_refused(tmp_path: Path, job: str, text: str, preset: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        rendered(tmp_path, job, text, preset)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("job", "text", "flags", "warning"),
    [
        ("verify", "root: s3://bucket/x\n", ("--preset", "gpu"), "verify has no workers"),
        ("plan", "images: 1e6\n", (), "plan has no workers"),
        ("ingest", INGEST, ("--preset", "gpu"), "the pods of --preset gpu have GPUs"),
        ("protect", PROTECT + "gpus_per_worker: 1\ndevice: cpu\n", ("--preset", "gpu"), "the GPUs would idle"),
        ("protect", PROTECT + "rekey: env:REKEY\n", (), "REKEY is read in every pod: put it into a Secret"),
        ("ingest", INGEST, ("--image", "host/facemae"), "--image facemae: without a tag"),
        ("ingest", INGEST, ("--image", "host:5000/facemae:latest"), "another try may run other code"),
        ("ingest", INGEST, ("--image", f"host:5000/facemae@sha256:{'0' * 64}"), ""),
        ("protect", PROTECT + "gpus_per_worker: 1\nrekey: env:REKEY\n", ("--preset", "gpu", "--secret", "rekey"), ""),
    ],
)
def test_what_costs_money_or_waits_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], job: str, text: str, flags: tuple[str, ...], warning: str
) -> None:
    assert submit(tmp_path, job, text, *IMAGE, *flags) == 0
    shown = capsys.readouterr().err
    assert warning in shown if warning else not shown


def test_every_job_that_can_be_submitted_is_one() -> None:
    from jobs.__main__ import JOBS as ALL

    assert set(JOBS) < set(ALL)
    assert set(ALL) - set(JOBS) == {"compare", "demo", "submit", "status", "cancel"}


def test_where_the_work_can_be_seen(tmp_path: Path) -> None:
    def root(job: str, text: str) -> str | None:
        found: InnerJob = read_job(job, file(tmp_path, text))
        return found.root

    assert root("ingest", INGEST) == "s3://bucket/original"
    assert root("embed", "input: s3://bucket/x\nrecognizer: s3://bucket/a.onnx\n") == "s3://bucket/x"
    assert root("pipeline", PIPELINE) == "s3://bucket/pipeline"
    assert root("plan", "images: 1e6\n") is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--name", ""), "--name is empty"), (("--config", "other.yaml"), "--config is given 2 times")],
)
@pytest.mark.parametrize("target", [IMAGE, RAY], ids=["kubernetes", "ray"])
def test_flags_that_would_be_lost_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: tuple[str, ...], flags: tuple[str, ...], message: str
) -> None:
    assert submit(tmp_path, "ingest", INGEST, *target, *flags) == 2
    assert message in capsys.readouterr().err
