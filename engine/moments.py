"""AdamW's moments in fewer bits: what they are kept in, and a checkpoint's of another kind made this run's.

fp32   8 bytes a parameter
bf16   4
int8   2 and a 64th: codes of matrices (kernels/lib/dynamic_code.py); vectors, which are few, stay fp32
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tritium.engine import checkpoint
from tritium.engine.checkpoint import Checkpoint
from tritium.kernels.lib import dynamic_code

KINDS = ("fp32", "bf16", "int8")
_PREFIX = "optimizer."  # of the optimizer's names in a checkpoint
_NAMES = (("exp_avg", "exp_avg_scale", True), ("exp_avg_sq", "exp_avg_sq_scale", False))  # moment, its scales, signed


def dtype_of(kind: str, param: Tensor) -> torch.dtype:
    """What the moments of a parameter are kept in; uint8 for codes."""
    if kind == "int8":
        return torch.uint8 if param.ndim >= 2 else torch.float32
    return torch.bfloat16 if kind == "bf16" else torch.float32


def zero_scales(param: Tensor) -> Tensor:
    """Of moments that are zero: (⌈n / 256⌉,) fp32."""
    return torch.zeros(dynamic_code.blocks(param.numel()), device=param.device)


def kind_of(stored: Mapping[str, Any]) -> str:
    """The kind of a checkpoint's moments, from its contents (checkpoint.contents)."""
    if any(name.startswith(f"{_PREFIX}exp_avg_scale.") for name in stored):
        return "int8"
    dtypes = {stored[name].properties.dtype for name in stored if name.startswith(f"{_PREFIX}exp_avg.")}
    return "bf16" if dtypes == {torch.bfloat16} else "fp32"


def to_read(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """What to read a checkpoint with moments of ``kind`` into so that ``put`` can make them those of ``state``: its own
    tensors, but fresh ones in the place of moments that are of another kind there."""
    found = {name: t for name, t in state.items() if not name.startswith(tuple(f"{_PREFIX}{s}." for _, s, _ in _NAMES))}
    for moment, scale, _ in _NAMES:
        for name, tensor in state.items():
            if not name.startswith(f"{_PREFIX}{moment}."):
                continue
            kept = dtype_of(kind, tensor)
            if kept != tensor.dtype:
                found[name] = torch.empty_like(tensor, dtype=kept)
            if kept == torch.uint8:
                key = f"{_PREFIX}{scale}.{name.removeprefix(f'{_PREFIX}{moment}.')}"
                found[key] = state[key] if key in state else zero_scales(tensor)
    return found


def read(found: Checkpoint, state: dict[str, Tensor]) -> str:
    """Fill ``state`` from a checkpoint whose moments may be of another kind; returns its kind."""
    stored = checkpoint.contents(found)
    kind = kind_of(stored)
    there = to_read(state, kind)
    checkpoint.read(found, there)
    put(there, state)
    return kind


@torch.no_grad()
def put(given: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Write the moments in ``given``, of any kind, into those of ``state``; into fewer bits to the nearest."""
    for moment, scale, signed in _NAMES:
        for name, tensor in state.items():
            if not name.startswith(f"{_PREFIX}{moment}.") or given[name] is tensor:
                continue
            key = f"{_PREFIX}{scale}.{name.removeprefix(f'{_PREFIX}{moment}.')}"
            value, scales = given[name], given.get(key)
            if value.dtype == torch.uint8 and tensor.dtype != torch.uint8:
                assert scales is not None
                value = dynamic_code.decode(value, scales, signed)
            elif tensor.dtype == torch.uint8 and value.dtype != torch.uint8:
                value, scales = dynamic_code.encode(value.float(), signed)
            tensor.copy_(value)
            if tensor.dtype == torch.uint8:
                assert scales is not None
                state[key].copy_(scales)
