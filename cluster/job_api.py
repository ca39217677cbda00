"""A job handed to a Ray cluster through its job API: submitted, asked, followed, stopped.

The API is HTTP, served by the head's dashboard. An address ``ray://HOST:10001`` (Ray's client server) is asked once where the dashboard
is. Ray's own client does the talking; what is added here are time limits, and errors that say what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import tempfile
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.dashboard.modules.job.common import JobStatus
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from cluster.job_package import write_package
from cluster.secret import carries_credentials
from cluster.submitted import Phase, RunState

STOP_SECONDS = 300
"""Between the polite stop of a driver and the kill: its workers finish what is in their hands. Ray's own 3 would cut them off."""
PHASES = {
    JobStatus.PENDING: Phase.WAITING,
    JobStatus.RUNNING: Phase.RUNNING,
    JobStatus.SUCCEEDED: Phase.SUCCEEDED,
    JobStatus.FAILED: Phase.FAILED,
    JobStatus.STOPPED: Phase.STOPPED,
}
for _chatty in ("dashboard_sdk", "job.sdk"):  # they tell of every upload and every closed socket
    logging.getLogger(f"ray.dashboard.modules.{_chatty}").setLevel(logging.WARNING)

_ANSWER_SECONDS = 30.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_NO_AGENT = "No available agent"
_LINE_ENDS = re.compile(r"[\r\n]+")


class JobApiError(ConnectionError):
    """A Ray cluster did not do what was asked of it; the message names its address, the reason and the remedy."""


@dataclass(frozen=True)
class RayJob:
    """What is submitted.

    Attributes:
        name: of the run, never used before on that cluster.
        job: the job of ``facemae JOB``.
        config: its YAML, which travels in the package.
        code: whether this installation's modules travel too, or the cluster's own are used.
        environment: of driver and workers. It is shown in Ray's dashboard: no secrets.
        metadata: shown there too.
    """

    name: str
    job: str
    config: str
    code: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"--name {self.name!r}: give letters, digits, '-', '_' and '.', at most 100")

    @property
    def entrypoint(self) -> str:
        """The driver's command; ``exec`` so that the stop reaches the job and no shell is left waiting for it."""
        program = "python -m jobs" if self.code else "facemae"
        return f"exec {program} {self.job} --config job.yaml"

    @property
    def env_vars(self) -> dict[str, str]:
        """The environment with what a polite stop needs."""
        return {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **self.environment}


class RayJobRun:
    """A job on a Ray cluster (``cluster.submitted.SubmittedRun``).

    Args:
        address: ``http(s)://HOST:8265`` or ``ray://HOST:10001``.
        name: of the job.

    Raises:
        JobApiError: nothing answers there, or it answers otherwise.
        ValueError: no such address can be.
    """

    def __init__(self, address: str, name: str) -> None:
        self.name, self.address = name, address
        self._client = _connect(address)

    @classmethod
    def submit(cls, address: str, job: RayJob) -> RayJobRun:
        """Upload the package and start the job. Raises JobApiError, also when the name was used before."""
        run = cls(address, job.name)
        mine, theirs = ray.__version__, run._client._server_ray_version
        if theirs is not None and theirs != mine:
            raise JobApiError(
                f"{address}: Ray {theirs} runs there, and Ray {mine} here: use the same version, drivers and workers need it too"
            )
        with tempfile.TemporaryDirectory() as folder, _explained(address, job.name):
            package = Path(folder) / "package.zip"
            write_package(package, job.config, code=job.code)
            run._client.submit_job(
                entrypoint=job.entrypoint,
                submission_id=job.name,
                runtime_env={"working_dir": str(package), "env_vars": job.env_vars},
                metadata={"facemae_job": job.job, **job.metadata},
                entrypoint_num_cpus=0,
            )
        return run

    def state(self) -> RunState:
        """See SubmittedRun."""
        details = self._details()
        return RunState(PHASES[details.status], _message(details), tuple(_findings(details)))

    def log(self) -> Iterator[str]:
        """See SubmittedRun. A bar that redraws itself gives a line each time."""
        loop, rest = asyncio.new_event_loop(), ""
        chunks: AsyncIterator[str] = self._client.tail_job_logs(self.name)
        try:
            while True:
                try:
                    rest += loop.run_until_complete(anext(chunks))
                except StopAsyncIteration:
                    break
                except aiohttp.WSServerHandshakeError as error:
                    raise _of_runtime(self.address, self.name, f"status code {error.status}: {error.message}") from None
                except Exception as error:  # aiohttp's own, a closed socket, a proxy's answer: in every case the log broke off
                    raise JobApiError(f"{self.address}: the log broke off: {_reason(error)}") from None
                *lines, rest = _LINE_ENDS.split(rest)
                yield from (line.rstrip() for line in lines if line.strip())
            if rest.strip():
                yield rest
        finally:
            with contextlib.suppress(Exception):
                loop.run_until_complete(chunks.aclose())  # type: ignore[attr-defined]
            loop.close()

    def cancel(self) -> None:
        """See SubmittedRun: the driver gets SIGTERM, and after ``STOP_SECONDS`` it is killed. One that has ended is left as it is."""
        self._details()
        with _explained(self.address):
            self._client.stop_job(self.name)

    def _details(self) -> JobDetails:
        with _explained(self.address, self.name):
            return self._client.get_job_info(self.name)


class _Client(JobSubmissionClient):
    """Ray's client with a time limit on every request."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=_ANSWER_SECONDS, **options)


def check_address(address: str) -> None:
    """Raise ValueError for what is no address of a Ray cluster's job API."""
    if carries_credentials(address):
        raise ValueError(
            "--to holds a user or password (not repeated here): leave them out; Ray's token comes from RAY_AUTH_TOKEN or a file"
        )
    try:
        found = urlsplit(address)
        good = found.scheme in ("http", "https", "ray") and found.hostname and found.port != 0
    except ValueError:  # no number where the port is, or a bracket that does not close
        good = None
    if not good:
        raise ValueError(f"--to {address}: give kubernetes, http://HOST:8265 (a Ray cluster's dashboard) or ray://HOST:10001")


def _connect(address: str) -> JobSubmissionClient:
    """The client of the dashboard behind an address."""
    check_address(address)
    url = _dashboard_of(address) if address.startswith("ray:") else address.rstrip("/")
    with _explained(address), _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # which would win over the address that was given
        return _Client(url)


def _dashboard_of(address: str) -> str:
    """The dashboard's URL, from Ray's client server."""
    host = urlsplit(address).hostname or ""
    try:
        with warnings.catch_warnings(), _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            warnings.simplefilter("ignore")  # it says the same as the error
            with ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False) as context:
                url = context.dashboard_url
    except AuthenticationError as error:
        raise JobApiError(_no_token(address, error)) from None
    except Exception as error:  # gRPC's own kinds, Ray's for other versions of Python, a time-out
        raise JobApiError(
            f"{address}: no Ray client server answers: {_reason(error)}; is its port right, and RAY_AUTH_TOKEN that cluster's? Or give "
            "the dashboard, http://HOST:8265"
        ) from None
    if not url:
        raise JobApiError(f"{address}: that cluster runs no dashboard, which takes the jobs: start its head with --include-dashboard=true")
    if url.startswith(("127.", "localhost")) and not host.startswith("127.") and host != "localhost":
        raise JobApiError(
            f"{address}: its dashboard listens on the head's own {url} alone: start the head with --dashboard-host=0.0.0.0, or tunnel to "
            "it and give --to http://127.0.0.1:8265"
        )
    return f"http://{url}"


@contextlib.contextmanager
def _explained(address: str, name: str = "") -> Iterator[None]:
    """Ray's and requests' errors as JobApiError or LookupError."""
    try:
        yield
    except AuthenticationError as error:
        raise JobApiError(_no_token(address, error)) from None
    except (ConnectionError, requests.RequestException) as error:
        raise JobApiError(
            f"{address}: no Ray dashboard answers: {_reason(error)}; is the head running, with --dashboard-host reachable from here?"
        ) from None
    except RuntimeError as error:
        raise _of_runtime(address, name, str(error)) from None


def _of_runtime(address: str, name: str, text: str) -> Exception:
    """What the job API answered, with the remedy."""
    if "status code 404" in text and name:
        return LookupError(f"{address}: no job {name} there: it never was, or the cluster was started again since")
    if "already exists" in text:
        return JobApiError(f"{address}: a job {name} was there before, and Ray takes each name once: give another --name, or none")
    if _NO_AGENT in text:
        return JobApiError(
            f"{address}: the head has no agent that takes jobs: its port 52365 may be taken by another Ray there; start the head with "
            "--dashboard-agent-listen-port=PORT, or wait when it has only just started"
        )
    if "status code 413" in text or "exceeds the maximum size" in text:
        return JobApiError(f"{address}: the upload is too large for it: install facemae on the cluster and submit with --installed")
    if "404" in text and "Version check" in text:
        return JobApiError(f"{address}: something answers there that is no Ray dashboard: give http://HOST:8265 of the head")
    return JobApiError(f"{address}: the job was refused: {_one_line(text)}")


def _no_token(address: str, error: Exception) -> str:
    given = "is not that cluster's" if "invalid" in str(error) else "is missing"
    return (
        f"{address}: refused, Ray's token {given}: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the token that "
        "its head was started with; `ray get-auth-token --generate` makes one"
    )


def _message(details: JobDetails) -> str:
    """The first line of Ray's message, without the log that it holds too; a run that runs has none."""
    if details.status == JobStatus.RUNNING:
        return ""
    return _one_line((details.message or "").partition(", last available logs")[0].partition("\n")[0])


def _findings(details: JobDetails) -> Iterator[str]:
    text = details.message or ""
    if details.status == JobStatus.FAILED and "runtime_env" in text.lower().replace("runtime environment", "runtime_env"):
        yield "the package could not be unpacked on the cluster: is its disk full, and is it the same version of Ray?"
    if "exit code 127" in text:
        yield "no such command on the cluster: without --installed it needs `python` with facemae's dependencies on the PATH of ray start"
    if "No module named" in text:
        yield "a module is missing on the cluster: install facemae's dependencies there (the image of docs/image.md has them)"
    if "supervisor" in text and details.status == JobStatus.FAILED:
        yield "the driver did not start, or was lost with its node: look at the head's memory, and submit it again"


def _reason(error: BaseException) -> str:
    """The innermost reason of an error, never empty."""
    root: BaseException = error
    while (inner := root.__cause__ or root.__context__) is not None:
        root = inner
    texts = [text for text in (str(getattr(root, "reason", "") or root), str(error), type(root).__name__) if text.strip()]
    return _one_line(re.sub(r"<[^>]*object at 0x[^>]*>:? *", "", texts[0])) or type(root).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())[:400].rstrip(".")


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """The environment without some variables."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
