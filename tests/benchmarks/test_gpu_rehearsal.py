"""``make gpu`` without a GPU: the cheapest stages rehearsed, and what happens to stages that hang or crash."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from tritium.benchmarks import gpu, stages

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

pytestmark = pytest.mark.timeout(300)  # processes that import torch, one after the other


def test_cheap_stages_are_rehearsed_on_a_bare_machine(tmp_path):
    """Each stage as a process of its own does it, from a file, tritium not installed, and nothing there but torch and
    numpy.
    """
    for stage in ("ceilings", "training"):
        argv = [str(SCRIPT), "--cpu", "--out", str(tmp_path), "--one", stage]
        command = [sys.executable, "-P", "-c", BARE.format(missing=MISSING, argv=argv)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr
    found = [line for stage in ("ceilings", "training") for line in stages.read_lines(tmp_path / f"{stage}.jsonl")]
    assert all({"stage", "name", "value", "unit"} <= line.keys() for line in found)
    by_name = {line["name"]: line for line in found}
    assert by_name["matmul bf16 128^3"]["value"] > 0
    assert by_name["equal losses"]["value"] == "True"
    assert by_name["gpt2_124m, tritium --kernels=reference"]["unit"] == "tokens/s"
    assert "Triton compiles for GPUs" in by_name["tritium --kernels=triton"]["value"]


def test_the_command_runs_stages_and_archives_them(tmp_path):
    command = [sys.executable, "-P", str(SCRIPT), "--cpu", "--stages", "device,gemm", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    environment = stages.read_lines(tmp_path / "out" / "device.jsonl")[0]["environment"]
    assert environment["versions"]["torch"] != "absent"
    with tarfile.open(tmp_path / "out" / "rehearsal.tar.gz") as tar:
        assert {"rehearsal/device.jsonl", "rehearsal/gemm.jsonl", "rehearsal/gemm.stderr.txt"} <= set(tar.getnames())
    assert [stages.read_lines(tmp_path / "out" / f"{s}.jsonl")[-1]["value"] for s in ("device", "gemm")] == ["ok", "ok"]


def planted(name, text, limit_s=60.0):
    return stages.Stage(name, limit_s, (sys.executable, "-c", text))


def test_a_hung_stage_is_killed_with_what_it_started_and_the_others_go_on(tmp_path):
    pid_file, lines = tmp_path / "pid", tmp_path / "out" / "hangs.jsonl"
    hangs = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(pid_file)!r}, "w").write(str(child.pid))
file = open({str(lines)!r}, "w")
file.write('{{"stage": "hangs", "name": "a", "value": 1, "unit": "x"}}\\n{{"stage": "ha')
file.flush()
time.sleep(600)
"""
    crashes = "import sys; sys.exit('the device fell off the bus')"
    segfaults = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    work = [
        planted("hangs", hangs, 2.0), planted("crashes", crashes), planted("segfaults", segfaults),
        planted("good", "print('fine')"),
    ]  # fmt: skip
    start = time.monotonic()
    outcomes = stages.run(work, tmp_path / "out", minutes=2, say=lambda text: None)
    assert time.monotonic() - start < 30
    assert [o.status for o in outcomes] == ["time limit", "failed", "failed", "ok"]
    assert "fell off the bus" in outcomes[1].detail
    assert f"exit status -{signal.SIGSEGV.value}" in outcomes[2].detail
    kept = stages.read_lines(lines)
    assert [line["name"] for line in kept] == ["a", "end"]  # the line cut short is left out, the end is readable
    assert kept[1]["value"] == "time limit"
    assert wait_until_gone(int(pid_file.read_text()))


def wait_until_gone(pid):
    """Whether the process ends within 10 s; a dead one that nobody has waited for counts as gone."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


def test_stages_for_which_no_time_is_left_are_not_begun(tmp_path):
    outcomes = stages.run([planted("late", "print('ran')")], tmp_path, minutes=0.1, say=lambda text: None)
    assert [o.status for o in outcomes] == ["not run"]
    assert json.loads((tmp_path / "late.jsonl").read_text())["value"] == "not run"


def test_unknown_stages_are_named(capsys):
    with pytest.raises(SystemExit) as raised:
        gpu.main(["--stages", "device,gems"])
    assert raised.value.code == 2
    assert "no stage gems; stages: device, ceilings" in capsys.readouterr().err


def test_a_line_that_is_no_measurement_is_refused(tmp_path):
    lines = stages.Lines(tmp_path, "s")
    with pytest.raises(ValueError, match="not a measurement"):
        lines.write("speed", float("inf"), "TB/s")
    with lines.attempt("a missing backend"):
        raise RuntimeError("not compiled in\nand more")
    assert stages.read_lines(lines.path) == [
        {"stage": "s", "name": "a missing backend", "value": "RuntimeError: not compiled in", "unit": "error"}
    ]
