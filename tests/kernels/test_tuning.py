"""The committed tuning entries: each names what exists and its evidence."""

import json
import pathlib

import pytest

from tritium.kernels import op as op_module
from tritium.kernels import ops
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
        (tmp_path / "tuning" / "one.json").write_text(json.dumps([{**entry, "speed": 2}]))
        tuning.cache_clear()
        with pytest.raises(TypeError, match="speed"):
            tuning()
    finally:
        tuning.cache_clear()
