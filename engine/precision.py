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

import os
import time
from functools import cache
from typing import Any

import torch

from tritium.engine.config import ConfigError
from tritium.kernels.site import interpreting


def resolve(precision: str, device: torch.device) -> torch.dtype:
    """The compute dtype for "auto", "fp32", "bf16" or "fp8". auto is bf16 where the device multiplies bf16
    matrices faster than fp32 ones, except in Triton's interpreter, which cannot compute in it. ConfigError for bf16
    where a CPU's products would be wrong.
    """
    if precision == "fp32" or (precision == "auto" and interpreting()):
        return torch.float32
    if precision in ("bf16", "fp8"):
        fast = True
    elif device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = bf16_gain_on_cpu() > 1.4
    if fast and device.type == "cpu" and (reason := _threads_withheld()) is not None:
        raise ConfigError(reason)
    return torch.bfloat16 if fast else torch.float32


def _threads_withheld() -> str | None:
    """Why libgomp may give a parallel region fewer threads than are asked for, if so: torch's bf16 products (oneDNN)
    leave out the share of those that did not come, and all that they give is then memory that nobody wrote.
    """
    consequence = "torch's matrix products in bf16 are wrong with fewer (losses are NaN)"
    if os.environ.get("OMP_DYNAMIC", "").strip().lower() == "true":
        return (
            f"OMP_DYNAMIC=true lets OpenMP start fewer threads than are asked for, and {consequence}; unset it, or use "
            "--train.precision fp32"
        )
    limit, threads = os.environ.get("OMP_THREAD_LIMIT", "").strip(), torch.get_num_threads()
    if limit.isdecimal() and 0 < int(limit) < threads:
        return (
            f"OMP_THREAD_LIMIT={limit} is below the {threads} threads that torch asks for, and {consequence}; set "
            f"OMP_NUM_THREADS={limit} too, or use --train.precision fp32"
        )
    return None


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
            masters[name] = parameter.data  # what it was made from; detach() would share the copy's version counter
            parameter.data = parameter.data.to(dtype)
    for path, module in model.named_modules():
        if hasattr(module, "master"):
            module.master = masters.get(f"{path}.weight")
    return masters
