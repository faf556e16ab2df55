"""Other tiles in the place of a launcher's own: put in and taken out, held to the contract, compared, written."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch

from tritium.benchmarks import gpu_records, gpu_tritium, record, stages, tiles, workers
from tritium.benchmarks.gpu_baseline import Bench
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.lib import triton_norms as norms
from tritium.kernels.ops import OPS

(FORWARD,) = (part for part in tiles.PARTS if part.label == "layer_norm forward gpt2_124m")


def test_every_part_speaks_of_a_choice_and_of_cases_that_there_are():
    assert len({part.label for part in tiles.PARTS}) == len(tiles.PARTS)
    for part in tiles.PARTS:
        op = OPS[part.op]
        module = __import__(part.module, fromlist=["x"])
        parameters = inspect.signature(getattr(module, part.function)).parameters
        assert set(part.when) <= set(parameters), part.label
        fields = module.Config._fields
        assert {name for changes in part.candidates for name in changes} <= set(fields), part.label
        known = {case.name: case for case in op.cases.CASES}
        assert known[part.case].large and not any(known[name].large for name in part.gate), part.label
        for name in part.also:
            assert {case.name for case in OPS[name].cases.CASES} & set(part.gate), (part.label, name)
        assert "triton" in op.backends()


def test_a_change_is_absolute_or_of_the_launchers_own():
    own = norms.Config(4, 1024, 8, 2, 3)
    assert tiles.changed(own, {}) == own
    assert tiles.changed(own, {"BLOCK_N": "x2", "num_warps": "/2", "STAGES": 4}) == norms.Config(8, 1024, 4, 4, 3)
    assert tiles.changed(own._replace(BLOCK_N=1), {"BLOCK_N": "/2"}).BLOCK_N == 1


def test_a_variant_changes_its_own_calls_and_leaves_no_trace():
    """Also where the launcher has cached its plan before, and afterwards."""
    own, other = norms._forward_plan(768, 2, False), norms.config(768, 2, add=False, backward=True)
    variant = tiles.Variant(FORWARD, {"num_warps": "x2"})
    for _ in range(2):
        with variant:
            tile, constants = norms._forward_plan(768, 2, False)
            assert (tile.num_warps, constants["num_warps"]) == (2 * own[0].num_warps,) * 2
            assert norms._forward_plan(768, 2, False) is norms._forward_plan(768, 2, False)  # cached as ever
            assert norms.config(768, 2, add=False, backward=True) == other
        assert norms._forward_plan(768, 2, False) is own
    ((arguments, (before, after)),) = variant.used.items()
    assert json.loads(arguments) == {"C": 768, "itemsize": 2, "add": False, "backward": False}
    assert after == {**before, "num_warps": 2 * before["num_warps"]}
    with pytest.raises(ZeroDivisionError), variant:
        _ = 1 / 0
    assert norms._forward_plan(768, 2, False) is own


def test_a_tile_is_held_to_the_contract_where_it_is_used(monkeypatch):
    seen = []

    def check(status, uses, tiny=True):
        def planted(op, backend, case, dtype, device, variants):
            seen.append((op.name, case.name))
            if uses:
                norms._forward_plan(48, 4, False)
            now = status[op.name] if isinstance(status, dict) else status
            return type("R", (), {"status": now, "ok": now == "passed", "reason": "3 % off"})

        monkeypatch.setattr(tiles.contract, "check", planted)
        bench = type("B", (), {"tiny": tiny, "device": "cpu"})()
        return tiles.hold(FORWARD, {"num_warps": "x2"}, bench)

    assert check("passed", True) == {"status": "passed", "reason": ""}
    assert check("failed", True) == {"status": "failed", "reason": "layer_norm odd: 3 % off"}
    assert check("passed", False)["status"] == "refused"  # nothing has used the tile, so nothing shows it right
    assert check("refused", True)["status"] == "refused"
    assert set(seen) == {("layer_norm", "odd")}
    # rms_norm's launcher asks by the same calls, and would get the tile too
    assert check("passed", True, tiny=False)["status"] == "passed"
    other = check({"layer_norm": "passed", "rms_norm": "failed"}, True, tiny=False)
    assert other == {"status": "failed", "reason": "rms_norm odd: 3 % off"}
    assert {name for _, name in seen} == set(FORWARD.gate)


def test_two_tiles_agree_up_to_rounding_only():
    own = [torch.randn(64, generator=torch.Generator().manual_seed(0)), torch.empty(0)]
    near = [own[0] * (1 + 2**-24), torch.empty(0)]
    assert tiles.disagreement(own, near, torch.float32) is None
    for wrong in (own[0] * 1.02, own[0].clone().fill_(float("nan")), own[0].roll(1)):
        assert "differs from the launcher's own" in tiles.disagreement(own, [wrong, own[1]], torch.float32)


def test_only_what_is_shown_to_be_faster_is_the_best():
    def row(low, median):
        return {"over_own": {"low": low, "median": median}}

    slower, unclear, fast, faster = row(0.8, 0.9), row(0.99, 1.3), row(1.01, 1.05), row(1.02, 1.2)
    assert tiles.fastest([slower, unclear]) is None
    assert tiles.fastest([slower, unclear, fast, faster]) is faster
    assert tiles.fastest([]) is None


def test_the_best_are_added_to_the_file_and_replace_those_of_the_same_calls(tmp_path, capsys):
    path = tmp_path / "tiles" / "a_gpu.json"

    def entry(F, num_warps, label="gelu tile"):
        return {"label": label, "module": "m", "function": "config", "arguments": {"F": F},
                "own": {"num_warps": 2}, "tile": {"num_warps": num_warps}}  # fmt: skip

    def there():
        return {(e["arguments"]["F"], e["tile"]["num_warps"]) for e in json.loads(path.read_text())}

    tiles.write(path, [entry(768, 4)])
    tiles.write(path, [entry(768, 8), entry(1600, 4), entry(768, 16, "relu2 tile")])  # the more valuable part is first
    assert there() == {(768, 8), (1600, 4)}
    tiles.write(path, [])
    assert there() == {(768, 8), (1600, 4)}
    tiles.write(path, [entry(768, 4, "relu2 tile")], finished=["gelu tile"])  # none was faster for it this time
    assert there() == {(768, 4)}
    path.write_text(path.read_text()[:-9])
    tiles.write(path, [entry(512, 4)])
    assert there() == {(512, 4)}
    assert f"replaced: {path} cannot be read" in capsys.readouterr().err


CHILD = """
import sys
from tritium.benchmarks import workers
def task(task, beat):
    if task["kind"] == "gate":
        if task["changes"].get("num_warps") == "/2": raise RuntimeError("out of resource: shared memory")
        return {"status": "passed", "reason": ""}
    ratio = {"median": 1.10, "low": 1.08, "high": 1.12, "level": 0.95}
    row = {"changes": task["changes"][0], "over_own": ratio, "ms": 1.0, "tile": {"num_warps": 8}, "own": {}}
    best = {"label": task["label"], "op": "layer_norm", "part": "forward", "changes": task["changes"][0],
            "module": "tritium.kernels.lib.triton_norms", "function": "config", "over_own": ratio,
            "uses": [{"arguments": {"C": 768}, "own": {"num_warps": 4}, "tile": {"num_warps": 8}}]}
    if FASTER is False: best = None
    return {"rows": [row], "left_out": ["BLOCK_N=x2: it is another result"], "best": best}
workers.serve(task)
"""


def test_the_stage_times_what_is_green_writes_the_best_and_skips_what_is_recorded(tmp_path, monkeypatch):
    """With a child that makes its answers up."""
    monkeypatch.setattr(workers, "QUIET_S", 10.0)
    gpu_tritium.source_of.cache_clear()
    facts = {"device": "a GPU", "torch": "2.11.0", "triton": "3.6.0", "tiles": "of before"}
    child = (sys.executable, "-P", "-c", f"FASTER = True\n{CHILD}")

    def lines_of(out, **more):
        out.mkdir()
        run = gpu_records.Run(facts={**facts, "tiles": out.name}, child=child, **more)
        tiles.tune(Bench(stages.Lines(out, "tiles"), "cpu", tiny=True, run=run))
        return stages.read_lines(out / "tiles.jsonl"), json.loads(next(out.glob("tiles_*.json")).read_text())

    lines, entries = lines_of(tmp_path / "gpu_1")
    by_name = {(line["name"], line["unit"]): line for line in lines}
    label = FORWARD.label
    assert by_name[f"{label} num_warps=/2", "contract"]["value"] == "error"
    assert by_name[f"{label} num_warps=x2", "× own tile"]["low"] == 1.08
    assert by_name[label, "left out"]["value"] == "BLOCK_N=x2: it is another result"
    assert by_name[label, "part"]["value"] == "num_warps=x2"
    (entry,) = entries
    assert (entry["arguments"], entry["tile"], entry["device"]) == ({"C": 768}, {"num_warps": 8}, "a GPU")
    assert entry["digest"] == record.source_digest("layer_norm", "triton")
    again, none = lines_of(tmp_path / "gpu_2", earlier=gpu_records.Earlier(tmp_path))
    assert [(line["name"], line["unit"]) for line in again] == [(label, "part")]
    assert again[0]["recorded"] == str(tmp_path / "gpu_1" / "tiles.jsonl")
    assert none == []

    # where ops are named, the file that launchers read is written: on a device, whose name it has
    monkeypatch.setattr(launch, "TILES", tmp_path / "tiles")
    monkeypatch.setattr(launch, "device_name", lambda: "A GPU 80GB")
    monkeypatch.setattr(tiles, "PARTS", (FORWARD,))
    for faster, wanted in ((True, [{"num_warps": 8}]), (False, [])):
        out = tmp_path / f"ops_{faster}"
        out.mkdir()
        child = (sys.executable, "-P", "-c", f"FASTER = {faster}\n{CHILD}")
        run = gpu_records.Run(ops=["layer_norm"], facts=facts, child=child)
        tiles.tune(Bench(stages.Lines(out, "tiles"), "cpu", tiny=False, run=run))
        path = tmp_path / "tiles" / "a_gpu_80gb.json"
        assert [e["tile"] for e in launch.read_tiles(path)] == wanted
        (line,) = (line for line in stages.read_lines(out / "tiles.jsonl") if line["unit"] == "file")
        assert (line["value"], line["entries"]) == (str(path), len(wanted))
    gpu_tritium.source_of.cache_clear()


@pytest.mark.timeout(120)
def test_two_tiles_are_compared_in_the_interpreter(tmp_path):
    """The real kernels, their results and an interval."""
    text = f"""
import json
from tritium.benchmarks import stages, tiles
from tritium.benchmarks.gpu_baseline import Bench
bench = Bench(stages.Lines(__import__("pathlib").Path({str(tmp_path)!r}), "tiles"), "cpu", tiny=True)
(part,) = (part for part in tiles.PARTS if part.label == {FORWARD.label!r})
print(json.dumps([tiles.hold(part, {{"BLOCK_N": "x2"}}, bench), tiles.compare(part, [{{"BLOCK_N": "x2"}}], bench)]))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", text], capture_output=True, text=True, env=environment, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    held, compared = json.loads(done.stdout)
    assert held["status"] == "passed", held
    (row,) = compared["rows"]
    assert row["tile"]["BLOCK_N"] == 2 * row["own"]["BLOCK_N"]
    assert row["over_own"]["low"] <= row["over_own"]["median"] <= row["over_own"]["high"]
    assert compared["left_out"] == []
