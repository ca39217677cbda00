"""A whole small pipeline as its user runs it: a child process a job, each under the keys and the policy of its own role."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from PIL import Image

from cluster.seaweedfs import Endpoint, seaweedfs
from facemae.synthetic import SyntheticFaces
from tests.infra.policy import ROLES, filled_in
from tests.infra.recorder import Recorder, recorder
from tests.jobs.test_leakage_job import write_recognizer

ROOT = Path(__file__).parents[2]
BUCKET = "s3://faces"
SMALL = ["--architecture", "facemae_tiny_patch16_112", "--batch-size", "8", "--images-per-identity", "2", "--samples", "16"]


@dataclass(frozen=True)
class Done:
    """How a child process ended."""

    code: int
    text: str


@dataclass
class WholeRun:
    """The server, the keys of every role, and all that the jobs left behind."""

    endpoint: Endpoint
    record: Recorder
    folder: Path
    rekey_secret: str
    keys: dict[str, tuple[str, str]]
    done: dict[str, Done] = field(default_factory=dict)
    command_lines: set[bytes] = field(default_factory=set)
    planted: str = field(default_factory=lambda: secrets.token_hex(32))

    def client(self, role: str | None = None) -> Any:
        """boto3 under a role's keys, past the recorder; the owner's without a role."""
        access, secret = self.keys[role] if role else (self.endpoint.access_key, self.endpoint.secret_key)
        keys = {"aws_access_key_id": access, "aws_secret_access_key": secret, "region_name": "us-east-1"}
        config = Config(s3={"addressing_style": "path"}, retries={"max_attempts": 1})
        return boto3.client("s3", endpoint_url=self.endpoint.url, config=config, **keys)

    def objects(self) -> dict[str, bytes]:
        """Every object of the bucket."""
        client, found = self.client(), dict[str, bytes]()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket="faces"):
            for entry in page.get("Contents", []):
                found[entry["Key"]] = client.get_object(Bucket="faces", Key=entry["Key"])["Body"].read()
        return found

    def environment(self, role: str, **changes: str) -> dict[str, str]:
        """What a job's process finds: the role's keys, and no profile of whoever runs the tests."""
        access, secret = self.keys[role]
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_", "FACEMAE_"))}
        own = {"AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret, "AWS_DEFAULT_REGION": "us-east-1"}
        own |= {"AWS_ENDPOINT_URL": self.record.url, "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
        own |= {"RAY_TMPDIR": str(self.folder / "t"), "TMPDIR": str(self.folder / "t"), "FACEMAE_TRACEBACK": "1"}
        return {**kept, **own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **changes}

    def start(self, role: str, *arguments: str, **changes: str) -> subprocess.Popen[str]:
        """Begin a job."""
        command = [sys.executable, "-m", "jobs", *arguments]
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=self.environment(role, **changes), cwd=self.folder, **streams)

    def finish(self, name: str, process: subprocess.Popen[str]) -> Done:
        """Wait for a job."""
        text, _ = process.communicate(timeout=240)
        self.done[name] = Done(process.returncode, text)
        return self.done[name]

    def job(self, name: str, role: str, *arguments: str, code: int = 0, **changes: str) -> None:
        """Run a job, and fail here, with what it printed, unless it ends with ``code``."""
        done = self.finish(name, self.start(role, *arguments, **changes))
        assert done.code == code, f"{name} ended with {done.code}:\n{done.text}"


@pytest.fixture(scope="session")
def whole_run(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WholeRun]:
    """Ingest, embed, train, protect with --rekey, measure, withhold and release by an index of cells, repair, report, verify, publish and
    verify again; then runs that must fail."""
    if not pytestconfig.getoption("--kills"):
        pytest.skip("runs in `make faults`: two dozen jobs, four minutes")
    keys = {role: (f"KEY{secrets.token_hex(8).upper()}", secrets.token_urlsafe(30)) for role in ROLES}
    folder = Path(tempfile.mkdtemp(prefix="fm", dir="/tmp"))  # Ray's sockets need a short path
    (folder / "t").mkdir()
    try:
        with seaweedfs(tmp_path_factory.mktemp("weed"), _identities(keys)) as endpoint, recorder(endpoint.url) as record:
            endpoint.create_bucket("faces")
            run = WholeRun(endpoint, record, folder, secrets.token_hex(32), keys)
            with _watching(run.command_lines):
                _all_jobs(run)
            yield run
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _identities(keys: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """SeaweedFS's configuration: each role's policy, word for word as infra/s3 has it."""
    identities = [
        {"name": role, "credentials": [{"accessKey": access, "secretKey": secret}], "policyNames": [role]}
        for role, (access, secret) in keys.items()
    ]
    return {"identities": identities, "policies": [{"name": role, "content": json.dumps(filled_in(role))} for role in keys]}


def _all_jobs(run: WholeRun) -> None:
    file = write_recognizer(run.folder / "alpha.onnx", 0)
    for part in (file, file.with_suffix(".json")):
        run.client().put_object(Bucket="faces", Key=f"recognizers/{part.name}", Body=part.read_bytes())
    recognizer = f"{BUCKET}/recognizers/{file.name}"
    (run.folder / "secret").write_text(run.rekey_secret)
    _upload_source(run)
    by_env: dict[str, Any] = {"REKEY_SECRET": run.rekey_secret}
    by_file = f"file:{run.folder}/secret"
    nowhere = run.start("auditor", "verify", f"{BUCKET}/original", AWS_ENDPOINT_URL="http://127.0.0.1:9")  # waits while others work
    one = ["--num-workers", "1"]
    pair = ["--original", f"{BUCKET}/original", "--protected", f"{BUCKET}/protected"]
    measure = [*pair, "--recognizer", recognizer, "--no-pixels", "--output", f"{BUCKET}/results", *one]
    protect = ["--input", f"{BUCKET}/original", "--weights", f"{BUCKET}/run", "--device", "cpu", *one]
    ids = "synthetic:ids=4,images=4,seed=1"
    run.job("ingest training", "ingest", "ingest", "--source", ids, "--output", f"{BUCKET}/training", "--shard-size", "8", *one)
    run.job("ingest", "ingest", "ingest", "--source", f"{BUCKET}/source", "--output", f"{BUCKET}/original", "--shard-size", "8", *one)
    run.job("embed", "measurer", "embed", "--input", f"{BUCKET}/training", "--recognizer", recognizer, *one)
    train = ["--data", f"{BUCKET}/training", "--recognizer", recognizer, "--output", f"{BUCKET}/run"]
    train += [*SMALL, "--grid-every", "1", "--checkpoint-every", "1", "--keep-checkpoints", "1", *one]
    run.job("train", "trainer", "train", *train)
    run.job("protect", "protector", "protect", *protect, "--output", f"{BUCKET}/protected", "--rekey", "env:REKEY_SECRET", **by_env)
    run.job("leakage", "measurer", "leakage", *measure, "--rekey", by_file)
    in_cells = [*measure, "--output", f"{BUCKET}/results/cells", "--index", "IVF2,SQfp16", "--rekey", by_file]
    run.job("withheld", "measurer", "leakage", *in_cells, "--max-cmc1", "0.01", code=4)
    repair = ["--repair", f"{BUCKET}/results", "--repair-rank", "10", "--recognizer", recognizer, "--rekey", by_file]
    run.job("repair", "repairer", "protect", *protect, "--output", f"{BUCKET}/repaired", *repair)
    run.job("released", "measurer", "leakage", *in_cells, "--max-cmc1", "0.99")
    run.job("report", "measurer", "report", "--output", f"{BUCKET}/results", "--rekey", by_file)
    run.job("verify training", "auditor", "verify", f"{BUCKET}/training")
    run.job("verify original", "auditor", "verify", f"{BUCKET}/original")
    run.job("verify", "auditor", "verify", f"{BUCKET}/protected")
    _publish(run)
    run.job("verify release", "reader", "verify", f"{BUCKET}/release")
    run.job("wrong key", "auditor", "verify", f"{BUCKET}/protected", code=2, AWS_SECRET_ACCESS_KEY=run.keys["ingest"][1])
    run.job("no secret", "measurer", "leakage", *measure, code=2)
    run.job("short secret", "protector", "protect", *protect, "--output", f"{BUCKET}/protected", "--rekey", "env:S", code=2, S="abc" * 9)
    access, secret = run.keys["auditor"]
    (run.folder / "url.yaml").write_text(f"root: s3://{access}:{secret}@faces/original")
    run.job("keys in a URL", "auditor", "verify", "--config", "url.yaml", code=2)
    endpoint = run.record.url.replace("//", f"//{access}:{secret}@")
    run.job("keys in the endpoint", "auditor", "verify", f"{BUCKET}/original", code=2, AWS_ENDPOINT_URL=endpoint)
    run.job("read only", "auditor", "protect", *protect[:2], "--method", "none", "--output", f"{BUCKET}/protected2", *one, code=2)
    run.finish("wrong endpoint", nowhere)
    _plant(run)


def _plant(run: WholeRun) -> None:
    """Leak a made-up secret in each of the places where the tests look, so that a search that finds nothing is known to look there."""
    run.client().put_object(Bucket="faces", Key="planted", Body=run.planted.encode())
    (run.folder / "t" / "planted").write_text(run.planted)
    code = "import sys, time; print(sys.argv[1], flush=True); time.sleep(1)"
    text = subprocess.run([sys.executable, "-c", code, run.planted], capture_output=True, text=True, check=True).stdout
    run.done["planted"] = Done(0, text)


def _upload_source(run: WholeRun) -> None:
    """Three people as folders of JPEGs, one file damaged, so that there is a ledger; a person's images differ in brightness alone, so that
    the toy attacker finds people among the originals and the gate takes its word."""
    client = run.client()
    people = SyntheticFaces(3, 4).render(range(12))[::4]
    for number in range(12):
        file = io.BytesIO()
        Image.fromarray(people[number // 4] // 2 + 5 * (number % 4)).save(file, "JPEG", quality=90)
        data = file.getvalue()[:200] if number == 5 else file.getvalue()
        client.put_object(Bucket="faces", Key=f"source/person {number // 4}/{number}.jpg", Body=data)


def _publish(run: WholeRun) -> None:
    """The commands of docs/release.md by boto3: what a release consists of, copied under the publisher's keys."""
    client = run.client("publisher")
    for part in ("shards/", "manifests/", "quarantine/", "index.json", "dataset.json"):
        for entry in client.list_objects_v2(Bucket="faces", Prefix=f"protected/{part}").get("Contents", []):
            data = client.get_object(Bucket="faces", Key=entry["Key"])["Body"].read()
            client.put_object(Bucket="faces", Key=entry["Key"].replace("protected", "release", 1), Body=data)


@contextlib.contextmanager
def _watching(found: set[bytes]) -> Iterator[None]:
    """Collect the command line of every process of the machine."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    found.add(file.read_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
