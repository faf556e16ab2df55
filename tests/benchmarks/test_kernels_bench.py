"""The op benchmark times what is right, and refuses what is not."""

import json
import types

import pytest
import torch

from tritium.benchmarks import kernels, timing
from tritium.kernels.op import Backend
from tritium.kernels.ops import OPS

OP = OPS["gelu"]


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


def test_an_unknown_op_or_dtype_is_named(capsys):
    for arguments, said in (
        (["gegelu"], "no op gegelu; ops: linear"),
        (["gelu", "--dtypes", "fp4"], "no dtype fp4; dtypes: fp32"),
    ):
        with pytest.raises(SystemExit) as raised:
            kernels.main(arguments)
        assert raised.value.code == 2
        assert said in capsys.readouterr().err


def test_fractions_of_what_this_device_reaches():
    reached = {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": 0.5}

    def of(op):
        times = (1.0, 1.0, 1.0, 0.0)
        return kernels.fractions(
            kernels.Measured(op, "x", "c", "fp32", False, "forward", *times, 5.0, 0.4, None), reached
        )

    assert of("attention") == {"of_copy": 0.5, "of_matmul": 0.8, "of_bound": 0.8}
    assert of("layer_norm")["of_bound"] == 0.5


def test_the_record_has_figures_that_can_be_compared(tmp_path, capsys):
    from tritium.benchmarks import compare

    path = tmp_path / "record.json"
    words = ["layer_norm", "--backends", "native", "--cases", "odd", "--rounds", "2", "--device", "cpu"]
    assert kernels.main([*words, "--out", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["command"].startswith("tritium bench kernels layer_norm")
    assert {f["name"].split()[0] for f in result["figures"]} == {"layer_norm.reference", "layer_norm.native"}
    assert all(len(f["samples"]) == 4 for f in result["figures"])
    assert result["sources"].keys() == {"layer_norm.reference", "layer_norm.native"}
    assert result["rates"]["fp32"]["copy_gb_per_s"] > 0
    assert compare.main([str(path), str(path), "--gate", "0.5"]) == 0
    assert "layer_norm.native" in capsys.readouterr().out
