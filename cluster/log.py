"""Log lines of driver and workers: plain text, or with FACEMAE_LOG=json one JSON object a line, for a cluster that gathers logs.

    {"time": "2026-01-31T12:00:00.123Z", "level": "warning", "logger": "cluster.scheduler", "message": "shard 00042 failed (1 of 3): ...",
     "host": "worker-7", "pid": 211, "run": "3f2a...", "attempt": 2, "shard": "00042"}

``run``, ``attempt`` and ``shard`` are there where they are known. They go to stderr; what a job prints on stdout, its results, stays text,
and so does the last line of a run that failed, which is for a person.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

VARIABLE = "FACEMAE_LOG"
OURS = ("cluster", "jobs", "facemae")
FACTS = ("run", "attempt", "shard")
_about: ContextVar[Mapping[str, Any]] = ContextVar("about", default={})  # noqa: B039  # never changed in place
_CREDENTIALS = re.compile(r"(?<=://)[^\s/@]+@")


def is_json() -> bool:
    """Whether log lines are JSON here."""
    return os.environ.get(VARIABLE) == "json"


@contextlib.contextmanager
def about(**facts: Any) -> Iterator[None]:
    """What is logged in the block, on this thread, is about these: run, attempt, shard."""
    token = _about.set({**_about.get(), **facts})
    try:
        yield
    finally:
        _about.reset(token)


def set_up() -> None:
    """Make this process log as FACEMAE_LOG says. Before Ray is imported, or Ray keeps its prefix before the lines of workers.

    Raises:
        ValueError: FACEMAE_LOG is neither ``json`` nor ``text``.
    """
    if os.environ.get(VARIABLE, "text") not in ("json", "text"):
        raise ValueError(f"{VARIABLE}={os.environ[VARIABLE]}: say json or text")
    if follow():
        # Ray shows workers' lines at the driver: as they are, and all of them
        os.environ.setdefault("RAY_DISABLE_WORKER_LOG_PREFIX", "1")
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")


def follow() -> bool:
    """Make this process, a worker say, log JSON where it is asked for: from INFO for our lines, from WARNING for libraries', and from
    ERROR for Ray's. Returns whether it was."""
    if not is_json():
        return False
    handler = _Handler()
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers, root.level = [handler], logging.WARNING
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)
    theirs = logging.getLogger("ray")
    theirs.handlers, theirs.propagate = [], True
    theirs.setLevel(logging.ERROR)
    logging.captureWarnings(True)
    return True


def ray_options() -> dict[str, Any]:
    """What ``ray.init`` is told of logging. (Its own way to set workers up, a hook, makes it start each worker twice.)"""
    return {"configure_logging": False} if follow() else {"logging_level": logging.ERROR}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """See the module; a user or password in a URL is left out."""
        facts = {**_about.get(), **{name: value for name, value in vars(record).items() if name in FACTS}}
        line = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _discreet(record.getMessage()),
            "host": socket.gethostname(),
            "pid": record.process,
            **facts,
        }
        if record.exc_info:
            line["exception"] = _discreet(self.formatException(record.exc_info))
        return json.dumps(line, default=str)


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what is stderr at the time, which a test or Ray may have changed since."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _discreet(text: str) -> str:
    return _CREDENTIALS.sub("***@", text)
