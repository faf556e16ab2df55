"""AdamW's moments in fewer bits: what is kept, that training repeats to the bit, and checkpoints of another kind."""

import itertools
import json

import pytest
import torch

from tritium.engine import checkpoint, moments, train
from tritium.engine.config import Config, ConfigError, GPTConfig, TrainConfig
from tritium.engine.parallel import World
from tritium.engine.step import MicroBatch
from tritium.kernels.lib import dynamic_code

V, T, B = 300, 16, 4
SMALL = Config(
    name="small",
    model=GPTConfig(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_embd=32),
    train=TrainConfig(batch_rows=B, micro_rows=B, precision="bf16", device="cpu", compile="false"),
)
LR = torch.tensor(3e-3)


def engine_of(kind: str, **fields) -> train.Engine:
    return train.build(SMALL.replace(optim={"moments": kind}, **fields), World())


def steps(engine: train.Engine, first: int, last: int) -> list[float]:
    """Losses of steps first to last - 1, each on its own batch."""
    found = []
    for step in range(first, last):
        draw = torch.Generator().manual_seed(step)
        ids = torch.randint(V, (B, T), generator=draw)
        loss, _ = engine.step([MicroBatch(ids, ids.roll(-1, 1))], LR, torch.tensor(1 / (B * T)))
        found.append(loss.item())
    return found


def save(engine: train.Engine, out, step: int) -> checkpoint.Checkpoint:
    import dataclasses

    meta = {"step": step, "config": dataclasses.asdict(engine.config)}
    state = engine.state() | checkpoint.random_state(0, torch.device("cpu"))
    return checkpoint.verify(checkpoint.save(out, state, meta, World(), keep=2))


def value(state: dict[str, torch.Tensor], moment: str, name: str) -> torch.Tensor:
    """A moment in fp32."""
    found = state[f"optimizer.{moment}.{name}"]
    if found.dtype == torch.uint8:
        return dynamic_code.decode(found, state[f"optimizer.{moment}_scale.{name}"], moment == "exp_avg")
    return found.float()


@pytest.mark.parametrize("kind", moments.KINDS)
def test_what_is_kept(kind):
    engine = engine_of(kind)
    groups = engine.optimizer.groups
    matrices = sum(p.numel() for g in groups for p in g.params if p.ndim == 2)
    vectors = sum(p.numel() for g in groups for p in g.params if p.ndim < 2)
    scales = sum(dynamic_code.blocks(p.numel()) for g in groups for p in g.params if p.ndim == 2)
    size = sum(t.nbytes for n, t in engine.state().items() if n.startswith("optimizer.exp_avg"))
    each = {"fp32": 8 * (matrices + vectors), "bf16": 4 * (matrices + vectors)}
    assert size == each.get(kind, 2 * matrices + 8 * scales + 8 * vectors)
    assert {row.op for row in engine.table if row.site == "optimizer"} == (
        {"adamw", "adamw_8bit"} if kind == "int8" else {"adamw"}
    )


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_it_learns_as_with_fp32_and_repeats_to_the_bit(kind, tmp_path):
    """A resumed run is the uninterrupted one, whatever the process has drawn: the rounding hangs on the step alone."""
    plain, engine = engine_of("fp32"), engine_of(kind)
    losses, expected = steps(engine, 0, 12), steps(plain, 0, 12)
    assert losses == pytest.approx(expected, rel=5e-3) and losses != expected
    assert losses[-1] < losses[0] - 0.02

    once = engine_of(kind)
    first = steps(once, 0, 6)
    found = save(once, tmp_path, 6)
    torch.manual_seed(99)
    again = engine_of(kind)
    assert train.restore(again, found) == 6
    torch.randn(7)
    assert first + steps(again, 6, 12) == losses
    for name, tensor in again.state().items():
        assert torch.equal(tensor, engine.state()[name]), name


@pytest.mark.parametrize(("there", "here"), list(itertools.permutations(moments.KINDS, 2)))
def test_a_checkpoint_of_another_kind_is_converted(there, here, tmp_path):
    engine = engine_of(there)
    steps(engine, 0, 5)
    found = save(engine, tmp_path, 5)
    assert moments.kind_of(checkpoint.contents(found)) == there
    other = engine_of(here)
    train.restore(other, found)
    old, new = engine.state(), other.state()
    for name in engine.optimizer.master_weights():
        assert torch.equal(old[f"model.{name}"], new[f"model.{name}"])
        for moment in ("exp_avg", "exp_avg_sq"):
            a, b = value(old, moment, name), value(new, moment, name)
            assert a.abs().max() > 0
            bound = {"fp32": 0.0, "bf16": 2**-8}.get(here if a.ndim == 2 or here == "bf16" else "fp32")
            if bound is None:  # to the nearest of codes: 1/60 of the largest, and half of itself
                assert ((a - b).abs() <= torch.maximum(0.5 * a.abs(), 3e-6 * a.abs().max())).all(), name
                assert (a - b).abs().max() <= a.abs().max() / 60
            else:
                assert ((a - b).abs() <= bound * a.abs()).all(), name
    assert new["optimizer.steps_done"] == 5
    assert steps(other, 5, 8) == pytest.approx(steps(engine, 5, 8), rel=5e-3)


def test_a_resumed_run_says_so(tmp_path):
    from tritium.engine.report import Reporter

    said = []

    class Noting(Reporter):
        def note(self, text):
            said.append(text)

    text = tmp_path / "a.jsonl"
    lines = (f"the {i} quick brown fox jumps over the lazy dog {i * i} " * 9 for i in range(60))
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    config = SMALL.replace(
        model={"vocab_size": 0},
        data={"sources": (str(text),), "folder": str(tmp_path / "data"), "tokenizer": "bytes", "val_fraction": 0.2},
        train={"steps": 2, "precision": "fp32", "eval_tokens": 64, "sample_tokens": 2, "compile_cache": False},
        run={"out": str(tmp_path / "run"), "tensorboard": False},
    )
    train.main(config, Noting(quiet=True))
    for kind, seen in (("int8", "fp32"), ("bf16", "int8"), ("bf16", None)):
        said.clear()
        steps = {"int8": 3, "bf16": 4 if seen else 5}[kind]
        train.main(config.replace(optim={"moments": kind}, train={"steps": steps}), Noting(quiet=True))
        notes = [line for line in said if "moments in" in line]
        assert len(notes) == (seen is not None)
        if seen:
            assert f"has moments in {seen} and this run keeps them in {kind}: they are converted once" in notes[0]


def test_blocks_that_another_layout_would_scatter_are_refused():
    config = SMALL.replace(optim={"moments": "int8"}, train={"weight_layout": "in_out"})
    with pytest.raises(ConfigError, match="optim.moments=int8 has a scale for 256 elements .*weight_layout out_in"):
        config.check()
    SMALL.replace(optim={"moments": "bf16"}, train={"weight_layout": "in_out"}).check()
    with pytest.raises(ConfigError, match="optim.moments=int8 .*one parameter, and train.flat=true .*train.flat false"):
        SMALL.replace(optim={"moments": "int8"}, train={"flat": "true"}).check()


def test_flat_storage_of_moments_in_bf16():
    """One long vector to the update; the run goes on as with tensors of their own, up to the random bits."""
    plain, flat = engine_of("bf16"), train.build(SMALL.replace(optim={"moments": "bf16"}, train={"flat": "true"}))
    assert flat.optimizer.flat and flat.optimizer.groups[0].flat["exp_avgs"].dtype == torch.bfloat16
    losses = steps(flat, 0, 6)
    assert losses == pytest.approx(steps(plain, 0, 6), rel=5e-3)
    again = train.build(SMALL.replace(optim={"moments": "bf16"}, train={"flat": "true"}))
    assert steps(again, 0, 6) == losses
