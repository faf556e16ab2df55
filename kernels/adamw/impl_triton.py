"""adamw in Triton: one launch for all tensors of a call, one pass over them.

Mathematics, per element, with g = grad·grad_scale in fp32 and t the step:
    m ← m + (1 - β1)(g - m)        v ← β2 v + (1 - β2) g²
    p ← p (1 - lr·λ) - [lr / (1 - β1ᵗ)] m / (√v / √(1 - β2ᵗ) + eps)        copy ← p, rounded
1 - βᵗ = -expm1(t·ln β) to a few units of fp32 for any t: ln β comes from the host, where fp64 costs nothing. With a
skip flag that is not zero no program reads or writes anything else, so every bit stays. Moments in bf16 are computed in
fp32 and rounded stochastically, by a hash of step, tensor and element (kernels/lib/stochastic.py).

Shapes: K tensors of any sizes (empty ones too), cut into chunks of CHUNK elements, one program each, which walks its
chunk in blocks of BLOCK. The tables of kernels/lib/triton_lists.py tell a program its tensor, offset, addresses and
dtypes. A whole chunk of aligned tensors takes the fast path: no mask, 16 bytes a load. Ends and unaligned tensors take
the other.

lr, step, grad_scale and skip are read on the device: the host waits for nothing.

Bytes: 24 an element for p, m, v in fp32, read and written, plus gradient and copy: 28 with both in 16 bits, and 20 with
moments in bf16. About 15
FLOPs an element: the bound is memory bandwidth. Nothing is saved; an update has no backward.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritium.kernels.adamw import arguments
from tritium.kernels.autograd import update_op
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib import triton_lists as lists
from tritium.kernels.lib.triton_math import LOG2E, cut_to_bf16, mix, stream
from tritium.kernels.site import Site

DETERMINISTIC = True  # elements are independent


@triton.jit
def _one_minus_power(log_beta, t):
    """1 - exp(log_beta·t), without the cancellation where the product is small."""
    x = log_beta * t
    series = 1 + x / 10 * (1 + x / 11 * (1 + x / 12))
    series = 1 + x / 7 * (1 + x / 8 * (1 + x / 9 * series))
    series = 1 + x / 4 * (1 + x / 5 * (1 + x / 6 * series))
    series = 1 + x / 2 * (1 + x / 3 * series)
    return tl.where(x > -1.0, -x * series, 1 - tl.exp2(x * LOG2E))


@triton.jit
def _blocks(
    P, G, M, V, COPY, codes, start, n, random, rest1, beta2, rest2, eps, decay, rate, unbias, grad_scale,
    COPIES: tl.constexpr, NARROW: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update n elements from ``start`` of the tensors at these addresses. random: their stream, if NARROW."""
    for first in range(0, n, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        at, mask = start + offsets, offsets < n
        p = lists.load(P, at, mask, tl.float32, FAST)
        if NARROW:
            m = lists.load(M, at, mask, tl.bfloat16, FAST)
            v = lists.load(V, at, mask, tl.bfloat16, FAST)
        else:
            m = lists.load(M, at, mask, tl.float32, FAST)
            v = lists.load(V, at, mask, tl.float32, FAST)
        g = lists.load_coded(G, codes & 3, at, mask, FAST) * grad_scale
        m += rest1 * (g - m)
        v = beta2 * v + rest2 * g * g
        p = p * decay - rate * m / (tl.sqrt(v) * unbias + eps)
        if NARROW:
            bits = mix(at.to(tl.uint32) ^ random)
            lists.store(M, at, cut_to_bf16(m, bits & 0xFFFF), mask, tl.bfloat16, FAST)
            lists.store(V, at, cut_to_bf16(v, bits >> 16), mask, tl.bfloat16, FAST)
        else:
            lists.store(M, at, m, mask, tl.float32, FAST)
            lists.store(V, at, v, mask, tl.float32, FAST)
        lists.store(P, at, p, mask, tl.float32, FAST)
        if COPIES:
            lists.store_coded(COPY, codes >> 2, at, p, mask, FAST)


@triton.jit(do_not_specialize=["K", "log_beta1", "log_beta2", "rest1", "beta2", "rest2", "eps", "weight_decay"])
def _update(
    OWNERS, LAYOUT, ADDRESSES, K, LR, STEP, GRAD_SCALE, SKIP,
    log_beta1, log_beta2, rest1, beta2, rest2, eps, weight_decay,
    COPIES: tl.constexpr, NARROW: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(SKIP) == 0:
        tensor, start, left, codes = lists.piece(OWNERS, LAYOUT, K, tl.program_id(0), CHUNK)
        P = tl.load(ADDRESSES + tensor)
        G = tl.load(ADDRESSES + K + tensor)
        M = tl.load(ADDRESSES + 2 * K + tensor)
        V = tl.load(ADDRESSES + 3 * K + tensor)
        COPY = P
        if COPIES:
            COPY = tl.load(ADDRESSES + 4 * K + tensor)
        lr, t = tl.load(LR), tl.load(STEP)
        decay = 1 - lr * weight_decay
        rate = lr / _one_minus_power(log_beta1, t)
        unbias = 1 / tl.sqrt(_one_minus_power(log_beta2, t))
        grad_scale = tl.load(GRAD_SCALE)
        random = stream(t, tensor, start)
        if (left >= CHUNK) & (((P | G | M | V | COPY) & 15) == 0):
            _blocks(
                P, G, M, V, COPY, codes, start, CHUNK, random, rest1, beta2, rest2, eps, decay, rate, unbias,
                grad_scale, COPIES, NARROW, True, BLOCK,
            )  # fmt: skip
        else:
            n = tl.minimum(left, CHUNK).to(tl.int32)
            _blocks(
                P, G, M, V, COPY, codes, start, n, random, rest1, beta2, rest2, eps, decay, rate, unbias,
                grad_scale, COPIES, NARROW, False, BLOCK,
            )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- launchers

_update_kernel = launch.Kernel(_update)


class Config(NamedTuple):
    CHUNK: int
    BLOCK: int
    num_warps: int


@launch.tuned
def config() -> Config:
    """4 elements a thread: 16 bytes of an fp32 tensor, and one layout for all dtypes (8 would make bf16 another, and
    move it through shared memory). 115 KB of traffic a program: beside it finding the tensor and taking the powers of β
    are little, and the last wave of programs is short."""
    return Config(4096, 512, 4)


@cache
def _constants(tile: Config, copies: bool, narrow: bool) -> launch.Constants:
    return launch.constants(COPIES=copies, NARROW=narrow, **tile._asdict())


def _launch(
    params: list[Tensor],
    copies: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
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
    arguments.check("in Triton", params, copies, grads, exp_avgs, exp_avg_sqs, params[0].device, launch.DTYPES)
    if not any(p.numel() for p in params):
        return
    device = params[0].device
    for name, scalar in (("lr", lr), ("step", step), ("grad_scale", grad_scale), ("skip", skip)):
        if scalar.dtype != torch.float32 or scalar.numel() != 1 or scalar.device != device:
            raise ValueError(
                f"adamw in Triton reads {name} on the device: it must be one float32 on {device}, it is "
                f"{scalar.dtype} of shape {tuple(scalar.shape)} on {scalar.device}"
            )
    theirs = [params, grads, exp_avgs, exp_avg_sqs, *([copies] if copies else [])]
    ours = [[t if t.is_contiguous() else t.contiguous() for t in ts] for ts in theirs]
    tile = config()
    table = lists.tables(ours, coded=(1, 4) if copies else (1,), chunk=tile.CHUNK)
    with launch.on_device(params[0]):
        _update_kernel(
            (table.chunks,), _constants(tile, bool(copies), exp_avgs[0].dtype == torch.bfloat16),
            table.owners, table.layout, table.addresses, table.tensors, lr, step, grad_scale, skip,
            _log(beta1), _log(beta2), 1 - beta1, beta2, 1 - beta2, eps, weight_decay,
        )  # fmt: skip
    for targets, sources in zip(theirs, ours, strict=True):
        for target, source in zip(targets, sources, strict=True):
            if target is not source and targets is not grads:  # it was not contiguous
                target.copy_(source)


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -math.inf


_adamw = update_op(
    "adamw_triton", _launch, mutates=("params", "copies", "exp_avgs", "exp_avg_sqs"),
    in_library=lists.keeping_nothing(_launch),
)  # fmt: skip


def adamw(
    params: list[Tensor],
    copies: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """One step in place: params fp32; exp_avgs, exp_avg_sqs all fp32 or all bf16; grads and copies (or an empty list)
    each fp32, bf16, fp16.

    lr, step, grad_scale, skip: () fp32 on the params' device.
    """
    _adamw(params, copies, grads, exp_avgs, exp_avg_sqs, lr, step, grad_scale, skip, beta1, beta2, eps, weight_decay)


def unsupported(site: Site) -> str | None:
    return launch.unsupported(site)
