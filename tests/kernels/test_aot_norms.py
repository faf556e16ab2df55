"""The norms' kernels compiled ahead of time: no spills, 16-byte loads, and every program of the backward resident."""

import dataclasses

import pytest
import torch

from tritium.kernels import aot, ops
from tritium.kernels.case import Case
from tritium.kernels.lib import triton_norms as norms

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ONE_TILE, WIDE = (
    {"_forward", "_backward", "_add_partials"},
    {"_forward_wide", "_means_wide", "_backward", "_add_partials"},
)


@pytest.mark.parametrize(
    ("op", "C", "arch", "dtype", "kernels"),
    [
        ("layer_norm", 768, "sm_90", BF16, ONE_TILE),
        ("add_layer_norm", 1600, "sm_90", BF16, ONE_TILE),
        ("add_rms_norm", 8192, "sm_100", FP16, ONE_TILE),
        ("add_layer_norm", norms.MAX_BACKWARD, "sm_80", FP32, ONE_TILE),
        ("rms_norm", norms.MAX_FORWARD, "sm_90", FP32, WIDE - {"_forward_wide"} | {"_forward"}),
        ("add_layer_norm", 65536, "sm_90", FP32, WIDE),
        ("rms_norm", 33, "sm_90", BF16, ONE_TILE),
    ],
)
def test_no_spills_and_a_full_processor(op, C, arch, dtype, kernels):
    lines = aot.compile_case(ops.OPS[op], Case("one", {"N": 4096, "C": C}), arch, dtype)
    found = {line.resources.kernel: line.resources for line in lines}
    assert set(found) == kernels
    assert [line.problem for line in lines if line.problem and C % 16 == 0] == []
    assert [r for r in found.values() if r.problem] == []
    for name, taken in found.items():
        if C % 16 == 0:
            assert taken.load_bits == 128, taken
            assert taken.store_bits == 128 or name in ("_means_wide", "_add_partials"), taken
        if name != "_add_partials":
            assert taken.blocks * taken.warps >= 16, "enough loads in flight to cover the memory's latency"
    tile = norms.config(C, dtype.itemsize, add=op.startswith("add"), backward=True)
    assert found["_backward"].blocks >= tile.programs, "a program that waits for another to end doubles the time"
    if C % 16 == 0:
        assert found["_backward"].shared_bytes > tile.BLOCK_N * tile.BLOCK_C * dtype.itemsize * (tile.STAGES - 1), (
            "tiles are read ahead into shared memory"
        )


def test_another_number_of_rows_compiles_nothing_new():
    base, compiled = Case("one", {"N": 16384, "C": 768}), set()
    for N in (16384, 1000, 17):
        case = dataclasses.replace(base, shape={**base.shape, "N": N})
        launches = aot.launches(ops.add_layer_norm, case, "sm_90", BF16, ops.add_layer_norm.load("triton"))
        assert {launch.kernel for launch in launches} == ONE_TILE
        compiled |= {id(launch.compiled) for launch in launches}
    assert len(compiled) == 3
