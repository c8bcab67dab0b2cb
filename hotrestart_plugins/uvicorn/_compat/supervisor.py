"""The inside of uvicorn's supervisor of several workers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Sequence

from uvicorn.supervisors import Multiprocess, multiprocess

Process = multiprocess.Process
"""uvicorn's handle of a worker process."""


@contextlib.contextmanager
def processes_made_by(factory: Callable[..., Process]) -> Iterator[None]:
    """Have uvicorn's supervisor make our processes: it looks its class up in its module."""
    original = multiprocess.Process
    multiprocess.Process = factory  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        multiprocess.Process = original  # type: ignore[misc]


def processes(supervisor: Multiprocess) -> Sequence[Process]:
    """Return the worker processes, those that have ended included."""
    return supervisor.processes


def number_of_workers(supervisor: Multiprocess) -> int:
    """How many workers the supervisor wants to have."""
    return supervisor.processes_num


def go_on_with(supervisor: Multiprocess, left: list[Process]) -> None:
    """Have the supervisor want these workers and no others."""
    supervisor.processes = left
    supervisor.processes_num = len(left)


def exit_status(process: Process) -> int | None:
    """The exit status of a worker, or None while it runs."""
    return process.process.exitcode


def kill(process: Process) -> None:
    """Send SIGKILL to a worker; the supervisor notices its end as usual."""
    process.process.kill()


def take_signals(supervisor: Multiprocess, spared: Container[int]) -> list[int]:
    """Return the signals that have come and were not handled yet, but the spared, and drop them."""
    taken = [number for number in supervisor.signal_queue if number not in spared]
    for number in taken:
        supervisor.signal_queue.remove(number)
    return taken


def is_told_to_stop(supervisor: Multiprocess, stops: Container[int]) -> bool:
    """Whether the supervisor exits, or will: it looks at its signals twice a second."""
    waiting = any(number in stops for number in supervisor.signal_queue)
    return waiting or supervisor.should_exit.is_set()


def close_listeners(supervisor: Multiprocess) -> None:
    """Close the supervisor's copies of the listeners; a worker started later gets none."""
    for sock in supervisor.sockets:
        sock.close()
    supervisor.sockets.clear()
