"""Ahead of time: the losses, the optimizer's kernels and linear, as their launchers launch them on GPUs."""

import dataclasses

import pytest
import torch

from tritium.kernels import aot, ops
from tritium.kernels.case import Case
from tritium.kernels.linear import impl_triton as linear

BF16, FP32 = torch.bfloat16, torch.float32


def case(name: str, op: str) -> Case:
    (found,) = (c for c in ops.OPS[op].cases.CASES if c.name == name)
    return found


@pytest.mark.parametrize(
    ("op", "name", "arch", "dtype", "kernels"),
    [
        ("adamw", "gpt2_124m", "sm_90", BF16, {"_update"}),
        ("global_norm", "gpt2_124m", "sm_80", BF16, {"_norm"}),
        ("cross_entropy", "gpt2_16k_sum", "sm_100", BF16, {"_forward_backward", "_scale"}),
        ("linear", "gpt2_124m_qkv", "sm_90", BF16, {"_rows", "_weights", "_column_sums", "_add_parts"}),
        ("linear", "gpt2_124m_head", "sm_80", FP32, {"_rows", "_weights"}),
        ("linear", "odd_widths", "sm_80", BF16, {"_rows", "_weights", "_column_sums", "_add_parts"}),
        ("linear", "odd_vocabulary", "sm_120", BF16, {"_rows", "_weights"}),
    ],
)
def test_no_kernel_spills_or_leaves_its_budget(op, name, arch, dtype, kernels):
    lines = aot.compile_case(ops.OPS[op], case(name, op), arch, dtype)
    assert {line.resources.kernel for line in lines} >= kernels
    assert [(line, line.problem) for line in lines if line.problem] == []


@pytest.mark.parametrize("op", ["adamw", "global_norm"])
def test_one_launch_for_all_tensors(op):
    loaded = ops.OPS[op].load("triton")
    (launch,) = aot.launches(ops.OPS[op], case("gpt2_124m", op), "sm_90", BF16, loaded, compile=False)
    assert launch.config is not None


def test_linear_knows_what_triton_reads_in_wide_pieces():
    even = torch.empty(64, 48, dtype=BF16)
    assert linear._aligned(even, even.t(), even[16:, 16:], even.expand(2, 64, 48)[0])
    for odd in (torch.empty(64, 40, dtype=BF16), even[:, 1:], even[:, ::2], torch.empty(9, 33).t()):
        assert not linear._aligned(even, odd)


def test_linear_of_another_length_compiles_nothing_new():
    base = case("gpt2_124m_qkv", "linear")
    compiled = set()
    for N in (16384, 16383, 1040):
        arguments = aot.meta_inputs(ops.linear, dataclasses.replace(base, shape={**base.shape, "N": N}), BF16)
        with aot.compiling_for("sm_90") as launched:
            y = linear.linear(**arguments)
            torch.autograd.grad(y, arguments["weight"], torch.empty_like(y))
        by_kernel = {launch.kernel: id(launch.compiled) for launch in launched if launch.kernel == "_rows"}
        assert by_kernel
        compiled.add(tuple(by_kernel.items()))
    assert len(compiled) == 1


@pytest.mark.parametrize(
    ("op", "name", "kernel"),
    [("linear_cross_entropy", "gpt2_124m", "_forward_backward"), ("global_norm", "gpt2_124m", "_norm")],
)
def test_what_is_read_before_others_write_has_a_barrier(op, name, kernel):
    """The interpreter runs programs thread by thread and cannot see it missing: in the loss every thread has read its
    row before any writes the gradient over it; in the norm all have written before the last program counts."""
    op = ops.OPS[op]
    (case,) = (c for c in op.cases.CASES if c.name == name)
    arguments = aot.meta_inputs(op, case, torch.bfloat16)
    with aot.compiling_for("sm_90") as launched:
        op.load("triton").function(**arguments)
    (compiled,) = {launch.compiled for launch in launched if launch.kernel == kernel}
    assert compiled.asm["ttir"].count("barrier") == 1
