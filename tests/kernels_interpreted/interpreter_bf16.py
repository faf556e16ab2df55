"""Makes bf16 right in Triton's interpreter (3.6 to 3.9), for tests: :func:`install`, with TRITON_INTERPRET=1.

The interpreter keeps a bf16 tensor as the uint16 of its bits. ``tl.dot``, ``+``, ``*`` and the like then calculate on
those bits, and the conversion from fp32 truncates where the hardware rounds to nearest even. Here operands are widened
to fp32 (exactly), the operation is done there, and its result is rounded: what the GPU's bf16 instructions give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from tritium.kernels.lib import triton_launch


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bits (uint16) → the same values in fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 → bf16 bits (uint16), to nearest, ties to even; infinities and NaN stay what they are."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def install() -> None:
    """Replace the interpreter's dot, elementwise arithmetic and fp32 → bf16 conversion. Calling it again changes
    nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "bf16_is_right", False):
        return
    handle = interpreter.TensorHandle
    dot, unary, binary, convert = builder.create_dot, builder.unary_op, builder.binary_op, interpreter._convert_float

    def is_bf16(tensor: Any) -> bool:
        return tensor.dtype.scalar == tl.bfloat16

    def wide(tensor: Any) -> Any:
        return handle(widen(tensor.data), tl.float32) if is_bf16(tensor) else tensor

    def narrow(values: np.ndarray) -> Any:
        return handle(values, tl.int1) if values.dtype == np.bool_ else handle(round_to_bf16(values), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), accumulator, *rest)

    def unary_op(self: Any, argument: Any, operation: Callable[..., Any]) -> Any:
        if not is_bf16(argument):
            return unary(self, argument, operation)
        return narrow(operation(widen(argument.data)))

    def binary_op(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> Any:
        if not is_bf16(left):
            return binary(self, left, right, operation)
        return narrow(operation(widen(left.data), widen(right.data)))

    def convert_float(values: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return round_to_bf16(values)
        return convert(values, source, target, mode)

    builder.create_dot, builder.unary_op, builder.binary_op = create_dot, unary_op, binary_op
    interpreter._convert_float = convert_float
    builder.bf16_is_right = triton_launch.INTERPRETED_BF16 = True
