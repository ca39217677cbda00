"""A container's log, taken up again where the stream broke off, without a line lost or given twice."""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Iterator

from cluster.kubernetes.api import Api, path_of

SILENCE_SECONDS = 60.0
"""After which a stream without a line is opened anew: a connection that died without a word looks the same."""
_STAMPED = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:\d\d) (.*)", re.DOTALL)


class PodLog:
    """The log of one container.

    Lines come with the time that the node gave them, and a new stream begins two seconds before the last line: those that were given
    already are known by time and content. What the node has rotated away in the meantime is lost.

    Attributes:
        unreadable: what the node said in place of the log, if it could not read it.
    """

    def __init__(self, api: Api, namespace: str, pod: str, container: str) -> None:
        self._api = api
        self._path = path_of("pods", namespace, pod, "log")
        self._container = container
        self._last = 0  # the second of the latest line
        self._given: dict[int, Counter[bytes]] = {}  # the lines of the last two seconds
        self.unreadable = ""

    def follow(self) -> Iterator[str]:
        """Lines as they come; ends when the container does, or when the server ends the stream.

        Raises:
            Refused: 400 while the container has not started, 404 when the pod is gone.
            ConnectionError: no answer, or the stream broke off.
        """
        return self._lines(follow=True)

    def rest(self) -> Iterator[str]:
        """What there is, without waiting for more; to the very end, so only for a container that has ended. Raises as ``follow``."""
        return self._lines(follow=False)

    def _lines(self, *, follow: bool) -> Iterator[str]:
        query = {"timestamps": "true", "container": self._container, **({"follow": "true"} if follow else {})}
        if self._last:
            query["sinceTime"] = datetime.datetime.fromtimestamp(self._last - 1, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        again: Counter[bytes] = sum(self._given.values(), Counter())
        self.unreadable = ""
        for line in self._api.lines(self._path, read_seconds=SILENCE_SECONDS, whole=follow, **query):
            found = _STAMPED.match(line)
            if found is None:
                self.unreadable = line.decode(errors="replace")
            elif again[line]:
                again[line] -= 1
            else:
                self._remember(line, found)
                yield found[3].decode(errors="replace").rstrip("\r")

    def _remember(self, line: bytes, found: re.Match[bytes]) -> None:
        zone = found[2].decode().replace("Z", "+00:00")
        second = int(datetime.datetime.fromisoformat(found[1].decode() + zone).timestamp())
        self._last = max(self._last, second)
        self._given.setdefault(second, Counter())[line] += 1
        for old in [each for each in self._given if each < self._last - 1]:
            del self._given[old]
