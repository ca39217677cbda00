"""Protections by name. A new method is one file beside this one and one entry in `PROTECTIONS`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from facemae.protection.protocol import Protection

PROTECTIONS = {
    "none": "facemae.protection.none:NoProtection",
    "facemae": "facemae.protection.facemae:FaceMaeProtection",
}
"""Where each method's class is: imported when it is asked for, so that one method does not pay for another's libraries."""


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
    module, _, name = PROTECTIONS[method].partition(":")
    protection: type[Protection] = getattr(importlib.import_module(module), name)
    signature = inspect.signature(protection)
    try:
        signature.bind(**options)
    except TypeError as error:
        known = ", ".join(map(str, signature.parameters.values())) or "none"
        raise ValueError(f"options of protection {method!r}: {error}; it takes: {known}") from error
    return protection(**options)


__all__ = ["PROTECTIONS", "Protection", "create_protection"]
