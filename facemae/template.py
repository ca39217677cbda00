"""IJB-style templates: several images of a person, from stills and video, as one embedding.

A template's embedding is the mean of its media's embeddings, a medium's the mean of its images' (Klare et al., CVPR 2015, and all IJB
protocols since; a video's thousand frames then weigh as much as one still), divided by its length. Images count with unit length (our
reading: InsightFace's script can also weigh them by the length that the network gave them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from facemae.pairs import PairListError, require_inside, truth
from facemae.table import read_table
from facemae.verification import unit_rows


@dataclass(frozen=True)
class Templates:
    """Which images make which template.

    Attributes:
        names, subjects: of the T templates, in order of first use.
        images: the distinct images, by path below a root.
        image, medium: int64 (R,), of each row of the list: its image, and its medium.
        template: int64 (M,), the template of each medium.
    """

    names: Sequence[str]
    subjects: Sequence[str]
    images: Sequence[str]
    image: np.ndarray
    medium: np.ndarray
    template: np.ndarray

    def pool(self, vectors: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings of the templates.

        Args:
            vectors: float32 (I, D), of the images.
            present: bool (I,), which of them there are; a template is made of those that are there.

        Returns:
            float32 (T, D) unit rows, zeros for a template without an image, and bool (T,), which have one.

        Raises:
            VerificationError: a template's images cancel each other out, or an embedding is not finite.
        """
        rows = present[self.image]
        media, some = _means(vectors[self.image[rows]], self.medium[rows], len(self.template))
        pooled, full = _means(media[some], self.template[some], len(self.names))
        found = np.zeros(pooled.shape, np.float32)
        found[full] = unit_rows(pooled[full], "template embeddings")
        return found, full

    def numbers(self) -> Mapping[str, int]:
        """Name -> number of a template."""
        return {name: number for number, name in enumerate(self.names)}


def read_templates(text: str, where: str) -> Templates:
    """A CSV of columns template, subject, image[, media]: a row an image. Without media, or where it is empty, each image is a medium of
    its own; media of one name in two templates are two.

    Raises:
        PairListError, TableError: columns or values are missing, there is no row, a template has two
            subjects, or an image's path leads out of the root.
    """
    subjects, numbers, images = dict[str, str](), dict[str, int](), dict[str, int]()
    media, rows = dict[tuple[str, ...], int](), list[tuple[int, int]]()
    for place, (template, subject, image, medium) in read_table(text, where, ("template", "subject", "image"), ("media",)):
        if subjects.setdefault(template, subject) != subject:
            raise PairListError(f"{place}: template {template!r} is of {subjects[template]!r} and of {subject!r}: it must be of one person")
        numbers.setdefault(template, len(numbers))
        number = images.setdefault(require_inside(image, place), len(images))
        key = (template, "media", medium) if medium else (template, "row", str(len(rows)))
        rows.append((number, media.setdefault(key, len(media))))
    image_of, medium_of = np.array(rows, np.int64).T
    owner = np.array([numbers[key[0]] for key in media], np.int64)
    return Templates(list(numbers), list(subjects.values()), list(images), image_of, medium_of, owner)


def read_template_pairs(text: str, where: str, templates: Templates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A CSV of columns t1, t2, same.

    Returns:
        int64 (N,), int64 (N,) numbers of templates, and bool (N,).

    Raises:
        PairListError, TableError: columns are missing, there is no row, a template is not known, or a row contradicts the
            templates' subjects.
    """
    numbers, left, right, same = templates.numbers(), list[int](), list[int](), list[bool]()
    for place, (a, b, value) in read_table(text, where, ("t1", "t2", "same")):
        one, other = (_known(numbers, name, place) for name in (a, b))
        left.append(one)
        right.append(other)
        same.append(truth(value, place))
        if same[-1] != (templates.subjects[one] == templates.subjects[other]):
            raise PairListError(f"{place}: same is {value}, and the subjects of {a} and {b} say otherwise: mend one of the two lists")
    return np.array(left, np.int64), np.array(right, np.int64), np.array(same, bool)


def read_template_names(text: str, where: str, templates: Templates) -> np.ndarray:
    """A CSV with a column template: the templates of a gallery, int64 (G,).

    Raises:
        PairListError, TableError: the column is missing, there is no row, or a template is not known or listed twice.
    """
    numbers = templates.numbers()
    found = [_known(numbers, name, place) for place, (name,) in read_table(text, where, ("template",))]
    if len(set(found)) < len(found):
        raise PairListError(f"{where} lists a template twice")
    return np.array(found, np.int64)


def _means(vectors: np.ndarray, group: np.ndarray, num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of each group's rows, float64 (G, D), zeros for an empty one, and bool (G,), which are not empty."""
    sums = np.zeros((num_groups, vectors.shape[1]))
    np.add.at(sums, group, vectors)
    counts = np.bincount(group, minlength=num_groups)
    return sums / np.maximum(counts, 1)[:, None], counts > 0


def _known(numbers: Mapping[str, int], name: str, place: str) -> int:
    if name not in numbers:
        raise PairListError(f"{place} names the template {name[:80]!r}, which the list of templates does not have")
    return numbers[name]
