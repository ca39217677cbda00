"""A Ray session: the cluster that is there, or a local one on loopback for as long as a job runs."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import ray

from cluster.log import ray_options
from cluster.scheduler import Interrupted


@contextlib.contextmanager
def session(address: str | None = None, num_cpus: int | None = None) -> Iterator[None]:
    """Connect to Ray for the duration of the block.

    A session that is already open is used and left open. Otherwise ``address`` (or ``RAY_ADDRESS``, which Ray sets inside a submitted
    job) names a running cluster; without either a local Ray is started on loopback, guarded by Ray's token, and stopped at the end.

    Raises:
        ConnectionError: no cluster answers at the address, or a local Ray did not start in time.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is None:
        # Ray rewrites 127.0.0.1 to the machine's outer address; another loopback address it keeps
        with _explained():
            ray.init(num_cpus=num_cpus, include_dashboard=False, _node_ip_address="127.0.0.2", **ray_options())
    else:
        ray.init(address=address, **ray_options())
    try:
        with _stopping():
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """A local Ray that is too slow to start raises a bare Exception: on a machine with other things to do, an ordinary error."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it says nothing"
        raise ConnectionError(f"a local Ray did not start: {reason}; run the same command again when the machine has less to do") from error


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """SIGTERM raises Interrupted also where no stage drains: Ray's own handler, set when it starts, would end the process with a dump.

    Raised in the midst of Ray's C code it comes out as some other error; that is still the stop that was asked for.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    stop = Interrupted("stopped as asked; run the same command to go on")
    asked = False

    def handle(_number: int, _frame: Any) -> NoReturn:
        nonlocal asked
        asked = True
        raise stop

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except Exception as error:
        if not asked or isinstance(error, Interrupted):
            raise
        raise stop from error
    finally:
        signal.signal(signal.SIGTERM, before)
