"""S3 by boto3: a bucket's prefix as a Store, every write checked against what the server says it holds.

A write sends its SHA-256, which AWS and SeaweedFS check, keep and send back; small ones (every commit is one) also their MD5, which
every server checks before it accepts. Where no SHA-256 comes back (Ceph RGW) the ETag, an MD5, is compared. The digest is kept as the
object's metadata ``sha256`` besides, on any server.

Large objects go up in parts. They are never conditional: Ceph RGW ignores If-None-Match there, so they count only through their
manifest. Endpoint, region and credentials come from boto3's ordinary places.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from cluster.store import AlreadyExists, NotFound, StoredObject, StoreError, Unfinished, require_inside, require_no_credentials

SMALL_BYTES = 1 << 20
"""Up to here an object's own digest is checked on reading too; a larger one is checked by the manifest that names it."""
SINGLE_PUT_BYTES = 256 << 20
PART_BYTES = 64 << 20
PART_THREADS = 4
TRIES = 3
"""Tries of a transfer whose bytes were damaged or cut short; boto3 itself tries again what failed as a whole."""

_MISSING = {"NoSuchKey", "404", "NotFound", "InvalidRange", "416"}
_EXISTS = {"PreconditionFailed", "412"}
_DAMAGED = {"BadDigest", "InvalidDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
_PASSING = {"408", "409", "425", "429", "RequestTimeout", "OperationAborted", "ConditionalRequestConflict", "NoSuchUpload", "SlowDown"}
_REMEDY = {
    "NoSuchBucket": "the bucket does not exist: create it, or correct the URL",
    "AccessDenied": "access denied: check the credentials and the bucket's policy",
    "403": "access denied: check the credentials and the bucket's policy",
    "InvalidAccessKeyId": "the access key is not known to this endpoint: check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret key is wrong: check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired: renew the credentials and run the same command again",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "PermanentRedirect": "the bucket is in another region: set AWS_DEFAULT_REGION",
    "301": "the bucket is in another region: set AWS_DEFAULT_REGION",
}
_DENIED = {"AccessDenied", "403"}
ResultT = TypeVar("ResultT")


class DamagedTransfer(StoreError):
    """Bytes did not arrive as they were sent; sending them again may help."""


class AccessDenied(StoreError):
    """The credentials do not allow it."""


class S3Store:
    """A bucket's prefix."""

    def __init__(self, url: str) -> None:
        import boto3
        from botocore.config import Config

        self.url = url.rstrip("/")
        self.bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self.prefix = prefix.strip("/")
        if not self.bucket:
            raise StoreError(f"{url} names no bucket: write s3://bucket/prefix", fatal=True)
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            require_no_credentials(os.environ.get(name, ""), name)
        config = Config(
            retries={"mode": "standard", "max_attempts": 8},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=32,
            # ours is SHA-256, which names the shards anyway; a second checksum would be a second pass over every byte
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # servers other than AWS rarely have a DNS name for each bucket
            s3={"addressing_style": "path" if os.environ.get("AWS_ENDPOINT_URL") else "auto"},
        )
        with self._translated(""):
            session = boto3.session.Session()
            self._client = session.client("s3", config=config, region_name=session.region_name or "us-east-1")
        require_no_credentials(self._client.meta.endpoint_url, "the endpoint_url of the AWS profile")

    def get(self, key: str) -> bytes:
        return _again(lambda: self._get(key))

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        data = _again(lambda: self._get(key, Range=f"bytes={start}-{stop - 1}"))
        if len(data) != stop - start:
            raise NotFound(f"{self.url}/{key} holds {len(data)} of the {stop - start} bytes from {start} on that were asked for")
        return data

    def put(self, key: str, data: bytes, *, if_absent: bool = False, sha256: str | None = None) -> None:
        sha256 = sha256 or hashlib.sha256(data).hexdigest()
        if len(data) <= SINGLE_PUT_BYTES:
            _again(lambda: self._put(key, data, sha256, if_absent))
        elif if_absent:
            raise StoreError(f"{self.url}/{key}: {len(data)} bytes are too many for a conditional PUT, which is for manifests", fatal=True)
        else:
            _again(lambda: self._put_in_parts(key, data, sha256))

    def list(self, prefix: str = "") -> Iterator[StoredObject]:
        strip = len(self.prefix) + 1 if self.prefix else 0
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._full(prefix))
        with self._translated(prefix):
            for page in pages:
                for entry in page.get("Contents", []):
                    yield StoredObject(entry["Key"][strip:], entry["Size"])

    def size(self, key: str) -> int:
        with self._translated(key, reading=True):
            return self._client.head_object(**self._at(key))["ContentLength"]

    def entries(self, prefix: str = "") -> Iterator[str]:
        full = self._full(prefix)
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=full, Delimiter="/")
        with self._translated(prefix):
            for page in pages:
                found = [entry["Prefix"] for entry in page.get("CommonPrefixes", [])] + [entry["Key"] for entry in page.get("Contents", [])]
                yield from (key[len(full) :] for key in found if key != full)

    def age(self, key: str) -> float | None:
        with self._translated(key, reading=True):
            answer = self._client.head_object(**self._at(key))
        told = answer["ResponseMetadata"]["HTTPHeaders"].get("date")  # of the same answer, so of the same clock
        if told is None:
            return None
        return max(0.0, (parsedate_to_datetime(told) - answer["LastModified"]).total_seconds())

    def delete(self, key: str) -> None:
        with self._translated(key):
            self._client.delete_object(**self._at(key))

    def unfinished(self) -> Iterator[Unfinished]:
        strip = len(self.prefix) + 1 if self.prefix else 0
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self._full(""))
        with self._translated(""):
            for page in pages:
                for entry in page.get("Uploads", []):
                    yield Unfinished(entry["Key"][strip:], entry["UploadId"])

    def discard(self, unfinished: Unfinished) -> None:
        with contextlib.suppress(NotFound), self._translated(unfinished.key):
            self._client.abort_multipart_upload(**self._at(unfinished.key), UploadId=unfinished.token)

    def _get(self, key: str, **span: str) -> bytes:
        with self._translated(key, reading=True):
            answer = self._client.get_object(**self._at(key), **span)
            data = answer["Body"].read()
        expected = answer["Metadata"].get("sha256")
        if not span and expected and len(data) <= SMALL_BYTES and hashlib.sha256(data).hexdigest() != expected:
            raise DamagedTransfer(f"{self.url}/{key} did not arrive as it was written (sha256)")
        return data

    def _put(self, key: str, data: bytes, sha256: str, if_absent: bool) -> None:
        extra: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
        if len(data) <= SMALL_BYTES:  # a commit must be refused when it is damaged, not found out afterwards
            extra["ContentMD5"] = base64.b64encode(_md5(data).digest()).decode()
        with self._translated(key):
            digest = _base64(sha256)
            answer = self._client.put_object(**self._at(key), Body=data, ChecksumSHA256=digest, Metadata={"sha256": sha256}, **extra)
        self._require_same(key, data, digest, answer)

    def _put_in_parts(self, key: str, data: bytes, sha256: str) -> None:
        """Upload parts in parallel, complete, and ask the server what it holds."""
        view = memoryview(data)
        parts = [view[start : start + PART_BYTES] for start in range(0, len(view), PART_BYTES)]
        with self._translated(key):
            upload = self._client.create_multipart_upload(**self._at(key), Metadata={"sha256": sha256})["UploadId"]
        try:
            with ThreadPoolExecutor(PART_THREADS) as pool:
                tags = list(pool.map(lambda number: self._put_part(key, upload, number + 1, parts[number]), range(len(parts))))
            listed = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
            with self._translated(key):
                self._client.complete_multipart_upload(**self._at(key), UploadId=upload, MultipartUpload={"Parts": listed})
                held = self._client.head_object(**self._at(key))  # Ceph's answer to the completion has no ETag
        except BaseException:
            with contextlib.suppress(StoreError):
                self.discard(Unfinished(key, upload))
            raise
        if held["ContentLength"] != len(data):
            raise DamagedTransfer(f"{self.url}/{key}: {len(data)} bytes were sent in parts, the server holds {held['ContentLength']}")

    def _put_part(self, key: str, upload: str, number: int, part: memoryview) -> str:
        """Upload one part. Returns its ETag."""

        def send() -> str:
            digest = base64.b64encode(hashlib.sha256(part).digest()).decode()
            with self._translated(key):
                answer = self._client.upload_part(
                    **self._at(key), UploadId=upload, PartNumber=number, Body=bytes(part), ChecksumSHA256=digest
                )
            self._require_same(key, part, digest, answer)
            return answer["ETag"]

        return _again(send)

    def _require_same(self, key: str, data: bytes | memoryview, digest: str, answer: Mapping[str, Any]) -> None:
        """Raise DamagedTransfer when the server says that it holds other bytes."""
        stored = answer.get("ChecksumSHA256")
        if stored is not None:
            same = stored == digest
        else:
            tag = answer.get("ETag", "").strip('"')
            # under a KMS or customer key an ETag is no MD5
            plain = len(tag) == 32 and "SSECustomerAlgorithm" not in answer and answer.get("ServerSideEncryption", "AES256") == "AES256"
            same = not plain or tag == _md5(data).hexdigest()
        if not same:
            raise DamagedTransfer(f"{self.url}/{key} is not stored as it was sent (checksum)")

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._full(key)}

    def _full(self, key: str) -> str:
        require_inside(self.url, key)
        return f"{self.prefix}/{key}" if self.prefix else key

    def _is_missing(self, key: str) -> bool:
        """Whether a key that was refused is only not there: AWS says 403 for both, to keys that may list but a part of the bucket."""
        from botocore.exceptions import ClientError

        try:
            page = self._client.list_objects_v2(Bucket=self.bucket, Prefix=self._full(key), MaxKeys=1)
        except ClientError:
            return False
        return all(entry["Key"] != self._full(key) for entry in page.get("Contents", []))

    @contextlib.contextmanager
    def _translated(self, key: str, *, reading: bool = False) -> Iterator[None]:
        """Raise the protocol's errors in place of botocore's; no message carries a credential."""
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError

        where = f"{self.url}/{key}" if key else self.url
        try:
            yield
        except boto.ClientError as error:
            translated = _client_error(where, error.response)
            if reading and isinstance(translated, AccessDenied) and self._is_missing(key):
                translated = NotFound(f"{where} does not exist")
            raise translated from None
        except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound, ValueError) as error:
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile or role, and AWS_ENDPOINT_URL as http://host:port"
            raise StoreError(f"{where}: {error}: {remedy}", fatal=True) from None
        except boto.EndpointConnectionError:
            raise StoreError(f"{where}: the endpoint does not answer: check AWS_ENDPOINT_URL and the network") from None
        except (boto.IncompleteReadError, boto.ResponseStreamingError, boto.ReadTimeoutError, ResponseParserError) as error:
            raise DamagedTransfer(f"{where}: {error}") from None
        except (boto.BotoCoreError, boto.HTTPClientError) as error:
            raise StoreError(f"{where}: {error}") from None


def _client_error(where: str, response: Mapping[str, Any]) -> StoreError:
    """The protocol's error for an answer of the server."""
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _MISSING:
        return NotFound(f"{where} does not exist" if "Range" not in code and code != "416" else f"{where} ends before the bytes asked for")
    if code in _EXISTS:
        return AlreadyExists(f"{where} is already there")
    if code in _DAMAGED:
        return DamagedTransfer(f"{where} did not arrive as it was sent ({code})")
    if code in _DENIED:
        return AccessDenied(f"{where}: {_REMEDY[code]}", fatal=True)
    refused = 400 <= status < 500 and code not in _PASSING and str(status) not in _PASSING
    return StoreError(f"{where}: {_REMEDY.get(code, code)}", fatal=code in _REMEDY or refused)


def _again(transfer: Callable[[], ResultT]) -> ResultT:
    """The transfer's result, tried up to TRIES times while its bytes are damaged on the way."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(DamagedTransfer):
            return transfer()
    return transfer()


def _md5(data: bytes | memoryview) -> Any:
    return hashlib.md5(data, usedforsecurity=False)


def _base64(digest: str) -> str:
    return base64.b64encode(bytes.fromhex(digest)).decode()
