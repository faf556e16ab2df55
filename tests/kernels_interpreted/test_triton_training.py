"""Training with the Triton kernels, through the interpreter: the losses and weights that the references give.

Bounds are those of docs/numerics.md, for whole steps: against the same training in fp64, the Triton kernels' error may
be twice the references' in fp32, and the floor. Adam's eps is large here, so that it is gradient descent with momentum;
with a small one, an element whose gradient is zero but for rounding (the bias of the keys) moves by lr, to a side that
rounding decides, and a gradient that is wrong by a factor moves what a right one does.
"""

import dataclasses
import json
import sys
from functools import cache

import pytest
import torch
from mutation import Mutant, mutated

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
    "geglu": dataclasses.replace(
        GPT2, n_layer=1, norm="rms_norm", activation="geglu", position="rope", rope_fraction=0.5
    ),
    "relu2": dataclasses.replace(GPT2, n_layer=1, activation="relu2"),
}  # fmt: skip
OPS = {
    "gpt2": {"embedding", "linear", "attention", "layer_norm", "gelu", "linear_cross_entropy"},
    "gpt2, head and loss apart": {"embedding", "linear", "attention", "layer_norm", "gelu", "cross_entropy"},
    "llama": {"embedding", "linear", "attention", "rms_norm", "rope", "swiglu", "linear_cross_entropy"},
    "geglu": {"embedding", "linear", "attention", "rms_norm", "rope", "geglu", "linear_cross_entropy"},
    "relu2": {"embedding", "linear", "attention", "layer_norm", "relu2", "linear_cross_entropy"},
}  # fmt: skip
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
    inverse = 1.0 / sum((b.targets != -100).sum() for b in batches)  # an fp32 number, of which fp64 has the very value
    inverse = inverse.to(engine.optimizer.groups[0].params[0].dtype)
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
    assert {row.backend for row in engine.table} == {"triton"}, "every op of the step"
    assert {row.op for row in engine.table} == OPS[name] | {"global_norm", "adamw"}
    found = trained(engine)
    assert outside(found, name) == []
    assert (found["losses"].diff() < -0.01).all(), "it must learn for the equality of weights to mean anything"


APART = "gpt2, head and loss apart"
NORMS, POINTWISE = (f"tritium.kernels.lib.triton_{name}" for name in ("norms", "pointwise"))
FAULTS = [
    (APART, Mutant("attention", "dq", "dq * scale", "dq * (scale * 1.02)", "")),
    (APART, Mutant("cross_entropy", "dlogits", "scale = dloss *", "scale = 1.02 * dloss *", "")),
    ("gpt2", Mutant("linear_cross_entropy", "dx", "_scaled(dx, dloss,", "_scaled(dx, dloss * 1.02,", "")),
    (APART, Mutant("layer_norm", "dweight", "dweight += dy *", "dweight += 1.02 * dy *", "", shared=NORMS)),
    ("llama", Mutant("rms_norm", "dx", "dx *= rstd", "dx *= 1.02 * rstd", "", shared=NORMS)),
    (APART, Mutant("gelu", "dx", "dx = dy * slope", "dx = dy * slope * 1.02", "", shared=POINTWISE)),
    ("llama", Mutant("swiglu", "dgate", "(dy * up * slope)", "(dy * up * slope * 1.02)", "", shared=POINTWISE)),
    ("geglu", Mutant("geglu", "dup", "(dy * value)", "(dy * value * 1.02)", "", shared=POINTWISE)),
    ("relu2", Mutant("relu2", "dx", "dx = dy * slope", "dx = dy * slope * 1.02", "", shared=POINTWISE)),
    ("llama", Mutant("rope", "dq and dk", "sin = -sin", "sin = -1.02 * sin", "")),
    (APART, Mutant("embedding", "dweight", "total.to(DWEIGHT", "(total * 1.02).to(DWEIGHT", "")),
    (APART, Mutant("linear", "dbias", "tl.sum(total, 0), columns < F", "tl.sum(total, 0) * 1.02, columns < F", "")),
    (APART, Mutant("adamw", "m", "rest1 * (g - m)", "rest1 * (g * 1.02 - m)", "")),
]  # fmt: skip


@pytest.mark.parametrize(("model", "fault"), FAULTS, ids=str)
def test_a_gradient_two_per_cent_off_is_seen(model, fault, tmp_path, monkeypatch):
    """The fault comes as a user's own kernel: a module named in the configuration."""
    module = f"planted_{fault.op}.impl"
    monkeypatch.setitem(sys.modules, module, mutated(fault, tmp_path).module)
    try:
        engine = train.build(config_of(model, default="triton", **{fault.op: module}))
        assert {row.backend for row in engine.table if row.op == fault.op} == {module}
        found = trained(engine)
    finally:
        ops.OPS[fault.op]._loaded.pop(module, None)
    wrong = outside(found, model)
    assert any(not line.startswith("losses") for line in wrong), wrong
    assert found["losses"].isfinite().all()


def test_every_op_that_the_models_call_has_a_fault():
    assert {fault.op for _, fault in FAULTS} == set().union(*OPS.values()) | {"adamw"}


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
    assert {row["backend"] for row in rows} == {"triton"}


def test_what_the_interpreter_cannot_compute_is_refused(monkeypatch):
    """The tests mend its bf16; a user has the interpreter as it is."""
    monkeypatch.setattr(triton_launch, "INTERPRETED_BF16", False)
    config = config_of("gpt2", default="triton")
    config = config.replace(train={"precision": "bf16"})
    with pytest.raises(KernelError, match="interpreter computes bfloat16 wrongly; use float32") as error:
        train.build(config)
    refused = OPS["gpt2"] - {"embedding"}  # whose table stays in fp32
    assert str(error.value).count("was chosen and cannot serve") == len(refused) + 2  # and both of the optimizer's
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
