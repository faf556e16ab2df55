"""The committed tuning entries: each names what exists and its evidence."""

import importlib
import json
import pathlib
import warnings

import pytest
import torch

from tritium.benchmarks import tiles
from tritium.kernels import aot, ops
from tritium.kernels import op as op_module
from tritium.kernels.lib import triton_launch as launch
from tritium.kernels.op import tuning
from tritium.kernels.site import PHASES

FILES = sorted((op_module._FOLDER / "tuning").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_entry_names_an_op_its_backends_and_its_evidence(path: pathlib.Path):
    entries = json.loads(path.read_text())
    assert isinstance(entries, list)
    for entry in entries:
        op = ops.OPS[entry["op"]]
        assert entry["order"], entry
        assert set(entry["order"]) <= set(op.backends()), entry
        assert len(set(entry["order"])) == len(entry["order"]), entry
        assert len(entry["evidence"]) > 10, entry
        assert entry.get("phase") in (None, *PHASES)
        assert entry.get("dtype") in (None, "float32", "bfloat16", "float16")
        assert all(0 < low <= high for low, high in entry.get("shape", {}).values())
        assert not any(op.load(name).unproven for name in entry["order"]), f"{entry}: never run on its device"


def test_the_loader_reads_every_file(tmp_path, monkeypatch):
    assert FILES
    tuning.cache_clear()
    assert len(tuning()) == sum(len(json.loads(path.read_text())) for path in FILES)
    (tmp_path / "tuning").mkdir()
    entry = {"arch": "sm_90", "op": "attention", "order": ["flex", "sdpa"], "evidence": "record", "compiled": True}
    entry["shape"] = {"D": [64, 128]}
    (tmp_path / "tuning" / "one.json").write_text(json.dumps([entry]))
    monkeypatch.setattr(op_module, "_FOLDER", tmp_path)
    tuning.cache_clear()
    try:
        (read,) = tuning()
        assert (read.order, read.shape, read.compiled) == (("flex", "sdpa"), {"D": (64, 128)}, True)
        shortened = {key: value for key, value in entry.items() if key != "evidence"}
        for text, said in (
            (json.dumps([entry, {**entry, "speed": 2}]), "entry 2: .*'speed'"),
            (json.dumps([shortened]), "entry 1: .*'evidence'"),
            ("[{", ".*line 1 column 3"), ("{}", ".*a list of entries"),
            (json.dumps([{**entry, "order": "sdpa"}]), "entry 1: order is a list"),
        ):  # fmt: skip
            (tmp_path / "tuning" / "one.json").write_text(text)
            tuning.cache_clear()
            with pytest.raises(op_module.KernelError, match=f"one.json: {said}.*; mend it, or "):
                tuning()
    finally:
        tuning.cache_clear()


# --------------------------------------------------------------------------------------------------------------- tiles

DEVICE = "NVIDIA H100 80GB HBM3"


def launched(part: tiles.Part, device: str) -> list[aot.Launch]:
    """The launches of the part's case on a board of this name, none compiled."""
    op = ops.OPS[part.op]
    (case,) = (case for case in op.cases.CASES if case.name == part.case)
    with aot.compiling_for("sm_90", compile=False, device=device) as found:
        outputs = op.load("triton").function(**(given := aot.meta_inputs(op, case, torch.bfloat16)))
        if part.what == "forward+backward":
            wanted = [t for t in given.values() if isinstance(t, torch.Tensor) and t.requires_grad]
            torch.autograd.grad(outputs, wanted, torch.empty_like(outputs))
    return found


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "TILES", tmp_path)
    return launch.tiles_path(DEVICE)


@pytest.mark.parametrize(
    "label",
    ["attention backward_keys gpt2_124m_1k", "layer_norm forward gpt2_124m", "gelu tile gpt2_124m",
     "cross_entropy tile gpt2_16k", "linear tile gpt2_124m_up"],
)  # fmt: skip
def test_a_written_tile_is_launched_on_its_device_alone(label, file):
    (part,) = (part for part in tiles.PARTS if part.label == label)
    variant = tiles.Variant(part, {"num_warps": "x2"})
    with variant:
        own = launched(part, "")
    about = {"label": label, "module": part.module, "function": part.function}
    used = [{**about, "arguments": json.loads(a), "own": o, "tile": t} for a, (o, t) in variant.used.items()]
    assert used
    before = [(line.kernel, line.tile, line.warps) for line in launched(part, DEVICE)]
    tiles.write(file, used)
    after = [(line.kernel, line.tile, line.warps) for line in launched(part, DEVICE)]
    assert after == [(line.kernel, line.tile, line.warps) for line in own] != before
    with variant:  # measures against the launcher's own, whatever is written
        assert [(line.kernel, line.tile, line.warps) for line in launched(part, DEVICE)] == after
    for name in ("", "NVIDIA A100-SXM4-80GB"):
        assert [(line.kernel, line.tile, line.warps) for line in launched(part, name)] == before
    # measured against a tile that the launcher has no more
    tiles.write(file, [{**entry, "own": {**entry["own"], "num_warps": 1}} for entry in used])
    assert [(line.kernel, line.tile, line.warps) for line in launched(part, DEVICE)] == before


def test_a_damaged_file_is_named_and_not_used(file):
    part = tiles.PARTS[0]
    before = [(line.tile, line.warps) for line in launched(part, DEVICE)]
    good = {"module": "m", "function": "config", "arguments": {}, "own": {"BLOCK_M": 64}, "tile": {"BLOCK_M": 64}}
    for text in ("", "[{", "{}", "[3]", json.dumps([good, {}]), json.dumps([{**good, "tile": {"BLOCK_M": 100}}]),
                 json.dumps([{**good, "tile": {"num_warps": True}}]), "\x00\xff"):  # fmt: skip
        file.write_text(text)
        with pytest.warns(UserWarning, match=rf"{file.name}.*no measured tile is used on this device"):
            assert [(line.tile, line.warps) for line in launched(part, DEVICE)] == before
        with pytest.raises(ValueError, match=file.name):
            launch.read_tiles(file)
    file.write_text(json.dumps([good]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [(line.tile, line.warps) for line in launched(part, DEVICE)] == before


def test_every_tile_that_is_tried_or_committed_is_read():
    """A launcher whose config is not ``tuned`` would never see what is written for it."""
    calls = {(part.module, part.function) for part in tiles.PARTS}
    for path in launch.TILES.glob("*.json"):
        calls |= {(entry["module"], entry["function"]) for entry in launch.read_tiles(path)}
    for module, function in calls:
        assert hasattr(getattr(importlib.import_module(module), function), "cache_clear"), (module, function)
