"""Which request meets which fault: small policies that a proxy asks, all of them functions of a seeded generator.

The generator handed to ``decide`` is seeded with the run's seed, the method, the key and how often that pair came before, so the third PUT
of a key meets the same fate in every run with the same seed, however the processes interleave.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import psutil


class Kind(StrEnum):
    """What can happen to a request. *before*: the server never sees it. *within*: at a random byte of its body (the request's for PUT and
    POST, the answer's for GET). *after*: the server has done it and answered, but the answer is lost."""

    ERROR_500 = "500-before"
    SLOW_DOWN = "503-before"
    RESET_BEFORE = "reset-before"
    KILL_BEFORE = "kill-before"

    RESET_WITHIN = "reset-within"
    KILL_WITHIN = "kill-within"
    SHORT = "short-within"
    """GET only: Content-Length promises more than comes; then the connection closes in order."""
    FLIP = "flip-within"
    """One bit of one byte is turned over."""
    SLOW = "slow-within"

    LOST_500 = "500-after"
    LOST_503 = "503-after"
    RESET_AFTER = "reset-after"
    KILL_AFTER = "kill-after"

    @property
    def action(self) -> str:
        return self.partition("-")[0]

    @property
    def place(self) -> str:
        return self.partition("-")[2]


FLAKY = (Kind.ERROR_500, Kind.SLOW_DOWN, Kind.RESET_BEFORE, Kind.RESET_WITHIN, Kind.SHORT, Kind.SLOW, Kind.LOST_500, Kind.RESET_AFTER)
"""What a bad network and a busy store do, short of changing a byte or killing anybody."""


@dataclass(frozen=True)
class Request:
    """One request as it reached the proxy. ``key`` begins with the bucket; ``ports`` are the client's and the proxy's; ``length`` is
    None where the body comes in HTTP chunks."""

    method: str
    key: str
    query: str
    ports: tuple[int, int]
    length: int | None

    def fits(self, kind: Kind) -> bool:
        """Whether the fault can happen to this request at all."""
        if kind.place != "within":
            return True
        return self.method == "GET" or (kind is not Kind.SHORT and self.method in ("PUT", "POST") and bool(self.length))


@dataclass(frozen=True)
class Fault:
    """What is to happen to one request; ``seconds`` is how long a slow body takes, ``victim`` the process to kill."""

    kind: Kind
    seconds: float = 0.0
    victim: psutil.Process | None = None


class Policy(Protocol):
    """Decides over every request, one at a time."""

    def decide(self, request: Request, rng: random.Random) -> Fault | None:
        """The fault that this request meets, or None."""


class NoFaults:
    """Everything passes unchanged."""

    def decide(self, request: Request, rng: random.Random) -> Fault | None:
        return None


class FirstOf:
    """The first of several policies that wants a fault."""

    def __init__(self, *policies: Policy) -> None:
        self._policies = policies

    def decide(self, request: Request, rng: random.Random) -> Fault | None:
        return next((fault for policy in self._policies if (fault := policy.decide(request, rng))), None)


class Random:
    """A fault of one of ``kinds`` for a share ``rate`` of the requests whose key matches ``keys``, ``limit`` in all.

    ``seconds`` is how long a slow body takes.
    """

    def __init__(
        self,
        rate: float,
        kinds: Sequence[Kind] = FLAKY,
        *,
        keys: str = "",
        methods: Collection[str] = ("GET", "PUT", "POST", "HEAD", "DELETE"),
        seconds: float = 2.0,
        limit: float = float("inf"),
    ) -> None:
        if any(kind.action == "kill" for kind in kinds):
            raise ValueError("Random kills nobody: use KillAt, which knows whom it may kill")
        self._rate, self._kinds, self._keys, self._methods = rate, kinds, re.compile(keys), methods
        self._seconds, self._left = seconds, limit

    def decide(self, request: Request, rng: random.Random) -> Fault | None:
        chosen = rng.random() < self._rate
        kinds = [kind for kind in self._kinds if request.fits(kind)]
        if not chosen or not kinds or self._left < 1 or request.method not in self._methods or not self._keys.search(request.key):
            return None
        self._left -= 1
        return Fault(rng.choice(kinds), self._seconds)


_PHASES = {
    "get": (Kind.KILL_WITHIN, "GET", "/shards/"),
    "put": (Kind.KILL_WITHIN, "PUT", "/shards/"),
    "before": (Kind.KILL_BEFORE, "PUT", "/manifests/"),
    "after": (Kind.KILL_AFTER, "PUT", "/manifests/"),
}


class KillAt:
    """Kill -9 of the process that sent a request, at one phase of it.

    Args:
        phase: ``get`` or ``put``, at a random byte of the answer's or the request's body; ``before`` or ``after``: instead of
            forwarding a PUT, or when the server has done it and the client does not know yet.
        rate: share of the matching requests.
        keys: which keys; data shards for ``get`` and ``put``, manifests for ``before`` and ``after``, unless given.
        victims: whom it may kill: a pattern that the command line must begin with. Others' requests pass unchanged.
        per_key_limit: kills per shard, which the data PUT and the manifest PUT of a shard share.
        limit: kills in all.
    """

    def __init__(
        self,
        phase: str,
        rate: float = 1.0,
        *,
        keys: str | None = None,
        victims: str = "ray::Worker",
        per_key_limit: float = 1,
        limit: float = float("inf"),
    ) -> None:
        self._kind, self._method, default = _PHASES[phase]
        self._rate, self._keys, self._victims = rate, re.compile(default if keys is None else keys), re.compile(victims)
        self._per_key_limit, self._left = per_key_limit, limit
        self._kills: Counter[str] = Counter()

    def decide(self, request: Request, rng: random.Random) -> Fault | None:
        chosen = rng.random() < self._rate and request.method == self._method and request.fits(self._kind)
        shard = shard_of(request.key)
        if not chosen or not self._keys.search(request.key) or self._left < 1 or self._kills[shard] >= self._per_key_limit:
            return None
        victim = owner(request.ports)
        if victim is None or not self._victims.match(title(victim)):
            return None
        self._left -= 1
        self._kills[shard] += 1
        return Fault(self._kind, victim=victim)


def shard_of(key: str) -> str:
    """``00042`` for ``.../shards/00042-0123456789ab.tar`` and ``.../manifests/00042.json``; another key stands for itself."""
    found = re.search(r"/(\d{5,})[-.][^/]*$", key)
    return found[1] if found else key


def owner(ports: tuple[int, int]) -> psutil.Process | None:
    """The process on this machine at the near end of the TCP connection from the first port to the second."""
    connections = (found for found in psutil.net_connections("tcp") if found.laddr and found.raddr)
    pid = next((found.pid for found in connections if (found.laddr.port, found.raddr.port) == ports), None)
    try:
        return psutil.Process(pid) if pid else None
    except psutil.NoSuchProcess:
        return None


def title(process: psutil.Process) -> str:
    """The command line in one string; empty for a process that is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
