"""One request, its answer, and the fault that comes between them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

from tests.faults.policy import Fault, Kind, Request
from tests.faults.wire import PIECE, Head, Stream

_CODES = {"500": ("500 Internal Server Error", "InternalError"), "503": ("503 Service Unavailable", "SlowDown")}
_STEPS = 20
"""Pieces of a slow body."""


@dataclass(frozen=True)
class Passed:
    """One request that came by: when (seconds since the epoch), the status the server gave (None: it never answered, or was never
    asked), and the bytes of the bodies that were let through to the server and to the client."""

    time: float
    method: str
    key: str
    query: str
    status: int | None
    bytes_up: int
    bytes_down: int


@dataclass(frozen=True)
class Injected:
    """One fault that happened: ``offset`` bytes of the body had passed (or: the byte that was flipped), ``pid`` was killed."""

    time: float
    kind: Kind
    method: str
    key: str
    offset: int | None = None
    pid: int | None = None


@dataclass
class Log:
    """All that a proxy saw and did. Appended to by the proxy's thread alone."""

    requests: list[Passed] = field(default_factory=list)
    injected: list[Injected] = field(default_factory=list)
    killed: set[psutil.Process] = field(default_factory=set)


class _Cut(Exception):
    """The fault's byte of the body has been reached; ``sink`` is the stream on which nothing follows."""

    def __init__(self, offset: int, sink: Stream) -> None:
        super().__init__(offset)
        self.offset, self.sink = offset, sink


class Exchange:
    """Carries one request to the server and the answer back."""

    def __init__(
        self,
        client: Stream,
        connect: Callable[[], Awaitable[Stream]],
        head: Head,
        request: Request,
        fault: Fault | None,
        rng: random.Random,
        log: Log,
    ) -> None:
        self._client, self._connect = client, connect
        self._head, self._request, self._rng, self._log = head, request, rng, log
        self._fault: Any = fault  # only what a place was given for asks what it is
        self._place = fault.kind.place if fault else ""
        self._status: int | None = None
        self._up = self._down = 0

    async def run(self) -> bool:
        """Returns whether the client's connection can carry another request."""
        try:
            return await self._run()
        except _Cut as cut:
            await cut.sink.arrived()
            await self._end(cut.offset)
            return False
        finally:
            request = self._request
            passed = Passed(time.time(), request.method, request.key, request.query, self._status, self._up, self._down)
            self._log.requests.append(passed)

    async def _run(self) -> bool:
        if self._place == "before":
            return await self._instead(self._request_body(), swallow=not self._head.expects)
        self._server: Stream = await self._connect()
        answer, early = await self._ask()
        body = self._server.read_body(answer, answer.body_length(self._request.method))
        if self._place == "after":
            stays = await self._instead(body, swallow=True)
        else:
            await self._answer(answer, body)
            stays = not self._head.closes
        return stays and not (early or answer.closes)

    def _request_body(self) -> AsyncIterator[bytes]:
        return self._client.read_body(self._head, self._head.body_length())

    async def _ask(self) -> tuple[Head, bool]:
        """Send the request. Returns the answer's head, and whether it came before the request's end, so that the rest lies unread."""
        await self._server.send(self._head.raw)
        sending = asyncio.create_task(self._send_request())
        answering = asyncio.create_task(self._read_answer())
        try:
            await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()  # raises what ended it
                return await answering, False
            answer = answering.result()
            if not self._head.expects or self._up:  # the client will send all of it before it looks for an answer
                with contextlib.suppress(ConnectionError):
                    await sending
            return answer, True
        finally:
            for task in (sending, answering):
                task.cancel()
            await asyncio.gather(sending, answering, return_exceptions=True)

    async def _send_request(self) -> None:
        body = self._request_body()
        if self._request.method != "GET":
            body = self._bent(body, self._request.length, self._server)
        async for piece in body:
            self._up += await self._server.send(piece)

    async def _read_answer(self) -> Head:
        """The final answer's head; ``100 Continue`` is passed on."""
        while True:
            answer = await self._server.read_head()
            if answer is None:
                raise ConnectionError("the server closed without an answer")
            if answer.status >= 200:
                self._status = answer.status
                return answer
            await self._client.send(answer.raw)

    async def _answer(self, answer: Head, body: AsyncIterator[bytes]) -> None:
        if self._request.method == "GET" and answer.status in (200, 206):
            body = self._bent(body, answer.body_length("GET"), self._client)
        await self._client.send(answer.raw)
        async for piece in body:
            self._down += await self._client.send(piece)

    async def _instead(self, body: AsyncIterator[bytes], *, swallow: bool) -> bool:
        """The fault in place of forwarding, or of the server's answer. ``swallow``: read the body of which nothing is passed on."""
        if swallow:
            async for _ in body:
                pass
        action = self._fault.kind.action
        if action not in _CODES:
            await self._end(None)
            return False
        self._record(None)
        line, code = _CODES[action]
        text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>injected fault</Message></Error>'
        stays = swallow and not self._head.closes
        close = "" if stays else "Connection: close\r\n"
        headers = f"HTTP/1.1 {line}\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n{close}\r\n"
        await self._client.send((headers + (text if self._request.method != "HEAD" else "")).encode())
        return stays

    async def _end(self, offset: int | None) -> None:
        """Break the connection as the fault wants it."""
        action, victim = self._fault.kind.action, self._fault.victim
        if action == "kill":
            if victim not in self._log.killed:  # one process may meet two such faults at once
                self._log.killed.add(victim)
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.kill()
                    self._record(offset, victim.pid)
            return
        self._record(offset)
        if action == "reset":
            self._client.reset()

    def _record(self, offset: int | None, pid: int | None = None) -> None:
        injected = Injected(time.time(), self._fault.kind, self._request.method, self._request.key, offset, pid)
        self._log.injected.append(injected)

    def _bent(self, body: AsyncIterator[bytes], length: int | None, sink: Stream) -> AsyncIterator[bytes]:
        """The body as the fault changes it on its way to ``sink``."""
        if self._place != "within" or not length:
            return body
        kind, offset = self._fault.kind, self._rng.randrange(length)
        if kind is Kind.SLOW:
            return self._slow(body, length)
        return self._flipped(body, offset) if kind is Kind.FLIP else self._cut(body, offset, sink)

    async def _cut(self, body: AsyncIterator[bytes], offset: int, sink: Stream) -> AsyncIterator[bytes]:
        left = offset
        async for piece in body:
            if len(piece) > left:
                yield piece[:left]
                raise _Cut(offset, sink)
            left -= len(piece)
            yield piece

    async def _flipped(self, body: AsyncIterator[bytes], offset: int) -> AsyncIterator[bytes]:
        start = 0
        async for piece in body:
            if start <= offset < start + len(piece):
                i = offset - start
                piece = piece[:i] + bytes([piece[i] ^ 1 << self._rng.randrange(8)]) + piece[i + 1 :]
                self._record(offset)
            start += len(piece)
            yield piece

    async def _slow(self, body: AsyncIterator[bytes], length: int) -> AsyncIterator[bytes]:
        self._record(None)
        size = min(-(-length // _STEPS), PIECE)
        async for piece in body:
            for start in range(0, len(piece), size):
                part = piece[start : start + size]
                await asyncio.sleep(self._fault.seconds * len(part) / length)
                yield part
