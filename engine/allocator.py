"""Memory of the C library on a CPU: freed blocks stay in the process instead of going back to the kernel.

A training step allocates and frees the same large tensors again and again. glibc gets each block of 128 KiB to 32 MiB
and more from the kernel by mmap and returns it when it is freed, so every step pays for page faults and for zeroing the
pages anew: 15 to 25 % of a step of GPT-2 124M on two cores (docs/log.md, 2026-11-24). This is what peers reach with an
environment variable or another allocator; here it is part of training on a CPU. It imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator

# mallopt's parameters and glibc's defaults for them (malloc.h, mallopt(3))
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_KEEP = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
_DEFAULTS = ((_MMAP_MAX, 65536), (_TRIM_THRESHOLD, 128 * 1024))
_USERS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD")


def why_not() -> str | None:
    """Why freed memory is left to the C library's own policy, or None when it can be kept."""
    if platform.libc_ver()[0] != "glibc":
        return "the C library is not glibc"
    for name in _USERS:
        if os.environ.get(name):
            return f"{name} is set, and what the user chose stays"
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return "GLIBC_TUNABLES sets malloc, and what the user chose stays"
    return None


@contextlib.contextmanager
def freed_memory_kept(on: bool = True) -> Iterator[bool]:
    """For the duration, memory that is freed stays in the process for the next allocation; yields whether it does.

    At the end glibc's defaults hold again and what is unused goes back. Does nothing where ``why_not()`` has a reason.
    """
    if not on or why_not() is not None:
        yield False
        return
    libc = ctypes.CDLL(None)
    done = [libc.mallopt(parameter, value) for parameter, value in _KEEP]
    try:
        yield all(done)
    finally:
        for parameter, value in _DEFAULTS:
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
