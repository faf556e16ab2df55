"""Attention ahead of time: no option, width or sign spills registers, and the tensor cores do the products."""

import pytest
import torch

from tritium.kernels import aot, ops
from tritium.kernels.attention import impl_triton as attention
from tritium.kernels.case import Case

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPTIONS = {
    "plain": {},
    "full": {"causal": False},
    "negative": {"scale": -0.1},
    "documents": {"documents": True},
    "window": {"window": 100},
    "softcap": {"softcap": 20.0},
    "dropout": {"dropout": 0.1},
    "documents_softcap": {"documents": True, "softcap": 20.0},
    "documents_dropout": {"documents": True, "dropout": 0.1},
    "softcap_dropout": {"softcap": 20.0, "dropout": 0.1},
    "everything": {"documents": True, "window": 100, "softcap": 20.0, "dropout": 0.1, "scale": -0.1},
}


def case(D: int, options: str, heads: tuple[int, int] = (4, 2)) -> Case:
    shape = {"B": 2, "Tq": 1024, "Tk": 1024, "H": heads[0], "G": heads[1], "D": D}
    return Case(f"{options}_{D}", shape, OPTIONS[options])


def problems(op: str, one: Case, arch: str, dtype: torch.dtype) -> list[str]:
    lines = aot.compile_case(ops.OPS[op], one, arch, dtype)
    assert {line.resources.kernel for line in lines} == {"_forward", "_delta", "_backward_keys", "_backward_queries"}
    return [f"{line.resources}: {line.problem}" for line in lines if line.problem]


@pytest.mark.parametrize(
    ("op", "D", "options", "arch", "dtype"),
    [
        ("attention", 64, "everything", "sm_90", BF16),
        ("attention_lse", 64, "negative", "sm_80", FP16),
        ("attention", 64, "plain", "sm_90", FP32),
    ],
)
def test_no_kernel_spills(op, D, options, arch, dtype):
    """Beside the large cases, which kernels/aot.py compiles. A budget asks for the tensor cores in 16 bits."""
    one = case(D, options)
    if op == "attention_lse":
        assert "dropout" not in one.options
    assert problems(op, one, arch, dtype) == []


# fp32 multiplies without tensor cores, a thread holding whole rows of both operands: with heads of 256, and with every
# option at 128, it spills. It computes right, and slowly.
FULL = [
    *(("everything", D, BF16) for D in (64, 128, 256)),
    *(("plain", D, FP16) for D in (40, 64, 128, 256)),
    *(("plain", D, FP32) for D in (64, 128)),
    ("everything", 64, FP32),
]


@pytest.mark.full
@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize(("options", "D", "dtype"), FULL, ids=str)
def test_full_no_kernel_spills(options, D, dtype, arch):
    """Spills only: of heads of 40 the loads are narrow, and of 256 Hopper's matrix instructions have no room."""
    lines = aot.compile_case(ops.attention, case(D, options), arch, dtype)
    assert [line.resources for line in lines if line.resources.stack > 0] == []


def test_what_differs_in_numbers_only_is_one_kernel():
    """A scale or a window for each layer, and dropout that changes in training, compile nothing new."""
    common = ("forward", 90, 64, 1, BF16, False, True)
    one = attention._plan(*common, 0.1, 5, 2.0, 0.1)
    assert one.constants is attention._plan(*common, 0.2, 6, 3.0, 0.2).constants
    others = [(-0.1, 5, 2.0, 0.1), (0.0, 5, 2.0, 0.1), (0.1, 0, 2.0, 0.1), (0.1, 5, 0.0, 0.1), (0.1, 5, 2.0, 0.0)]
    found = [attention._plan(*common, *numbers).constants for numbers in others]
    assert len({id(c) for c in [one.constants, *found]}) == 6
    assert [c["SIGN"] for c in found] == [-1, 0, 1, 1, 1]


def test_the_length_of_documents_compiles_nothing_new():
    seen = set()
    for T in (1024, 1023, 17):
        q = torch.empty(2, T, 4, 64, dtype=BF16, device="meta")
        with aot.compiling_for("sm_90") as launched:
            attention.forward(
                q, q, q, torch.empty(2, T, dtype=torch.int32, device="meta"), None, True, 0.1, 0, 0.0, 0.0
            )
        seen |= {id(launch.compiled) for launch in launched}
    assert len(seen) == 1
