"""Random numbers for noise that must not be subtracted again: a function of (seed, key) that nobody computes without the seed.

splitmix64, which chooses masks, is no generator for this: whoever knows part of a picture (a plain background) reads its state off the
noise there, and then has the noise everywhere. SHAKE-128 (FIPS 202) of seed and key has no state that could be read off.
"""

from __future__ import annotations

from hashlib import sha256, shake_128
from typing import Any

import numpy as np

SECRET_SEED = "seed_sha256"
"""The key under which a description has a secret seed's hash, in place of the seed."""
MIN_SEED_BITS = 96
"""A shorter seed can be guessed: its hash is in the lineage, and tells when a guess is right (our reading of "enough")."""


def random_words(purpose: str, key: str, seed: int, count: int) -> np.ndarray:
    """Returns uint64 (count,): SHAKE-128 of purpose, seed and key."""
    # surrogatepass: keys come from tar member names, which need not be valid UTF-8
    digest = shake_128(f"{purpose}/{seed}/{key}".encode("utf-8", "surrogatepass")).digest(8 * count)
    return np.frombuffer(digest, "<u8")


def uniform(words: np.ndarray) -> np.ndarray:
    """uint64 (N,) -> float64 (N,) in (0, 1), neither end: the middle of one of 2^52 equal steps (2^53 would round the last to 1)."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def seed_facts(seed: int) -> dict[str, Any]:
    """What a lineage may say of a seed that must stay secret: its SHA-256, and a warning where it can be guessed from that."""
    facts = {SECRET_SEED: sha256(f"facemae noise seed {seed}".encode()).hexdigest()}
    if abs(seed).bit_length() >= MIN_SEED_BITS:
        return facts
    warning = f"the seed has fewer than {MIN_SEED_BITS} bits: whoever guesses it computes the noise and takes it away again"
    return {**facts, "warning": f"{warning}. For a release give one of 128 random bits or more (facemae protect --secret-seed)"}
