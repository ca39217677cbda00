"""The stage that turns a source of faces into a data set of aligned JPEGs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cluster.dataset import Labels, ShardData
from cluster.listing import MAX_SHARD_BYTES
from cluster.lookahead import ahead_map, chunks, codec_pool
from cluster.picture import SIZE, PictureError, align
from cluster.processor import Processor, Unit
from cluster.shard import Rejected, Sample, ShardWriter
from cluster.source import Source
from cluster.tar import BLOCK

CHUNK = 64
MAX_ROWS = 100_000
"""Rows of one shard's ledger; a tar of millions of tiny members gets one more row that counts the rest."""
REJECTED = "rejected:"


class _Ledger:
    """The rows of one shard, of bounded number, and exact counts by reason."""

    def __init__(self, shard: str) -> None:
        self._shard, self._rows, self._more = shard, list[Rejected](), 0
        self.counts: Counter[str] = Counter()

    def add(self, row: Rejected) -> None:
        """Take a row, or count it."""
        self.counts[REJECTED + row.reason] += row.num_samples
        if len(self._rows) < MAX_ROWS:
            self._rows.append(row)
        else:
            self._more += row.num_samples

    def rows(self) -> list[Rejected]:
        """The rows, and one for those above the limit."""
        error = f"{self._more} more than the {MAX_ROWS} that are listed; the manifest counts all of them by reason"
        return self._rows + [Rejected(self._shard, "not-listed", error, 0, None, self._more)] * bool(self._more)


class IngestProcessor(Processor[Unit]):
    """Checks every picture of a unit and writes it under a key of our own (``SHARD-NUMBER``), its origin beside it in the ``.json``.

    Args:
        source: where the faces are.
        resize: scale pictures that are not 112 x 112 instead of quarantining them.
        keep_source: write the origin; without it nothing leads from a sample back to its file.
    """

    def __init__(self, source: Source, *, resize: bool = False, keep_source: bool = True) -> None:
        self._source, self._resize, self._keep_source = source, resize, keep_source

    def describe(self) -> dict[str, Any]:
        """The source's description and the options that shape the output."""
        options = {"resize": self._resize, "keep_source": self._keep_source, "size": SIZE}
        return {"stage": "ingest", **self._source.describe(), **options}

    def open(self, threads: int) -> None:
        """Start the codec threads."""
        self._pool, self._ahead = codec_pool(threads), threads + 1

    def fetch(self, unit: Unit) -> Any:
        """What the source reads for this unit."""
        return self._source.fetch(unit)

    def compute(self, unit: Unit, fetched: Any) -> ShardData:
        """Align or refuse each picture, in the source's order. ``counts`` has the samples left out by reason, as ``rejected:REASON``."""
        writer, ledger, kept, size = ShardWriter(), _Ledger(unit.name), 0, 0
        items = enumerate(self._source.samples(unit, fetched))
        named = ((f"{unit.name}-{number:06d}", item) for number, item in items)
        for results in ahead_map(self._pool, self._align_all, chunks(named, CHUNK), self._ahead):
            for result, unchanged in results:
                size += _size(result) if isinstance(result, Sample) else 0
                if isinstance(result, Sample) and size > MAX_SHARD_BYTES:
                    result = Rejected(result.key, "shard-full", f"the shard would have over {MAX_SHARD_BYTES} bytes", 0, result.source)
                if isinstance(result, Rejected):
                    ledger.add(result)
                    continue
                writer.add(result)
                kept += unchanged
        payload = writer.finish() if writer.samples else None
        counts = {"kept_bytes": kept, "reencoded": writer.samples - kept, **ledger.counts}
        return ShardData(payload, writer.samples, Labels.of(writer.labels), ledger.rows(), counts)

    def _align_all(self, items: Sequence[tuple[str, Sample | Rejected]]) -> list[tuple[Sample | Rejected, bool]]:
        return [self._align(key, item) for key, item in items]

    def _align(self, key: str, item: Sample | Rejected) -> tuple[Sample | Rejected, bool]:
        """The sample under its new key, and whether its bytes are the source's own."""
        source = item.source if self._keep_source else None
        if isinstance(item, Rejected):
            return Rejected(key, item.reason, item.error, item.num_bytes, source, item.num_samples), False
        try:
            picture = align(item.image, resize=self._resize)
        except PictureError as error:
            return Rejected(key, error.reason, str(error), len(item.image), source), False
        return Sample(key, picture.jpeg, item.identity, source), picture.kept


def _size(sample: Sample) -> int:
    """What a sample takes in a tar at most: three headers, three paddings, and its source as JSON escapes it."""
    return len(sample.image) + 7 * BLOCK + 6 * len(sample.source or "")
