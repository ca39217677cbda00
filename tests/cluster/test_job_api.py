"""Ray's job API where it answers otherwise than it should; a real one is in tests/nodes/test_submit.py."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import ray

from cluster.job_api import JobApiError, RayJob, RayJobRun, check_address
from cluster.submitted import Phase

Answers = Mapping[tuple[str, str], tuple[int, Any]]
VERSION = {("GET", "/api/version"): (200, {"version": "4", "ray_version": ray.__version__, "ray_commit": "x"})}
JOB = RayJob("mine", "ingest", "a: 1\n", code=False)


@contextlib.contextmanager
def dashboard(answers: Answers) -> Iterator[str]:
    """An HTTP server that answers as a dashboard would; a path matches by its beginning."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length)
            known = (found for (method, path), found in answers.items() if method == self.command and self.path.startswith(path))
            status, body = next(known, (404, "no such page"))
            data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({}, "something answers there that is no Ray dashboard"),
        ({("GET", "/api/version"): (500, "boom")}, "500 Server Error"),
        ({("GET", "/api/version"): (200, "<html>")}, "no Ray dashboard answers"),
        ({("GET", "/api/version"): (401, "no token")}, "Ray's token is missing: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        ({("GET", "/api/version"): (403, "wrong token")}, "Ray's token is not that cluster's"),
    ],
)
def test_a_dashboard_that_is_none_or_refuses_is_explained(answers: Answers, message: str) -> None:
    with dashboard(answers) as url, pytest.raises(JobApiError) as refused:
        RayJobRun(url, "mine")
    assert message in str(refused.value)
    assert str(refused.value).startswith(url)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({("POST", "/api/jobs/"): (500, "No available agent to submit job, please try again later.")}, "--dashboard-agent-listen-port"),
        ({("POST", "/api/jobs/"): (400, "ValueError: Job with submission_id mine already exists.")}, "a job mine was there before"),
        ({("GET", "/api/version"): (200, {"ray_version": "2.9.0"})}, "Ray 2.9.0 runs there, and Ray "),
        ({("POST", "/api/jobs/"): (500, "Traceback: out of ideas")}, "the job was refused: "),
        ({("PUT", "/api/packages"): (413, "Maximum request body size 1 exceeded")}, "the upload is too large"),
    ],
)
def test_a_submission_that_is_refused_is_explained(answers: Answers, message: str) -> None:
    with dashboard({**VERSION, ("PUT", "/api/packages"): (200, {}), **answers}) as url, pytest.raises(JobApiError) as refused:
        RayJobRun.submit(url, JOB)
    assert message in str(refused.value)


def details(status: str, message: str = "") -> dict[str, Any]:
    return {"type": "SUBMISSION", "submission_id": "mine", "status": status, "entrypoint": "x", "message": message}


@pytest.mark.parametrize(
    ("answer", "phase", "message", "finding"),
    [
        (details("PENDING", "Job has not started yet.\nmore"), Phase.WAITING, "Job has not started yet", ""),
        (details("RUNNING", "Job is currently running."), Phase.RUNNING, "", ""),
        (details("STOPPED"), Phase.STOPPED, "", ""),
        (details("SUCCEEDED", "Job finished successfully."), Phase.SUCCEEDED, "Job finished successfully", ""),
        (
            details("FAILED", "Job entrypoint command failed with exit code 127, last available logs (truncated):\nsecret line"),
            Phase.FAILED,
            "Job entrypoint command failed with exit code 127",
            "needs `python` with facemae's dependencies",
        ),
        (
            details("FAILED", "exit code 1, last available logs:\nNo module named 'torch'"),
            Phase.FAILED,
            "exit code 1",
            "a module is missing",
        ),
        (details("FAILED", "runtime_env setup failed: x"), Phase.FAILED, "runtime_env setup failed: x", "could not be unpacked"),
        (details("FAILED", "Job supervisor actor died"), Phase.FAILED, "Job supervisor actor died", "lost with its node"),
    ],
)
def test_a_state_is_one_line_and_what_ails_it(answer: dict[str, Any], phase: Phase, message: str, finding: str) -> None:
    with dashboard({**VERSION, ("GET", "/api/jobs/mine"): (200, answer)}) as url:
        state = RayJobRun(url, "mine").state()
    assert (state.phase, state.message, state.phase.ended) == (phase, message, phase not in (Phase.WAITING, Phase.RUNNING))
    assert finding in " ".join(state.findings)
    assert bool(state.findings) == bool(finding)


def test_a_job_that_is_not_there_is_a_lookup_error_whatever_is_asked() -> None:
    with dashboard(VERSION) as url:
        run = RayJobRun(url, "mine")
        asks: list[Callable[[], Any]] = [run.state, run.cancel, lambda: list(run.log())]
        for ask in asks:
            with pytest.raises(LookupError, match="no job mine there"):
                ask()


def test_no_answer_has_a_reason() -> None:
    with dashboard(VERSION) as url:
        run = RayJobRun(url, "mine")
    asks: list[Callable[[], Any]] = [run.state, lambda: list(run.log()), lambda: RayJobRun(url, "mine")]
    for ask in asks:
        with pytest.raises(ConnectionError, match=r"[Cc]onnection refused|Connect call failed"):
            ask()


def test_the_address_that_is_given_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    with dashboard({**VERSION, ("GET", "/api/jobs/mine"): (200, details("RUNNING"))}) as url:
        assert RayJobRun(url, "mine").state().phase is Phase.RUNNING


@pytest.mark.parametrize("address", ["head:8265", "http://", "http://head:none", "ftp://head", "kubernets", "http://[::1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="give kubernetes, http://HOST:8265"):
        check_address(address)
    with pytest.raises(ValueError, match="not repeated here") as refused:
        check_address("http://user:topsecret@head:8265")
    assert "topsecret" not in str(refused.value)
