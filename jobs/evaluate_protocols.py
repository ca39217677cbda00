"""The protocols of ``facemae evaluate``: what a list or a folder asks of a recogniser, judged by embeddings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from facemae.identification import Split, identify
from facemae.pairs import PairList
from facemae.template import Templates
from facemae.verification import Roc, Verification, file_folds, require_both_kinds, squared_distances, verify
from jobs.evaluate_images import Images


class Protocol(ABC):
    """What one list or folder asks of a recogniser.

    Attributes:
        name: the list's file name without its ending.
        kind: "bin", "pairs", "cfp", "identification", "template-pairs" or "template-identification".
        sources: where its images are.
        keys: of all its images.
        absent: keys of which there is no image.
        sha256: of the list's bytes; None for a folder.
    """

    def __init__(self, name: str, kind: str, sources: Sequence[Images], sha256: str | None = None) -> None:
        self.name, self.kind, self.sources, self.sha256 = name, kind, sources, sha256
        self.keys = [key for source in sources for key in source.keys]
        self.absent = [key for source in sources for key in source.absent()]

    def describe(self, present: np.ndarray) -> dict[str, Any]:
        """What evaluate.json says of it beside its results; ``present`` as in ``score``."""
        unreadable = int(np.count_nonzero(~present)) - len(self.absent)
        counts = {"images": len(present), "images_absent": len(self.absent), "images_unreadable": unreadable}
        return {"name": self.name, "kind": self.kind, "list_sha256": self.sha256, **counts}

    @abstractmethod
    def score(self, vectors: np.ndarray, present: np.ndarray) -> dict[str, Any]:
        """The figures, JSON-able, from unit rows float32 (I, D) of ``keys`` and bool (I,), which of them there are.

        Raises:
            VerificationError: too little is there to measure anything.
        """


class PairProtocol(Protocol):
    """1:1 verification of a list of pairs."""

    def __init__(self, name: str, kind: str, images: Images, pairs: PairList, sha256: str | None = None) -> None:
        super().__init__(name, kind, [images], sha256)
        require_both_kinds(pairs.same)  # before the images are embedded
        self._pairs = pairs
        self._fold = file_folds(len(pairs)) if pairs.fold is None else pairs.fold  # before anything is left out

    def score(self, vectors: np.ndarray, present: np.ndarray) -> dict[str, Any]:
        """Accuracy in folds and the ROC."""
        usable = self._pairs.usable(present)
        pairs = self._pairs.chosen(usable)
        found = verify(squared_distances(vectors, pairs.left, pairs.right), pairs.same, self._fold[usable])
        return {"pairs": len(pairs), "pairs_left_out": int(np.count_nonzero(~usable)), **found.to_json()}


class IdentificationProtocol(Protocol):
    """1:N search in a folder of identities. ``identities`` int64 (I,) is the label of each image, -1 for a distractor."""

    def __init__(self, name: str, sources: Sequence[Images], identities: np.ndarray) -> None:
        super().__init__(name, "identification", sources)
        self._identities = identities

    def score(self, vectors: np.ndarray, present: np.ndarray) -> dict[str, Any]:
        """One image of each identity is the gallery, its others are probes; people with one image join the distractors."""
        rows = np.flatnonzero(present & (self._identities >= 0))
        labels = self._identities[rows]
        split = Split.of(labels)
        others = np.concatenate([rows[split.single], np.flatnonzero(present & (self._identities < 0))])
        found = identify(
            vectors[rows[split.gallery]], labels[split.gallery], vectors[rows[split.probes]], labels[split.probes], vectors[others]
        )
        return {**found.to_json(), "single_image_identities": len(split.single)}


class TemplatePairProtocol(Protocol):
    """1:1 verification of templates."""

    def __init__(self, name: str, images: Images, templates: Templates, pairs: tuple[np.ndarray, ...], sha256: str) -> None:
        super().__init__(name, "template-pairs", [images], sha256)
        require_both_kinds(pairs[2])
        self._templates, self._pairs = templates, pairs

    def score(self, vectors: np.ndarray, present: np.ndarray) -> dict[str, Any]:
        """The ROC; these lists have no folds."""
        pooled, full = self._templates.pool(vectors, present)
        left, right, same = self._pairs
        usable = full[left] & full[right]
        found = Verification(Roc.of(squared_distances(pooled, left[usable], right[usable]), same[usable]), None)
        counts = {"templates": len(full), "templates_left_out": int(np.count_nonzero(~full))}
        return {"pairs": int(usable.sum()), "pairs_left_out": int(np.count_nonzero(~usable)), **counts, **found.to_json()}


class TemplateSearchProtocol(Protocol):
    """1:N search of templates: those of the gallery list, and all others as probes."""

    def __init__(self, name: str, images: Images, templates: Templates, gallery: np.ndarray, sha256: str) -> None:
        super().__init__(name, "template-identification", [images], sha256)
        self._templates, self._gallery = templates, gallery

    def score(self, vectors: np.ndarray, present: np.ndarray) -> dict[str, Any]:
        """Ranks and the open set; a probe whose subject the gallery does not hold is a stranger."""
        pooled, full = self._templates.pool(vectors, present)
        _, labels = np.unique(self._templates.subjects, return_inverse=True)
        listed = np.isin(np.arange(len(full)), self._gallery)
        gallery, probes = np.flatnonzero(full & listed), np.flatnonzero(full & ~listed)
        found = identify(pooled[gallery], labels[gallery], pooled[probes], labels[probes], pooled[:0])
        return {**found.to_json(), "templates": len(full), "templates_left_out": int(np.count_nonzero(~full))}
