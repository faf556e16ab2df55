"""The interpreter's bf16, as mended for these tests, against torch's own."""

import interpreter_bf16
import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def _arithmetic(A, B, SUM, PRODUCT, LESS, NEGATIVE, DOT, ROUNDED, WIDE, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a, b = tl.load(A + at), tl.load(B + at)
    tl.store(SUM + at, a + b)
    tl.store(PRODUCT + at, a * b)
    tl.store(LESS + at, (a < b).to(tl.int32))
    tl.store(NEGATIVE + at, -a)
    tl.store(DOT + at, tl.dot(a, b))
    tl.store(ROUNDED + at, tl.load(WIDE + at).to(tl.bfloat16))


def test_arithmetic_dot_and_rounding_are_those_of_torch():
    N = 16
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(N, N, generator=generator).bfloat16() for _ in range(2))
    wide = torch.randn(N, N, generator=generator)
    wide[0, :5] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, 1.00390625])  # the last: a tie
    total, product, negative, rounded = (torch.empty_like(a) for _ in range(4))
    less, dot = torch.empty(N, N, dtype=torch.int32), torch.empty(N, N)
    _arithmetic[(1,)](a, b, total, product, less, negative, dot, rounded, wide, N=N)
    assert torch.equal(total, a + b)
    assert torch.equal(product, a * b)
    assert torch.equal(less.bool(), a < b)
    assert torch.equal(negative, -a)
    torch.testing.assert_close(dot, a.float() @ b.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rounded, wide.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_every_bf16_survives_the_round_trip():
    bits = np.arange(2**16, dtype=np.uint16)
    values = interpreter_bf16.widen(bits)
    again = interpreter_bf16.round_to_bf16(values)
    assert np.array_equal(again[~np.isnan(values)], bits[~np.isnan(values)])
    assert np.isnan(interpreter_bf16.widen(again[np.isnan(values)])).all()


def test_installing_twice_changes_nothing():
    builder = interpreter_bf16.interpreter.InterpreterBuilder
    before = builder.create_dot, builder.binary_op, builder.unary_op, interpreter_bf16.interpreter._convert_float
    interpreter_bf16.install()
    assert before == (
        builder.create_dot, builder.binary_op, builder.unary_op, interpreter_bf16.interpreter._convert_float
    )  # fmt: skip
