from __future__ import annotations

from typing import Any

import pytest

from facemae.protection import PROTECTIONS, create_protection
from facemae.protection.none import NoProtection


def test_methods_are_found_by_their_own_name() -> None:
    assert {"none", "facemae"} <= PROTECTIONS.keys()
    assert isinstance(create_protection("none"), NoProtection)
    assert create_protection("none").name == "none"


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("blurr", {}, r"unknown protection 'blurr': choose one of .*facemae.*none"),
        ("facemae", {"weights": "w", "ratio": 1}, r"'ratio'; it takes: weights.*mask_ratio.*seed.*device.*threads.*dtype"),
        ("facemae", {}, "missing a required argument: 'weights'"),
        ("none", {"seed": 0}, "'seed'; it takes: none"),
    ],
)
def test_an_unknown_method_or_option_is_answered_with_the_known(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_protection(method, **options)
