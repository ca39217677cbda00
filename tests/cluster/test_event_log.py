"""Event files made in memory, read back by TensorBoard's own reader."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster import event_log
from cluster.event_log import EventLog


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 16, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_tensorboard_reads_numbers_and_pictures_and_drops_what_a_dead_attempt_wrote_beyond(tmp_path: Path):
    dead, alive = EventLog(0), EventLog(2)
    for step in (1, 2, 3, 4):
        dead.scalar("loss", 10.0 * step, step)
    alive.scalar("loss", 0.5, 3)
    alive.image("faces", png(7), (8, 16, 3), 3)
    for log in (dead, alive):
        name, data = log.take()
        (tmp_path / name).write_bytes(data)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 10.0), (2, 20.0), (3, 0.5)]
    (picture,) = events.Images("faces")
    assert (picture.width, picture.height, picture.encoded_image_string) == (16, 8, png(7))


def test_a_large_file_is_followed_by_another(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(event_log, "ROLL_BYTES", 1000)
    log = EventLog(0)
    log.scalar("loss", 1.0, 1)
    first, data = log.take()
    log.image("faces", b"x" * 1000, (8, 16, 3), 2)
    again, larger = log.take()
    later, small = log.take()
    assert first == again < later
    assert larger.startswith(data)
    assert len(small) < 100
