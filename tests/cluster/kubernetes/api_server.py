"""A small Kubernetes API server: the protocol for the resources that a run touches, and a cluster that a test moves by hand.

It keeps objects as JSON and answers list, get, create (dryRun=All, fieldValidation=Strict), delete (propagation, preconditions) and
followed logs (timestamps, sinceTime, chunked), and refuses with the ``Status`` objects of the real one.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Object = dict[str, Any]
TOKEN = "test-token-5c1f0e9a"
KINDS = {"rayjobs": "RayJob", "rayclusters": "RayCluster", "configmaps": "ConfigMap", "pods": "Pod", "events": "Event"}
_PATH = re.compile(
    r"/(?:api/v1|apis/(?P<group>[^/]+)/(?P<version>[^/]+))/namespaces/(?P<namespace>[^/]+)/(?P<resource>\w+)(?:/(?P<name>[^/]+))?(?:/(?P<part>\w+))?"
)
_STRICT = {"RayJob": {"spec"}, "ConfigMap": {"data", "binaryData", "immutable"}}
_SPEC = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint", "entrypointNumCpus", "entrypointNumGpus",
    "entrypointResources", "jobId", "managedBy", "metadata", "preRunningDeadlineSeconds", "rayClusterSpec", "runtimeEnvYAML",
    "shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
}  # fmt: skip


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, code: int, reason: str, message: str, details: Object | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code, self.retry_after = code, retry_after
        self.status = {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason,
            "details": details or {}, "code": code,
        }  # fmt: skip


@dataclass
class Log:
    """A container's log file. ``cuts``: bytes after which each stream in turn is torn, without a word; None lets it be."""

    lines: list[tuple[datetime.datetime, str]] = field(default_factory=list)
    ended: bool = False
    tail: str = ""
    cuts: list[int | None] = field(default_factory=list)
    streams: int = 0

    def write(self, *lines: str, at: datetime.datetime | None = None) -> None:
        for line in lines:
            self.lines.append((at or datetime.datetime.now(datetime.UTC), line))


class Cluster:
    """What the server answers from. Tests change it; ``lock`` guards it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.objects: dict[tuple[str, str, str], Object] = {}
        self.namespace = "faces"  # of what a test moves by hand
        self.namespaces = {"faces", "default", "facemae"}
        self.kuberay = True
        self.token = TOKEN
        self.logs: dict[str, Log] = {}
        self.requests: list[str] = []
        self.refusals: list[tuple[str, Refusal]] = []
        """(pattern of ``METHOD path?query``, answer), each used once, in order."""
        self.always: list[tuple[str, Refusal]] = []

    # -- by hand ---------------------------------------------------------------------------------------------------------------

    def put(self, resource: str, body: Object, namespace: str | None = None) -> Object:
        metadata = body.setdefault("metadata", {})
        metadata.setdefault("namespace", namespace or self.namespace)
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", stamp())
        body.setdefault("kind", KINDS[resource])
        body.setdefault("apiVersion", "ray.io/v1" if resource.startswith("ray") else "v1")
        with self.lock:
            self.objects[resource, metadata["namespace"], metadata["name"]] = body
        return body

    def get(self, resource: str, name: str, namespace: str | None = None) -> Object | None:
        with self.lock:
            return self.objects.get((resource, namespace or self.namespace, name))

    def status(self, name: str, **status: Any) -> None:
        """KubeRay writes into the RayJob's status."""
        with self.lock:
            rayjob = self.objects["rayjobs", self.namespace, name]
            rayjob.setdefault("status", {}).update(status)

    def remove(self, resource: str, name: str, namespace: str | None = None) -> None:
        """It is gone, and what it owns with it."""
        with self.lock:
            gone = self.objects.pop((resource, namespace or self.namespace, name), None)
            uid = gone["metadata"]["uid"] if gone else None
            for key, each in list(self.objects.items()):
                if any(owner.get("uid") == uid for owner in each["metadata"].get("ownerReferences", [])):
                    self.remove(key[0], key[2], key[1])

    def submitter(self, name: str, pod: str, job_uid: str = "job-1", *, running: bool = True) -> Log:
        """The pod that hands the job to Ray, with its log."""
        state = {"running": {"startedAt": stamp()}} if running else {"waiting": {"reason": "ContainerCreating"}}
        self.put(
            "pods",
            {
                "metadata": {
                    "name": pod,
                    "labels": {"batch.kubernetes.io/job-name": name, "job-name": name},
                    "ownerReferences": [{"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job_uid}],
                },
                "spec": {"containers": [{"name": "ray-job-submitter"}, {"name": "sidecar"}]},
                "status": {
                    "phase": "Running" if running else "Pending",
                    "containerStatuses": [{"name": "sidecar", "state": {"running": {}}}, {"name": "ray-job-submitter", "state": state}],
                },
            },
        )
        log = Log()
        self.logs[pod] = log
        return log

    def start(self, pod: str) -> None:
        """A submitter pod that waited runs."""
        with self.lock:
            status = self.objects["pods", self.namespace, pod]["status"]
            status["phase"] = "Running"
            status["containerStatuses"][1]["state"] = {"running": {"startedAt": stamp()}}

    def exit(self, pod: str, code: int = 0) -> None:
        """A submitter pod's container ends, and its log with it."""
        with self.lock:
            status = self.objects["pods", self.namespace, pod]["status"]
            status["phase"] = "Failed" if code else "Succeeded"
            status["containerStatuses"][1]["state"] = {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed"}}
            self.logs[pod].ended = True

    # -- the protocol ----------------------------------------------------------------------------------------------------------

    def check(self, method: str, target: str, token: str) -> None:
        with self.lock:
            self.requests.append(f"{method} {target}")
            if token != f"Bearer {self.token}":
                raise Refusal(401, "Unauthorized", "Unauthorized")
            for index, (pattern, refusal) in enumerate(self.refusals):
                if re.search(pattern, f"{method} {target}"):
                    del self.refusals[index]
                    raise refusal
            for pattern, refusal in self.always:
                if re.search(pattern, f"{method} {target}"):
                    raise refusal

    def list(self, resource: str, namespace: str, query: dict[str, str]) -> Object:
        labels = dict(each.split("=", 1) for each in query.get("labelSelector", "").split(",") if each)
        fields = dict(each.split("=", 1) for each in query.get("fieldSelector", "").split(",") if each)
        with self.lock:
            found = [
                each
                for (kind, where, _), each in sorted(self.objects.items())
                if (kind, where) == (resource, namespace)
                and labels.items() <= each["metadata"].get("labels", {}).items()
                and all(each.get(key) == value for key, value in fields.items())
            ]
        start, limit = int(query.get("continue") or 0), int(query.get("limit") or 1000)
        more = {"continue": str(start + limit)} if start + limit < len(found) else {}
        return {"kind": f"{KINDS[resource]}List", "apiVersion": "v1", "metadata": more, "items": found[start : start + limit]}

    def create(self, resource: str, namespace: str, body: Object, query: dict[str, str]) -> Object:
        name = body["metadata"]["name"]
        if namespace not in self.namespaces:
            raise Refusal(404, "NotFound", f'namespaces "{namespace}" not found', {"name": namespace, "kind": "namespaces"})
        if query.get("fieldValidation") == "Strict":
            wrong = [key for key in body if key not in {"apiVersion", "kind", "metadata", *_STRICT[body["kind"]]}]
            wrong += [f"spec.{key}" for key in body.get("spec", {}) if body["kind"] == "RayJob" and key not in _SPEC]
            if wrong:
                kind = body["kind"]
                text = f'{kind} in version "v1" cannot be handled as a {kind}: strict decoding error: unknown field "{wrong[0]}"'
                raise Refusal(400, "BadRequest", text)
        with self.lock:
            if (resource, namespace, name) in self.objects:
                details = {"name": name, "kind": resource}
                raise Refusal(409, "AlreadyExists", f'{resource} "{name}" already exists', details)
            made = json.loads(json.dumps(body))
            made["metadata"].update(uid=str(uuid.uuid4()), creationTimestamp=stamp(), namespace=namespace)
            if query.get("dryRun") != "All":
                self.objects[resource, namespace, name] = made
            return made

    def delete(self, resource: str, namespace: str, name: str, options: Object) -> Object:
        with self.lock:
            self.need(resource, namespace, name)
            found = self.objects[resource, namespace, name]
            uid = (options.get("preconditions") or {}).get("uid")
            if uid and uid != found["metadata"]["uid"]:
                raise Refusal(409, "Conflict", f"the UID in the precondition ({uid}) does not match the UID in record")
            if options.get("propagationPolicy") == "Foreground":
                found["metadata"]["deletionTimestamp"] = stamp()
                found["metadata"]["finalizers"] = ["foregroundDeletion"]
                return found
            self.remove(resource, name, namespace)
            return {"kind": "Status", "status": "Success"}

    def need(self, resource: str, namespace: str, name: str) -> Object:
        with self.lock:
            found = self.objects.get((resource, namespace, name))
            if found is None:
                group = ".ray.io" if resource.startswith("ray") else ""
                details = {"name": name, "kind": resource}
                raise Refusal(404, "NotFound", f'{resource}{group} "{name}" not found', details)
            return json.loads(json.dumps(found))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def log_message(self, *_: Any) -> None:
        pass

    def _do(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size) or b"{}")
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        try:
            self.cluster.check(self.command, self.path, self.headers.get("Authorization", ""))
            found = _PATH.fullmatch(parts.path)
            if found is None or (found["group"] == "ray.io" and not (self.cluster.kuberay and found["version"] == "v1")):
                return self._send(404, b"404 page not found\n", "text/plain")
            resource, namespace, name = found["resource"], found["namespace"], found["name"]
            if self.command == "GET" and found["part"] == "log":
                return self._log(name, namespace, query)
            if self.command == "GET" and name:
                answer = self.cluster.need(resource, namespace, name)
            elif self.command == "GET":
                answer = self.cluster.list(resource, namespace, query)
            elif self.command == "POST":
                answer = self.cluster.create(resource, namespace, body, query)
            else:
                answer = self.cluster.delete(resource, namespace, name, body)
            return self._send(201 if self.command == "POST" else 200, json.dumps(answer).encode())
        except Refusal as refusal:
            return self._send(refusal.code, json.dumps(refusal.status).encode(), retry_after=refusal.retry_after)

    do_GET = do_POST = do_DELETE = do_PATCH = _do

    def _send(self, code: int, body: bytes, kind: str = "application/json", retry_after: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        self.end_headers()
        self.wfile.write(body)

    def _log(self, name: str, namespace: str, query: dict[str, str]) -> None:
        pod = self.cluster.need("pods", namespace, name)
        if query.get("container") != "ray-job-submitter":
            raise Refusal(400, "BadRequest", f"a container name must be specified for pod {name}")
        if pod["status"]["phase"] == "Pending":
            raise Refusal(400, "BadRequest", f'container "ray-job-submitter" in pod "{name}" is waiting to start: ContainerCreating')
        log = self.cluster.logs[name]
        log.streams += 1
        cut = log.cuts.pop(0) if log.cuts else None
        since = datetime.datetime.fromisoformat(query["sinceTime"]) if "sinceTime" in query else None
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        sent = position = 0
        while True:
            ended = log.ended
            text = ""
            for at, line in log.lines[position:]:
                position += 1
                if since is None or at >= since:
                    text += f"{at.strftime('%Y-%m-%dT%H:%M:%S')}.{at.microsecond:06d}123Z {line}\n"
            if ended and log.tail:
                text += f"{stamp()} {log.tail}"
            data = text.encode()
            if cut is not None and sent + len(data) >= cut:
                self._chunk(data[: cut - sent])
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self._chunk(data)
            sent += len(data)
            if ended or query.get("follow") != "true" or self.cluster.get("pods", name, namespace) is None:
                self.wfile.write(b"0\r\n\r\n")
                return
            time.sleep(0.01)

    def _chunk(self, data: bytes) -> None:
        if data:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are part of the tests."""


def stamp(seconds_ago: float = 0.0) -> str:
    """A time as the API server writes it."""
    return (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds_ago)).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_kubeconfig(path: Path, server: str, **cluster: Any) -> None:
    """A kubeconfig with the context ``here`` for namespace ``faces``, and ``elsewhere`` without one."""
    content = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": server, **cluster}}],
        "users": [{"name": "u", "user": {"token": TOKEN}}],
        "contexts": [
            {"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "faces"}},
            {"name": "elsewhere", "context": {"cluster": "c", "user": "u"}},
        ],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))


@contextlib.contextmanager
def serving() -> Iterator[tuple[Cluster, str]]:
    """A cluster and the address of its API server."""
    cluster = Cluster()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"cluster": cluster}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield cluster, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
