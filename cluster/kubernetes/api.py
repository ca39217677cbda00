"""The Kubernetes API server: requests with time limits, tried again where that helps, and refusals explained.

Paths and plain JSON objects rather than the client's models: KubeRay's resources have none. Credentials, TLS and proxies are the
``kubernetes`` client's, from a kubeconfig or from inside a pod. It was tried against a server of the tests that speaks the protocol,
never against a real API server.
"""

from __future__ import annotations

import email.utils
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal
from urllib.parse import quote, urlencode

from cluster.kubernetes.refusal import explain, line_of

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0
TRIES = 5
PAUSE_SECONDS = 1.0
"""Before the second try; doubled each time, unless the server says how long."""
MAX_PAUSE_SECONDS = 30.0
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"

_PASSING = (429, 500, 502, 503, 504)
_UNDONE = (429, 503)
"""Answers after which a change was certainly not made, so that it may be sent again."""
Method = Literal["GET", "POST", "PATCH", "DELETE"]
Object = dict[str, Any]


class Refused(ConnectionError):
    """The API server answered, and not with what was asked for; the message says why and what to do.

    Attributes:
        status: the HTTP status code.
        reason: the machine-readable reason of the ``Status`` object: ``AlreadyExists``, ``NotFound``.
        text: the server's own words.
        name: the object that it speaks of; empty where it does not say.
    """

    def __init__(self, message: str, status: int, body: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.status = status
        self.reason = str(body.get("reason") or "")
        self.text = line_of(body.get("message"))
        self.name = str((body.get("details") or {}).get("name") or "")


class Api:
    """One API server, as one user.

    Args:
        context: of the kubeconfig (KUBECONFIG, or ~/.kube/config); its current one where None. Inside a pod without a kubeconfig, the
            pod's own service account is used.
        namespace: the namespace; the context's where None.

    Attributes:
        server: the server's address.
        namespace: the namespace.

    Raises:
        ValueError: no kubeconfig, no such context, or a broken one.
    """

    def __init__(self, context: str | None = None, namespace: str | None = None) -> None:
        import kubernetes.client

        configuration, found = _configuration(context)
        configuration.retries = False  # tried again here, where it is known what may be sent twice
        self._client = kubernetes.client.ApiClient(configuration)
        self.server = configuration.host
        self.namespace = namespace or found
        self.now = time.time()

    def get(self, path: str, **query: str) -> Object:
        """An object or a list. Raises Refused, ConnectionError."""
        return json.loads(self._answered("GET", path, query).data or b"{}")

    def items(self, path: str, **query: str) -> list[Object]:
        """All objects of a list, page by page. Raises Refused, ConnectionError."""
        found = list[Object]()
        query = {"limit": "500", **query}
        while True:
            page = self.get(path, **query)
            found.extend(page.get("items") or [])
            query["continue"] = (page.get("metadata") or {}).get("continue") or ""
            if not query["continue"]:
                return found

    def create(self, path: str, body: Object, *, dry_run: bool = False) -> Object:
        """Make an object; unknown fields are refused. With ``dry_run`` the server checks everything and keeps nothing.

        Raises:
            Refused: also where it exists.
            ConnectionError: no answer; the object may exist all the same.
        """
        query = {"fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
        return json.loads(self._answered("POST", path, query, body, repeat=dry_run).data or b"{}")

    def delete(self, path: str, *, propagation: Literal["Foreground", "Background"], uid: str | None = None) -> None:
        """Delete an object: with ``uid`` that very one and none that has its name by now. Raises Refused, ConnectionError."""
        body: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if uid:
            body["preconditions"] = {"uid": uid}
        self._answered("DELETE", path, {}, body, repeat=True)

    def lines(self, path: str, *, read_seconds: float, whole: bool, **query: str) -> Iterator[bytes]:
        """Lines of a text answer as they come.

        Args:
            read_seconds: of silence after which the connection counts as broken.
            whole: leave out a last line without an end, for it may be half of one.

        Raises:
            Refused: the server refuses.
            ConnectionError: it does not answer, or the stream broke off in the middle.
        """
        from urllib3.exceptions import HTTPError

        response = self._answered("GET", path, query, read_seconds=read_seconds, stream=True)
        rest = b""
        try:
            for piece in response.stream(65536, decode_content=True):
                *lines, rest = (rest + piece).split(b"\n")
                yield from lines
            if rest and not whole:
                yield rest
        except (HTTPError, OSError) as error:
            raise ConnectionError(f"the stream from {self.server} broke off: {line_of(error)}") from None
        finally:
            response.close()

    def _answered(
        self,
        method: Method,
        path: str,
        query: Mapping[str, str],
        body: Object | None = None,
        *,
        repeat: bool = False,
        stream: bool = False,
        read_seconds: float = READ_SECONDS,
    ) -> Any:
        """The answer's raw response, read unless it is a ``stream``. Passing troubles are tried again where that does no harm."""
        repeat = repeat or method == "GET"
        for attempt in range(1, TRIES + 1):
            pause = min(PAUSE_SECONDS * 2 ** (attempt - 1), MAX_PAUSE_SECONDS)
            try:
                response = self._sent(method, path, query, body, stream, read_seconds)
            except _Unreached as error:
                if attempt == TRIES or not (repeat or error.unsent) or not error.passing:
                    raise ConnectionError(_unreachable(self.server, error, change=not repeat and not error.unsent)) from None
            else:
                if response.status < 300:
                    return response
                refused = self._refused(response, method, path)
                if attempt == TRIES or response.status not in (_PASSING if repeat else _UNDONE) or "webhook" in refused.text:
                    raise refused
                after = response.headers.get("Retry-After", "")
                pause = min(float(after), MAX_PAUSE_SECONDS) if after.isdigit() else pause
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _sent(self, method: Method, path: str, query: Mapping[str, str], body: Object | None, stream: bool, read_seconds: float) -> Any:
        """One request and its raw response. Raises _Unreached."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import ConnectTimeoutError, HTTPError, NameResolutionError, NewConnectionError, ProxyError

        target = f"{path}?{urlencode(query)}" if query else path
        try:
            _, url, headers, content, _ = self._client.param_serialize(
                method, target, header_params={"Accept": "*/*"}, body=body, auth_settings=["BearerToken"]
            )
            response = self._client.call_api(method, url, headers, content, _request_timeout=(CONNECT_SECONDS, read_seconds)).response
            if not stream or response.status >= 300:
                response.read(cache_content=True)
        except ApiException as error:  # how the client tells of TLS
            raise _Unreached(str(error.reason), unsent=True, passing=False) from None
        except (NewConnectionError, ConnectTimeoutError, NameResolutionError, ProxyError) as error:
            raise _Unreached(str(error), unsent=True) from None
        except (HTTPError, OSError) as error:
            raise _Unreached(str(error), unsent=False) from None
        if date := email.utils.parsedate_tz(response.headers.get("Date", "")):
            self.now = email.utils.mktime_tz(date)
        return response

    def _refused(self, response: Any, method: Method, path: str) -> Refused:
        try:
            body = json.loads(response.data)
        except ValueError:
            body = {}
        body = body if isinstance(body, dict) else {}
        message = explain(response.status, body, _asked(method, path), self.namespace, self.server)
        return Refused(message, response.status, body)


def path_of(resource: str, namespace: str, name: str = "", part: str = "") -> str:
    """The path of a namespaced resource: ``path_of("pods", "faces", "run-x", "log")``."""
    base = _BASES.get(resource, "/api/v1")
    return "/".join([f"{base}/namespaces/{quote(namespace)}/{resource}", *(quote(each) for each in (name, part) if each)])


_BASES = {"rayjobs": "/apis/ray.io/v1", "rayclusters": "/apis/ray.io/v1"}


class _Unreached(Exception):
    """No answer. ``unsent``: the request never left. ``passing``: another try may help."""

    def __init__(self, message: str, *, unsent: bool, passing: bool = True) -> None:
        super().__init__(line_of(message.replace("\n", ": ")))
        self.unsent, self.passing = unsent, passing


def _unreachable(server: str, error: _Unreached, *, change: bool) -> str:
    text = str(error)
    if "CERTIFICATE" in text.upper() or "SSL" in text.upper():
        return (
            f"no trusted connection to {server}: {text}; the kubeconfig's certificate-authority is not this cluster's, or a certificate "
            "has expired: fetch the kubeconfig again"
        )
    if change:
        return f"{server} did not answer ({text}): whether it was done is not known; look with facemae status before you try again"
    return f"{server} does not answer ({text}): is the cluster up, and is a VPN or proxy needed? kubectl cluster-info asks the same"


def _asked(method: Method, path: str) -> str:
    """What a request asks for, in words: ``create rayjobs.ray.io``."""
    verb = {"GET": "get", "POST": "create", "PATCH": "patch", "DELETE": "delete"}[method]
    parts = path.partition("/namespaces/")[2].split("/")[1:]
    resource = parts[0] if parts else path
    part = f"/{parts[2]}" if len(parts) > 2 else ""
    return f"{verb} {resource}{part}{'.ray.io' if resource in _BASES else ''}"


def _configuration(context: str | None) -> tuple[Any, str]:
    """The client's configuration and the namespace that goes with it."""
    import kubernetes.client
    from kubernetes.config import ConfigException, kube_config, load_incluster_config

    configuration = kubernetes.client.Configuration()
    files = os.environ.get("KUBECONFIG") or os.path.expanduser("~/.kube/config")
    present = any(os.path.exists(file) for file in files.split(os.pathsep) if file)
    inside = os.path.exists(f"{SERVICE_ACCOUNT}/token")
    if not present and (context is not None or not inside):
        raise ValueError(f"there is no kubeconfig at {files}: log in to the cluster, or set KUBECONFIG")
    try:
        if not present:
            load_incluster_config(client_configuration=configuration)
            with open(f"{SERVICE_ACCOUNT}/namespace", encoding="utf-8") as file:
                return configuration, file.read().strip()
        contexts, current = kube_config.list_kube_config_contexts(files)
        names = {each["name"]: each for each in contexts}
        chosen = current if context is None else names.get(context)
        if chosen is not None:
            kube_config.load_kube_config(files, context=context, client_configuration=configuration, persist_config=False)
            return configuration, str(chosen["context"].get("namespace") or "default")
    except ConfigException as error:
        raise ValueError(f"the kubeconfig {files} cannot be used: {line_of(error)}; look at it with: kubectl config view") from None
    except Exception as error:  # the client trusts the file's form; what it says then may quote a credential
        raise ValueError(f"the kubeconfig {files} cannot be read ({type(error).__name__}): look at it with: kubectl config view") from None
    raise ValueError(f"--context {context}: {files} has no such context; it has {', '.join(sorted(names)) or 'none'}")
