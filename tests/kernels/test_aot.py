"""Ahead-of-time compilation: what the launchers would launch on GPUs this machine does not have."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from tritium.kernels import aot, ops
from tritium.kernels.attention import impl_triton as attention
from tritium.kernels.case import Budget, Case
from tritium.kernels.lib import triton_norms
from tritium.kernels.op import Backend

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
        ("linear_cross_entropy", "gpt2_124m", "sm_90", {"_forward_backward", "_scale"}),
    ],
)
def test_other_ops_compile_without_spills(op, name, arch, kernels, launches):
    lines = aot.compile_case(ops.OPS[op], case(name, op), arch, BF16)
    assert {line.resources.kernel for line in lines} == kernels
    assert [(line, line.problem) for line in lines if line.problem] == []
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
        compiled.add(id(launched[0].compiled))
    assert len(compiled) == 1


def test_a_tile_too_large_is_a_failure(monkeypatch, capsys):
    """A planted fault: 256 elements a thread of each operand must spill, and be reported."""
    monkeypatch.setattr(triton_norms, "config", lambda *args, **options: triton_norms.Config(8, 1024, 1, 3, 1))
    assert aot.main(["layer_norm", "--arch", "sm_90", "--case", "gpt2_124m"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"^OVER: layer_norm _\w+ sm_90 .*spills: [1-9]\d* bytes of stack", printed, re.M)
    assert "over their limits" in printed


def test_main_prints_a_table_and_succeeds(capsys):
    assert aot.main(["layer_norm", "--arch", "sm_80", "--case", "gpt2_124m"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["op", "kernel", "arch", "cases", "dtype"]
    assert any(line.split()[:5] == ["layer_norm", "_backward", "sm_80", "gpt2_124m", "bfloat16"] for line in lines)
    assert any(
        re.match(r"layer_norm +gpt2_124m +backward +memory +0\.025\d+ +0\.027\d+ +1\.11 +2\.7 TB/s", x) for x in lines
    )
    assert "not run" in "\n".join(lines)
    assert "0 over their limits, 0 calls failed" in lines[-1]
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


# -------------------------------------------------------------------------------------------- budgets and their faults


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (Budget("_forward", registers=16), "registers a thread, the budget is 16"),
        (Budget("_forward", threads=4096), "threads on a processor, the budget asks for 4096"),
        (Budget("_forward", needs=("tensor core",)), "has no tensor core"),
        (Budget("_forward", needs=("tma",), arch="sm_9*"), "has no tma"),
    ],
)
def test_a_broken_budget_is_a_failure(budget, said, monkeypatch, capsys):
    norm = ops.layer_norm.cases
    monkeypatch.setattr(norm, "BUDGETS", (*norm.BUDGETS, budget))
    assert aot.main(["layer_norm", "--arch", "sm_90", "--case", "gpt2_124m"]) == 1
    over = [line for line in capsys.readouterr().out.splitlines() if line.startswith("OVER")]
    assert len(over) == 1 and "layer_norm _forward sm_90" in over[0] and said in over[0]


def test_a_budget_holds_where_its_patterns_match():
    norm = ops.layer_norm
    kernel = aot.Resources("_forward", "sm_90", 4, 3, 200, 0, 0, 10, 0, 1, threads=128, load_bits=128)
    assert kernel.over(Budget("_forward")) == []
    assert kernel.over(Budget("_forward", registers=200, threads=128, needs=("wide loads",))) == []
    assert len(kernel.over(Budget("_forward", registers=199, threads=129, needs=("wide stores", "tma")))) == 4
    with pytest.raises(ValueError, match="tensor cores"):
        kernel.over(Budget("_forward", needs=("tensor cores",)))
    found = {b.kernel for b in aot.budgets_of(norm, "_add_partials", "sm_90", "gpt2_124m")}
    assert found == {"_add_partials"}
    assert aot.budgets_of(norm, "_other", "sm_90", "gpt2_124m") == []


@triton.jit
def _planted(X, Y, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at, at < N), at < N)


def test_a_tile_that_config_did_not_choose_is_a_failure(monkeypatch):
    """A launcher that passes numbers of its own is found out, unless its budget says that they are fixed."""

    def launcher(x):
        y = torch.empty_like(x)
        _planted[(1,)](x, y, x.numel(), BLOCK=256, num_warps=2, enable_fp_fusion=True)
        return y

    backend, large = Backend("relu2", "triton", launcher, types.ModuleType("planted")), case("gpt2_124m", "relu2")
    (line,) = aot.compile_case(ops.relu2, large, "sm_90", BF16, backend)
    assert line.problem == "launched with BLOCK=256 num_warps=2 num_stages=3, which no config() returned"
    budgets = (Budget("_planted", fixed=True),)
    monkeypatch.setattr(ops.relu2.cases, "BUDGETS", budgets)
    (line,) = aot.compile_case(ops.relu2, large, "sm_90", BF16, backend)
    assert line.problem is None
    other = dataclasses.replace(backend, name="mine.relu2")  # no budgets are made for a user's own
    (line,) = aot.compile_case(ops.relu2, large, "sm_90", BF16, other)
    assert line.problem is None


def test_a_tile_agrees_with_config_in_every_part():
    launched = {"C": 768, "BLOCK_C": 1024, "num_warps": 4, "num_stages": 3}
    assert aot._agrees({"BLOCK_C": 1024, "num_warps": 4, "programs": 7}, launched)
    assert not aot._agrees({"BLOCK_C": 1024, "num_warps": 8}, launched)
    assert not aot._agrees({"BLOCK_C": 512, "num_warps": 4}, launched)
    assert not aot._agrees({"BLOCK_C": 1024, "num_warps": 4, "num_stages": 2}, launched)
    assert not aot._agrees({"num_warps": 4}, launched)


WITH_TRITON = [name for name, op in ops.OPS.items() if "triton" in op.backends()]


@pytest.mark.parametrize("name", WITH_TRITON)
def test_every_kernel_has_a_budget_and_a_tile_that_config_chose(name):
    """Nothing is compiled here: the launchers run, and the launches are looked at."""
    op = ops.OPS[name]
    cases = [c for c in op.cases.CASES if c.large]
    shown = cases[:1] if name in ("adamw", "global_norm") else cases  # theirs differ in the number of tensors only
    for large in shown:
        for launch in aot.launches(op, large, "sm_90", BF16, op.load("triton"), compile=False):
            budgets = aot.budgets_of(op, launch.kernel, "sm_90", large.name)
            assert budgets, f"{name} {launch.kernel}: kernels/{name}/cases.py has no Budget for it"
            assert launch.config is not None or any(b.fixed for b in budgets), (launch.kernel, launch.tile)


# ------------------------------------------------------------------------------------------------- reading the binaries


CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDGSTS.E.BYPASS.64 [R5], desc[UR4][R2.64] ;
        /*0030*/              @P1  STG.E.U16 desc[UR4][R2.64], R3 ;
        /*0040*/              @UP0 UTMALDG.2D [UR8], [UR6] ;
        /*0050*/                   STL.64 [R1], R2 ;
        /*0060*/                   LDL R2, [R1] ;
        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0090*/                   EXIT ;
"""


def test_instructions_are_counted_whatever_guards_them(monkeypatch, tmp_path):
    class Metadata:
        target = aot.GPUTarget("cuda", 90, 32)
        name, num_warps, num_stages, shared = "k", 4, 3, 2048

    class Kernel:
        metadata = Metadata
        asm = {"cubin": b"planted", "ptx": ".reqntid 384"}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = {"cuobjdump": "REG:90 STACK:16 SHARED:0 LOCAL:0", "nvdisasm": CODE}
    monkeypatch.setattr(aot, "_tool", lambda name, *args: said[name])
    aot._read_binary.cache_clear()
    found = aot.resources(Kernel)
    assert (found.registers, found.stack, found.spills, found.instructions) == (90, 16, 2, 10)
    assert (found.tensor_core, found.other_matrix, found.tma) == (1, 1, 1)
    assert (found.load_bits, found.store_bits) == (128, 16)
    assert (found.threads, found.blocks, found.resident) == (384, 1, 384)  # 384 threads of 96 registers
    assert "spills: 16 bytes of stack a thread, 2 instructions" in found.problem
    assert len(list(tmp_path.rglob("*.json"))) == 1, "kept"
    aot._read_binary.cache_clear()
    monkeypatch.setattr(aot, "_tool", lambda name, *args: pytest.fail("read again"))
    assert aot.resources(Kernel) == found
    aot._read_binary.cache_clear()


# ------------------------------------------------------------------------------------------ processes, tables, the page


def test_a_compiler_that_crashes_is_an_error_of_its_job(tmp_path, monkeypatch):
    package = tmp_path / "crashing"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "on_sm_80.py").write_text(
        "import os, tritium.kernels.rms_norm.impl_triton as works\n"
        "from tritium.kernels.lib import triton_launch\n"
        "def rms_norm(x, weight=None, eps=1e-5):\n"
        "    if triton_launch.arch() == 80: os._exit(9)\n"
        "    return works.rms_norm(x, weight, eps)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    jobs = aot.jobs_of([ops.rms_norm], "crashing.on_sm_80", ["sm_80", "sm_90"], ["bfloat16"], ["width_768"])
    dead, alive = aot.run_jobs(jobs, 2, lambda text: None)
    assert dead.lines == [] and "ended its process" in dead.errors[0]
    assert alive.errors == [] and {line.resources.kernel for line in alive.lines} >= {"_forward"}


@pytest.mark.parametrize("after_s", [0.0, 0.5, 2.0], ids=["starting", "importing", "compiling"])
def test_ctrl_c_ends_every_process(after_s):
    command = [
        sys.executable,
        "-P",
        "-m",
        "tritium.kernels.aot",
        "attention",
        "--jobs",
        "2",
        "--arch",
        "sm_80",
        "sm_90",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as p:
        assert "compiles" in p.stderr.readline()
        time.sleep(after_s)
        os.killpg(p.pid, signal.SIGINT)
        out, err = p.communicate(timeout=30)
    assert (p.returncode, out) == (130, "")
    assert err == "stopped by Ctrl-C\n"
    deadline = time.monotonic() + 10
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(p.pid, 0)
            time.sleep(0.1)
        pytest.fail("processes are left")


def line_of(**changes) -> aot.Line:
    taken = aot.Resources("_forward", "sm_90", 4, 3, 76, 0, 64, 100, 0, 8, threads=128, load_bits=128, store_bits=64)
    return aot.Line("layer_norm", "gpt2_124m", BF16, dataclasses.replace(taken, **changes), "BLOCK_C=1024")


def test_a_table_shows_where_two_tritons_differ():
    other = dataclasses.replace(line_of(registers=80), case="gpt2_124m")
    (row,) = aot.table({"3.9.0": [line_of()], "3.6.0": [other]})
    cells = dict(zip(aot.HEAD, row, strict=False))
    assert (cells["registers"], cells["stack"], cells["threads/SM"]) == ("76 / 80", "0", "1024")
    assert cells["load, store bits"] == "128, 64"
    (row,) = aot.table({"3.9.0": [line_of(), dataclasses.replace(line_of(), case="b")]})
    assert dict(zip(aot.HEAD, row, strict=False))["cases"] == "gpt2_124m + 1"
    (row,) = aot.table({"3.9.0": [line_of()], "3.6.0": []})
    assert dict(zip(aot.HEAD, row, strict=False))["registers"] == "76 / -"


def test_lines_survive_the_way_between_processes():
    line = dataclasses.replace(line_of(), budgets=("has no tma",))
    assert aot._line(json.loads(json.dumps(line, default=aot._plain))) == line


def test_the_page_is_written_between_its_markers(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{aot.BEGIN}\nold\n{aot.END}\nafter\n")
    aot.write_page(path, aot.page({"3.9.0": [line_of()], "3.6.0": [line_of(stack=8)]}, [ops.layer_norm]))
    text = path.read_text()
    assert "- layer_norm _forward sm_90 (BLOCK_C=1024): spills: 8 bytes" in text and "(Triton 3.6.0)\n\n" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| layer_norm | _forward | gpt2_124m | BLOCK_C=1024 |" in text
    assert "not run" in text and "2.7 TB/s" in text
    path.write_text("no markers")
    with pytest.raises(SystemExit, match="no markers"):
        aot.write_page(path, "x")


def test_the_page_names_every_kernel():
    """docs/performance.md is written by hand of a command: a kernel that it lacks says that it is stale."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    for name in WITH_TRITON:
        op = ops.OPS[name]
        large = next(c for c in op.cases.CASES if c.large)
        for launch in aot.launches(op, large, "sm_90", BF16, op.load("triton"), compile=False):
            row = f"| {name} | {launch.kernel} | "
            assert row in text, f'{row}: run make check-kernels ARGS="--write docs/performance.md"'
