"""What Kubernetes takes as a name, a label, an address: checked here, so that a mistake is told before anything is sent.

Every function raises ValueError with the flag, what was given, the reason and the remedy, in one line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

INT32_MAX = 2**31 - 1
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_LABEL_PART = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_ENVIRONMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HOST = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]")
_IMAGE_WORD = r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:[A-Za-z0-9][A-Za-z0-9.-]*(?::[0-9]+)?/)?{_IMAGE_WORD}(?:/{_IMAGE_WORD})*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?"
)


def check_name(flag: str, name: str, *, longest: int = 63) -> None:
    """A name that starts a host name too (DNS-1035 label): RayJob, group of workers."""
    if not _LABEL_1035.fullmatch(name) or len(name) > longest:
        raise ValueError(
            f"{flag} {name!r}: give a small letter, then small letters, digits and '-', not at the end, at most {longest} in all"
        )


def check_namespace(flag: str, name: str) -> None:
    """A namespace (DNS-1123 label)."""
    if not _LABEL_1123.fullmatch(name) or len(name) > 63:
        raise ValueError(f"{flag} {name!r}: give small letters, digits and '-', not at an end, at most 63")


def check_object(flag: str, name: str) -> None:
    """The name of a Secret, service account or priority class (DNS-1123 subdomain)."""
    if not _SUBDOMAIN.fullmatch(name) or len(name) > 253:
        raise ValueError(f"{flag} {name!r}: give the name of an object: small letters, digits, '-' and '.', not at an end, at most 253")


def check_image(flag: str, image: str) -> None:
    """A container image. What holds a user or password is not repeated."""
    if "@" in image.partition("@sha256:")[0]:
        raise ValueError(
            f"{flag}: the image holds a user or password (it is not repeated here): put them into a pull secret, --pull-secret NAME"
        )
    if not _IMAGE.fullmatch(image):
        raise ValueError(f"{flag} {image!r}: no container image; give HOST/NAME:TAG, as registry.example.org/facemae:1.0")


def check_selector(flag: str, selector: Mapping[str, str]) -> None:
    """Labels that a machine must have."""
    for key, value in selector.items():
        prefix, slash, name = key.rpartition("/")
        good_prefix = not slash or (len(prefix) <= 253 and _SUBDOMAIN.fullmatch(prefix))
        if not good_prefix or not _LABEL_PART.fullmatch(name) or len(name) > 63:
            raise ValueError(f"{flag} {key}={value}: {key!r} is no label's name; give PREFIX/NAME=VALUE, as nvidia.com/gpu.present=true")
        if not isinstance(value, str) or len(value) > 63 or (value and not _LABEL_PART.fullmatch(value)):
            raise ValueError(f"{flag} {key}={value}: {value!r} is no label's value; give at most 63 letters, digits, '-', '_' and '.'")


def check_variable(flag: str, name: str) -> None:
    """The name of an environment variable."""
    if not _ENVIRONMENT.fullmatch(name):
        raise ValueError(f"{flag} {name!r}: no name of an environment variable; give letters, digits and '_', no digit first")


def check_count(flag: str, number: int, *, least: int) -> None:
    """A whole number that a manifest can hold."""
    if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= INT32_MAX:
        raise ValueError(f"{flag} {number}: give a whole number, {least} or more")


def check_seconds(flag: str, amount: float, *, unit: float, zero: bool) -> int:
    """A duration given in units of ``unit`` seconds, in whole seconds."""
    if not math.isfinite(amount) or amount < 0 or (not zero and amount * unit < 1):
        raise ValueError(f"{flag} {amount}: give a finite number {'of 0 or more' if zero else 'above 0'}")
    if amount * unit > INT32_MAX:
        raise ValueError(f"{flag} {amount}: too long, Kubernetes counts at most {INT32_MAX} seconds: give {INT32_MAX / unit:.0f} or less")
    return round(amount * unit)


def check_endpoint(flag: str, url: str) -> None:
    """An http(s) address of an S3 server, without user and password, which are not repeated."""
    if "@" in url:
        raise ValueError(f"{flag}: the address holds a user or password (not repeated here): put it into a Secret, --secret NAME")
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in ("http", "https"):
        raise ValueError(f"{flag} {url!r}: give the whole address, with https:// or http:// before it")
    host = rest.removesuffix("/")
    if not _host_port(host) and not _HOST.fullmatch(host):
        raise ValueError(f"{flag} {url!r}: no host and port; give https://HOST or https://HOST:PORT, without a path")


def check_host_port(flag: str, address: str) -> None:
    """HOST:PORT, with nothing before it and no password."""
    if "@" in address:
        raise ValueError(f"{flag}: the address holds a user or password (not repeated here): give HOST:PORT, the password is in a Secret")
    if not _host_port(address):
        raise ValueError(f"{flag} {address!r}: give HOST:PORT with nothing before it, as facemae-redis:6379")


def _host_port(address: str) -> bool:
    host, _, port = address.rpartition(":")
    return bool(_HOST.fullmatch(host)) and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535
