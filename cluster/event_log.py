"""TensorBoard events in memory: a worker that is killed leaves no file behind, and object storage takes whole objects anyway."""

from __future__ import annotations

import io
import time
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

ROLL_BYTES = 16 * 2**20
"""From here on events go to a new file, so that a long run neither holds nor uploads all of its pictures again and again."""


class EventLog:
    """An event file that grows in memory.

    Args:
        first: steps done before; TensorBoard drops what an earlier, dead attempt wrote beyond them.

    Attributes:
        name: of the file; names of later files sort after it.
    """

    def __init__(self, first: int) -> None:
        self._open()
        self._write(step=first + 1, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Add a number."""
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))

    def image(self, name: str, png: bytes, shape: tuple[int, ...], step: int) -> None:
        """Add a PNG of ``shape`` (H, W, 3)."""
        picture = Summary.Image(height=shape[0], width=shape[1], colorspace=shape[2], encoded_image_string=png)
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, image=picture)]))

    def take(self) -> tuple[str, bytes]:
        """The file's name and all of its bytes so far; after a large one a new file begins."""
        name, data = self.name, self._file.getvalue()
        if len(data) > ROLL_BYTES:
            self._open()
        return name, data

    def _open(self) -> None:
        self.name = f"events.out.tfevents.{time.time():017.6f}"
        self._file = io.BytesIO()
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")

    def _write(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
