"""Training with the Triton kernels, through the interpreter: the losses and weights that the references give.

Bounds are those of docs/numerics.md, for whole steps: against the same training in fp64, the Triton kernels' error may
be twice the references' in fp32, and the floor. Adam's eps is large here, so that it is gradient descent with momentum;
with a small one, an element whose gradient is zero but for rounding (the bias of the keys) moves by lr, to a side that
rounding decides, and a gradient that is wrong by a factor moves what a right one does.
"""

import dataclasses
import json
import pathlib
import sys
from functools import cache

import pytest
import torch

from tritium.engine import checkpoint, cli, optim, precision, train
from tritium.engine.config import Config, DataConfig, GPTConfig, KernelsConfig, OptimConfig, TrainConfig
from tritium.engine.step import MicroBatch, train_step
from tritium.kernels import contract, op, ops
from tritium.kernels.lib import triton_launch
from tritium.kernels.op import KernelError

V, T, STEPS, LR = 61, 16, 4, torch.tensor(0.5)
GPT2 = GPTConfig(vocab_size=V, vocab_multiple=16, block_size=T, n_layer=2, n_head=2, n_embd=32, init_std=0.2)
MODELS = {
    "gpt2": GPT2,
    "gpt2, head and loss apart": dataclasses.replace(GPT2, n_layer=1, fused_loss=False, label_smoothing=0.1),
    "llama": dataclasses.replace(
        GPT2, position="rope", norm="rms_norm", activation="swiglu", n_head=4, n_kv_head=2, qk_norm=True,
        tie_head=False, bias=False, z_loss=1e-3, logit_softcap=20.0,
    ),
}  # fmt: skip
TRITON = {
    "gpt2": {"attention", "layer_norm", "linear_cross_entropy"},
    "gpt2, head and loss apart": {"attention", "layer_norm", "cross_entropy"},
    "llama": {"attention", "linear_cross_entropy"},
}
Trained = dict[str, torch.Tensor]


def config_of(name: str, **kernels: str) -> Config:
    return Config(
        model=MODELS[name],
        data=DataConfig(documents=name == "llama"),
        train=TrainConfig(batch_rows=4, micro_rows=2, device="cpu"),
        optim=OptimConfig(eps=1.0, weight_decay=0.01),
        kernels=KernelsConfig(**kernels),
    )


def work(documents: bool) -> list[MicroBatch]:
    """Two micro-batches; some targets do not count."""
    numbers, batches = torch.Generator().manual_seed(0), []
    for _ in range(2):
        rows = torch.randint(V, (2, T + 1), generator=numbers)
        targets = torch.where(torch.rand(2, T, generator=numbers) < 0.1, -100, rows[:, 1:])
        start = torch.tensor([[0] * 5 + [5] * (T - 5), [0] * T], dtype=torch.int32) if documents else None
        batches.append(MicroBatch(rows[:, :-1].contiguous(), targets, start))
    return batches


def trained(engine: train.Engine) -> Trained:
    """The losses of a few steps over the same rows, and the weights after them."""
    batches = work(engine.config.data.documents)
    inverse = 1.0 / sum((b.targets != -100).sum() for b in batches).double()
    losses = [train_step(engine.loss, engine.optimizer, batches, LR, inverse)[0] for _ in range(STEPS)]
    return {"losses": torch.stack(losses)} | {n: p.detach().clone() for n, p in engine.model.named_parameters()}


@cache
def expected(name: str) -> tuple[Trained, Trained]:
    """With the reference kernels: in fp64, and in fp32."""
    plain = train.build(config_of(name, default="reference"))
    exact = train.build(config_of(name, default="reference"))
    model = exact.model.double()
    model.compute_dtype = torch.float64
    exact.optimizer = optim.AdamW(model, exact.config.optim, {})
    op.bind([model, exact.optimizer], "reference", dtype=torch.float64)
    return trained(exact), trained(plain)


def outside(found: Trained, name: str) -> list[str]:
    """Where what was found is further from fp64 than it may be."""
    exact, plain = expected(name)
    assert found.keys() == exact.keys() == plain.keys()
    u, (floor_max, floor_rms) = contract.unit_roundoff(torch.float32), contract.FLOORS[torch.float32]

    def rms(x: torch.Tensor) -> float:
        return x.square().mean().sqrt().item()

    wrong = []
    for key, true in exact.items():
        error, allowed = (found[key] - true).abs(), (plain[key] - true).abs()
        for kind, norm, floor in (("max", lambda x: x.abs().max().item(), floor_max), ("rms", rms, floor_rms)):
            bound = contract.FACTOR * norm(allowed) + floor * u * norm(true)
            if not norm(error) <= bound:
                wrong.append(f"{key}: {kind} error {norm(error):.3g}, bound {bound:.3g}")
    return wrong


@pytest.mark.parametrize("name", MODELS)
def test_the_losses_and_weights_are_the_references(name):
    engine = train.build(config_of(name, default="triton"))
    assert (engine.dtype, engine.compiled) == (torch.float32, False)
    backends = {(row.op, row.backend) for row in engine.table if "triton" in ops.OPS[row.op].backends()}
    assert backends == {(o, "triton") for o in TRITON[name]}
    others = [row for row in engine.table if "triton" not in ops.OPS[row.op].backends()]
    assert others and all(row.why.startswith(f"{row.op} has no triton; auto: ") for row in others)
    found = trained(engine)
    assert outside(found, name) == []
    assert (found["losses"].diff() < -0.01).all(), "it must learn for the equality of weights to mean anything"


FAULTS = {
    "attention": ("gpt2, head and loss apart", "dq * scale", "dq * (scale * 1.02)"),
    "layer_norm": (
        "gpt2, head and loss apart",
        "dweight += tl.sum(dy * xhat, 0)",
        "dweight += tl.sum(dy * xhat, 0) * 1.02",
    ),
    "cross_entropy": ("gpt2, head and loss apart", "scale = dloss *", "scale = 1.02 * dloss *"),
    "linear_cross_entropy": ("gpt2", "_scaled(dx, dloss, x_dtype)", "_scaled(dx, dloss * 1.02, x_dtype)"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_gradient_two_per_cent_off_is_seen(name, tmp_path, monkeypatch):
    """The fault comes as a user's own kernel: a module named in the configuration."""
    model, before, after = FAULTS[name]
    source = pathlib.Path(ops.OPS[name].load("triton").module.__file__).read_text()
    registered = f'"{name}_triton"'
    assert before in source and registered in source
    module = f"planted_{name}.impl"
    (tmp_path / f"planted_{name}").mkdir()
    changed = source.replace(before, after).replace(registered, f'"{name}_planted"')
    (tmp_path / f"planted_{name}" / "impl.py").write_text(changed)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        engine = train.build(config_of(model, default="triton", **{name: module}))
        assert {row.backend for row in engine.table if row.op == name} == {module}
        found = trained(engine)
    finally:
        ops.OPS[name]._loaded.pop(module, None)
        sys.modules.pop(module, None)
    wrong = outside(found, model)
    assert any(not line.startswith("losses") for line in wrong), wrong
    assert found["losses"].isfinite().all()


# --------------------------------------------------------------------------------------------------- the command line


def test_the_command_trains_eagerly_in_fp32(tmp_path, capsys):
    lines = [json.dumps({"text": f"The {i}th cat sees the {i + 1}th dog."}) for i in range(100)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    command = (
        f"train tiny --kernels=triton --model.n_layer 1 --model.n_head 2 --model.n_embd 32 --model.block_size {T} "
        f"--data.tokenizer bytes --data.sources {tmp_path}/text.jsonl --data.folder {tmp_path}/shards "
        "--train.device cpu --train.steps 2 --train.batch_rows 2 --train.micro_rows 2 --train.eval_tokens 32 "
        f"--train.sample_tokens 2 --run.require_bigram false --run.tensorboard false --run.out {tmp_path}/run"
    )
    assert cli.main(command.split()) == 0
    shown = "".join(capsys.readouterr())
    assert "not compiling: Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1)" in shown
    assert "float32, cpu × 1, eager" in shown
    rows = checkpoint.newest(tmp_path / "run", pytest.fail).meta["kernels"]
    backends = {(row["op"], row["backend"]) for row in rows if "triton" in ops.OPS[row["op"]].backends()}
    assert backends == {("attention", "triton"), ("linear_cross_entropy", "triton")}


def test_what_the_interpreter_cannot_compute_is_refused(monkeypatch):
    """The tests mend its bf16; a user has the interpreter as it is."""
    monkeypatch.setattr(triton_launch, "INTERPRETED_BF16", False)
    config = config_of("gpt2", default="triton")
    config = config.replace(train={"precision": "bf16"})
    with pytest.raises(KernelError, match="interpreter computes bfloat16 wrongly; use float32") as error:
        train.build(config)
    assert str(error.value).count("was chosen and cannot serve") == 3  # attention, layer_norm, linear_cross_entropy
    monkeypatch.undo()
    assert {row.backend for row in train.build(config).table if row.op == "attention"} == {"triton"}


def test_nothing_is_compiled_unless_it_is_insisted_on(monkeypatch):
    cpu, config = torch.device("cpu"), config_of("gpt2")
    insisting = config.replace(train={"compile": "true"})
    assert train.should_compile(config, cpu)[0] is False
    assert train.should_compile(insisting, cpu) == (True, None)
    assert precision.resolve("auto", cpu) == torch.float32
    monkeypatch.delenv("TRITON_INTERPRET")
    assert train.should_compile(config, cpu) == (True, None)
