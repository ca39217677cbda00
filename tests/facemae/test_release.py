"""The gate's arithmetic: which attacker counts, what an image without a rank does, and both sides of a limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from facemae.release import decide, limits_of

Curve = dict[str, Any] | None


def curve(high: float, queries: int = 100) -> Curve:
    return {"queries": queries, "high": [high, 1.0], "cmc": [0.0, 0.0]}


def attacker(name: str, image: Curve, identity: Curve = None, left_out: int = 0, finds: float | None = 0.9) -> dict[str, Any]:
    """``finds``: the share of the originals in which it finds the person; None where nobody has two images."""
    leakage = {"image": image, "identity": identity, "left_out": left_out}
    reference = {"identity": None if finds is None else {"cmc": [finds]}}
    return {"name": name, "adaptive": None, "leakage": leakage, "reference": reference}


def report(*attackers: dict[str, Any], **protection: str) -> Mapping[str, Any]:
    made = {"config": {"protection": {"method": "facemae", **protection}}, "parent": {"fingerprint": "f"}}
    return {"original": {"fingerprint": "f"}, "protected": made, "attackers": list(attackers)}


@pytest.mark.parametrize("parent", [None, {"fingerprint": "of others"}])
def test_what_was_made_from_others_never_passes(parent: dict[str, str] | None) -> None:
    """Strangers' pictures are traced to nobody: that nothing is found says nothing."""
    measured = report(attacker("a", curve(0.001)))
    assert decide(measured, 0.01).passed
    found = decide({**measured, "protected": {**measured["protected"], "parent": parent}}, 0.01)
    assert not found.passed
    assert "was not made from the originals" in found.reason


def test_the_largest_upper_end_of_all_attackers_decides() -> None:
    found = decide(report(attacker("a", curve(0.01)), attacker("adaptive(a)", curve(0.03)), attacker("b", curve(0.02))), 0.025)
    assert not found.passed
    assert (found.worst.attacker, found.worst.upper, found.worst.mate) == ("adaptive(a)", 0.03, "image")
    assert "up to 3 % of the images" in found.reason
    assert "by adaptive(a)" in found.reason
    assert "above the limit of 2.5 %" in found.reason


@pytest.mark.parametrize(("limit", "passed"), [(0.02, True), (math.nextafter(0.02, 0), False), (0.99, True)])
def test_a_limit_that_is_just_kept_passes(limit: float, passed: bool) -> None:
    assert decide(report(attacker("a", curve(0.02))), limit).passed is passed


def test_few_people_cannot_show_that_it_is_not_more_and_are_told_so() -> None:
    few = curve(0.021, 240)
    assert few is not None
    few["cmc"] = [0.009]
    reason = decide(report(attacker("a", few)), 0.01).reason
    assert "up to 2.1 %" in reason
    assert "0.9 % were found" in reason
    assert "a larger set may" in reason
    few["cmc"] = [0.02]
    assert "larger set" not in decide(report(attacker("a", few)), 0.01).reason, "no size of a set would help"


def test_each_limit_has_a_bound_of_its_own() -> None:
    both = report(attacker("a", curve(0.001), curve(0.2, 50)), attacker("b", curve(0.004), curve(0.1)))
    assert [b.attacker for b in decide(both, 0.01, 0.25).bounds] == ["b", "a"]
    assert decide(both, 0.01, 0.25).worst.mate == "identity", "the nearest to its limit"
    failed = decide(both, 0.01, 0.15)
    assert (failed.passed, failed.worst.mate) == (False, "identity")
    assert "--max" not in failed.reason
    assert "original" not in failed.reason, "a bound that is kept is no reason to withhold"
    assert decide(both, max_identity_cmc1=0.2).passed
    assert [set(b) for b in failed.to_json()] == [{"mate", "limit", "upper", "attacker", "queries", "cmc1"}] * 2


@pytest.mark.parametrize("nothing", [None, curve(math.nan), {"queries": 0, "high": [0.0]}])
def test_what_was_not_measured_never_passes(nothing: Curve) -> None:
    for given_limits in ((0.99, None), (None, 0.99)):
        found = decide(report(attacker("a", nothing, nothing)), *given_limits)
        assert not found.passed
        assert "nothing was measured" in found.reason


def test_images_without_a_rank_count_as_found() -> None:
    found = decide(report(attacker("a", curve(0.01, 900), left_out=100)), 0.1)
    assert found.worst.upper == pytest.approx((0.01 * 900 + 100) / 1000)
    assert not found.passed


@given(st.integers(1, 10**6), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_the_bound_with_left_out_images_is_never_below_their_pooled_share(queries: int, share: float, above: float, left_out: int) -> None:
    hits = int(share * queries)
    high = hits / queries + above * (1 - hits / queries)
    upper = decide(report(attacker("a", curve(high, queries), left_out=left_out)), 0.99).worst.upper
    assert (hits + left_out) / (queries + left_out) <= upper + 1e-12
    assert high - 1e-12 <= upper <= 1 + 1e-12


@pytest.mark.parametrize("limit", [0.0, -0.1, 1, 1.01, math.nan, 5])
def test_limits_outside_the_unit_interval_are_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="--max-cmc1"):
        limits_of(limit, None)
    with pytest.raises(ValueError, match="--max-identity-cmc1"):
        decide(report(attacker("a", curve(0.1))), 0.5, limit)


def test_what_calls_itself_no_protection_never_passes() -> None:
    found = decide(report(attacker("a", curve(0.001)), method="none", warning="not a protection"), 0.9)
    assert not found.passed
    assert found.reason == "the set is never released: not a protection", "the bound is kept and no reason"


@pytest.mark.parametrize(("finds", "passed"), [((0.1, 0.49), False), ((0.1, 0.5), True), ((None,), True), ((None, 0.2), False)])
def test_weak_attackers_alone_release_nothing(finds: tuple[float | None, ...], passed: bool) -> None:
    found = decide(report(*(attacker(str(share), curve(0.001), finds=share) for share in finds)), 0.9)
    assert found.passed is passed
    assert ("too weak to tell: the best finds the person in" in found.reason) is not passed


def test_a_weak_attacker_that_traces_more_counts() -> None:
    assert not decide(report(attacker("good", curve(0.001)), attacker("weak", curve(0.5), finds=0.1)), 0.01).passed


def test_who_attacked_is_told() -> None:
    adapted = {**attacker("a (adaptive)", curve(0.1)), "adaptive": {"maps": []}}
    found = decide(report(adapted, attacker("b", curve(0.1), finds=None)), 0.9).attackers
    assert found == ({"name": "a (adaptive)", "adaptive": True, "reference": 0.9}, {"name": "b", "adaptive": False, "reference": None})


def test_a_gate_without_limits_or_attackers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a limit"):
        decide(report(attacker("a", curve(0.1))))
    with pytest.raises(ValueError, match="no attacker"):
        decide(report(), 0.1)
