"""Protections by name. A new method is one file beside this one and one entry in `PROTECTIONS`."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from facemae.protection.dial import Dial
from facemae.protection.protocol import ProtectedShard, Protection, ShardProtection

PROTECTIONS = {
    "none": "facemae.protection.none:NoProtection",
    "facemae": "facemae.protection.facemae:FaceMaeProtection",
    "mae": "facemae.protection.mae:MaeProtection",
    "blur": "facemae.protection.blur:BlurProtection",
    "pixelate": "facemae.protection.pixelate:PixelateProtection",
    "noise": "facemae.protection.noise:NoiseProtection",
    "random_mask": "facemae.protection.random_mask:RandomMaskProtection",
    "fixed_mask": "facemae.protection.fixed_mask:FixedMaskProtection",
    "k_same": "facemae.protection.k_same:KSameProtection",
    "pixel_dp": "facemae.protection.pixel_dp:PixelDpProtection",
}
"""Where each method's class is: imported when it is asked for, so that one method does not pay for another's libraries."""


def protection_class(method: str) -> type[Protection]:
    """The class of a method, imported now. Raises ValueError when there is no such method; the message lists them."""
    if method not in PROTECTIONS:
        raise ValueError(f"unknown protection {method!r}: choose one of {', '.join(sorted(PROTECTIONS))}")
    module, _, name = PROTECTIONS[method].partition(":")
    found: type[Protection] = getattr(importlib.import_module(module), name)
    return found


def create_protection(method: str, **options: Any) -> Protection:
    """Builds a protection.

    Args:
        method: a key of `PROTECTIONS`.
        **options: keyword arguments of that method's class.

    Raises:
        ValueError: the method or an option is unknown, or a required option is missing; the message lists the known.
    """
    protection = protection_class(method)
    signature = inspect.signature(protection)
    try:
        signature.bind(**options)
    except TypeError as error:
        known = ", ".join(map(str, signature.parameters.values())) or "none"
        raise ValueError(f"options of protection {method!r}: {error}; it takes: {known}") from error
    return protection(**options)


__all__ = ["PROTECTIONS", "Dial", "ProtectedShard", "Protection", "ShardProtection", "create_protection", "protection_class"]
