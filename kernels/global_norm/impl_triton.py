"""global_norm in Triton: one launch over all tensors, every element read once.

Mathematics: norm = √Σx². Squares of fp32 overflow above 1.8e19 and vanish below 1e-23, so a block of elements is scaled
first by the power of two 2⁻ᵉ, exact, that brings its largest magnitude into [1, 2): Σ(2⁻ᵉx)² is safe in fp32, and what
vanishes there is nothing beside the largest. 4ᵉ times it, in fp64, is added to the program's sum. NaN and infinity
survive all of this.

Shapes: K tensors of any sizes, cut into chunks of CHUNK elements; P programs, a fixed number per processor, each take
every P-th chunk. The tables are those of kernels/lib/triton_lists.py.

The end: each program writes its fp64 sum to its place and adds one to a counter. The one that finds P - 1 there is the
last: it adds the P sums in the order of their places, whoever came last, so the result repeats bit for bit on one GPU
model, and it puts the counter back to 0 for the next launch. Places and counter belong to a device and stream.

Bytes: K tensors read once. 4 instructions an element: the bound is memory bandwidth. There is no gradient.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.autograd import bypass, register
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib import triton_lists as lists
from tritium.kernels.site import Site

DETERMINISTIC = True


@triton.jit
def _squares(x):
    """Σx² of a block, in fp64."""
    largest = tl.max(tl.abs(x), 0)
    exponent = largest.to(tl.int32, bitcast=True) >> 23  # biased; 0 for 0, 255 for infinity and NaN
    exponent = tl.minimum(tl.maximum(254 - exponent, 1), 254)  # of the factor
    scaled = x * (exponent << 23).to(tl.float32, bitcast=True)
    back = ((1023 + 2 * (127 - exponent)).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    return tl.sum(scaled * scaled, 0).to(tl.float64) * back


@triton.jit(do_not_specialize=["K", "chunks"])
def _norm(
    OWNERS, LAYOUT, ADDRESSES, K, chunks, SUMS, COUNTER, NORM,
    CHUNK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    program, P = tl.program_id(0), tl.num_programs(0)
    offsets = tl.arange(0, CHUNK)
    total = tl.zeros((), tl.float64)
    for chunk in range(program, chunks, P):
        tensor, start, left, code = lists.piece(OWNERS, LAYOUT, K, chunk, CHUNK)
        address = tl.load(ADDRESSES + tensor)
        if (left >= CHUNK) & ((address & 15) == 0):
            total += _squares(lists.load_coded(address, code, start + offsets, None, True))
        else:
            total += _squares(lists.load_coded(address, code, start + offsets, offsets < left, False))
    tl.store(SUMS + program, total)
    tl.debug_barrier()
    if tl.atomic_add(COUNTER, 1, sem="acq_rel", scope="gpu") == P - 1:
        sums = tl.zeros((BLOCK_P,), tl.float64)
        for first in range(0, P, BLOCK_P):
            places = first + tl.arange(0, BLOCK_P)
            sums += tl.load(SUMS + places, places < P, other=0.0, cache_modifier=".cg")  # past the processor's cache
        tl.store(NORM, tl.sqrt(tl.sum(sums, 0)).to(tl.float32))
        tl.store(COUNTER, 0)


# ----------------------------------------------------------------------------------------------------------- launchers

_norm_kernel = launch.Kernel(_norm)


class Config(NamedTuple):
    CHUNK: int
    BLOCK_P: int
    num_warps: int
    programs_per_processor: int


@launch.tuned
def config(arch: int) -> Config:
    """16 elements a thread, all in registers, and as many programs as a processor holds at one time: 40 KB of 16-bit
    tensors in flight, twice what the memory's latency asks for. BLOCK_P: of the final sum."""
    return Config(4096, 256, 8, programs_per_processor=5 if arch < 90 else 6)


@cache
def _constants(tile: Config) -> launch.Constants:
    return launch.constants(CHUNK=tile.CHUNK, BLOCK_P=tile.BLOCK_P, num_warps=tile.num_warps)


@cache
def _workspace(device: torch.device, stream: int, programs: int) -> tuple[Tensor, Tensor]:
    """(sums, counter); every launch leaves the counter at 0 as it found it."""
    return torch.empty(programs, dtype=torch.float64, device=device), torch.zeros(1, dtype=torch.int32, device=device)


def _launch(tensors: list[Tensor]) -> Tensor:
    if {t.dtype for t in tensors}.difference(launch.DTYPES):
        launch.require_dtype("global_norm", **{f"tensors[{i}]": t for i, t in enumerate(tensors)})
    device = tensors[0].device
    if len({t.device for t in tensors}) > 1:
        raise ValueError(
            f"global_norm takes tensors of one device, these are on {', '.join(map(str, {t.device for t in tensors}))}"
        )
    if sum([t.numel() for t in tensors]) == 0:
        return torch.zeros((), device=device)
    dense = [t if t.is_contiguous() else t.contiguous() for t in tensors]
    result = torch.empty((), dtype=torch.float32, device=device)
    with launch.on_device(result):
        tile = config(launch.arch())
        table = lists.tables([dense], coded=(0,), chunk=tile.CHUNK)
        most = launch.processors() * tile.programs_per_processor
        workspace = _workspace if lists.keeps(device) else _workspace.__wrapped__
        sums, counter = workspace(device, lists.stream_of(device), most)
        _norm_kernel(
            (min(table.chunks, most),), _constants(tile),
            table.owners, table.layout, table.addresses, table.tensors, table.chunks, sums, counter, result,
        )  # fmt: skip
    return result


_registered = register("global_norm_triton", lists.keeping_nothing(_launch))
_registered.register_fake(lambda tensors: tensors[0].new_empty((), dtype=torch.float32))


def global_norm(tensors: list[Tensor]) -> Tensor:
    """Any number of tensors, each fp32, bf16 or fp16, on one device → the norm over all their elements, () fp32."""
    if not tensors:
        return torch.zeros(())
    return _launch(tensors) if bypass(tensors) else _registered([t.detach() for t in tensors])


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
