"""attention on the CPU in C++ (attention.cpp): flash attention on register-blocked GEMMs, forward and backward.

B batch, Tq queries, Tk keys, H query heads, G key/value heads, D head width; sums over the visible pairs (i, j).

    forward    s = scale q·k (softcap: c tanh(s/c))   p = exp(s - lse)   lse = log Σⱼ exp s   y = Σⱼ p v
    backward   δ = dy·y    ds = p (dy·v - δ)    dq = scale Σⱼ ds k    dk = scale Σᵢ ds q    dv = Σᵢ p dy
               (softcap: ds is multiplied by 1 - tanh²; dropout: p and dy·v by the mask / (1 - dropout))

Saved for backward: q, k, v, y, and lse per row in base 2 and fp32: 4 bytes a row, where the weights, which are computed
again, would be 4 Tk. q, k and v are read in place, whatever the strides of batch, time and head.

The bound is arithmetic: 4 D FLOPs a visible pair forward and 10 D backward (14 D where there are fewer heads than
threads: a head is then cut into blocks), against 2 (Tq H + Tk G) D elements of memory forward and twice that backward.
What lies above the causal diagonal is not computed, except where rows and keys are rounded up to a register block (8 x
16 with AVX-512). Scratch of a thread: 1 to 2 MiB, and backward Tq D H / G in fp32, for dq.

bf16 inputs: a CPU with AVX512-BF16 (instruction set v4_bf16) multiplies them as they are, two at a time, and takes p
and ds rounded to bf16 in the products with v, k, q and dy; it flushes what is below 2^-126. Elsewhere they are widened
when a block is packed, and p and ds stay fp32. Softmax, lse, δ and every sum are fp32 in both.
"""

import array
import math

import torch
from torch import Tensor

from tritium.kernels.attention.reference import check_options
from tritium.kernels.autograd import differentiable
from tritium.kernels.lib import native
from tritium.kernels.site import Site

DETERMINISTIC = True  # at any number of threads

_scratch_size = native.Function("attention_scratch", "ipi", "l")
# dtype; q, k, v, seq_start; numbers; causal, scale, softcap, keep_scale; ...
_forward = native.Function("attention_forward", "i pppp p ifff pp pl i")
_backward = native.Function("attention_backward", "i pppp p ifff pp plll ppp pl i")


def _check(
    q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None, seed: Tensor | None, softcap: float, dropout: float
) -> None:
    """Refuse what the C++ side would misread."""
    check_options(softcap, dropout)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in native.DTYPES or tensor.device.type != "cpu":
            raise TypeError(
                "attention native computes float32 and bfloat16 on the CPU; "
                f"{name} is {tensor.dtype} on {tensor.device}; choose reference"
            )
        if tensor.dtype != q.dtype:
            raise TypeError(f"attention takes q, k and v of one dtype; q is {q.dtype} and {name} is {tensor.dtype}")
    B, Tq, H, D = q.shape
    G = k.shape[2]
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D or (H % G if G else H):
        raise ValueError(
            "attention takes q (B, Tq, H, D) and k, v (B, Tk, G, D) with H a multiple of G; "
            f"they are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if seq_start is not None and (tuple(seq_start.shape) != (B, Tq) or seq_start.dtype.is_floating_point):
        raise ValueError(
            f"attention takes seq_start as integers of shape (B, Tq) = ({B}, {Tq}); it is {seq_start.dtype} of shape "
            f"{tuple(seq_start.shape)}"
        )
    if dropout > 0 and seed is None:
        raise ValueError("attention with dropout needs a seed tensor, or the result could not be repeated")


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _starts(seq_start: Tensor | None) -> Tensor | None:
    return None if seq_start is None else seq_start.to(torch.int32)


def _numbers(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, seed: Tensor | None, window: int, dropout: float
) -> array.array:  # type: ignore[type-arg]
    """What the C++ side calls ``numbers``."""
    B, Tq, H, D = q.shape
    threshold = int(dropout * 2**32)
    hashed = 0 if seed is None or not threshold else (int(seed) * 0x9E3779B1) & 0xFFFFFFFF
    return array.array(
        "q",
        (
            *(B, Tq, k.shape[1], H, k.shape[2], D),
            *(stride for tensor in (q, k, v) for stride in tensor.stride()[:3]),
            *((0, 0) if starts is None else starts.stride()),
            *(window, threshold, hashed),
        ),
    )


def _scratch(
    dtype: torch.dtype,
    numbers: array.array,  # type: ignore[type-arg]
    backward: bool,
    threads: int,
) -> tuple[Tensor, int]:
    size = _scratch_size(native.DTYPES[dtype], numbers.buffer_info()[0], backward)
    return torch.empty(threads * size, dtype=torch.float32), size


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float, window: int, softcap: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q, k, v, seq_start, seed, softcap, dropout)
    q, k, v, starts = _unit(q), _unit(k), _unit(v), _starts(seq_start)
    B, Tq, H, _ = q.shape
    y = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(B, H, Tq, dtype=torch.float32)
    if y.numel() == 0:
        return y, lse.zero_()
    threads = torch.get_num_threads()
    numbers = _numbers(q, k, v, starts, seed, window, dropout)
    scratch, size = _scratch(q.dtype, numbers, False, threads)
    _forward(
        *(native.DTYPES[q.dtype], q.data_ptr(), k.data_ptr(), v.data_ptr()),
        *(None if starts is None else starts.data_ptr(), numbers.buffer_info()[0]),
        *(causal, scale, softcap, 1.0 / (1.0 - dropout), y.data_ptr(), lse.data_ptr()),
        *(scratch.data_ptr(), size, threads),
    )
    return y, lse


def _launch_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None, seed: Tensor | None, y: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dy, q, k, v, y, starts = _unit(dy), _unit(q), _unit(k), _unit(v), y.contiguous(), _starts(seq_start)
    dq, dk, dv = _allocate_gradients(q, k, v)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    threads = torch.get_num_threads()
    numbers = _numbers(q, k, v, starts, seed, window, dropout)
    scratch, size = _scratch(q.dtype, numbers, True, threads)
    _backward(
        *(native.DTYPES[q.dtype], q.data_ptr(), k.data_ptr(), v.data_ptr()),
        *(None if starts is None else starts.data_ptr(), numbers.buffer_info()[0]),
        *(causal, scale, softcap, 1.0 / (1.0 - dropout), y.data_ptr(), lse.data_ptr()),
        *(dy.data_ptr(), *dy.stride()[:3], dq.data_ptr(), dk.data_ptr(), dv.data_ptr()),
        *(scratch.data_ptr(), size, threads),
    )
    return dq, dk, dv


def _allocate_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    return dq, dk, dv


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float, window: int, softcap: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, Tq, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Tq), dtype=torch.float32)


def _fake_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, seq_start: Tensor | None, seed: Tensor | None, y: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _allocate_gradients(q, k, v)


def _pairs(Tq: int, Tk: int, causal: bool, window: int) -> float:
    """Visible pairs as an area, so that a causal square is half of a full one; documents are unknown and count as
    one."""
    if not causal:
        return Tq * Tk

    def seen(T: float) -> float:  # ∫₀ᵀ min(position, window)
        return T * T / 2 if window <= 0 or window >= T else window * window / 2 + window * (T - window)

    return seen(Tk) - seen(max(Tk - Tq, 0))


def _flops(
    q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size, seq_start: object, seed: object, causal: bool,
    scale: float, window: int, *args: object, out_shape: object = None, **kwargs: object,
) -> int:  # fmt: skip
    """The model's two GEMMs."""
    B, Tq, H, D = q_shape
    return int(4 * B * H * D * _pairs(Tq, k_shape[1], causal, window))


def _flops_backward(
    dy_shape: torch.Size, q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size, seq_start: object,
    seed: object, y_shape: object, lse_shape: object, causal: bool, scale: float, window: int, *args: object,
    out_shape: object = None, **kwargs: object,
) -> int:  # fmt: skip
    """The model's four GEMMs; computing the scores again is a cost of this algorithm."""
    return 2 * _flops(q_shape, k_shape, v_shape, seq_start, seed, causal, scale, window)


_attention = differentiable(
    "attention_native",
    forward=_launch_forward,
    backward=_launch_backward,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    save=lambda args, results: (*args[:5], *results, *args[5:]),
    gradients=(0, 1, 2),
    flops=_flops,
    flops_backward=_flops_backward,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_start: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """q (B, Tq, H, D), k and v (B, Tk, G, D), fp32 or bf16, strided views read in place → (B, Tq, H, D) in q's dtype;
    the options are the reference's."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _attention(q, k, v, seq_start, seed, causal, scale, window, softcap, dropout)


def unsupported(site: Site) -> str | None:
    return native.unsupported(site)
