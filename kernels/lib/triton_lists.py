"""One launch over many tensors: the tables such a kernel finds its piece in, and access to elements by address.

The tensors are cut into chunks of CHUNK elements, one program each (or one iteration of a program). Three tables on the
device say where a chunk lies:

    OWNERS     (chunks,) int32: the tensor a chunk belongs to
    LAYOUT     (3, K) int64: elements of each tensor, its first chunk, its dtypes: two bits for each list that is read
               by code, the first list lowest
    ADDRESSES  (lists, K) int64: the first byte of tensor k of each list

The first two hang on shapes and dtypes and are made once. Addresses change (gradients are allocated anew at every
step), so they are the key under which a table is kept: an old one can never be taken for a new one. A new one costs one
copy from pinned memory, which the host does not wait for. Nothing is kept that lies in a CUDA graph's memory
(``keeps``).
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@triton.jit
def piece(OWNERS, LAYOUT, K, chunk, CHUNK: tl.constexpr):
    """(tensor, first element, elements from there to the tensor's end, dtype codes) of a chunk."""
    tensor = tl.load(OWNERS + chunk)
    size = tl.load(LAYOUT + tensor)
    start = (chunk - tl.load(LAYOUT + K + tensor)) * CHUNK
    return tensor, start, size - start, tl.load(LAYOUT + 2 * K + tensor)


@triton.jit
def pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address as a pointer. ALIGNED: it is a multiple of 16 bytes, which lets a thread load so many at once."""
    pointer = address.to(tl.pointer_type(DTYPE), bitcast=True)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(address, at, mask, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """Elements ``at`` of a tensor, in fp32. FAST: the address is aligned and there is no mask."""
    if FAST:
        x = tl.load(pointer(address, DTYPE, True) + at)
    else:
        x = tl.load(pointer(address, DTYPE, False) + at, mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def store(address, at, x, mask, DTYPE: tl.constexpr, FAST: tl.constexpr):
    if FAST:
        tl.store(pointer(address, DTYPE, True) + at, x.to(DTYPE))
    else:
        tl.store(pointer(address, DTYPE, False) + at, x.to(DTYPE), mask)


@triton.jit
def load_coded(address, code, at, mask, FAST: tl.constexpr):
    """``load`` of a dtype that is known by its code in the table only."""
    if code == 0:
        x = load(address, at, mask, tl.float32, FAST)
    elif code == 1:
        x = load(address, at, mask, tl.bfloat16, FAST)
    else:
        x = load(address, at, mask, tl.float16, FAST)
    return x


@triton.jit
def store_coded(address, code, at, x, mask, FAST: tl.constexpr):
    if code == 0:
        store(address, at, x, mask, tl.float32, FAST)
    elif code == 1:
        store(address, at, x, mask, tl.bfloat16, FAST)
    else:
        store(address, at, x, mask, tl.float16, FAST)


# --------------------------------------------------------------------------------------------------------------- tables


class Tables(NamedTuple):
    owners: Tensor
    layout: Tensor
    addresses: Tensor
    tensors: int
    chunks: int


def tables(lists: Sequence[Sequence[Tensor]], coded: Sequence[int], chunk: int) -> Tables:
    """The tables of lists of contiguous tensors on one device; the k-th tensors of all lists have one size.

    coded: the lists whose dtypes the kernel asks for, in the order of their bits; chunk: elements of one.
    """
    first = lists[0]
    device = first[0].device
    codes = [
        sum(CODES[t.dtype] << 2 * i for i, t in enumerate(ts)) for ts in zip(*(lists[i] for i in coded), strict=True)
    ]
    make_layout, make_addresses = _layout, _addresses
    if not keeps(device):
        make_layout, make_addresses = _layout.__wrapped__, _addresses.__wrapped__  # type: ignore[assignment]
    stream = stream_of(device)
    owners, layout = make_layout(device, stream, chunk, tuple([t.numel() for t in first]), tuple(codes))
    addresses = make_addresses(device, stream, tuple([t.data_ptr() for t in chain.from_iterable(lists)]))
    return Tables(owners, layout, addresses, len(first), owners.shape[0])


def stream_of(device: torch.device) -> int:
    """The current stream: what is written to the device is in order for the kernels of its own stream only."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether launches are being recorded into a CUDA graph instead of done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_calls = threading.local()


def keeps(device: torch.device) -> bool:
    """Whether what is made for a launch may be kept for later ones. Not while launches are recorded: it has not been
    written yet, and is the graph's. Not in a call that ``keeping_nothing`` made."""
    return not getattr(_calls, "keep_nothing", False) and not capturing(device)


def keeping_nothing(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """A launcher for the library to call: within, nothing is kept.

    A compiled model calls ops through the library, and torch may then allocate from the memory of CUDA graphs although
    nothing is recorded: torch.compile's mode reduce-overhead warms up so. When a graph is recorded or replayed, torch
    takes as free what is there and is no result of a graph; it looks for such tensors, and raises for one. Eager calls
    never run in there.
    """

    @wraps(launcher)
    def launched(*args: Any) -> Any:
        before, _calls.keep_nothing = getattr(_calls, "keep_nothing", False), True
        try:
            return launcher(*args)
        finally:
            _calls.keep_nothing = before

    return launched


@lru_cache(maxsize=32)
def _layout(
    device: torch.device, stream: int, chunk: int, sizes: tuple[int, ...], codes: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    counts = [-(-size // chunk) for size in sizes]
    layout = array("q", chain(sizes, accumulate(counts[:-1], initial=0), codes))
    programs = sum(counts)
    owners = torch.repeat_interleave(
        torch.arange(len(sizes), dtype=torch.int32), torch.tensor(counts), output_size=programs
    )
    if programs >= 2**31:
        raise ValueError(f"{sum(sizes)} elements are more chunks of {chunk} than a launch may have programs")
    return _upload(owners, device), _upload(torch.frombuffer(layout, dtype=torch.int64), device)


@lru_cache(maxsize=32)
def _addresses(device: torch.device, stream: int, addresses: tuple[int, ...]) -> Tensor:
    return _upload(torch.frombuffer(array("q", addresses), dtype=torch.int64), device)


# The host's side of copies in CUDA graphs, which read it at every replay. Nobody says when a graph has gone, so it is
# kept for good: 8 bytes a list and tensor for each time that a step is recorded, not replayed; 10 KB for GPT-2's adamw.
_recorded: list[Tensor] = []


def _upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. Pinned memory returns to torch's own pool, which gives it out again only when the copy has
    been done."""
    if device.type == "cuda":
        host = host.pin_memory()
        if capturing(device):
            _recorded.append(host)
    return host.to(device, non_blocking=True)
