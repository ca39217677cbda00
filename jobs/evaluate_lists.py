"""The lists and folders that ``facemae evaluate`` is given, read and checked before anything is embedded."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.listing import in_order
from cluster.store import StoreError, join_url, open_store, read_url, split_url
from facemae.bin_file import BinFileError, read_bin
from facemae.pairs import PairListError, of_bin, read_cfp, read_pairs
from facemae.template import read_template_names, read_template_pairs, read_templates
from facemae.verification import VerificationError
from jobs.evaluate_images import BinImages, FolderImages
from jobs.evaluate_protocols import IdentificationProtocol, PairProtocol, Protocol, TemplatePairProtocol, TemplateSearchProtocol

if TYPE_CHECKING:
    from jobs.evaluate import EvaluateConfig


class Roots:
    """What each root holds, listed once."""

    def __init__(self) -> None:
        self._listed = dict[str, dict[str, int]]()

    def listed(self, url: str) -> dict[str, int]:
        """Path below the root -> size, in order of paths. Raises StoreError where the root holds nothing."""
        if url not in self._listed:
            self._listed[url] = {stored.key: stored.size for stored in in_order(open_store(url))}
            if not self._listed[url]:
                raise StoreError(f"{url} does not exist, or holds no file: give the folder of the images", fatal=True)
        return self._listed[url]


def open_protocols(config: EvaluateConfig) -> list[Protocol]:
    """Read every list.

    Raises:
        PairListError, TableError, BinFileError: a list cannot be read, or two have one name.
        StoreError: a file or a root is not there.
    """
    roots = Roots()
    found = [*_bins(config), *_pairs(config, roots), *_cfp(config, roots), *_identification(config, roots), *_templates(config, roots)]
    names = [protocol.name for protocol in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PairListError(f"two lists are named {twice[0]!r}, after their files: rename one, so that the table can tell them apart")
    return found


def _bins(config: EvaluateConfig) -> Iterator[Protocol]:
    for file in config.bin:
        data = read_url(file)
        try:
            pairs = of_bin(read_bin(data), file)
        except BinFileError as error:
            raise BinFileError(f"{file}: {error}") from None
        yield _named(file, PairProtocol, _stem(file), "bin", BinImages(file, pairs.images), pairs, _sha256(data))


def _pairs(config: EvaluateConfig, roots: Roots) -> Iterator[Protocol]:
    for file in config.pairs:
        text, sha256 = _text(file)
        root = str(config.images)
        pairs = read_pairs(text, file, roots.listed(root))
        yield _named(file, PairProtocol, _stem(file), "pairs", FolderImages(root, pairs.images, roots.listed(root)), pairs, sha256)


def _cfp(config: EvaluateConfig, roots: Roots) -> Iterator[Protocol]:
    root = config.cfp
    for protocol in config.cfp_protocols if root else ():
        pairs = read_cfp(lambda path: _text(join_url(str(root), path))[0], protocol)
        yield PairProtocol(f"cfp_{protocol.lower()}", "cfp", FolderImages(str(root), pairs.images, roots.listed(str(root))), pairs)


def _identification(config: EvaluateConfig, roots: Roots) -> Iterator[Protocol]:
    root = config.identification
    if not root:
        return
    names = [name for name in roots.listed(root) if "/" in name]
    if beside := len(roots.listed(root)) - len(names):
        print(f"{root}: {beside} files beside the folders of identities are left out: nobody is named by their place", file=sys.stderr)
    _, labels = np.unique([name.rpartition("/")[0] for name in names], return_inverse=True)
    sources = [FolderImages(root, names, roots.listed(root))]
    if config.distractors:
        others = roots.listed(config.distractors)
        sources.append(FolderImages(config.distractors, list(others), others))
        if set(sources[0].keys) & set(sources[1].keys):
            raise PairListError(f"{config.distractors} holds images of {root}: a distractor must be of nobody who is searched for")
        labels = np.append(labels, np.full(len(others), -1))
    yield IdentificationProtocol(f"{_stem(root)}-identification", sources, labels.astype(np.int64))


def _templates(config: EvaluateConfig, roots: Roots) -> Iterator[Protocol]:
    if not config.templates:
        return
    templates = read_templates(_text(config.templates)[0], config.templates)
    images = FolderImages(str(config.images), templates.images, roots.listed(str(config.images)))
    for file in config.template_pairs:
        text, sha256 = _text(file)
        pairs = read_template_pairs(text, file, templates)
        yield _named(file, TemplatePairProtocol, _stem(file), images, templates, pairs, sha256)
    for file in config.template_gallery:
        text, sha256 = _text(file)
        yield TemplateSearchProtocol(_stem(file), images, templates, read_template_names(text, file, templates), sha256)


def _named(file: str, kind: Callable[..., Protocol], *arguments: Any) -> Protocol:
    """A protocol, whose first checks name the file when they fail."""
    try:
        return kind(*arguments)
    except VerificationError as error:
        raise VerificationError(f"{file}: {error}") from None


def _text(file: str) -> tuple[str, str]:
    """The text of a list and the sha256 of its bytes."""
    data = read_url(file)
    try:
        return data.decode(), _sha256(data)
    except UnicodeDecodeError:
        raise PairListError(f"{file} is no text (UTF-8): give a list of pairs; a .bin file belongs to --bin") from None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _stem(file: str) -> str:
    """A file's name without its ending, fit for a table."""
    return re.sub(r"[|\s]+", "_", split_url(file)[1].rpartition(".")[0] or split_url(file)[1])
