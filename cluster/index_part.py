"""Second half of building an index: the rows of one part out of every shard of the intermediate set."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.cell_rows import CellRows, GroupReader
from cluster.dataset import Dataset, Labels, ShardData
from cluster.processor import Processor, Unit


class PartProcessor(Processor[Unit]):
    """Gathers the rows of one part, sorted by cell and number.

    Args:
        cells_url: the intermediate set.
        description: what determines the index.
    """

    def __init__(self, cells_url: str, description: Mapping[str, object]) -> None:
        self._url, self._description = cells_url, dict(description)

    def describe(self) -> dict[str, object]:
        """The index's description."""
        return {"stage": "index", **self._description}

    def open(self, threads: int) -> None:
        """Read the manifests of the intermediate set."""
        dataset = Dataset(self._url, ".parquet")
        self._reader, self._manifests = GroupReader(dataset), dataset.manifests()

    def fetch(self, unit: Unit) -> list[CellRows]:
        """This part's rows of every shard."""
        found = (self._reader.read(manifest, int(unit.name)) for manifest in self._manifests)
        return [rows for rows in found if rows is not None]

    def compute(self, unit: Unit, fetched: list[CellRows]) -> ShardData:
        """The part."""
        if not fetched:
            return ShardData(None, 0, Labels())
        rows = CellRows.merge(fetched)
        sink = pa.BufferOutputStream()
        pq.write_table(rows.to_table(), sink, compression="none", use_dictionary=False)
        return ShardData(sink.getvalue().to_pybytes(), len(rows), Labels.of(rows.rows.identities.tolist()))
