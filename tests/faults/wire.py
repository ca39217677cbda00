"""HTTP/1.1 messages as bytes on asyncio streams: read without interpreting more than is needed to know where they end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass

PIECE = 64 << 10
_MAX_HEAD = 1 << 20


@dataclass(frozen=True)
class Head:
    """A start line and headers, as they came (``raw``) and taken apart; header names in lower case."""

    raw: bytes
    first: tuple[str, ...]
    headers: Mapping[str, str]

    @property
    def chunked(self) -> bool:
        """True where the body comes in chunks of HTTP (aws-chunked is S3's own framing inside a body, and no concern of ours)."""
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    @property
    def closes(self) -> bool:
        """True where the sender will close the connection after this message."""
        return self.headers.get("connection", "").lower() == "close" or "HTTP/1.0" in self.first

    @property
    def expects(self) -> bool:
        """True where the client waits for ``100 Continue`` (about a second) before it sends the body."""
        return self.headers.get("expect", "").lower() == "100-continue"

    @property
    def status(self) -> int:
        """The status code of an answer."""
        return int(self.first[1])

    def body_length(self, method: str | None = None) -> int | None:
        """Bytes of the body: of a request, or of the answer to ``method``; None where only its framing or the connection's end tells."""
        if method and (method == "HEAD" or self.status < 200 or self.status in (204, 304)):
            return 0
        if self.chunked:
            return None
        text = self.headers.get("content-length")
        return int(text) if text is not None else None if method else 0


class Stream:
    """One side of a connection whose writes are pushed out at once, so that what has passed is known to the byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self._writer = reader, writer
        writer.transport.set_write_buffer_limits(0)  # drain() then waits until the kernel has all
        self.ports: tuple[int, int] = (writer.get_extra_info("peername")[1], writer.get_extra_info("sockname")[1])
        """The other side's and our own."""

    @classmethod
    async def connect(cls, host: str, port: int) -> Stream:
        return cls(*await asyncio.open_connection(host, port, limit=_MAX_HEAD))

    async def send(self, data: bytes) -> int:
        """Write all of ``data``; returns its length."""
        self._writer.write(data)
        await self._writer.drain()
        return len(data)

    async def arrived(self) -> None:
        """Return when the other side's kernel has acknowledged every byte."""
        unacknowledged = bytearray(4)
        while not self._writer.is_closing():
            fcntl.ioctl(self._writer.get_extra_info("socket"), termios.TIOCOUTQ, unacknowledged)
            if not any(unacknowledged):
                return
            await asyncio.sleep(0.001)

    async def read_head(self) -> Head | None:
        """The next message's head, None when the connection ended between two messages."""
        try:
            raw = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise ConnectionError("closed within a head") from None
            return None
        start, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return Head(raw, tuple(start.split(" ", 2)), {name.strip().lower(): value.strip() for name, _, value in pairs})

    async def read_body(self, head: Head, length: int | None) -> AsyncIterator[bytes]:
        """The body's bytes in pieces, framing included. Raises ConnectionError where it ends early."""
        if length is not None:
            while length:
                piece = await self.reader.read(min(length, PIECE))
                if not piece:
                    raise ConnectionError(f"closed {length} bytes before the body's end")
                length -= len(piece)
                yield piece
        elif head.chunked:
            async for piece in self._read_chunks():
                yield piece
        else:
            while piece := await self.reader.read(PIECE):
                yield piece

    async def _read_chunks(self) -> AsyncIterator[bytes]:
        try:
            size = -1
            while size:
                line = await self.reader.readuntil(b"\r\n")
                size = int(line.split(b";")[0], 16)
                yield line + (await self.reader.readexactly(size + 2) if size else b"")
            while line != b"\r\n":  # trailers, up to an empty line
                yield (line := await self.reader.readuntil(b"\r\n"))
        except asyncio.IncompleteReadError:
            raise ConnectionError("closed within a chunked body") from None

    async def close(self) -> None:
        """End as a process does that exits: what was written still arrives."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def reset(self) -> None:
        """End by a TCP reset."""
        linger = struct.pack("ii", 1, 0)
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()


async def serve(connected: Callable[[Stream], Awaitable[None]], host: str) -> asyncio.Server:
    """Listen on a free port and give every connection to the coroutine ``connected(Stream)``."""
    return await asyncio.start_server(lambda reader, writer: connected(Stream(reader, writer)), host, 0, limit=_MAX_HEAD)
