"""Secrets that a run needs: read where they are used, never passed on, never printed.

A secret is named by a reference, ``env:NAME`` or ``file:PATH``. The reference travels (in configurations and to the workers); the
secret does not: driver and workers each read it for themselves, and a ``KeyMap`` refuses to be pickled.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIN_SECRET_BYTES = 32
KEY_BITS = 128
MAKE_ONE = "make one with: openssl rand -hex 32"
_REFERENCE = re.compile(r"env:(?P<env>[A-Za-z_][A-Za-z0-9_]{0,47})|file:(?P<file>[^\0\n]+)")
_CHECK_MESSAGE = b"facemae rekey\0check"  # no key holds a NUL, so no key's replacement is the published check
_CREDENTIALS = re.compile(r"s3:/*([^/]*@|(?!arn:)[^/]*:)|(?!s3:|file:)[A-Za-z][A-Za-z0-9+.-]*:/+.*@")


class SecretError(ValueError):
    """A secret that cannot be used; the message names its reference, the reason and the remedy, and never the secret."""


def read_secret(reference: str) -> bytes:
    """The secret behind ``env:NAME`` or ``file:PATH`` on this machine; white space around it is left out.

    Raises:
        SecretError: no such reference, nothing behind it, or fewer than 32 bytes.
    """
    found = _parsed(reference, "a secret")
    if name := found["env"]:
        secret = os.environb.get(name.encode(), b"").strip()
        if not secret:
            raise SecretError(f"{reference}: the environment variable is not set here; driver and workers each read it for themselves")
    else:
        try:
            secret = Path(found["file"]).read_bytes().strip()
        except OSError as error:
            raise SecretError(
                f"{reference}: {error.strerror}; driver and workers each read the file for themselves: mount it on all"
            ) from None
    if len(secret) < MIN_SECRET_BYTES:
        raise SecretError(f"{reference}: the secret has {len(secret)} bytes, at least {MIN_SECRET_BYTES} are needed; {MAKE_ONE}")
    return secret


def require_reference(reference: str, what: str) -> None:
    """Raise SecretError, without repeating it, for what is no ``env:NAME`` or ``file:PATH``; nothing is read."""
    _parsed(reference, what)


def _parsed(reference: str, what: str) -> re.Match[str]:
    found = _REFERENCE.fullmatch(reference)
    if found is None:  # not shown: it may be the secret itself, given in place of its reference
        raise SecretError(f"{what} is given by its place, env:NAME or file:PATH, and what was given is neither: it is not repeated here")
    return found


@dataclass(frozen=True)
class SeedReference:
    """Where each process finds the secret that a protection's noise is drawn from; it travels, the seed does not.

    Attributes:
        reference: env:NAME or file:PATH.
        check: of the seed that the driver found; it tells nothing else.
    """

    reference: str
    check: str

    @classmethod
    def of(cls, reference: str) -> SeedReference:
        """As the driver finds it. Raises SecretError, see ``read_secret``."""
        return cls(reference, _seed_of(reference)[1])

    def read(self) -> int:
        """The seed, 256 bits: HMAC-SHA256 of a fixed text under the secret. Raises SecretError, also where it is not the driver's."""
        seed, check = _seed_of(self.reference)
        if not hmac.compare_digest(check, self.check):
            raise SecretError(
                f"{self.reference}: another secret here (its check is {check}) than on the driver ({self.check}): give the same everywhere"
            )
        return seed


def _seed_of(reference: str) -> tuple[int, str]:
    """The seed behind a reference, and its check."""
    secret = read_secret(reference)
    seed, check = (hmac.digest(secret, text, "sha256") for text in (b"facemae noise seed", b"facemae noise seed\0check"))
    return int.from_bytes(seed), check.hex()[:16]


class KeyMap:
    """Replaces sample keys for a release: 128 bits of HMAC-SHA256(secret, key), as 32 hexadecimal digits.

    Attributes:
        check: a value that two maps share only when their secrets do; it tells nothing else and may be published.

    Raises:
        SecretError: see ``read_secret``; with ``check``, also when the secret is another than the one that gave it.
    """

    def __init__(self, reference: str, check: str | None = None) -> None:
        self._mac = hmac.new(read_secret(reference), digestmod=hashlib.sha256)
        self.check = self._digest(_CHECK_MESSAGE)[:16]
        if check is not None and not hmac.compare_digest(check, self.check):
            raise SecretError(
                f"{reference}: another secret than the one that the keys were replaced with (its check is {self.check}, theirs is "
                f"{check}): give that one, on the driver and on every worker"
            )

    def __call__(self, key: str) -> str:
        """The key that takes the place of ``key``."""
        return self._digest(key.encode("utf-8", "surrogatepass"))

    def __reduce__(self) -> Any:
        raise TypeError("a KeyMap holds a secret and does not travel: pass its reference, and make another where it is needed")

    def describe(self) -> dict[str, Any]:
        """What lineage says of it: how keys were replaced, and the check."""
        return {"method": "hmac-sha256", "bits": KEY_BITS, "check": self.check}

    def _digest(self, message: bytes) -> str:
        mac = self._mac.copy()  # the secret's part is computed once
        mac.update(message)
        return mac.hexdigest()[: KEY_BITS // 4]


def key_map_of(config: Mapping[str, Any], reference: str | None, where: str) -> KeyMap | None:
    """The map from the originals' keys to those of the protected set ``where``, whose lineage is ``config``; None when they are the same.

    Raises:
        SecretError: its keys were replaced and there is no reference, or to another secret; or they were not replaced.
    """
    replaced = config.get("rekey")
    if replaced is None and reference is None:
        return None
    if replaced is None:
        raise SecretError(f"the keys of {where} were not replaced: leave out --rekey")
    if reference is None:
        raise SecretError(f"the keys of {where} were replaced for a release: give --rekey env:NAME or file:PATH of the same secret")
    return KeyMap(reference, replaced["check"])


def carries_credentials(url: str) -> bool:
    """Whether a URL holds a user or password (``s3://KEY:SECRET@bucket``, ``http://user:password@host``), and must not be repeated."""
    return bool(_CREDENTIALS.match(url))
