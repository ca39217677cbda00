"""A reverse proxy between S3 clients and a server on this machine, through which faults come as a policy decides.

    with FaultProxy(endpoint.url, Random(0.1), seed=1) as proxy:
        environment = dataclasses.replace(endpoint, url=proxy.url).environment
        ...
        proxy.requests, proxy.injected

Where no fault is asked for no byte is changed: heads pass as they came, Host included, so that signatures hold; bodies are counted.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from types import TracebackType
from urllib.parse import unquote, urlsplit

from tests.faults.exchange import Exchange, Injected, Log, Passed
from tests.faults.policy import NoFaults, Policy, Request
from tests.faults.wire import Stream, serve


class FaultProxy:
    """Listens on a free port of 127.0.0.1 for as long as its block lasts; ``policy`` may be replaced while it runs."""

    def __init__(self, upstream_url: str, policy: Policy | None = None, seed: int = 0) -> None:
        upstream = urlsplit(upstream_url)
        self._upstream = (str(upstream.hostname), upstream.port or 80)
        self.policy: Policy = policy or NoFaults()
        self.seed, self.url = seed, ""
        self._log = Log()
        self._seen: Counter[tuple[str, str]] = Counter()
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="fault proxy", daemon=True)

    @property
    def requests(self) -> list[Passed]:
        """Every request that has ended, in the order of their ends."""
        return list(self._log.requests)

    @property
    def injected(self) -> list[Injected]:
        """Every fault that has happened."""
        return list(self._log.injected)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        if not self._ready.wait(10):
            raise RuntimeError("the fault proxy did not start within 10 s")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        server = await serve(self._serve, "127.0.0.1")
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        await self._stop.wait()
        server.close()  # asyncio.run then cancels what is still open

    async def _serve(self, client: Stream) -> None:
        """One client's connection, with one of its own to the server."""
        server: Stream | None = None

        async def connect() -> Stream:
            nonlocal server
            if server is None or server.reader.at_eof():
                server = await Stream.connect(*self._upstream)
            return server

        try:
            while (head := await client.read_head()) is not None:
                path, _, query = head.first[1].partition("?")
                request = Request(head.first[0], unquote(path).lstrip("/"), query, client.ports, head.body_length())
                rng = self._generator(request)
                fault = self.policy.decide(request, rng)
                if not await Exchange(client, connect, head, request, fault, rng, self._log).run():
                    break
        except (OSError, asyncio.CancelledError):
            pass  # a side went away: so does the other, below
        finally:
            for stream in (client, server):
                if stream is not None:
                    await stream.close()

    def _generator(self, request: Request) -> random.Random:
        """A generator of this request's own."""
        name = (request.method, request.key)
        self._seen[name] += 1
        return random.Random(f"{self.seed} {name} {self._seen[name]}")
