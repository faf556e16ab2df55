"""Tensors beyond 2³¹ elements that cost nothing: reserved and never touched, and launches of which one program runs."""

import faulthandler
import mmap
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from triton.runtime import interpreter

from tritium.kernels.lib import triton_launch as launch

NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python's mmap names from 3.13 on
FAR = 2**30  # elements between two rows, the most that a stride of 32 bits leaves in a power of two


def reserved(size: int, dtype: torch.dtype) -> torch.Tensor:
    """(size,) zeros: addresses without memory, of which a page costs something once it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    return torch.frombuffer(mmap.mmap(-1, size * dtype.itemsize, flags=flags), dtype=dtype)


def spread(values: torch.Tensor, *strides: int) -> torch.Tensor:
    """The same values where ``strides`` put them."""
    size = 1 + sum((length - 1) * stride for length, stride in zip(values.shape, strides, strict=True))
    far = reserved(size, values.dtype).as_strided(values.shape, strides)
    far.copy_(values)
    return far


def far_allocations() -> None:
    """From now on torch.empty reserves what is larger than 1 GiB, whatever memory there is."""
    empty = torch.empty

    def reserve(*size, dtype=None, device=None, **options):
        shape = torch.Size(size[0] if size and isinstance(size[0], Sequence) else size)
        if shape.numel() * (dtype or torch.float32).itemsize < 2**30:
            return empty(*size, dtype=dtype, device=device, **options)
        return reserved(shape.numel(), dtype or torch.float32).view(shape)

    torch.empty = reserve


def only(program: Callable[..., tuple[int, ...]] = lambda *grid: tuple(n - 1 for n in grid)) -> None:
    """From now on one program of every launch runs, by default the last; the kernel sees the grid as it is."""
    builder = interpreter.interpreter_builder
    set_dim, set_index = (getattr(type(builder), name).__get__(builder) for name in ("set_grid_dim", "set_grid_idx"))

    def call(self, grid, constants, *args):
        whole = (*grid, 1, 1)[:3]
        place = (*program(*grid), 0, 0)[:3]
        builder.set_grid_dim, builder.set_grid_idx = lambda *_: set_dim(*whole), lambda *_: set_index(*place)
        self.jit[(1,)](*args, **constants)

    launch.Kernel.__call__ = call


def many_processors() -> None:
    """From now on every chunk of a launch has a program of its own."""
    launch.processors = lambda: 2**20


def warm() -> None:
    """Import what autograd and assert_close import when they are first called: once, and not in every child."""
    x = torch.ones(1, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(2 * x, x, torch.ones(1))[0], torch.full((1,), 2.0))


def in_child(work: Callable[[], None]) -> str:
    """What became of ``work`` in a process of its own, since a lost offset may end it: nothing, or what went wrong."""
    warm()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            faulthandler.disable()
            torch.set_num_threads(1)  # the threads of before are not in this process
            work()
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return f"ended by {signal.Signals(status).name}" if status else said


def close(found: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), want.double(), rtol=2e-3, atol=2e-3)


def launcher(module: ModuleType, kernel: str) -> launch.Kernel:
    """The launcher of a kernel of a module."""
    return launch.Kernel(getattr(module, kernel))
