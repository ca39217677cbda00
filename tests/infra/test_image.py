"""The container image, without a container engine: its Dockerfile's rules, what it copies and what it runs."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.kubernetes import pod
from cluster.secret import carries_credentials
from tests.infra.dockerfile import Instruction, arguments, let_through, parse, read

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "infra" / "image"
DOCKERFILE = read(IMAGE / "Dockerfile")
FINAL = [each for each in DOCKERFILE if each.stage == DOCKERFILE[-1].stage]
IGNORE = (IMAGE / "Dockerfile.dockerignore").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOLS = {"build-essential", "gcc", "g++", "make", "cmake", "ninja-build", "git", "python3-pip", "python3-dev", "binutils"}
LABELS = {"title", "description", "licenses", "version", "revision", "base.name"}


def wrong_with(found: list[Instruction]) -> set[str]:
    """What a Dockerfile does that ours must not."""
    final = [each for each in found if each.stage == found[-1].stage]
    users = [each.words[0].partition(":")[0] for each in final if each.name == "USER"]
    bases = [each.words[0] for each in found if each.name == "FROM"]
    defaults = arguments(found)
    wrong = set()
    if not users or users[-1] != str(pod.USER):
        wrong.add("user")
    for base in bases:
        image = re.sub(r"\$\{(\w+)\}", lambda match: defaults.get(match[1], ""), base)
        if not re.search(r"(@sha256:[0-9a-f]{64}|:[^:@/]*\d+(\.\d+){1,2}[^:/]*|:[a-z]+-\d{8}(\.\d+)?)$", image):
            wrong.add("base")
    for each in found:
        if each.name == "ADD":
            wrong.add("add")
        if each.name in ("ENV", "ARG") and re.search(r"(?i)secret|token|passw|credential|access_?key", each.value):
            wrong.add("secret")
        if any(carries_credentials(word) for word in re.split(r"[\s=\"']+", each.value)):
            wrong.add("secret")
        if each.name == "RUN" and re.search(r"(curl|wget)\b[^|]*\|\s*(ba)?sh", each.value):
            wrong.add("download")
    if any(installed(each) & TOOLS or re.search(r"-(dev|venv)\b", each.value) for each in final if each.name == "RUN"):
        wrong.add("tools")
    if any(each.name == "ENTRYPOINT" for each in final):
        wrong.add("entrypoint")
    return wrong


def installed(step: Instruction) -> set[str]:
    """What a step installs by apt-get."""
    found = re.findall(r"apt-get install ([^&|;]*)", step.value)
    return {word for part in found for word in part.split() if not word.startswith("-")}


def test_the_image_s_own_rules() -> None:
    assert wrong_with(DOCKERFILE) == set()


GOOD = "ARG BASE=ubuntu:24.04.3\nFROM ${BASE} AS image\nUSER 1000:1000\n"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (GOOD.replace("USER 1000:1000", "USER root"), "user"),
        (GOOD.replace("USER 1000:1000", ""), "user"),
        (GOOD + "USER root\n", "user"),
        (GOOD.replace(":24.04.3", ""), "base"),
        (GOOD.replace("24.04.3", "latest"), "base"),
        (GOOD.replace("24.04.3", "24"), "base"),
        (GOOD + "ADD https://example.org/x /x\n", "add"),
        (GOOD + "ENV AWS_SECRET_ACCESS_KEY=x\n", "secret"),
        (GOOD + "ARG TOKEN\n", "secret"),
        (GOOD + "ENV URL=https://me:word@host/x\n", "secret"),
        (GOOD + "RUN wget -O- https://example.org/x | sh\n", "download"),
        (GOOD + "RUN apt-get update && apt-get install -y \\\n    wget \\\n    g++ && true\n", "tools"),
        (GOOD + 'ENTRYPOINT ["facemae"]\n', "entrypoint"),
    ],
)
def test_each_rule_is_enforced(text: str, rule: str) -> None:
    assert wrong_with(parse(GOOD)) == set()
    assert wrong_with(parse(text)) == {rule}


def test_hadolint_finds_nothing(tmp_path: Path) -> None:
    command = ["hadolint", "--config", str(IMAGE / "hadolint.yaml")]
    done = subprocess.run([*command, str(IMAGE / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM ubuntu\nRUN cd /tmp\n")
    assert subprocess.run([*command, str(tmp_path / "Dockerfile")], capture_output=True).returncode == 1


def test_everything_that_is_copied_exists_and_reaches_the_builder() -> None:
    for each in DOCKERFILE:
        if each.name != "COPY" or each.option("from"):
            continue
        for source in each.words[:-1]:
            assert (ROOT / source).exists(), source
            assert let_through(IGNORE, source), source
    stages = {each.stage for each in DOCKERFILE}
    assert all(each.option("from") in stages for each in DOCKERFILE if each.name == "COPY" and each.option("from"))


def test_the_package_reaches_the_builder_and_nothing_else_does() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    sent = {path for path in tracked if let_through(IGNORE, path)}
    packages = {path for path in tracked if path.partition("/")[0] in ("facemae", "cluster", "jobs")}
    own = {f"infra/image/{name}" for name in ("requirements.txt", "profile.sh", "healthy.sh")}
    assert sent == packages | own | {"pyproject.toml", "README.md", "LICENSE"}
    for path in (".git/config", ".env", "facemae/.env", "jobs/__pycache__/x.pyc", "cluster/a/b.pyc", ".venv/bin/python", "secrets.yaml"):
        assert not let_through(IGNORE, path), path


def test_what_it_runs_is_there() -> None:
    copied = {each.words[-1]: each for each in FINAL if each.name == "COPY"}
    health = next(each for each in FINAL if each.name == "HEALTHCHECK")
    script = json.loads(re.sub(r".*\bCMD ", "", health.value))[0]
    assert copied[f"/usr/local/bin/{script}"].option("chmod") == "755"
    assert os.access(IMAGE / script, os.X_OK)
    command = json.loads(next(each for each in FINAL if each.name == "CMD").value)
    assert command[0] in PROJECT["scripts"]
    wanted = set(re.findall(r"^\s*(?!answers|echo|exit|set|if|fi)([a-z][a-z0-9]+) ", (IMAGE / script).read_text(), re.MULTILINE))
    apt = set().union(*(installed(each) for each in FINAL if each.name == "RUN"))
    assert wanted <= apt, "the script's programs are installed"
    assert {"bash", "wget"} <= apt, "KubeRay's commands need them"
    assert copied["/opt/facemae"].words[0] == arguments(DOCKERFILE)["PREFIX"]
    assert next(each for each in FINAL if each.name == "WORKDIR").words == [pod.HOME]


def test_a_login_shell_finds_the_package_too() -> None:
    path = next(each.value for each in FINAL if each.name == "ENV" and each.value.startswith("PATH="))
    first = path.removeprefix("PATH=").partition(":")[0]
    done = subprocess.run(
        ["bash", "-c", f". {IMAGE}/profile.sh; echo $PATH"], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.stdout.strip() == f"{first}:/usr/bin:/bin"


def test_labels() -> None:
    labels = next(each.value for each in FINAL if each.name == "LABEL")
    assert set(re.findall(r"org\.opencontainers\.image\.([a-z.]+)=", labels)) == LABELS
    assert arguments(DOCKERFILE)["VERSION"] == PROJECT["version"]
    assert PROJECT["license"] in labels
    assert PROJECT["description"] in labels


@contextlib.contextmanager
def answering(text: str) -> Iterator[int]:
    """A server that answers everything with ``text``; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def healthy(*flags: str, folder: Path, **ports: int) -> tuple[int, str]:
    """The script's exit code, and what it says."""
    environment = {**os.environ, "RAY_TMPDIR": str(folder), "HEALTH_SECONDS": "5", **{name: str(port) for name, port in ports.items()}}
    done = subprocess.run([str(IMAGE / "healthy.sh"), *flags], capture_output=True, text=True, env=environment, timeout=60)
    return done.returncode, done.stdout.strip()


def test_health(tmp_path: Path) -> None:
    assert healthy(folder=tmp_path) == (0, "no Ray was started here")
    (tmp_path / "ray" / "session_latest").mkdir(parents=True)
    with answering("success") as good, answering("local raylet is down") as bad:
        assert healthy(folder=tmp_path, RAY_AGENT_PORT=good) == (0, "Ray lives")
        assert healthy(folder=tmp_path, RAY_AGENT_PORT=bad) == (1, "the raylet does not answer")
        assert healthy("--head", folder=tmp_path, RAY_AGENT_PORT=good, RAY_DASHBOARD_PORT=good) == (0, "Ray lives")
        assert healthy("--head", folder=tmp_path, RAY_AGENT_PORT=good, RAY_DASHBOARD_PORT=bad) == (1, "the GCS does not answer")
    assert healthy(folder=tmp_path, RAY_AGENT_PORT=good) == (1, "the raylet does not answer"), "nobody listens there any more"
