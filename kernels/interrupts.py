"""Ctrl-C while other processes are started."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Processes started within never get SIGINT, not even while they import; this one gets at the end what came.

    A terminal sends Ctrl-C to the whole group, but it is the parent that decides what ends and how. Blocking the signal
    is enough for the children, who inherit it from this thread. It is not for this process: any other thread that does
    not block it (OpenBLAS's, say) takes the signal, and Python then interrupts its main thread, blocked or not, perhaps
    halfway through starting a child. So the main thread has a handler that waits, too.

    Start ``multiprocessing.resource_tracker`` before: starting it unblocks the signal.
    """
    came: list[int] = []
    takes = threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT))
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number)) if takes else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if takes:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if came:
            signal.raise_signal(signal.SIGINT)
