"""The op benchmark times what is right, and refuses what is not."""

import fnmatch
import json
import pathlib
import subprocess
import sys
import types

import pytest
import torch

from tritium.benchmarks import compare, kernels, record, throughput, timing
from tritium.kernels import peaks
from tritium.kernels.op import Backend
from tritium.kernels.ops import OPS

OP = OPS["gelu"]


MEASURE_RATES = kernels.rates


@pytest.fixture(autouse=True)
def rates_known(monkeypatch):
    """Measuring them takes seconds; one test does."""
    monkeypatch.setattr(kernels, "rates", lambda device, dtype: {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": 0.1})


def test_rates_are_this_machines():
    found = MEASURE_RATES("cpu", torch.float32)
    assert 0.1 < found["copy_gb_per_s"] < 10_000
    assert 0.001 < found["matmul_tflop_per_s"] < 1_000


def planted(factor):
    """A backend of gelu whose result is ``factor`` × the right one."""
    return Backend(
        "gelu",
        "planted",
        lambda x, approximate="tanh": OP.reference(x, approximate) * factor,
        types.ModuleType("planted"),
    )


def test_the_gate_admits_what_is_right_and_stops_what_is_two_percent_off():
    gate = kernels.Gate("cpu")
    assert gate.admits(OP, planted(1.0), torch.float32)
    assert gate.red == []
    wrong = kernels.Gate("cpu")
    assert not wrong.admits(OP, planted(1.02), torch.float32)
    assert "gelu.planted" in wrong.red[0]


def test_a_red_backend_gets_no_figure_and_status_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(OP, "backends", lambda: ["reference", "planted"])
    monkeypatch.setitem(OP._loaded, "planted", planted(1.02))
    path = tmp_path / "record.json"
    assert (
        kernels.main(
            ["gelu", "--cases", OP.cases.CASES[0].name, "--rounds", "2", "--device", "cpu", "--out", str(path)]
        )
        == 1
    )
    shown = capsys.readouterr()
    assert "gelu.reference" in shown.out
    assert "gelu.planted" not in shown.out
    assert "RED" in shown.err
    result = json.loads(path.read_text())
    assert {row["backend"] for row in result["rows"]} == {"reference"}
    assert result["red"]


def test_a_backend_that_fails_at_a_size_costs_the_others_nothing(monkeypatch, tmp_path, capsys):
    """It kept the contract on the small cases and said that it can serve this one."""
    right, timed = planted(1.0), kernels.bench_case
    fail = False

    def fails(x, approximate="tanh"):
        if fail:
            raise RuntimeError("too large, after all")
        return right.function(x, approximate)

    def judged(*args):
        nonlocal fail
        fail = True
        yield from timed(*args)

    monkeypatch.setattr(kernels, "bench_case", judged)
    monkeypatch.setattr(OP, "backends", lambda: ["planted", "reference"])
    monkeypatch.setitem(OP._loaded, "planted", Backend("gelu", "planted", fails, types.ModuleType("planted")))
    path = tmp_path / "record.json"
    words = ["gelu", "--cases", "odd", "--rounds", "2", "--device", "cpu", "--out", str(path)]
    assert kernels.main(words) == 1
    assert "gelu.planted odd forward: RuntimeError: too large, after all" in capsys.readouterr().err
    result = record.read(path)
    assert {(row["backend"], row["what"]) for row in result["rows"]} == {
        ("reference", "forward"), ("reference", "forward+backward"),
    }  # fmt: skip
    assert [c["name"] for c in result["checks"] if not c["ok"]] == ["gelu.planted runs what it does not refuse"]


def test_what_is_being_done_is_said_as_it_is_done(monkeypatch, tmp_path, capsys):
    """On stderr, so that --json's stdout is a record alone; a contract that holds for minutes has its own line."""
    monkeypatch.setattr(OP, "backends", lambda: ["reference", "planted"])
    monkeypatch.setitem(OP._loaded, "planted", planted(1.0))
    words = ["gelu", "--cases", "odd", "--rounds", "2", "--device", "cpu", "--json", "--out", str(tmp_path / "r.json")]
    assert kernels.main(words) == 0
    shown = capsys.readouterr()
    small = len([case for case in OP.cases.CASES if not case.large])
    said = [line for line in shown.err.splitlines() if line.startswith("gelu")]
    wanted = [
        "gelu fp32, 1 of 1: a copy and a product, that rates are parts of",
        f"gelu.planted float32: its contract, {small} cases",
        "gelu odd fp32: inputs",
        "gelu.reference odd fp32 forward: warm-up",
        "gelu.planted odd fp32 forward: warm-up",
        "gelu odd fp32 forward: 2 rounds of reference, planted",
        "gelu.reference odd fp32 forward+backward: warm-up",
        "gelu.planted odd fp32 forward+backward: warm-up",
        "gelu odd fp32 forward+backward: 2 rounds of reference, planted",
    ]
    assert [line for line in said if line in wanted] == wanted
    assert json.loads(shown.out)["kind"] == "kernels"


@pytest.mark.parametrize("done", [0, 1, 2])
def test_ctrl_c_keeps_the_ops_that_are_done(monkeypatch, tmp_path, capsys, done):
    """In a record of their own: one of all ops, from before, stays."""
    ran, bench = [], kernels.bench_ops

    def stops(request, *more):
        if len(ran) == done:
            raise KeyboardInterrupt
        ran.append(request.ops[0].name)
        return bench(request, *more)

    monkeypatch.setattr(kernels, "bench_ops", stops)
    path, words = tmp_path / "record.json", ["--backends", "reference", "--cases", "odd", "--rounds", "2"]
    path.write_text("the one before")
    assert kernels.main(["gelu", "relu2", "layer_norm", *words, "--device", "cpu", "--out", str(path)]) == 130
    assert path.read_text() == "the one before"
    kept = tmp_path / "record_stopped.json"
    assert kept.exists() == bool(done)
    if not done:
        assert "stopped by Ctrl-C before the first op was done; nothing is written" in capsys.readouterr().err
        return
    result = record.read(kept)
    assert f"written: {kept}" in capsys.readouterr().out
    assert [row["op"] for row in result["rows"]] == [op for op in ("gelu", "relu2")[:done] for _ in range(2)]
    left = ["gelu", "relu2", "layer_norm"][done:]
    assert result["refused"] == [{"op": op, "backend": "*", "why": "stopped by Ctrl-C (fp32)"} for op in left]


@pytest.mark.parametrize(("out", "said"), [(".", "is a folder; name a file"), ("file/a.json", "cannot hold a record")])
def test_an_out_that_cannot_be_written_is_said_before_anything_is_timed(monkeypatch, tmp_path, capsys, out, said):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kernels, "bench_ops", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit) as raised:
        kernels.main(["gelu", "--device", "cpu", "--out", str(tmp_path / out)])
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


def test_what_is_named_twice_is_timed_once(tmp_path, capsys):
    path = tmp_path / "record.json"
    words = ["gelu", "gelu", "--dtypes", "fp32,fp32", "--backends", "reference", "--cases", "odd", "--rounds", "2"]
    assert kernels.main([*words, "--device", "cpu", "--out", str(path)]) == 0
    assert [f["name"] for f in record.read(path)["figures"]] == [
        "gelu.reference odd fp32 forward", "gelu.reference odd fp32 forward+backward", "copy fp32", "matmul fp32",
    ]  # fmt: skip


def test_a_gpu_that_is_not_there_is_a_wrong_command_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as raised:
        kernels.main(["gelu", "--device", "cuda"])
    assert raised.value.code == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_rates_are_the_ideal_work_over_the_measured_time(monkeypatch):
    monkeypatch.setattr(OP, "backends", lambda: ["reference", "planted"])
    monkeypatch.setitem(OP._loaded, "planted", planted(1.0))
    case = next(
        case for case in OP.cases.CASES if not case.large and kernels.work(OP, case, torch.float32, "forward")[1] > 0
    )
    request = kernels.Request([OP], "cpu", [torch.float32], pattern=case.name, rounds=2, inner=1)
    rows = list(kernels.bench_ops(request, kernels.Gate("cpu"), timing.WallClock(), []))
    assert {(row.backend, row.what) for row in rows} == {
        (b, w) for b in ("reference", "planted") for w in ("forward", "forward+backward")
    }
    for row in rows:
        flops, moved = OP.cases.flops(case), OP.cases.bytes(case, torch.float32)
        if row.what == "forward+backward":
            flops, moved = flops + OP.cases.flops_backward(case), moved + OP.cases.bytes_backward(case, torch.float32)
        assert row.gb_per_s * row.p50_ms == pytest.approx(moved / 1e6)
        assert row.tflop_per_s * row.p50_ms == pytest.approx(flops / 1e9)
        assert (row.over_reference is None) == (row.backend == "reference")


def test_of_a_function_without_a_gradient_the_forward_alone_is_timed():
    op = OPS["global_norm"]
    request = kernels.Request([op], "cpu", [torch.float32], ["reference"], pattern="odd", rounds=2, inner=1)
    rows = list(kernels.bench_ops(request, kernels.Gate("cpu"), timing.WallClock(), []))
    assert [(row.backend, row.what) for row in rows] == [("reference", "forward")]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["layernorm"], "no op 'layernorm'; the nearest are layer_norm, "),
        (["gelu", "--dtypes", "fp4"], "no dtype 'fp4'; the nearest are fp"),
        (["gelu", "--backends", "tritn"], "no backend of these ops 'tritn'; the nearest are triton, "),
        (
            ["gelu", "--cases", "odd,gpt2_124n"],
            "--cases gpt2_124n matches no case of these ops; the nearest are gpt2_124m",
        ),
        (["gelu", "--rounds", "1"], "--rounds must be at least 2"),
        (["gelu", "--case", "odd"], "no flag '--case'; the nearest are --cases"),
    ],
)
def test_a_wrong_command_line_says_what_there_is(arguments, said, capsys):
    with pytest.raises(SystemExit) as raised:
        kernels.main(arguments)
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


def test_tritons_interpreter_is_not_timed(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as raised:
        kernels.main(["gelu"])
    assert raised.value.code == 2
    assert "says nothing about speed; unset it" in capsys.readouterr().err


def measured(op, what="forward", case="c", **fields):
    given = {"gb_per_s": 5.0, "tflop_per_s": 0.4, "p50_ms": 1.0, "dtype": "fp32", **fields}
    values = {"p20_ms": 1.0, "p80_ms": 1.0, "noise": 0.0, "over_reference": None, "compiled": False, "backend": "x"}
    return kernels.Measured(op=op, case=case, what=what, **values, **given)


def test_fractions_of_what_this_device_reaches():
    reached = {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": 0.5}
    wanted = {"of_copy": 0.5, "of_matmul": 0.8, "of_bound": 0.8, "bound_by": "measured matmul"}
    assert kernels.fractions(measured("attention"), reached) == wanted
    wanted = {"of_copy": 0.5, "of_matmul": 0.8, "of_bound": 0.5, "bound_by": "measured copy"}
    assert kernels.fractions(measured("layer_norm"), reached) == wanted


def test_on_a_known_device_the_bound_is_its_own():
    reached = {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": 0.5}
    assert kernels.peak_of("NVIDIA H100 80GB HBM3") == peaks.H100
    assert kernels.peak_of("NVIDIA H200") == peaks.H200
    assert kernels.peak_of("NVIDIA A100-SXM4-80GB") == peaks.A100
    # another chip, or a board of the chip with another clock or memory, has another bound
    for name in ("Intel(R) Xeon(R) Processor", "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA H100 PCIe",
                 "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe"):  # fmt: skip
        assert kernels.peak_of(name) is None, name
    op = OPS["layer_norm"]
    case = next(case for case in op.cases.CASES if case.name == "gpt2_124m")
    row = measured("layer_norm", "forward+backward", "gpt2_124m", dtype="bf16", p50_ms=0.1)
    moved = op.cases.bytes(case, torch.bfloat16) + op.cases.bytes_backward(case, torch.bfloat16)
    found = kernels.fractions(row, reached, peaks.H100)
    assert found["bound_by"] == "memory"
    assert found["of_bound"] == pytest.approx(moved / peaks.H100.measured_copy / 1e-4)
    assert found["of_copy"] == 0.5


def test_the_record_has_figures_that_can_be_compared(tmp_path, capsys, monkeypatch):
    taken = iter(range(1, 100))
    rate = lambda device, dtype: {"copy_gb_per_s": float(next(taken)), "matmul_tflop_per_s": 2.0}  # noqa: E731
    monkeypatch.setattr(kernels, "rates", rate)
    path = tmp_path / "record.json"
    words = ["layer_norm", "--backends", "native", "--cases", "odd", "--rounds", "2", "--device", "cpu"]
    assert kernels.main([*words, "--out", str(path), "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(path.read_text())
    assert json.loads(shown.out) == result
    assert "layer_norm.native" in shown.err and f"written: {path}" in shown.err
    assert result["command"].startswith("tritium bench kernels layer_norm")
    goals = [figure for figure in result["figures"] if figure["better"]]
    assert {figure["name"].split()[0] for figure in goals} == {"layer_norm.reference", "layer_norm.native"}
    assert all(len(figure["samples"]) == 4 and figure["unit"] == "ms" for figure in goals)
    assert result["sources"].keys() == {"layer_norm.reference", "layer_norm.native"}
    assert {(check["name"], check["ok"]) for check in result["checks"]} == {
        ("layer_norm.reference keeps its contract", True), ("layer_norm.native keeps its contract", True)
    }  # fmt: skip
    # the rates before and after the op: their middle is what its rows are fractions of
    assert result["rates"] == {"fp32": {"copy_gb_per_s": 1.5, "matmul_tflop_per_s": 2.0}}
    assert {f["name"]: f["samples"] for f in result["figures"] if not f["better"]}["copy fp32"] == [1.0, 2.0]
    for row in result["rows"]:
        assert row["of_copy"] == pytest.approx(row["gb_per_s"] / 1.5)
        assert row["of_matmul"] == pytest.approx(row["tflop_per_s"] / 2.0)
        assert row["of_bound"] == row["of_copy"]
    assert compare.main([str(path), str(path), "--gate", "0.5"]) == 0
    assert "layer_norm.native" in capsys.readouterr().out


def test_a_record_goes_where_its_choice_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "RESULTS", tmp_path)
    words = ["relu2", "--cases", "odd,one", "--rounds", "2", "--device", "cpu"]
    assert kernels.main(words) == 0
    assert kernels.main([*words, "--backends", "reference"]) == 0
    written = sorted(p.name for p in (tmp_path / "cpu").iterdir())
    assert written == ["kernels_relu2_fp32_odd_one.json", "kernels_relu2_fp32_reference_odd_one.json"]
    assert f"written: {tmp_path / 'cpu' / written[0]}" in capsys.readouterr().out


def test_ops_that_a_cpu_cannot_bear_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "CPU_GFLOP", 0.0)
    assert kernels.main(["linear", "--device", "cpu", "--out", str(tmp_path / "r.json")]) == 0
    assert "refused linear.*: its large cases are too much for a CPU; name one with --cases" in capsys.readouterr().out


def test_a_backend_that_was_named_and_cannot_run_is_status_1(tmp_path, capsys):
    words = ["relu2", "--backends", "triton", "--cases", "odd", "--rounds", "2", "--device", "cpu"]
    assert kernels.main([*words, "--out", str(tmp_path / "r.json")]) == 1
    assert "triton gave no figure: Triton compiles for GPUs" in capsys.readouterr().err


def test_inductor_is_the_reference_compiled(tmp_path):
    path = tmp_path / "r.json"
    words = ["relu2", "--backends", "inductor", "--cases", "odd", "--dtypes", "fp32", "--rounds", "2"]
    assert kernels.main([*words, "--device", "cpu", "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {(row["backend"], row["compiled"]) for row in rows} == {("reference", False), ("reference", True)}


NATIVE = pathlib.Path(OPS["global_norm"].folder) / "impl_native.py"
CALL = "return _launch(tensors) if"


@pytest.mark.parametrize("sign", ["", "-"])
def test_a_copy_of_a_kernel_with_its_sign_flipped_gets_no_speed(tmp_path, capsys, monkeypatch, sign):
    """The file is copied into a package of the user's, chosen by its path."""
    package = tmp_path / f"mine_{'flipped' if sign else 'kept'}"
    package.mkdir()
    text = NATIVE.read_text().replace("tritium::global_norm_native", f"tritium::{package.name}")
    assert text.count(CALL) == 1
    (package / "norm.py").write_text(text.replace(CALL, CALL.replace("_launch", f"{sign}_launch")))
    monkeypatch.syspath_prepend(str(tmp_path))
    name, path = f"{package.name}.norm", tmp_path / "record.json"
    words = ["global_norm", "--backends", name, "--cases", "odd", "--rounds", "2", "--device", "cpu"]
    status = kernels.main([*words, "--out", str(path)])
    result, shown = json.loads(path.read_text()), capsys.readouterr()
    assert {row["backend"] for row in result["rows"]} == ({"reference"} if sign else {"reference", name})
    assert status == (1 if sign else 0)
    assert (f"RED, hence no speed: failed  global_norm.{name}" in shown.err) == bool(sign)
    assert (f"{name} gave no figure" in shown.err) == bool(sign)
    assert {check["name"]: check["ok"] for check in result["checks"]}[f"global_norm.{name} keeps its contract"] != bool(
        sign
    )
    assert f"global_norm.{name} odd" not in shown.out or not sign
    if sign:
        assert compare.red(record.read(path))


def test_a_backend_of_the_repository_with_its_sign_flipped_gets_no_speed(tmp_path, capsys, monkeypatch):
    op = OPS["global_norm"]
    module = op.load("native").module
    right = module.global_norm
    monkeypatch.setattr(module, "global_norm", lambda tensors: -right(tensors))
    monkeypatch.delitem(op._loaded, "native")
    words = ["global_norm", "--cases", "odd", "--rounds", "2", "--device", "cpu"]
    assert kernels.main([*words, "--out", str(tmp_path / "r.json")]) == 1
    monkeypatch.undo()
    op._loaded.pop("native")
    shown = capsys.readouterr()
    assert "global_norm.native" not in shown.out
    assert "RED, hence no speed: failed  global_norm.native" in shown.err


def test_the_same_runs_under_pytest_benchmark(tmp_path):
    """In a clean shell; one op of the default selection, and a red backend that fails untimed."""
    path = tmp_path / "speeds.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/", "-k", "relu2", "--benchmark-json", str(path), "-q"]
    done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(path.read_text())["benchmarks"]
    more, seconds = found["extra_info"], found["stats"]["median"]
    assert (more["op"], more["backend"], more["dtype"]) == ("relu2", "reference", "float32")
    assert more["tb_per_s"] == pytest.approx(more["bytes"] / seconds / 1e12)
    assert more["tflop_per_s"] == pytest.approx(more["flops"] / seconds / 1e12)
    assert fnmatch.fnmatch(found["name"], "test_speed?relu2-reference-*-forward+backward?")
    assert found["stats"]["rounds"] == 5


def test_under_pytest_benchmark_a_red_backend_fails_untimed(monkeypatch):
    from tritium.benchmarks import test_kernels as lane

    monkeypatch.setattr(OP, "backends", lambda: ["reference", "planted"])
    monkeypatch.setitem(OP._loaded, "planted", planted(-1.0))
    with pytest.raises(AssertionError, match=r"gelu\.planted"):
        lane.test_speed(None, OP, "planted", OP.cases.CASES[0], "forward")


def test_the_default_selection_is_one_case_an_op():
    from tritium.benchmarks import test_kernels as lane

    chosen: dict[str, set[tuple[str, str]]] = {}
    for parameters in lane.runnable():
        op, _, case, what = parameters.values
        if not parameters.marks:
            chosen.setdefault(op.name, set()).add((case.name, what))
    assert chosen.keys() == OPS.keys()
    assert all(len(found) == 1 for found in chosen.values())
