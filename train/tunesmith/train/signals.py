"""SIGINT and SIGTERM as a wish to stop, heard between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """Whether someone asked for a stop."""

    requested: bool = False


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Note the first signal; the same one again interrupts at once. (Ctrl-C reaches every process
    of a terminal, and whoever started them passes it on as SIGTERM: that is one wish.)

    Does nothing outside the main thread, which alone hears signals.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    heard: set[int] = set()

    def note(number: int, _frame: FrameType | None) -> None:
        if number in heard:
            raise KeyboardInterrupt
        heard.add(number)
        stop.requested = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
