"""A proxy before an S3 server that writes down every request, and answers as AWS does where a key may not list the whole bucket."""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

DENIED = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


@dataclass(frozen=True)
class Request:
    """One request as the server got it, and the server's own answer."""

    access_key: str
    method: str
    target: str
    headers: dict[str, str]
    status: int


@dataclass
class Recorder:
    """The proxy's address and what it saw."""

    url: str
    requests: list[Request] = field(default_factory=list)


@contextlib.contextmanager
def recorder(upstream: str) -> Iterator[Recorder]:
    """Record what goes to ``upstream`` (http://host:port) through the address of the recorder.

    An object that does not exist is answered with 403 in place of 404: so does AWS, unless the key may list the bucket without a prefix.
    """
    address = urlsplit(upstream)
    assert address.hostname is not None
    found = Recorder("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
            try:
                server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in ("connection", "expect"):
                        server.putheader(name, value)
                server.endheaders(body)
                answer = server.getresponse()
                data = answer.read()
            finally:
                server.close()
            key = re.search(r"Credential=([^/]+)/", self.headers.get("Authorization", ""))
            headers = {name.lower(): value for name, value in self.headers.items()}
            found.requests.append(Request(key[1] if key else "", self.command, self.path, headers, answer.status))
            missing = answer.status == 404 and self.command in ("GET", "HEAD")
            self.send_response(403 if missing else answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in HOP:
                    self.send_header(name, value)
            data = DENIED if missing and self.command == "GET" else data
            length = answer.getheader("Content-Length", "0") if self.command == "HEAD" and not missing else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

        def log_message(self, format: str, *args: Any) -> None:
            return

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy.daemon_threads = True
    found.url = f"http://127.0.0.1:{proxy.server_address[1]}"
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        proxy.shutdown()
        proxy.server_close()
