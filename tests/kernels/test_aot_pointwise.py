"""The kernels of gelu, swiglu, geglu, relu2, rope and embedding compiled ahead of time: no spills, and wide loads."""

import dataclasses

import pytest
import torch

from tritium.kernels import aot, ops
from tritium.kernels.case import Case
from tritium.kernels.embedding import impl_triton as embedding
from tritium.kernels.lib import triton_pointwise as pointwise
from tritium.kernels.rope import impl_triton as rope

BF16, FP32 = torch.bfloat16, torch.float32
EXACT = Case("wide_exact", {"N": 4096, "F": 6400}, {"approximate": "none", "packed": True}, large=True)


def case(op: str, name: str) -> Case:
    (found,) = (c for c in (*ops.OPS[op].cases.CASES, EXACT) if c.name == name)
    return found


@pytest.mark.parametrize(
    ("op", "name", "arch", "dtype", "kernels"),
    [
        ("gelu", "wide_exact", "sm_90", BF16, {"_unary_forward", "_unary_backward"}),
        ("swiglu", "gpt2_1558m", "sm_90", BF16, {"_gated_forward", "_gated_backward"}),
        ("geglu", "wide_exact", "sm_80", FP32, {"_gated_forward", "_gated_backward"}),
        ("rope", "llama_8b", "sm_100", BF16, {"_turn"}),
        ("embedding", "gpt2_124m", "sm_90", FP32, {"_gather", "_make_keys", "_find_runs", "_sum_chunks", "_sum_runs"}),
    ],
)
def test_no_spills_and_a_processor_full_of_programs(op, name, arch, dtype, kernels):
    lines = aot.compile_case(ops.OPS[op], case(op, name), arch, dtype)
    found = [line.resources for line in lines]
    assert {r.kernel for r in found} == kernels
    assert [r for r in found if r.problem] == []
    assert all(r.blocks * r.warps >= 24 for r in found), "enough loads in flight to cover the memory's latency"


@pytest.mark.parametrize("op", ["swiglu", "rope"])
def test_a_packed_projection_is_read_by_16_bytes(op):
    """Rows as far apart as a projection has them: the loads stay as wide as a thread can ask for."""
    arguments = aot.meta_inputs(ops.OPS[op], case(op, "gpt2_124m"), BF16)
    assert not any(a.is_contiguous() for a in arguments.values() if a.requires_grad)
    with aot.compiling_for("sm_90") as launched, torch.no_grad():
        ops.OPS[op].load("triton").function(**arguments)
    (kernel,) = launched
    ptx = kernel.compiled.asm["ptx"]
    loads = [line for line in ptx.splitlines() if "ld.global" in line]
    stores = [line for line in ptx.splitlines() if "st.global" in line]
    assert loads and all(".v4.b32" in line for line in loads), loads
    assert stores and all(".v4.b32" in line for line in stores), stores


@pytest.mark.parametrize(
    ("op", "letters"), [("swiglu", {"N": (16384, 1000)}), ("rope", {"T": (1024, 77), "B": (16, 3)})]
)
def test_another_length_compiles_nothing_new(op, letters):
    base, compiled = case(op, "gpt2_124m"), set()
    for index in range(2):
        shape = {**base.shape, **{letter: sizes[index] for letter, sizes in letters.items()}}
        arguments = aot.meta_inputs(ops.OPS[op], dataclasses.replace(base, shape=shape), BF16)
        with aot.compiling_for("sm_90") as launched, torch.no_grad():
            ops.OPS[op].load("triton").function(**arguments)
        compiled |= {id(launch.compiled) for launch in launched}
    assert len(compiled) == 1


@pytest.mark.parametrize("op", ["gelu", "geglu"])
def test_vectors_of_any_length_share_their_kernels(op):
    function, compiled = ops.OPS[op].load("triton").function, {}
    for length in (1, 5, 1000, 1001, 128 * 5, 128 * 7, 4096 * 3, 2**20):
        with aot.compiling_for("sm_90") as launched, torch.no_grad():
            x = torch.empty(length, device="meta", dtype=BF16)
            function(x) if op == "gelu" else function(x, x)
        (one,) = launched
        compiled.setdefault(id(one.compiled), []).append(length)
    assert list(compiled.values()) == [[1, 5, 1000, 1001], [640, 896], [4096 * 3, 2**20]]


def test_tiles_fit_the_widths_of_real_models():
    for F in (3072, 4096, 5120, 6400, 2048, 2752, 4352, 14336):
        for itemsize in (2, 4):
            tile = pointwise.config(F, itemsize)
            assert tile.BLOCK_N * tile.BLOCK_F * itemsize == tile.num_warps * 32 * 32
            assert -F % tile.BLOCK_F <= F // 32, "few columns of a tile are idle"
            assert tile.BLOCK_F * itemsize >= 256, "rows are read in whole lines"
    for H, G, D, half in ((12, 12, 64, 32), (25, 25, 64, 32), (32, 8, 128, 64), (8, 1, 256, 16), (1, 1, 2, 1)):
        turn = rope.config(H, G, D, half, 2)
        tile = turn.BLOCK_N * max(turn.BLOCK_H, turn.BLOCK_G) * max(turn.BLOCK_HALF, turn.BLOCK_REST // 2)
        assert tile <= 2048, "32 bytes a thread of either half"
    for C in (768, 1024, 1280, 1600):
        assert -C % embedding.config(C, 2).BLOCK_C <= C // 16
