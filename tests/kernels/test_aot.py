"""Ahead-of-time compilation: what the launchers would launch on GPUs this machine does not have."""

import dataclasses

import pytest
import torch
from triton.runtime.jit import JITFunction

from tritium.kernels import aot, ops
from tritium.kernels.attention import impl_triton as attention
from tritium.kernels.case import Case
from tritium.kernels.lib import triton_norms as norms

BF16 = torch.bfloat16


def case(name: str, op: str) -> Case:
    (found,) = (c for c in ops.OPS[op].cases.CASES if c.name == name)
    return found


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The options of every launch. All ask for fused multiply-add, whose default depends on Triton's version."""
    found, run = [], JITFunction.run

    def seen(self, *args, **options):
        found.append(options)
        return run(self, *args, **options)

    monkeypatch.setattr(JITFunction, "run", seen)
    yield found
    assert all(options.get("enable_fp_fusion") is True for options in found)


def test_attention_of_gpt2_on_an_h100():
    lines = aot.compile_case(ops.attention, case("gpt2_124m_1k", "attention"), "sm_90", BF16)
    by_kernel = {line.resources.kernel: line.resources for line in lines}
    assert set(by_kernel) == {"_forward", "_delta", "_backward_keys", "_backward_queries"}
    for name, found in by_kernel.items():
        assert found.problem is None, found
        assert found.arch == "sm_90"
        assert 0 < found.registers <= 255
        assert found.blocks >= 1
        assert (found.tensor_core > 0) == (name != "_delta"), found
        if name != "_delta":
            kernel = name.removeprefix("_")
            chosen = attention.config(kernel, 90, 64, BF16)
            assert (found.warps, found.stages) == (chosen.num_warps, chosen.num_stages), "what the launcher picks"
    assert by_kernel["_forward"].blocks >= 2


@pytest.mark.parametrize(
    ("op", "name", "arch", "kernels"),
    [
        ("layer_norm", "gpt2_124m", "sm_80", {"_forward", "_backward", "_add_partials"}),
        ("layer_norm", "gpt2_1558m", "sm_100", {"_forward", "_backward", "_add_partials"}),
        ("cross_entropy", "gpt2_16k", "sm_90", {"_forward", "_backward"}),
        ("linear_cross_entropy", "gpt2_124m", "sm_90", {"_forward_backward_in_place", "_scale"}),
    ],
)
def test_other_ops_compile_without_spills(op, name, arch, kernels, launches):
    lines = aot.compile_case(ops.OPS[op], case(name, op), arch, BF16)
    assert {line.resources.kernel for line in lines} == kernels
    assert [line.resources for line in lines if line.resources.problem] == []
    assert len(launches) >= len(kernels)


def test_another_length_compiles_nothing_new():
    """T changes from batch to batch in evaluation and generation; a kernel per length would compile for minutes."""
    base = case("gpt2_124m_1k", "attention")
    compiled = set()
    for T in (1024, 1023, 17):
        shape = {**base.shape, "Tq": T, "Tk": T}
        arguments = aot.meta_inputs(ops.attention, dataclasses.replace(base, shape=shape), BF16)
        with aot.compiling_for("sm_90") as launched, torch.no_grad():
            attention.attention(**arguments)
        assert len(launched) == 1
        compiled.add(id(launched[0]))
    assert len(compiled) == 1


def test_a_tile_too_large_is_a_failure(monkeypatch, capsys):
    """A planted fault: 256 elements a thread of each operand must spill, and be reported."""
    monkeypatch.setattr(norms, "config", lambda *_, **__: norms.Config(8, 1024, 1, 1, programs=1))
    assert aot.main(["layer_norm", "--arch", "sm_90", "--case", "gpt2_124m"]) == 1
    printed = capsys.readouterr().out
    assert "spills" in printed
    assert "over their limits" in printed


def test_main_prints_a_table_and_succeeds(capsys):
    assert aot.main(["layer_norm", "--arch", "sm_80", "--case", "gpt2_124m"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["op", "case", "dtype", "kernel", "arch"]
    assert any(line.split()[:5] == ["layer_norm", "gpt2_124m", "bfloat16", "_backward", "sm_80"] for line in lines)
    assert "0 over their limits" in lines[-1]
    assert aot.main(["layer_norm", "--case", "no_such_case"]) == 1


def test_problems():
    fine = aot.Resources("k", "sm_90", 4, 3, 128, 0, 1000, 100, 0, 4)
    assert fine.problem is None
    assert "spills" in dataclasses.replace(fine, stack=8).problem
    assert "shared memory" in dataclasses.replace(fine, shared_bytes=300_000).problem
    assert dataclasses.replace(fine, shared_bytes=200_000).problem is None
    assert "shared memory" in dataclasses.replace(fine, shared_bytes=200_000, arch="sm_80").problem


def test_meta_inputs_keep_shapes_and_take_no_memory():
    arguments = aot.meta_inputs(ops.cross_entropy, case("llama3", "cross_entropy"), BF16)
    assert arguments["logits"].is_meta
    assert arguments["logits"].shape == (8192, 128256)
    assert arguments["logits"].requires_grad
    assert arguments["vocab_size"] == 128256


def test_the_driver_is_put_back():
    from triton.runtime.driver import driver

    before = driver._active, JITFunction.run
    with pytest.raises(RuntimeError, match="planted"), aot.compiling_for("sm_90"):
        raise RuntimeError("planted")
    assert before == (driver._active, JITFunction.run)


def test_what_cannot_be_compiled_says_so(monkeypatch):
    with pytest.raises(ValueError, match="sm_75"), aot.compiling_for("sm_75"):
        pass
    with pytest.raises(SystemExit):
        aot.main(["no_such_op"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), aot.compiling_for("sm_90"):
        pass
