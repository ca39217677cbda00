"""Protections by name. A new method is one file beside this one and one entry in `PROTECTIONS`."""

from __future__ import annotations

import inspect
from typing import Any

from facemae.protection.facemae import FaceMaeProtection
from facemae.protection.none import NoProtection
from facemae.protection.protocol import Protection

PROTECTIONS: dict[str, type[Protection]] = {
    NoProtection.name: NoProtection,
    FaceMaeProtection.name: FaceMaeProtection,
}


def create_protection(method: str, **options: Any) -> Protection:
    """Builds a protection.

    Args:
        method: a key of `PROTECTIONS`.
        **options: keyword arguments of that method's class.

    Raises:
        ValueError: the method or an option is unknown, or a required option is missing; the message lists the known.
    """
    if method not in PROTECTIONS:
        raise ValueError(f"unknown protection {method!r}: choose one of {', '.join(sorted(PROTECTIONS))}")
    signature = inspect.signature(PROTECTIONS[method])
    try:
        signature.bind(**options)
    except TypeError as error:
        known = ", ".join(map(str, signature.parameters.values())) or "none"
        raise ValueError(f"options of protection {method!r}: {error}; it takes: {known}") from error
    return PROTECTIONS[method](**options)


__all__ = ["PROTECTIONS", "FaceMaeProtection", "NoProtection", "Protection", "create_protection"]
