"""bf16 compute weights beside fp32 masters, and where fp8 comes in.

The matrices that GEMMs read (and their biases) live in the model in the compute dtype; the optimizer owns their fp32
masters and writes the copies in the same pass as the update. Embeddings and norms stay fp32: they are read row-wise.
The head's weight is as the matrices are on a CPU, where casting it and widening its gradient are passes over memory
that show; a table that is also the head's weight then has both, and its rows are read from the master. On a GPU it is
an fp32 leaf, cast inside its op, whose gradient a deterministic kernel fills.

fp8 is bf16 with other kernels: all tensors are as there, and the matrix products of chosen layers round their operands
to fp8 on the way in (kernels/lib/fp8.py; Config.kernel_choices says which). So a checkpoint knows nothing of it.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch

from tritium.kernels.site import interpreting


def resolve(precision: str, device: torch.device) -> torch.dtype:
    """The compute dtype for "auto", "fp32", "bf16" or "fp8". auto is bf16 where the device multiplies bf16
    matrices faster than fp32 ones, except in Triton's interpreter, which cannot compute in it.
    """
    if precision == "fp32" or (precision == "auto" and interpreting()):
        return torch.float32
    if precision in ("bf16", "fp8"):
        return torch.bfloat16
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = bf16_gain_on_cpu() > 1.4
    return torch.bfloat16 if fast else torch.float32


@cache
def bf16_gain_on_cpu(N: int = 512, C: int = 768, repeats: int = 12) -> float:
    """How many times faster (N, C) @ (C, C) is in bf16 than in fp32, measured once a process in some 0.1 s; 0 without
    bf16 instructions.

    Measured, because the instruction's presence does not tell: with AVX512-BF16 and no AMX, AMD's cores are about 4
    times as fast in bf16 and Intel's half as fast (docs/log.md, 2026-11-24). Noise cannot take one for the other.
    """
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return 0.0
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for repeat in range(repeats + 1):
        for dtype, taken in seconds.items():
            # no random numbers: the global generator's state is the run's
            x, w = torch.full((N, C), 0.5, dtype=dtype), torch.full((C, C), 0.5, dtype=dtype)
            start = time.perf_counter()
            torch.mm(x, w)
            if repeat > 0:  # the first warms up
                taken.append(time.perf_counter() - start)
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


def lay_out(model: Any, layout: str) -> None:
    """Put the matrices of the model's GEMMs into memory as ``layout`` says, "out_in" or "in_out". Names, shapes and
    values stay; copies, gradients and moments that are made like the parameters afterwards lie as they do.
    """
    if layout == "in_out":
        chosen = set(model.compute_parameters())
        for name, parameter in model.named_parameters():
            if name in chosen and parameter.ndim == 2:
                parameter.data = parameter.data.t().contiguous().t()


def to_compute_dtype(model: Any, dtype: torch.dtype, head: bool = False) -> dict[str, torch.Tensor]:
    """Put the model's GEMM operands into ``dtype``; returns name → fp32 master for each parameter that was changed.

    head: the head's weight as well.
    """
    model.compute_dtype = dtype
    masters: dict[str, torch.Tensor] = {}
    if dtype == torch.float32:
        return masters
    chosen = {*model.compute_parameters(), *([model.head_name] if head else [])}
    for name, parameter in model.named_parameters():
        if name in chosen:
            masters[name] = parameter.detach()  # keeps what it was made from
            parameter.data = parameter.data.to(dtype)
    for path, module in model.named_modules():
        if hasattr(module, "master"):
            module.master = masters.get(f"{path}.weight")
    return masters
