"""Memory of the C library on a CPU: freed blocks stay in the process instead of going back to the kernel.

A training step allocates and frees the same large tensors again and again. glibc gets each block of 128 KiB to 32 MiB
and more from the kernel by mmap and returns it when it is freed, so every step pays for page faults and for zeroing the
pages anew: 15 to 25 % of a step of GPT-2 124M on two cores (docs/log.md, 2026-11-24). What is kept lies in huge pages,
where Linux gives them to who asks: another 2 % (2026-11-29). Large tensors lie in a heap of our own, since in glibc's a
step takes a fifth to more than twice as much as it asks for (2026-11-29). This is what peers reach with environment
variables or another allocator; here it is part of training on a CPU. It imports the standard library alone, until it is
used.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import platform
import resource
import sys
from collections.abc import Iterator

# mallopt's parameters and glibc's defaults for them (malloc.h, mallopt(3))
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_KEEP = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
_DEFAULTS = ((_MMAP_MAX, 65536), (_TRIM_THRESHOLD, 128 * 1024))
_HUGE_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
_OVERCOMMIT = pathlib.Path("/proc/sys/vm/overcommit_memory")
_MADV_HUGEPAGE, _HUGE_PAGE = 14, 2 << 20  # linux/mman.h; of x86-64, and of no harm where they are of another size
_RESERVE_MAX = 64 << 30
TORCHS_ALLOCATOR = b"libc10.so"  # the library whose allocator tensors come from
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


def policy() -> str:
    """What becomes of memory that is freed while training on a CPU: "native" (large tensors keep it in the native
    library's heap), "glibc" (in the C library's) or "" (it goes where the C library puts it)."""
    if why_not() is not None:
        return ""
    opened = open_heap()
    if opened is None:
        return "glibc"
    opened.tritium_heap_close()
    return "native"


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
    ask_for_huge_pages(libc)
    opened = open_heap()
    try:
        yield all(done)
    finally:
        if opened is not None:
            opened.tritium_heap_close()
        for parameter, value in _DEFAULTS:
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def ask_for_huge_pages(libc: ctypes.CDLL) -> bool:
    """Ask the kernel to back the heap with huge pages, as far as it goes now and as it will grow: half of what is
    available is added to it, as addresses that take no memory until they are used. Returns whether it was asked.

    Call it once freed memory is kept, or the heap shrinks again. Not done where the kernel gives none to who asks, nor
    where addresses count: under strict overcommit, or a limit on address space or data.
    """
    if not (_huge_pages_on_request() and _addresses_are_free()):
        return False
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.free(libc.malloc(min((available_bytes() or 0) // 2, _RESERVE_MAX)))
    for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            begin = -(-begin // _HUGE_PAGE) * _HUGE_PAGE
            return end - begin >= _HUGE_PAGE and libc.madvise(begin, end - begin, _MADV_HUGEPAGE) == 0
    return False


def open_heap() -> ctypes.CDLL | None:
    """Let torch take its large tensors from the native library's own heap (kernels/lib/csrc/heap.cpp), whose holes the
    next step's tensors fit into. Returns the library, whose ``tritium_heap_close`` ends it; None where glibc's heap has
    to do: without the library, where addresses count, or where torch's own allocator is not as the heap knows it."""
    from tritium.kernels.lib import native

    library = native.library()
    if library is None or not _addresses_are_free():
        return None
    # what is beyond that goes to glibc, where the system has a say
    reserve = max(available_bytes() or 0, _HUGE_PAGE) // _HUGE_PAGE * _HUGE_PAGE
    library.tritium_heap_open.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int]
    opened = library.tritium_heap_open(TORCHS_ALLOCATOR, reserve, int(_huge_pages_on_request())) == 0
    return library if opened else None


def heap_bytes() -> tuple[int, int, int]:
    """Of the native heap: bytes that are taken, up to where the last of them ends, and the most of the latter since it
    was opened; zeros where there is none."""
    from tritium.kernels.lib import native

    found = (ctypes.c_int64 * 3)()
    if (library := native.library()) is not None:
        library.tritium_heap_bytes(found)
    return found[0], found[1], found[2]


def _huge_pages_on_request() -> bool:
    try:
        return "[madvise]" in _HUGE_PAGES.read_text()
    except OSError:
        return False


def _addresses_are_free() -> bool:
    """Whether addresses that are asked for cost nothing before they are used: no strict overcommit, no limit."""
    try:
        if _OVERCOMMIT.read_text().strip() == "2":
            return False
    except OSError:
        return False
    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    return all(resource.getrlimit(limit)[0] == resource.RLIM_INFINITY for limit in limits)


def _status_bytes(field: str) -> int | None:
    """A memory figure of this process from /proc (Linux)."""
    path = pathlib.Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def peak_bytes() -> int:
    """The largest resident size of this process so far: VmHWM, since ru_maxrss starts at the *parent's* peak."""
    scale = 1 if sys.platform == "darwin" else 1024
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def resident_bytes() -> int:
    """The resident size of this process now; where the system does not say, its peak so far."""
    return _status_bytes("VmRSS") or peak_bytes()


def available_bytes() -> int | None:
    """What this process may still take of the host's memory: of the system's, and of its control group's and its own
    address space where these have limits. None where the system does not say (other than Linux)."""
    path = pathlib.Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    group = pathlib.Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        used = int((group / "memory.current").read_text())
        found.append(max(0, int((group / "memory.max").read_text()) - used))
    most, taken = resource.getrlimit(resource.RLIMIT_AS)[0], _status_bytes("VmSize")
    if most != resource.RLIM_INFINITY and taken is not None:
        found.append(max(0, most - taken))
    return min(found, default=None)
