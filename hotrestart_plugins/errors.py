"""Every error that this package raises on purpose.

::

    HotRestartError
    ├── ConfigurationError          for you to fix: an option, an address, a directory
    │   ├── AddressError            an address that is none, or cannot be bound
    │   └── RendezvousError       a meeting directory that cannot be trusted or used
    ├── MessageError                bytes from the other side that are no message
    ├── LifecycleError              a fault of ours: an event in a state where it cannot come
    └── TakeoverError               the takeover did not happen; the parent serves on
        ├── Overtaken               a newer instance was started, and takes over instead
        ├── Busy                    another takeover is under way
        ├── NoAnswer                the parent lives, but did not answer in time
        ├── ParentGone              the parent ended in the middle of the takeover
        ├── WrongPeer               somebody else answered, or asked
        ├── WrongDescriptor         what came is not the listener that was asked for
        └── NotReady                the app did not start, or not in time

Each is one line: what, its value, and the way out.
"""

from __future__ import annotations


class HotRestartError(Exception):
    """The root: catch this to catch all of them."""

    status = 70  # EX_SOFTWARE, sysexits(3)
    """With what a process that fails because of this exits."""


class ConfigurationError(HotRestartError):
    """A setting that cannot work; starting again without a change fails again."""

    status = 78  # EX_CONFIG, sysexits(3)


class AddressError(ConfigurationError):
    """An address that cannot be understood or bound."""


class RendezvousError(ConfigurationError):
    """The meeting directory cannot be made, trusted or used."""


class MessageError(HotRestartError):
    """A datagram that is none of the three messages. The receiver drops it and goes on."""


class LifecycleError(HotRestartError):
    """An event was reported in a state in which it cannot come: a fault in this package."""


class TakeoverError(HotRestartError):
    """This instance could not take over. The running one goes on serving; try again."""

    status = 75  # EX_TEMPFAIL, sysexits(3)


class Overtaken(TakeoverError):
    """A newer instance was started while this one waited or booted: it takes over instead."""

    status = 0  # nothing has failed, and whoever restarts what fails shall not restart this

    def __init__(self, pid: int) -> None:
        """`pid`: of the newer instance; 0 if it is in another pid namespace."""
        super().__init__(f"Overtaken by pid {pid}")
        self.pid = pid


class Busy(TakeoverError):
    """Another instance was taking over for longer than this one would wait."""


class NoAnswer(TakeoverError):
    """The parent lives but did not answer within the deadline."""


class ParentGone(TakeoverError):
    """The parent ended before it had answered. `HotRestart` itself recovers from this."""


class WrongPeer(TakeoverError):
    """The kernel names a user as the sender that is neither this one nor root."""


class WrongDescriptor(TakeoverError):
    """A descriptor came that is no listening stream socket, or is bound elsewhere."""


class NotReady(TakeoverError):
    """The app failed to start, or was not ready within the ready timeout."""

    status = 3  # uvicorn's STARTUP_FAILURE, gunicorn's WORKER_BOOT_ERROR
