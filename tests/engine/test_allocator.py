"""Freed memory stays in the process while training, and goes back afterwards."""

import contextlib
import os
import platform
import subprocess
import sys

import pytest
import torch

from tritium.engine import allocator, precision, train
from tritium.engine.config import Config, ConfigError

FAULTS = """
import resource
import torch
from tritium.engine import allocator

def faults():  # minor page faults of ten rounds of what a step does: allocate 64 MiB, write, free
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(16 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS:"))

given_back = faults()
with allocator.freed_memory_kept() as kept:
    held = min(faults() for _ in range(5))  # once every size has found its place in the heap
    inside = resident()
print(kept, given_back, held, inside - resident())
"""


def run(**environment):
    command = [sys.executable, "-P", "-c", FAULTS]
    clean = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", *allocator._USERS)}
    said = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True).stdout.split()
    return said[0] == "True", *map(int, said[1:])


def test_freed_memory_is_kept_inside_and_given_back_afterwards():
    kept, given_back, held, returned_kib = run()
    assert kept == (platform.libc_ver()[0] == "glibc")
    if not kept:
        return
    assert given_back > 10 * 30  # at the least a fault for every huge page
    assert held < given_back / 20
    assert returned_kib > 60 << 10


HUGE = """
import pathlib, resource, sys
import torch
from tritium.engine import allocator

def heap(field):  # of glibc's heap and of ours
    sizes, inside = 0, False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = line.rstrip().endswith("[heap]") or (len(line.split()) == 5 and end - begin > 1 << 30)
        elif inside and line.startswith(field + ":"):
            sizes += int(line.split()[1]) << 10
    return sizes

if len(sys.argv) > 1:
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 36, 1 << 36))
before = allocator.resident_bytes()
with allocator.freed_memory_kept():
    grown = allocator.resident_bytes() - before
    tensors = [torch.ones(1 << 18) for _ in range(256)]
    print(heap("AnonHugePages"), grown, heap("Size"))
"""


def huge(*arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", *allocator._USERS)}
    command = [sys.executable, "-P", "-c", HUGE, *arguments]
    said = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True).stdout
    return [int(part) for part in said.split()]


def test_what_is_kept_lies_in_huge_pages_where_linux_gives_them_and_takes_no_memory_before_it_is_used():
    """256 MiB in tensors of 1 MiB, each smaller than a huge page."""
    enabled, overcommit = allocator._HUGE_PAGES, allocator._OVERCOMMIT
    given = enabled.exists() and "[madvise]" in enabled.read_text() and overcommit.read_text().strip() != "2"
    pages, grown, size = huge()
    assert grown < 32 << 20
    if given and allocator.why_not() is None:
        assert pages > 128 << 20 and size > 1 << 30
        limited, _, size = huge("limited")
        assert limited < 32 << 20 and size < 1 << 30
    assert huge(MALLOC_TRIM_THRESHOLD_="1000000")[0] < 32 << 20  # what the user set stays


LIMITED = """
import resource
from tritium.engine import allocator
free = allocator.available_bytes()
taken = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 26), taken + (1 << 26)))
print(free, allocator.available_bytes())
"""


def test_what_is_available_is_the_least_of_all_limits():
    said = subprocess.run([sys.executable, "-P", "-c", LIMITED], capture_output=True, text=True, check=True).stdout
    free, limited = map(int, said.split())
    assert 0 < limited <= 1 << 26 < free


def test_what_the_user_set_stays():
    kept, _, _, _ = run(MALLOC_TRIM_THRESHOLD_="1000000")
    assert not kept
    assert not run(GLIBC_TUNABLES="glibc.malloc.arena_max=1")[0]


def test_training_on_a_cpu_keeps_it(monkeypatch):
    asked = []
    monkeypatch.setattr(allocator, "freed_memory_kept", lambda on=True: asked.append(on) or _nothing())
    for device in ("cpu", "cuda"):
        with train.settings(Config(), torch.device(device)):
            pass
    assert asked == [True, False]


class _nothing:
    def __enter__(self):
        return False

    def __exit__(self, *exc):
        return None


@pytest.mark.parametrize(("gain", "wanted"), [(0.5, torch.float32), (4.0, torch.bfloat16), (0.0, torch.float32)])
def test_auto_precision_is_what_multiplies_faster(monkeypatch, gain, wanted):
    monkeypatch.setattr(precision, "bf16_gain_on_cpu", lambda: gain)
    assert precision.resolve("auto", torch.device("cpu")) == wanted
    assert precision.resolve("bf16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"OMP_DYNAMIC": "TRUE"}, "OMP_DYNAMIC=true lets OpenMP"),
        ({"OMP_THREAD_LIMIT": "1"}, "OMP_THREAD_LIMIT=1 is below the 2 threads"),
        ({"OMP_DYNAMIC": "false", "OMP_THREAD_LIMIT": "2"}, None),
        ({"OMP_DYNAMIC": "", "OMP_THREAD_LIMIT": "2147483647"}, None),
    ],
)
def test_bf16_with_threads_withheld_is_refused(monkeypatch, given, refused):
    """oneDNN's products leave out what the threads that did not come should have computed."""
    for name in ("OMP_DYNAMIC", "OMP_THREAD_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(precision, "bf16_gain_on_cpu", lambda: 4.0)
    for asked in ("auto", "bf16", "fp8"):
        with pytest.raises(ConfigError, match=refused) if refused else contextlib.nullcontext():
            assert precision.resolve(asked, torch.device("cpu")) == torch.bfloat16
    assert precision.resolve("fp32", torch.device("cpu")) == torch.float32
    assert precision.resolve("bf16", torch.device("cuda")) == torch.bfloat16


def test_the_gain_of_bf16_is_measured_without_touching_the_random_state():
    before = torch.get_rng_state()
    gain = precision.bf16_gain_on_cpu()
    assert torch.equal(torch.get_rng_state(), before)
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert (0.02 < gain < 50) if fast else gain == 0.0


REPLAY = """
import random
import torch
from tritium.engine import allocator, plan

named, allocator.TORCHS_ALLOCATOR = allocator.TORCHS_ALLOCATOR, b"libno.so"
assert allocator.policy() == "glibc"  # no such library
allocator.TORCHS_ALLOCATOR = named
r, alive = random.Random(0), {}
with allocator.freed_memory_kept():
    model = plan.Heap(64, header=64, split=64)
    begun, top, _ = allocator.heap_bytes()
    assert (begun, top) == (0, 0), (begun, top)
    for key in range(3000):
        if alive and r.random() < (0.3 if key % 1000 < 500 else 0.7):
            gone = r.choice(sorted(alive))
            tensor = alive.pop(gone)
            assert int(tensor[0]) == int(tensor[-1]) == gone, "one block lies in another"
            del tensor
            model.give(gone)
        else:
            size = int(2 ** r.uniform(18, 22)) if r.random() < 0.8 else 1 << 20
            alive[key] = torch.empty(size // 4, dtype=torch.int32)
            alive[key][0] = alive[key][-1] = key
            model.take(key, alive[key].nbytes)
        taken, top, most = allocator.heap_bytes()
        assert (top, most) == (model.top, model.size), (key, top, most, model.top, model.size)
        assert taken == sum(length for _, length in model.taken.values())
    small = torch.empty((1 << 18) - 4, dtype=torch.uint8), torch.empty(1 << 18, dtype=torch.uint8)
    assert allocator.heap_bytes()[0] == taken + (1 << 18) + 64  # the first is glibc's
    try:
        torch.empty(1 << 50, dtype=torch.uint8)
    except RuntimeError as error:
        assert "memory" in str(error)
    else:
        raise AssertionError("a petabyte was given")
print("as planned")
"""

THREADS = """
import ctypes
import multiprocessing
import threading
import torch
from tritium.engine import allocator
from tritium.kernels.lib import native

heap, found = native.library(), (ctypes.c_int64 * 3)()
torch.set_num_threads(1)  # OpenMP's threads are not there in a child of a fork, and are waited for

def work(number, rounds):
    kept = []
    for i in range(50 * rounds):  # with the interpreter's lock let go
        heap.tritium_heap_bytes(found)
        torch.empty(1 << 18 + i % 3, dtype=torch.uint8)
    for i in range(rounds):
        kept.append(torch.full((70_000 + 1000 * (i * 7 % 13),), number, dtype=torch.int32))
        if len(kept) > 5:
            old = kept.pop(i % 5)
            assert bool((old == number).all())

def child():
    work(99, 50)

with allocator.freed_memory_kept():
    mine = torch.full((100_000,), 7)
    threads = [threading.Thread(target=work, args=(number, 400)) for number in range(4)]
    for thread in threads:
        thread.start()
    children = [multiprocessing.get_context("fork").Process(target=child) for _ in range(6)]
    for process in children:  # while threads hold the heap's lock now and then
        process.start()
    for process in children:
        process.join(60)
    assert [process.exitcode for process in children] == [0] * 6
    for thread in threads:
        thread.join()
    assert bool((mine == 7).all())
    with allocator.freed_memory_kept():
        pass
    other = torch.zeros(1 << 25)  # still the heap's, though an inner block has ended
    assert allocator.heap_bytes()[0] > 1 << 27
    resident = allocator.resident_bytes()
assert bool((mine == 7).all()) and allocator.heap_bytes()[0] > 1 << 27
del other
assert allocator.heap_bytes()[0] < 1 << 22 and resident - allocator.resident_bytes() > 100 << 20
late = torch.zeros(1 << 20)
assert allocator.heap_bytes()[0] < 1 << 22  # taken from glibc, as before
print("held")
"""


OWNERS = """
import io
import numpy
import torch
from tritium.engine import allocator

N = 1 << 18
with allocator.freed_memory_kept():
    kept = torch.arange(N).numpy()  # numpy's from now on
    assert allocator.heap_bytes()[0] == 8 * N + 64
    taken = torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(torch.arange(N)))
    grown = torch.arange(N).resize_(2 * N)
    shared = torch.arange(N).share_memory_()
    file = io.BytesIO()
    torch.save(taken, file)
    file.seek(0)
    for tensor in (torch.from_numpy(kept), taken, grown[:N], shared, torch.load(file)):
        assert torch.equal(tensor, torch.arange(N))
    grown.untyped_storage().resize_(0)
    torch.from_numpy(numpy.ones(N)).sum()  # numpy's own memory is freed by numpy
    del tensor, taken, grown, shared
    assert allocator.heap_bytes()[0] == 8 * N + 64, allocator.heap_bytes()
assert int(kept.sum()) == N * (N - 1) // 2
del kept
assert allocator.heap_bytes()[:2] == (0, 0)
print("each its own")
"""


@pytest.mark.parametrize(
    ("program", "said"),
    [(REPLAY, "as planned"), (THREADS, "held"), (OWNERS, "each its own")],
    ids=["replay", "threads", "owners"],
)
def test_the_native_heap(program, said):
    """Large tensors lie where plan.Heap says, none in another, with threads and forks too; at the end memory goes."""
    if allocator.policy() != "native":
        pytest.skip("glibc's heap has to do here")
    clean = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", *allocator._USERS)}
    done = subprocess.run([sys.executable, "-P", "-c", program], env=clean, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == said, done.stderr


def test_without_the_native_heap_glibc_keeps_it(monkeypatch):
    from tritium.kernels.lib import native

    if allocator.why_not() is not None:
        return
    assert allocator.policy() in ("native", "glibc")
    monkeypatch.setattr(native, "library", lambda: None)
    assert allocator.policy() == "glibc" and allocator.heap_bytes() == (0, 0, 0)
    with allocator.freed_memory_kept() as kept:
        assert kept
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert allocator.policy() == ""
