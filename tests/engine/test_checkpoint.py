import dataclasses
import errno
import json
import pathlib

import pytest
import torch

from tritium.engine import checkpoint
from tritium.engine.checkpoint import CheckpointError
from tritium.engine.config import Config, ConfigError, GPTConfig
from tritium.engine.parallel import World

WORLD = World()


def make(out, step, value=0.0, keep=2):
    state = {
        "model.w": torch.full((3, 4), value),
        "optimizer.steps_done": torch.tensor(float(step)),
        **checkpoint.random_state(0, WORLD.device),
    }
    meta = {"step": step, "position": step * 8, "config": dataclasses.asdict(Config())}
    return checkpoint.save(out, state, meta, WORLD, keep)


def damage(path: pathlib.Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "bit":
        data[len(data) // 2] ^= 1
    path.write_bytes(data[: len(data) // 2] if kind == "truncate" else data)
    if kind == "missing":
        path.unlink()


def test_round_trip_is_exact_and_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step, value=step / 3)
    assert [p.name for p in checkpoint.candidates(tmp_path)] == ["step_00000003", "step_00000002"]
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found.step == 3 and found.config == Config() and found.meta["position"] == 24
    state = {"model.w": torch.zeros(3, 4), "rng.cpu.0": torch.zeros_like(torch.get_rng_state())}
    checkpoint.read(found, state)
    assert torch.equal(state["model.w"], torch.full((3, 4), 1.0))
    assert torch.equal(state["rng.cpu.0"], torch.get_rng_state())


@pytest.mark.parametrize("kind", ["bit", "truncate", "missing"])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "run.json"])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, kind, file):
    make(tmp_path, 1)
    damage(make(tmp_path, 2) / file, kind)
    said = []
    assert checkpoint.newest(tmp_path, said.append).step == 1
    assert len(said) == 1 and file in said[0] and "step_00000002" in said[0]


def test_damaged_checksums_are_noticed(tmp_path):
    make(tmp_path, 1)
    damage(make(tmp_path, 2) / "checksums.json", "truncate")
    said = []
    assert checkpoint.newest(tmp_path, said.append).step == 1 and "checksums.json" in said[0]
    sums = checkpoint.candidates(tmp_path)[0] / "checksums.json"
    sums.write_text("{}")  # a list that vouches for nothing
    with pytest.raises(CheckpointError, match="does not list"):
        checkpoint.verify(sums.parent)


def test_all_damaged_is_an_error_and_none_at_all_is_none(tmp_path):
    assert checkpoint.newest(tmp_path, pytest.fail) is None
    damage(make(tmp_path, 1) / "__0_0.distcp", "bit")
    with pytest.raises(CheckpointError, match="no checkpoint of .* is usable"):
        checkpoint.newest(tmp_path, lambda text: None)


def test_a_half_written_checkpoint_is_not_a_candidate(tmp_path):
    whole = make(tmp_path, 1)
    whole.with_name(".step_00000002.tmp").mkdir()
    assert checkpoint.candidates(tmp_path) == [whole]
    assert make(tmp_path, 2).name == "step_00000002"


def test_a_full_disk_is_said_and_costs_nothing(tmp_path, monkeypatch):
    make(tmp_path, 1, value=1.0)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)  # what DCP's writer calls for each tensor
    with pytest.raises(CheckpointError, match=r"step 2 .*No space left on device.*earlier\s+checkpoints are untouched"):
        make(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert checkpoint.newest(tmp_path, pytest.fail).step == 1


def test_an_unwritable_folder_is_said(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(CheckpointError, match="--run.out"):
        make(tmp_path, 1)


def test_a_checkpoint_of_another_shape_is_refused_with_names(tmp_path):
    make(tmp_path, 1)
    found = checkpoint.newest(tmp_path, pytest.fail)
    with pytest.raises(CheckpointError, match=r"model.w has shape \(3, 4\), the model expects \(2, 4\)"):
        checkpoint.read(found, {"model.w": torch.zeros(2, 4)})
    with pytest.raises(CheckpointError, match="model.v is missing"):
        checkpoint.read(found, {"model.v": torch.zeros(2, 4)})


def test_a_config_that_changes_what_is_learned_cannot_continue(tmp_path):
    stored = Config()
    longer = dataclasses.replace(stored, train=dataclasses.replace(stored.train, steps=5000, log_every=1))
    checkpoint.check_compatible(stored, longer, tmp_path)
    with pytest.raises(ConfigError, match=r"model.n_layer: 12 → 3"):
        checkpoint.check_compatible(stored, dataclasses.replace(stored, model=GPTConfig(n_layer=3)), tmp_path)


def test_another_format_is_refused(tmp_path):
    path = make(tmp_path, 1)
    meta = json.loads((path / "run.json").read_text()) | {"format": 99}
    (path / "run.json").write_text(json.dumps(meta))
    sums = json.loads((path / "checksums.json").read_text())
    sums["run.json"] = checkpoint._sha256(path / "run.json")
    (path / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match="format 99"):
        checkpoint.verify(path)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newer_checkpoint_never_costs_a_good_one(tmp_path, keep):
    for step in (10, 20, 30):
        make(tmp_path, step, keep=3)
    damage(checkpoint.folder_of(tmp_path, 30) / "run.json", "bit")
    found = checkpoint.newest(tmp_path, lambda text: None)
    assert found.step == 20
    for step in (22, 24):  # the run goes on from 20 without anyone having moved 30 away
        make(tmp_path, step, keep=keep)
        assert checkpoint.verify(checkpoint.folder_of(tmp_path, step)).step == step
    moved = checkpoint.set_aside(tmp_path, checkpoint.newest(tmp_path, lambda text: None))
    assert [path.name for path in moved] == (["damaged_step_00000030"] if keep == 2 else [])
    assert checkpoint.newest(tmp_path, pytest.fail).step == 24
    make(tmp_path, 26, keep=2)
    assert [path.name for path in checkpoint.candidates(tmp_path)] == ["step_00000026", "step_00000024"]


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_checksums_that_are_no_list_are_damage(tmp_path, text):
    make(tmp_path, 1)
    (make(tmp_path, 2) / "checksums.json").write_text(text)
    said = []
    assert checkpoint.newest(tmp_path, said.append).step == 1
    assert "no list of checksums" in said[0]


def test_the_operating_system_s_word_is_the_reason():
    """As DCP reports a full disk: its own exception around torch's, which came while handling the system's."""
    inner, torchs, outer = (
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("unexpected pos"),
        ValueError(),
    )
    torchs.__context__, outer.__cause__ = inner, torchs
    assert checkpoint._root(outer) == "OSError: [Errno 28] No space left on device"
    assert checkpoint._root(ValueError("alone")) == "ValueError: alone"


def test_a_small_file_is_replaced_whole(tmp_path):
    path = tmp_path / "config.json"
    checkpoint.write_whole(path, "one")
    checkpoint.write_whole(path, "two")
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_a_small_file_do_not_take_each_others(tmp_path, monkeypatch):
    path, write, inner = tmp_path / "config.json", checkpoint._write, []

    def written(temporary, content):
        write(temporary, content)
        if not inner:  # before the first is in place a second one writes
            inner.append(temporary)
            checkpoint.write_whole(path, "second")
            assert path.read_text() == "second"

    monkeypatch.setattr(checkpoint, "_write", written)
    checkpoint.write_whole(path, "first")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_a_small_file_that_cannot_be_written_leaves_the_old_one_alone(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    checkpoint.write_whole(path, "one")

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_whole(path, "two")
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]
