"""leakage.json, read and checked: every number of the report's page comes from here or from the data sets it names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import pydantic

from cluster.store import NotFound, Store, StoreError
from facemae.curve import DEPTH
from facemae.release import WEAK_ATTACKER
from facemae.risk import RISK_DEPTHS
from jobs.leakage import SCHEMA

Level = Literal["none", "little", "kept", "unknown"]
NO_UTILITY, LITTLE_UTILITY = 0.1, 0.5
"""Rule of thumb of the page: below which share of the originals' utility a set has none, or little (our reading)."""


@dataclass(frozen=True)
class Identity:
    """One identity's images, and how many of them were traced at rank 1."""

    identity: int
    images: int
    traced: int
    share: float


@dataclass(frozen=True)
class RiskByIdentity:
    """How the traced share spreads over the identities; ``worst`` holds those traced most surely."""

    identities: int
    traced_once: int
    traced_always: int
    mean_share: float
    share_quantiles: Mapping[str, float]
    worst: list[Identity]


@dataclass(frozen=True)
class CurveData:
    """A CMC curve: hits, shares with the ends of their interval, and guessing, each at every depth k.

    Raises:
        ValueError: the lists are of different lengths, the depths are not 1 to 10 and larger ones, or there is no query.
    """

    queries: int
    effective_queries: float
    depths: list[int]
    hits: list[int]
    cmc: list[float]
    low: list[float]
    high: list[float]
    chance: list[float]
    by_identity: RiskByIdentity

    def __post_init__(self) -> None:
        lengths = {len(values) for values in (self.depths, self.hits, self.cmc, self.low, self.high, self.chance)}
        if len(lengths) != 1 or self.queries < 1:
            raise ValueError(f"a curve of {self.queries} queries whose lists have {sorted(lengths)} entries")
        if self.depths[:DEPTH] != list(range(1, DEPTH + 1)) or any(b <= a for a, b in pairwise(self.depths)):
            raise ValueError(f"a curve at the depths {self.depths}: they start with 1 to {DEPTH} and grow")

    @property
    def above_chance(self) -> bool:
        """Whether the whole interval at k = 1 lies above guessing."""
        return self.low[0] > self.chance[0]


@dataclass(frozen=True)
class Link:
    """The share of protected images that one threshold links to their originals, or why there is none to tell."""

    far: float
    tar: float | None
    threshold: float | None
    reason: str = ""


@dataclass(frozen=True)
class Bounds:
    """Ends of the true CMC@1."""

    low: float
    high: float


@dataclass(frozen=True)
class MateSample:
    """What an exact search of random queries says of an approximate one, for one kind of mate."""

    queries: int
    hits: int
    exact_hits: int
    bounds: Bounds


@dataclass(frozen=True)
class SampleData:
    """The random queries that were searched exactly too."""

    queries: int
    recall_at_1: float
    image: MateSample | None
    identity: MateSample | None


@dataclass(frozen=True)
class Search:
    """One search: the folder of its ranks, its counts, a curve for the same image and one for the same identity, and linking.

    ``sample`` is None where the whole search was exact.
    """

    ranks: str
    images: int
    queries: int
    left_out: int
    fingerprint: str
    gallery: int
    image: CurveData | None
    identity: CurveData | None
    histograms: Mapping[str, list[int]]
    linking: list[Link] | None
    sample: SampleData | None


@dataclass(frozen=True)
class Recognizer:
    """The attacker's network."""

    name: str
    sha256: str
    dim: int


@dataclass(frozen=True)
class Attacker:
    """What one recogniser finds, plain or with an adaptive map: protected -> original, original -> original, protected -> protected."""

    name: str
    recognizer: Recognizer
    adaptive: Mapping[str, Any] | None
    leakage: Search
    reference: Search
    utility: Search

    @property
    def weak(self) -> bool:
        """Whether it fails on the originals themselves."""
        return self.reference.identity is not None and self.reference.identity.cmc[0] < WEAK_ATTACKER

    @property
    def kept_leakage(self) -> float | None:
        """Traced to the person, as a share of the way from guessing (0) to what the originals give (1)."""
        return self._kept(self.leakage)

    @property
    def kept_utility(self) -> float | None:
        """Nearest neighbour of the right person among the protected images, on the same scale."""
        return self._kept(self.utility)

    def _kept(self, search: Search) -> float | None:
        curve, ceiling = search.identity, self.reference.identity
        if curve is None or ceiling is None or ceiling.cmc[0] <= ceiling.chance[0]:
            return None
        return (curve.cmc[0] - curve.chance[0]) / (ceiling.cmc[0] - ceiling.chance[0])


@dataclass(frozen=True)
class ImageSet:
    """One of the two image sets as it was when it was measured."""

    url: str
    samples: int
    quarantined: int
    identities: int | None
    shards: int
    config: Mapping[str, Any]
    fingerprint: str
    parent: Mapping[str, Any] | None

    @property
    def synthetic(self) -> bool:
        """Whether the faces are drawn by a program."""
        return self.config.get("source") == "synthetic"

    @property
    def protection(self) -> Mapping[str, Any]:
        """What the protection said of itself; empty for originals."""
        found = self.config.get("protection")
        return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Ends:
    """CMC@1 and its interval."""

    cmc: float
    low: float
    high: float


@dataclass(frozen=True)
class OtherAttacker:
    """What an attacker found of another protection; None where nothing was to be found."""

    name: str
    image: Ends | None
    identity: Ends | None
    utility: Ends | None


@dataclass(frozen=True)
class Other:
    """Another protection of the same originals, measured before."""

    url: str
    protection: Mapping[str, Any]
    attackers: list[OtherAttacker]


@dataclass(frozen=True)
class Bins:
    """Equal bins of the similarity histograms."""

    low: float
    high: float
    bins: int


@dataclass(frozen=True)
class Measurement:
    """The content of leakage.json. The first attacker is the worst one; ``beside`` holds other protections of the same originals."""

    search: str
    confidence: float
    histogram: Bins
    original: ImageSet
    protected: ImageSet
    worst_attacker: str
    attackers: list[Attacker]
    beside: list[Other]

    def __post_init__(self) -> None:
        if not self.attackers:
            raise ValueError("no attacker")

    @property
    def ks(self) -> list[int]:
        """The k of CMC@k that tables show."""
        return list(RISK_DEPTHS)

    @property
    def worst(self) -> Attacker:
        """The attacker that leads the report."""
        return self.attackers[0]

    @property
    def utility(self) -> Level:
        """The best utility that any attacker worth its name sees; "unknown" where there is none to judge by."""
        shares = [a.kept_utility for a in self.attackers if not a.weak and a.kept_utility is not None]
        if not shares:
            return "unknown"
        return "none" if max(shares) < NO_UTILITY else "little" if max(shares) < LITTLE_UTILITY else "kept"

    @property
    def all_weak(self) -> bool:
        """Whether no attacker can tell even the originals apart."""
        return all(attacker.weak for attacker in self.attackers)


def read_measurement(store: Store) -> tuple[Measurement, bytes]:
    """leakage.json, checked, and its bytes.

    Raises:
        StoreError: there is none, or it is of another schema, or damaged; the message says what is missing and what to run.
    """
    where = f"{store.url}/leakage.json"
    again = f"run `facemae leakage ... --output {store.url}` again"
    try:
        data = store.get("leakage.json")
    except NotFound:
        raise StoreError(f"{where} does not exist: run `facemae leakage ... --output {store.url}` first", fatal=True) from None
    try:
        content = json.loads(data)
    except ValueError as error:
        raise StoreError(f"{where} is no JSON ({error}): {again}", fatal=True) from None
    found = (content.get("kind"), content.get("schema")) if isinstance(content, dict) else (None, None)
    if found != ("leakage", SCHEMA):
        raise StoreError(
            f"{where} is {found[0]!r} of schema {found[1]}, this version reads 'leakage' of schema {SCHEMA}: {again}", fatal=True
        )
    try:
        return pydantic.TypeAdapter(Measurement).validate_python(content), data
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise StoreError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}: {again}", fatal=True) from None
