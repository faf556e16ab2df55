"""``make gpu`` without a GPU: stages rehearsed, planted kernels that hang, crash or are wrong, records, the table."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import time

import pytest

from tritium.benchmarks import gpu, gpu_records, gpu_table, gpu_tritium, record, stages, tiles, workers
from tritium.benchmarks.gpu_baseline import Bench
from tritium.engine import presets
from tritium.kernels import op as binding
from tritium.kernels import peaks
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.op import Backend
from tritium.kernels.ops import OPS

SCRIPT = pathlib.Path(gpu.__file__)
BARE = """
import importlib.machinery, runpy, sys
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {missing} else find(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MISSING = {
    "rich", "tyro", "tokenizers", "safetensors", "zstandard", "transformers", "tensorboard", "matplotlib", "datasets",
}  # fmt: skip
FACTS = {"device": "a GPU", "torch": "2.11.0", "triton": "3.6.0"}

pytestmark = pytest.mark.timeout(300)  # processes that import torch


def test_stages_are_rehearsed_on_a_bare_machine(tmp_path):
    """Each stage as a process of its own does it, from a file, tritium not installed, and nothing there but torch and
    numpy.
    """
    names = ("ceilings", "training", "anatomy", "ablation")
    running = []
    for stage in names:
        argv = [str(SCRIPT), "--cpu", "--out", str(tmp_path), "--one", stage]
        command = [sys.executable, "-P", "-c", BARE.format(missing=MISSING, argv=argv)]
        environment = {**os.environ, **gpu.STAGES[stage].rehearsal, "OMP_NUM_THREADS": "1"}
        running.append(subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path, env=environment
        ))  # fmt: skip
    for process in running:
        said, _ = process.communicate(timeout=250)
        assert process.returncode == 0, said
    found = [line for stage in names for line in stages.read_lines(tmp_path / f"{stage}.jsonl")]
    by_name = {line["name"]: line for line in found}
    assert by_name["matmul bf16 128^3"]["value"] > 0
    assert by_name["equal losses"]["value"] == "True"
    assert by_name["gpt2_124m, tritium --kernels=reference"]["unit"] == "tokens/s"
    assert "Triton compiles for GPUs" in by_name["tritium --kernels=triton"]["value"]
    assert by_name[f"gpt2_124m, {gpu_table.OVER}"]["value"] > 1.0
    assert "most of it" in (tmp_path / "anatomy.txt").read_text()
    assert {record.read(path)["kind"] for path in tmp_path.glob("*.json")} == {"train", "ablate"}


def test_the_command_runs_stages_keeps_them_and_skips_what_is_recorded(tmp_path):
    """An earlier run has shown one baseline, and the contract of one backend of three."""
    out, kept = tmp_path / "out", tmp_path / "records"
    versions = record.versions()
    facts = {"device": record.machine("cpu")["name"], "torch": versions["torch"], "triton": versions["triton"]}
    facts["tiles"] = ""  # none was measured for this machine
    end = {"name": "end", "value": "ok", "unit": "status", "seconds": 1.0, "detail": ""}
    earlier = kept / "gpu_20200101T000000Z"
    earlier.mkdir(parents=True)
    name = "gelu.reference one fp32"
    known = {"op": "gelu", "backend": "reference", "case": "one", "dtype": "fp32", "compiled": False,
             "digest": record.source_digest("gelu", "reference"),
             "oracle": gpu_records.oracle_digest("gelu")}  # fmt: skip
    written(earlier, "contract", {"name": name, "value": "passed", "unit": "contract", **known, **facts})
    copied = {"name": "copy 1 MiB", "value": 7.0, "unit": "TB/s"}
    written(earlier, "ceilings", copied, {**end, "device": facts["device"], "torch": facts["torch"]})

    words = [sys.executable, "-P", str(SCRIPT), "--cpu", "--out", str(out), "--stages", "ceilings,contract",
             "--ops", "gelu", "--records", str(kept)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=280, cwd=tmp_path, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"== ceilings: recorded in 0 s (recorded already: {earlier / 'ceilings.jsonl'}" in done.stdout
    taken_over, last = stages.read_lines(out / "ceilings.jsonl")
    assert (taken_over["value"], taken_over["recorded"]) == (7.0, str(earlier / "ceilings.jsonl"))
    assert last["value"] == "recorded"
    lines = {line["name"]: line for line in stages.read_lines(out / "contract.jsonl")}
    assert lines[name]["recorded"] == str(earlier / "contract.jsonl")
    assert (lines["recorded"]["value"], lines["passed"]["value"]) == (1, 2)
    assert "recorded" not in lines["gelu.triton one fp32"]  # in the interpreter
    with tarfile.open(out / "rehearsal.tar.gz") as tar:
        wanted = {"device.jsonl", "ceilings.jsonl", "contract.jsonl", "contract.stderr.txt", "table.md", "gpu.json"}
        assert {f"rehearsal/{name}" for name in wanted} <= set(tar.getnames())
    result = record.read(out / "gpu.json")
    assert not record.problems(result, {**record.COMMON, **gpu_table.SCHEMA})
    assert (result["kind"], result["machine"]["device"]) == ("gpu", "cpu")
    ended = {s["stage"]: s["status"] for s in result["stages"]}
    assert (ended["ceilings"], ended["contract"], ended["training"]) == ("recorded", "ok", "not run")
    assert "gpt2_124m tokens/s" in done.stdout and "≥ 600,000" in done.stdout and "not run" in done.stdout
    (run,) = (path for path in kept.iterdir() if path != earlier)
    assert {path.name for path in run.iterdir()} == {"device.jsonl", "contract.jsonl"}


def test_without_a_device_the_rest_is_not_run(tmp_path):
    """Here there is no GPU: the table says so of every stage, and there is an archive."""
    words = [sys.executable, "-P", str(SCRIPT), "--out", str(tmp_path / "out"), "--stages", "training,gemm"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 1
    assert "torch sees none" in done.stdout
    assert "== training: not run in 0 s (there is no device to measure)" in done.stdout
    assert (tmp_path / "out" / "gpu.tar.gz").exists()


def test_tuning_adds_the_tiles_and_wrong_words_end_with_the_nearest(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr(gpu, "run_all", lambda names, minutes, a, ops: seen.append((names, minutes, ops)) or 0)
    monkeypatch.setenv("STAGE", "kernels")
    monkeypatch.setenv("OPS", "attention")
    monkeypatch.setenv("GPU_MINUTES", "3")
    assert gpu.main([]) == 0
    assert seen == [(["kernels", "tiles"], 3.0, ["attention"])]
    for words, said in (
        (["--stages", "device,gems"], "there is no stage 'gems'; the nearest are gemm"),
        (["--ops", "atention"], "there is no op 'atention'; the nearest are attention"),
        (["--minutes", "soon"], "'soon' is none"), (["--minutes", "-1"], "'-1' is none"),
        (["--stagse", "gemm"], "there is no flag '--stagse'; the nearest are --stages"),
        (["--stages", " ,"], "--stages (STAGE) names no stage"),
        (["--out", str(SCRIPT)], f"{SCRIPT} cannot hold a record"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as raised:
            gpu.main(words)
        assert raised.value.code == 2
        assert said in capsys.readouterr().err
    assert len(seen) == 1


def test_a_python_without_torch_is_told_what_is_missing(tmp_path):
    argv = [str(SCRIPT), "--cpu", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-P", "-c", BARE.format(missing={"torch", "numpy"}, argv=argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{sys.executable} has no torch, numpy, and make gpu installs nothing" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_stopped_in_its_first_stage_says_so_of_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stages, "stop_on_signals", lambda: None)

    def stopped(stage, out, limit_s):
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "_run", stopped)
    assert gpu.main(["--cpu", "--stages", "gemm", "--out", str(tmp_path)]) == 130
    assert f"== gemm: not run in 0 s ({stages.STOPPED})" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- kernels in children

CHILD = """
import os, sys, time, types
from tritium.benchmarks import gpu_records, gpu_tritium, stages
from tritium.benchmarks.gpu_baseline import Bench
from tritium.kernels.op import Backend
from tritium.kernels.ops import OPS

op = OPS["gelu"]
def hangs(x, approximate="tanh"): time.sleep(600)
def aborts(x, approximate="tanh"): os.abort()
def exits(x, approximate="tanh"): sys.exit(0)
def wrong(x, approximate="tanh"): return op.reference(x, approximate) * 1.02
for function in (hangs, aborts, exits, wrong):
    op._loaded[function.__name__] = Backend("gelu", function.__name__, function, types.ModuleType("planted"))
op.backends = lambda: ["reference", "aborts", "exits", "hangs", "wrong"]
stage = sys.argv[1]
lines = stages.Lines(__import__("pathlib").Path(OUT), stage, begin=False)
gpu_tritium.serve(stage, Bench(lines, "cpu", tiny=True))
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A rehearsal of gelu whose children have planted backends."""
    monkeypatch.setattr(OPS["gelu"], "backends", lambda: ["reference", "aborts", "exits", "hangs", "wrong"])
    monkeypatch.setattr(workers, "QUIET_S", 3.0)  # three times in a rehearsal; a first check takes 2 s
    monkeypatch.setattr(gpu_tritium, "SLOW_S", 0.0)
    gpu_tritium.source_of.cache_clear()
    child = (sys.executable, "-P", "-c", f"OUT = {str(tmp_path)!r}\n{CHILD}")

    def made(stage, **more):
        run = gpu_records.Run(ops=["gelu"], facts=FACTS, child=child, **more)
        return Bench(stages.Lines(tmp_path, stage), "cpu", tiny=True, run=run)

    yield made
    gpu_tritium.source_of.cache_clear()


def test_a_kernel_that_hangs_crashes_or_is_wrong_is_named_and_costs_itself(bench, tmp_path):
    start = time.monotonic()
    with pytest.raises(SystemExit, match="1 failed, 1 hung, 2 crashed; 1 passed"):
        gpu_tritium.contract_on_device(bench("contract"))
    assert time.monotonic() - start < 100
    lines = {line["backend"]: line for line in stages.read_lines(tmp_path / "contract.jsonl") if "backend" in line}
    found = {backend: line["value"] for backend, line in lines.items()}
    assert found == {
        "reference": "passed", "aborts": "crashed", "exits": "crashed", "hangs": "hung", "wrong": "failed",
    }  # fmt: skip
    assert lines["reference"]["digest"] == record.source_digest("gelu", "reference")
    assert lines["reference"]["device"] == "a GPU"


def test_only_what_the_contract_is_green_for_is_timed(bench, tmp_path, monkeypatch):
    """The stage's lines decide; who is not in them is checked first."""
    monkeypatch.setattr(gpu_tritium, "ops_of", lambda bench: [OPS["gelu"]])
    case = OPS["gelu"].cases.CASES[0].name
    rows = gpu_tritium._shown(OPS["gelu"], "fp32", [
        {"unit": "contract", "op": "gelu", "backend": b, "case": case, "dtype": "fp32", "compiled": False, "value": v}
        for b, v in (("aborts", "crashed"), ("exits", "crashed"), ("hangs", "hung"), ("reference", "passed"))
    ], tiny=True)  # fmt: skip
    assert rows == [["reference", case, "passed"], ["aborts", case, "crashed"], ["exits", case, "crashed"],
                    ["hangs", case, "hung"]]  # fmt: skip
    made = bench("kernels")
    op = OPS["gelu"]
    wrong = lambda x, approximate="tanh": op.reference(x, approximate) * 1.02  # noqa: E731
    for name in ("aborts", "exits", "hangs", "wrong"):
        monkeypatch.setitem(op._loaded, name, Backend("gelu", name, wrong, sys.modules[__name__]))
    answer = gpu_tritium.time_case(made, {"op": "gelu", "case": "odd", "dtype": "fp32", "reports": rows}, {})
    assert {row["backend"] for row in answer["rows"]} == {"reference"}
    assert {text.split()[1].split(".")[1] for text in answer["red"]} == {"aborts", "exits", "hangs", "wrong"}


RED = {"unit": "contract", "op": "gelu", "backend": "hangs", "case": "one", "dtype": "fp32", "compiled": False}


def test_a_backend_that_broke_the_contract_is_in_no_training_step(bench, tmp_path, monkeypatch):
    """One that hung there would hang the stage, to its limit."""

    def never(x, approximate="tanh"):
        raise AssertionError("it was run")

    for name in ("hangs", "wrong"):
        monkeypatch.setitem(OPS["gelu"]._loaded, name, Backend("gelu", name, never, sys.modules[__name__]))
    written(tmp_path, "contract", RED | {"name": "a", "value": "hung"})
    monkeypatch.setattr(gpu_tritium, "CHOICES", ("hangs",))
    gpu_tritium.training_by_kernels(bench("training"))
    lines = {line["name"]: line for line in stages.read_lines(tmp_path / "training.jsonl")}
    assert lines["gpt2_124m, tritium --kernels=hangs"]["unit"] == "tokens/s"
    assert (lines["gelu.hangs"]["value"], lines["gelu.hangs"]["unit"]) == (
        "hung in the contract: gelu=auto in its place", "left out")  # fmt: skip
    # what auto would take may be red too
    monkeypatch.setattr(binding, "tuning", lambda: (binding.Tuned("*", "gelu", ("wrong",), "made up"),))
    written(
        tmp_path,
        "contract",
        RED | {"name": "a", "value": "hung"},
        RED | {"name": "b", "value": "failed", "backend": "wrong"},
    )
    found = gpu_tritium.sound(bench("training"), presets.load("gpt2_124m").replace(kernels={"gelu": "hangs"}))
    assert found.kernels.gelu == "reference"


def test_what_hung_in_one_stage_hangs_in_no_other(bench, tmp_path, monkeypatch):
    """Nor is it tuned."""
    monkeypatch.setattr(OPS["gelu"], "backends", lambda: ["hangs"])
    written(
        tmp_path,
        "contract",
        RED | {"name": "a", "value": "hung"},
        RED | {"name": "b", "value": "crashed", "backend": "triton"},
    )
    with pytest.raises(SystemExit, match="the contract: none passed, 1 not run"):
        gpu_tritium.contract_on_device(bench("contract_fp32"))
    found = {line["backend"]: line for line in stages.read_lines(tmp_path / "contract_fp32.jsonl") if "backend" in line}
    assert (found["hangs"]["value"], found["hangs"]["reason"]) == ("not run", "gelu.hangs hung in an earlier stage")
    tiles.tune(bench("tiles"))
    lines = stages.read_lines(tmp_path / "tiles.jsonl")
    assert [(line["value"], line["unit"]) for line in lines] == [("crashed in the contract", "left out")]


@pytest.mark.parametrize("stage", ["contract", "contract_fp32"])
def test_a_contract_whose_time_ran_out_has_not_failed(bench, tmp_path, monkeypatch, capsys, stage):
    """Nothing is red, and nothing is shown either."""
    monkeypatch.setattr(OPS["gelu"], "backends", lambda: ["reference", "wrong"])
    with pytest.raises(SystemExit) as stop:
        gpu_tritium.contract_on_device(bench(stage, end=time.monotonic()))
    assert stop.value.code == stages.OUT_OF_TIME
    assert "the contract: no time left, 2 not run and none of them red" in capsys.readouterr().err
    lines = [line for line in stages.read_lines(tmp_path / f"{stage}.jsonl") if "backend" in line]
    assert [(line["value"], line["reason"]) for line in lines] == [("not run", "no time left")] * 2


def test_what_an_earlier_run_found_red_counts_until_the_source_changes_or_it_passes(bench, tmp_path):
    known = {"digest": gpu_tritium.source_of("gelu", "reference"), "oracle": gpu_records.oracle_digest("gelu"), **FACTS}
    line = RED | known | {"backend": "reference", "stage": "contract", "name": "a", "value": "crashed"}
    kept(tmp_path, "1", line)
    earlier = gpu_records.Earlier(tmp_path)
    assert gpu_tritium.red_backends(bench("training", earlier=earlier)) == {("gelu", "reference"): "crashed"}
    kept(tmp_path, "2", line | {"value": "passed"})
    assert gpu_tritium.red_backends(bench("training", earlier=gpu_records.Earlier(tmp_path))) == {}
    kept(tmp_path, "3", line | {"name": "b", "digest": "another"})
    assert gpu_tritium.red_backends(bench("training", earlier=gpu_records.Earlier(tmp_path))) == {}


def test_an_ablation_of_ops_that_the_model_does_not_call_says_so(tmp_path, monkeypatch):
    plain = Backend("gelu", "triton", OPS["gelu"].reference, sys.modules[__name__])  # Triton's is interpreted there
    monkeypatch.setitem(OPS["gelu"]._loaded, "triton", plain)
    lines = stages.Lines(tmp_path, "ablation")
    gpu_tritium.ablation(Bench(lines, "cpu", tiny=True, run=gpu_records.Run(ops=["swiglu", "attention"])))
    said = {line["name"]: line["value"] for line in stages.read_lines(lines.path)}
    assert said == {
        "swiglu=reference": "gpt2_124m does not call it: nothing can be left out",
        "attention=reference": "its reference computes it here: nothing can be left out",
    }


# ------------------------------------------------------------------------------------------------------ earlier records


def kept(folder, name, *lines):
    path = folder / f"gpu_{name}" / "contract.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_record_counts_only_for_the_source_the_versions_and_the_device_it_was_made_with(tmp_path):
    known = {**FACTS, "digest": "aaaa", "oracle": "bbbb"}
    line = {"stage": "contract", "name": "gelu.triton odd bf16", "value": "passed", "unit": "contract", **known}
    path = kept(tmp_path, "1", line, {"stage": "contract", "name": "end", "value": "ok", "unit": "status", **FACTS})
    failed = kept(tmp_path, "2", line | {"value": "failed"}, {"stage": "contract", "name": "end", "value": "failed",
                                                              "unit": "status", **FACTS})  # fmt: skip
    earlier = gpu_records.Earlier(tmp_path)
    wanted = {**known, "value": "passed"}
    assert earlier.line(line["name"], wanted).path == path  # and not the newer one, which is not green
    for key in known:
        assert earlier.line(line["name"], {**wanted, key: "another"}) is None
    assert earlier.line("gelu.triton odd fp32", wanted) is None
    assert earlier.stage("contract", FACTS) == path
    assert earlier.stage("contract", {**FACTS, "torch": "2.12.0"}) is None
    assert earlier.stage("kernels", FACTS) is None
    assert earlier.line(line["name"], known).path == failed
    assert gpu_records.Earlier(tmp_path / "nowhere").line(line["name"], {}) is None
    assert gpu_records.Earlier(None).files == {}


def test_a_stage_that_left_a_backend_out_is_not_recorded(bench, tmp_path, monkeypatch):
    """It ended well, but of what it left out it has no figure; what the model does not call is no loss."""
    end = {"stage": "contract", "name": "end", "value": "ok", "unit": "status", **FACTS}
    unused = {"stage": "contract", "name": "swiglu=reference", "value": "not called", "unit": "left out"}
    path = kept(tmp_path, "1", unused, end)
    assert gpu_records.Earlier(tmp_path).stage("contract", FACTS) == path
    written(tmp_path, "contract", RED | {"name": "a", "value": "hung", "backend": "wrong"})
    monkeypatch.setitem(
        OPS["gelu"]._loaded, "wrong", Backend("gelu", "wrong", OPS["gelu"].reference, sys.modules[__name__])
    )
    made = bench("training")
    gpu_tritium.sound(made, presets.load("gpt2_124m").replace(kernels={"gelu": "wrong"}))
    (left_out,) = stages.read_lines(tmp_path / "training.jsonl")
    assert (left_out["name"], left_out["unit"]) == ("gelu.wrong", "left out")
    kept(tmp_path, "2", left_out, end)
    assert gpu_records.Earlier(tmp_path).stage("contract", FACTS) == path  # the one before had it
    path.unlink()
    assert gpu_records.Earlier(tmp_path).stage("contract", FACTS) is None


def test_digests_follow_the_source(tmp_path):
    for name in ("kernels/op.py", "kernels/contract.py", "kernels/gelu/cases.py", "kernels/gelu/reference.py",
                 "kernels/gelu/impl_triton.py", "kernels/gelu/notes.txt", "engine/step.py"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a")
    tree, oracle = gpu_records.tree_digest(tmp_path), gpu_records.oracle_digest("gelu", tmp_path)
    (tmp_path / "kernels/gelu/notes.txt").write_text("b")
    assert gpu_records.tree_digest(tmp_path) == tree
    (tmp_path / "kernels/gelu/impl_triton.py").write_text("b")
    assert gpu_records.tree_digest(tmp_path) != tree
    assert gpu_records.oracle_digest("gelu", tmp_path) == oracle
    (tmp_path / "kernels/gelu/cases.py").write_text("b")
    assert gpu_records.oracle_digest("gelu", tmp_path) != oracle


def test_facts_follow_the_tiles_of_the_device(tmp_path):
    folder = tmp_path / "kernels" / "tuning" / "tiles"
    folder.mkdir(parents=True)
    assert gpu_records.tiles_digest("NVIDIA A100-SXM4-80GB", tmp_path) == ""
    (folder / launch.tiles_path("NVIDIA A100-SXM4-80GB").name).write_text("[]")
    first = gpu_records.tiles_digest("NVIDIA A100-SXM4-80GB", tmp_path)
    (folder / launch.tiles_path("NVIDIA A100-SXM4-80GB").name).write_text("[1]")
    assert "" != first != gpu_records.tiles_digest("NVIDIA A100-SXM4-80GB", tmp_path)
    assert gpu_records.tiles_digest("NVIDIA H100 80GB HBM3", tmp_path) == ""


def test_a_run_adds_to_the_records_only_what_it_wrote(tmp_path):
    out, begun = tmp_path / "out", time.time()
    out.mkdir()
    for name in ("contract.jsonl", "ceilings.jsonl", "train.json", "table.txt"):
        (out / name).write_text("x")
    (out / "old.json").write_text("of another day")
    os.utime(out / "old.json", (begun - 1000, begun - 1000))
    gpu_records.keep(out, ["contract"], tmp_path / "kept", begun)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"contract.jsonl", "train.json"}


# ----------------------------------------------------------------------------------------------------------- the table


def written(folder, stage, *lines):
    stages.Lines(folder, stage)
    (folder / f"{stage}.jsonl").write_text("".join(json.dumps({"stage": stage, **line}) + "\n" for line in lines))


def speed(op, backend, case, what, ms, **more):
    return {"name": f"{op}.{backend} {case} {what}", "value": 1.0, "unit": "GB/s", "op": op, "backend": backend,
            "case": case, "what": what, "dtype": "bf16", "compiled": False, "p50_ms": ms, **more}  # fmt: skip


def test_the_table_has_every_goal_and_what_was_measured_of_it(tmp_path):
    """Made-up figures of an H100, each goal worked out by hand."""

    def tokens(choice, value):
        return {"name": f"gpt2_124m, tritium --kernels={choice}", "value": value, "unit": "tokens/s"}

    written(tmp_path, "training", tokens("auto", 590e3), tokens("triton", 610e3),
            {"name": "gpt2_124m, plain PyTorch", "value": 700e3, "unit": "tokens/s"})  # fmt: skip
    written(tmp_path, "training_350m", {"name": "gpt2_350m, tritium --kernels=auto", "value": 2e5, "unit": "tokens/s"})
    written(tmp_path, "anatomy", {"name": f"gpt2_124m, {gpu_table.OVER}", "value": 1.21, "unit": "×"})
    written(tmp_path, "ceilings", {"name": "copy 64 MiB (read + written)", "value": 2.0, "unit": "TB/s"},
            {"name": "matmul bf16 8192^3", "value": 700.0, "unit": "TFLOP/s"})  # fmt: skip
    case = next(case for case in OPS["layer_norm"].cases.CASES if case.name == "gpt2_124m")
    forward_bytes = OPS["layer_norm"].cases.bytes(case, gpu_table._bf16())
    met_ms = forward_bytes / 2.75e12 * 1e3
    written(
        tmp_path, "kernels", speed("layer_norm", "triton", "gpt2_124m", "forward", 0.999 * met_ms),
        speed("layer_norm", "reference", "gpt2_124m", "forward", 1e-6),
        speed("layer_norm", "triton", "gpt2_124m", "forward+backward", 0.999 * met_ms + 1.0, recorded="FILE"),
        speed("layer_norm", "triton", "gpt2_350m", "forward", 10.0) | {"dtype": "fp32"},
        {"name": "end", "value": "time limit", "unit": "status", "seconds": 9.0, "detail": "killed"},
    )  # fmt: skip
    written(tmp_path, "overhead", {"name": "gelu.triton", "value": 14.0, "unit": "us over by hand", "goal_us": 15.0})
    written(tmp_path, "contract", {"name": "a", "value": "passed", "unit": "contract"},
            {"name": "b", "value": "hung", "unit": "contract"})  # fmt: skip
    environment = record.begin("gpu", "make gpu", "cpu")
    environment["machine"]["name"] = "NVIDIA H100 80GB HBM3"
    result = gpu_table.summary(tmp_path, list(gpu.STAGES), environment, rehearsed=False)
    rows = {row["figure"]: row for row in result["goals"]}

    def shown(name):
        return rows[name]["value"], rows[name]["verdict"], rows[name]["by"]

    assert shown("gpt2_124m tokens/s") == (610e3, "met", "triton")  # not the peer's
    assert shown("gpt2_350m tokens/s") == (2e5, "not met", "auto")
    assert shown("gpt2_774m tokens/s") == (None, "not run", "")
    assert shown(f"gpt2_124m {gpu_table.OVER}") == (1.21, "not met", "")
    assert shown(f"gpt2_1558m {gpu_table.OVER}") == (None, "not run", "")
    assert shown("checks of the contract that failed") == (1.0, "not met", "1 passed")
    assert shown("gelu eager call over by hand") == (14.0, "met", "triton")
    assert rows["layer_norm gpt2_124m forward"]["value"] == pytest.approx(2.75 / 0.999)
    assert rows["layer_norm gpt2_124m forward"]["verdict"] == "met"
    backward = rows["layer_norm gpt2_124m backward"]
    moved = OPS["layer_norm"].cases.bytes_backward(case, gpu_table._bf16())
    assert backward["value"] == pytest.approx(moved / 1e-3 / 1e12)
    assert (backward["verdict"], backward["recorded"]) == ("not met", True)
    assert shown("layer_norm gpt2_350m forward") == (None, "not run", "")  # fp32 is no bf16
    goals = sum(len(list(gpu_table._goals(op))) for op in OPS.values())
    assert len(rows) == len(gpu_table.TRAINING_GOALS) + goals + 2
    assert {s["stage"]: s["status"] for s in result["stages"]}["kernels"] == "time limit"
    assert [c["name"] for c in result["checks"] if not c["ok"]] == ["stage kernels"]
    assert not record.problems(result, {**record.COMMON, **gpu_table.SCHEMA})

    text, page = gpu_table.text(result), gpu_table.markdown(result)
    assert "gpt2_124m tokens/s" in text and "610,000" in text and "≥ 600,000" in text
    assert "| gpt2_774m tokens/s | *not run* | ≥ 108,000 | tokens/s | *not run* |  |" in page
    assert "| kernels | time limit | 9 | killed |" in page


def test_goals_hold_for_the_gpu_they_are_for(tmp_path):
    assert gpu_table.no_goal_for("NVIDIA H100 80GB HBM3", False) == ""
    assert gpu_table.no_goal_for("NVIDIA H100 80GB HBM3", True) == "rehearsed"
    for name in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200", "NVIDIA A100-SXM4-80GB"):
        assert gpu_table.no_goal_for(name, False) == "no goal for this GPU"
    assert gpu_table.verdict(2.0, 1.0, "higher", "rehearsed") == "rehearsed"
    assert gpu_table.verdict(None, 1.0, "higher", "rehearsed") == "not run"
    assert [gpu_table.verdict(v, 1.2, "lower") for v in (1.1, 1.2, 1.3)] == ["met", "met", "not met"]


def test_a_fraction_of_a_copy_is_of_the_copy_measured_in_the_same_run():
    op = OPS["layer_norm"]
    case = next(case for case in op.cases.CASES if case.name == "long_rows")
    ms = 1e3 * op.cases.bytes(case, gpu_table._bf16()) / 2.0e12
    lines = [speed("layer_norm", "triton", "long_rows", "forward", ms)]
    peak = dataclasses.replace(peaks.H100, measured_copy=2.0e12)
    rows = {row["figure"]: row for row in gpu_table.kernel_rows(lines, peak, "", [op])}
    assert rows["layer_norm long_rows forward"]["value"] == pytest.approx(1.0)
    assert rows["layer_norm long_rows forward"]["verdict"] == "met"
