"""adamw_8bit in Triton: one launch for all tensors of a call, one pass over them.

The mathematics per element is adamw's (kernels/adamw/impl_triton.py); a block of 256 elements is a row of a tile, whose
largest new moments are its scales, and which is then made codes of (kernels/lib/dynamic_code.py). With a skip flag that
is not zero no program reads or writes anything else.

Bytes: 16 an element with gradients and copies in 16 bits. About 150 operations an element, most of them for the codes:
on an H100 about as long as the bytes take.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.adamw.impl_triton import _log, _one_minus_power
from tritium.kernels.adamw_8bit import arguments
from tritium.kernels.autograd import update_op
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib import triton_lists as lists
from tritium.kernels.lib.triton_math import mix, stream
from tritium.kernels.site import Site

DETERMINISTIC = True  # blocks are independent


@triton.jit
def _decade(d):
    """10ᵈ⁻⁶, d (int32) from 0 to 6."""
    p = tl.where(d >= 6, 1.0, 1e-1)
    p = tl.where(d < 5, 1e-2, p)
    p = tl.where(d < 4, 1e-3, p)
    p = tl.where(d < 3, 1e-4, p)
    p = tl.where(d < 2, 1e-5, p)
    return tl.where(d < 1, 1e-6, p)


@triton.jit
def _per_decade(d):
    """Its reciprocal."""
    p = tl.where(d >= 6, 1.0, 1e1)
    p = tl.where(d < 5, 1e2, p)
    p = tl.where(d < 4, 1e3, p)
    p = tl.where(d < 3, 1e4, p)
    p = tl.where(d < 2, 1e5, p)
    return tl.where(d < 1, 1e6, p)


@triton.jit
def _power(e):
    """2ᵉ, e (int32) from -126 to 127."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _decode(code, SIGNED: tl.constexpr):
    """What a code (int32) stands for, as a part of the scale."""
    if SIGNED:
        q, SHIFT = tl.abs(code - 127), 0
    else:
        q, SHIFT = code + 1, 1
    x = q.to(tl.float32)
    exponent = (x.to(tl.int32, bitcast=True) >> 23) - 127
    exponent = tl.maximum(exponent, 0)
    value = _decade(exponent - SHIFT) * (0.1 + 0.9 * (x - _power(exponent) + 0.5) * _power(-exponent))
    value = tl.where(exponent - SHIFT == 7, 1.0, value)
    value = tl.where(q < 1 + SHIFT, 0.0, value)
    if SIGNED:
        value = tl.where(code < 127, -value, value)
    return value


@triton.jit
def _encode(x, scale, random, SIGNED: tl.constexpr):
    """The code of x, uint8; scale broadcasts to it, random: 16 bits."""
    FIRST: tl.constexpr = 1 if SIGNED else 2
    y = tl.abs(x) * tl.where(scale >= 1.1754943508222875e-38, 1.0 / scale, 0.0)
    d = (y >= 1e-6).to(tl.int32) + (y >= 1e-5).to(tl.int32) + (y >= 1e-4).to(tl.int32)
    d += (y >= 1e-3).to(tl.int32) + (y >= 1e-2).to(tl.int32) + (y >= 1e-1).to(tl.int32)
    p = _decade(d)
    n = FIRST * _power(d)
    s, start = (0.9 / FIRST) * p * _power(-d), 0.1 * p
    place = tl.maximum(
        (y - start) * (n * _per_decade(d) * (1 / 0.9)) + 63.5, 63.0
    )  # from 64 on: truncation is the floor
    i = tl.minimum(place.to(tl.int32).to(tl.float32) - 64.0, n - 1.0)
    under, over, lowest = i < 0.0, i == n - 1.0, (i < 0.0) & (d == 0)
    below = tl.where(under, start - 0.1 * s, start + (i + 0.5) * s)
    below = tl.where(lowest, 0.0, below)
    gap = tl.where(over, tl.where(d == 6, 0.5, 3.0), tl.where(under, 0.6, 1.0)) * s
    gap = tl.where(lowest, start + 0.5 * s, gap)
    q = (n + i).to(tl.int32) + (random.to(tl.int32).to(tl.float32) * 0.0000152587890625 * gap < y - below).to(tl.int32)
    if SIGNED:
        code = tl.where(x < 0.0, 127 - tl.minimum(q, 127), 127 + q)
    else:
        code = tl.where(x > 0.0, tl.maximum(q, 2), q) - 1
    return code.to(tl.uint8)


@triton.jit
def _largest(x):
    """Of each row of magnitudes, by their bits: a NaN is above everything."""
    return tl.max((x.to(tl.int32, bitcast=True) & 0x7FFFFFFF), axis=1, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _blocks(
    P, G, M, V, M_SCALES, V_SCALES, COPY, codes, start, n, random, rest1, beta2, rest2, eps, decay, rate, unbias,
    grad_scale, COPIES: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Update n elements from ``start``, which begins a block of 256, of the tensors at these addresses."""
    for first in range(0, n, ROWS * 256):
        offsets = first + tl.arange(0, ROWS)[:, None] * 256 + tl.arange(0, 256)[None, :]
        rows = first + tl.arange(0, ROWS)[:, None] * 256
        at, mask, there = start + offsets, offsets < n, rows < n
        block = (start + rows) // 256
        p = lists.load(P, at, mask, tl.float32, FAST)
        g = lists.load_coded(G, codes & 3, at, mask, FAST) * grad_scale
        m = tl.load(lists.pointer(M, tl.uint8, FAST) + at, mask, other=127).to(tl.int32)
        v = tl.load(lists.pointer(V, tl.uint8, FAST) + at, mask, other=0).to(tl.int32)
        m_scales, v_scales = lists.pointer(M_SCALES, tl.float32, False), lists.pointer(V_SCALES, tl.float32, False)
        m = _decode(m, True) * tl.load(m_scales + block, there, other=0.0)
        v = _decode(v, False) * tl.load(v_scales + block, there, other=0.0)
        m += rest1 * (g - m)
        v = beta2 * v + rest2 * g * g
        p = p * decay - rate * m / (tl.sqrt(v) * unbias + eps)
        lists.store(P, at, p, mask, tl.float32, FAST)
        if COPIES:
            lists.store_coded(COPY, codes >> 2, at, p, mask, FAST)
        m_scale, v_scale = _largest(tl.where(mask, m, 0.0)), _largest(tl.where(mask, v, 0.0))
        tl.store(m_scales + block, m_scale, there)
        tl.store(v_scales + block, v_scale, there)
        bits = mix(at.to(tl.uint32) ^ random)
        tl.store(lists.pointer(M, tl.uint8, FAST) + at, _encode(m, m_scale, bits & 0xFFFF, True), mask)
        tl.store(lists.pointer(V, tl.uint8, FAST) + at, _encode(v, v_scale, bits >> 16, False), mask)


@triton.jit(do_not_specialize=["K", "log_beta1", "log_beta2", "rest1", "beta2", "rest2", "eps", "weight_decay"])
def _update_8bit(
    OWNERS, LAYOUT, ADDRESSES, K, LR, STEP, GRAD_SCALE, SKIP,
    log_beta1, log_beta2, rest1, beta2, rest2, eps, weight_decay,
    COPIES: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    if tl.load(SKIP) == 0:
        tensor, start, left, codes = lists.piece(OWNERS, LAYOUT, K, tl.program_id(0), CHUNK)
        P = tl.load(ADDRESSES + tensor)
        G = tl.load(ADDRESSES + K + tensor)
        M = tl.load(ADDRESSES + 2 * K + tensor)
        V = tl.load(ADDRESSES + 3 * K + tensor)
        M_SCALES = tl.load(ADDRESSES + 4 * K + tensor)
        V_SCALES = tl.load(ADDRESSES + 5 * K + tensor)
        COPY = P
        if COPIES:
            COPY = tl.load(ADDRESSES + 6 * K + tensor)
        lr, t = tl.load(LR), tl.load(STEP)
        decay = 1 - lr * weight_decay
        rate = lr / _one_minus_power(log_beta1, t)
        unbias = 1 / tl.sqrt(_one_minus_power(log_beta2, t))
        grad_scale = tl.load(GRAD_SCALE)
        random = stream(t, tensor, start)
        if (left >= CHUNK) & (((P | G | M | V | COPY) & 15) == 0):
            _blocks(
                P, G, M, V, M_SCALES, V_SCALES, COPY, codes, start, CHUNK, random, rest1, beta2, rest2, eps, decay,
                rate, unbias, grad_scale, COPIES, True, ROWS,
            )  # fmt: skip
        else:
            n = tl.minimum(left, CHUNK).to(tl.int32)
            _blocks(
                P, G, M, V, M_SCALES, V_SCALES, COPY, codes, start, n, random, rest1, beta2, rest2, eps, decay,
                rate, unbias, grad_scale, COPIES, False, ROWS,
            )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- launchers

_update_kernel = launch.Kernel(_update_8bit)


class Config(NamedTuple):
    CHUNK: int
    ROWS: int
    num_warps: int


@launch.tuned
def config() -> Config:
    """4 elements a thread: with 8, a row for a warp, registers spill."""
    return Config(4096, 2, 4)


@cache
def _constants(tile: Config, copies: bool) -> launch.Constants:
    return launch.constants(COPIES=copies, **tile._asdict())


def _launch(
    params: list[Tensor],
    copies: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    if not params:
        return
    device = params[0].device
    codes, scales = (exp_avgs, exp_avg_sqs), (exp_avg_scales, exp_avg_sq_scales)
    arguments.check("in Triton", params, copies, grads, codes, scales, device, launch.DTYPES)
    if not any(p.numel() for p in params):
        return
    for name, scalar in (("lr", lr), ("step", step), ("grad_scale", grad_scale), ("skip", skip)):
        if scalar.dtype != torch.float32 or scalar.numel() != 1 or scalar.device != device:
            raise ValueError(
                f"adamw_8bit in Triton reads {name} on the device: it must be one float32 on {device}, it is "
                f"{scalar.dtype} of shape {tuple(scalar.shape)} on {scalar.device}"
            )
    theirs = [params, grads, *codes, *scales, *([copies] if copies else [])]
    ours = [[t if t.is_contiguous() else t.contiguous() for t in ts] for ts in theirs]
    tile = config()
    table = lists.tables(ours, coded=(1, 6) if copies else (1,), chunk=tile.CHUNK)
    with launch.on_device(params[0]):
        _update_kernel(
            (table.chunks,), _constants(tile, bool(copies)),
            table.owners, table.layout, table.addresses, table.tensors, lr, step, grad_scale, skip,
            _log(beta1), _log(beta2), 1 - beta1, beta2, 1 - beta2, eps, weight_decay,
        )  # fmt: skip
    for targets, sources in zip(theirs, ours, strict=True):
        for target, source in zip(targets, sources, strict=True):
            if target is not source and targets is not grads:  # it was not contiguous
                target.copy_(source)


_MUTATES = ("params", "copies", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales")
_adamw_8bit = update_op(
    "adamw_8bit_triton", _launch, mutates=_MUTATES, in_library=lists.keeping_nothing(_launch)
)  # fmt: skip


def adamw_8bit(
    params: list[Tensor],
    copies: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """See the reference; grads and copies (or an empty list) each fp32, bf16 or fp16; lr, step, grad_scale, skip: ()
    fp32 on the params' device.
    """
    _adamw_8bit(
        params, copies, grads, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, lr, step, grad_scale, skip,
        beta1, beta2, eps, weight_decay,
    )  # fmt: skip


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
