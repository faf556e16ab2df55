"""precision=fp8: which layers it means, what overrides it, and that a model learns in it."""

import math
import pathlib
import statistics

import pytest
import torch

from tritium.benchmarks import curves, record
from tritium.engine import train
from tritium.engine.config import Config, ConfigError
from tritium.engine.optim import AdamW
from tritium.engine.parallel import World
from tritium.engine.step import MicroBatch, train_step
from tritium.kernels import op

CPU = torch.device("cpu")
SMALL = Config().replace(
    model={"vocab_size": 61, "vocab_multiple": 64, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32},
    train={"precision": "fp8", "compile": "false", "batch_rows": 4, "micro_rows": 2, "device": "cpu"},
    kernels={"default": "reference"},
)


def backends(config: Config) -> dict[str, str]:
    """Call site (and its op, at the head) → its backend in training."""
    table = train._bind(train.on_meta(config, torch.bfloat16), config, CPU, torch.bfloat16, False)
    wanted = ("linear", "linear_cross_entropy")
    return {f"{r.site} {r.op}": r.backend for r in table if r.phase == "train" and r.op in wanted}


def test_fp8_is_bf16_with_other_kernels_in_the_blocks():
    found = backends(SMALL)
    assert {site: b for site, b in found.items() if b != "reference"} == {
        f"blocks.{i}.{part} linear": "fp8_rowwise"
        for i in range(2)
        for part in ("attention.qkv", "attention.proj", "mlp.up", "mlp.down")
    }
    engine = train.build(SMALL, World(device=CPU))
    assert engine.dtype == torch.bfloat16
    assert all(w.dtype == torch.float32 for w in engine.optimizer.master_weights().values())


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"train": {"fp8_layers": ("blocks.1.mlp.*",)}}, {"blocks.1.mlp.up linear", "blocks.1.mlp.down linear"}),
        ({"train": {"fp8_layers": ("head",)}}, {"head linear", "head linear_cross_entropy"}),
        ({"train": {"fp8_layers": ("head",)}, "model": {"fused_loss": False}}, {"head linear"}),
        (
            {"train": {"fp8_layers": ("blocks.0.*",)}, "kernels": {"override": ("blocks.*.mlp.*:linear=reference",)}},
            {"blocks.0.attention.qkv linear", "blocks.0.attention.proj linear"},
        ),
    ],
)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_layers_are_chosen_by_pattern_and_overridden_by_place(changes, layers, recipe):
    config = SMALL.replace(**changes).replace(train={"fp8_recipe": recipe})
    assert {site for site, backend in backends(config).items() if backend == f"fp8_{recipe}"} == layers


def test_what_cannot_be_meant_is_said_before_anything_is_built():
    with pytest.raises(op.KernelError, match=r"blocks\.7\.\*:linear matches no call site"):
        train.check_kernels(SMALL.replace(train={"fp8_layers": ("blocks.7.*",)}), CPU)
    with pytest.raises(ConfigError, match="fp8_layers names no layer"):
        SMALL.replace(train={"fp8_layers": ()}).check()
    odd = SMALL.replace(model={"vocab_multiple": 1}, train={"fp8_layers": ("head",)})
    with pytest.raises(op.KernelError, match=r"multiples of 16, this site has Vp=61; change the width"):
        train.check_kernels(odd, CPU)
    plain = SMALL.replace(train={"precision": "fp32"}, kernels={"linear": "fp8_rowwise"})
    with pytest.raises(op.KernelError, match=r"computes in float32; compute in bfloat16 \(train.precision=bf16 or fp8"):
        train.check_kernels(plain, CPU)


def losses(config: Config, steps: int = 12, compile: bool = False) -> list[float]:
    engine = train.build(config, World(device=CPU), compile=compile)
    ids = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(0))
    batches = [MicroBatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in ids.split(2)]
    lr, inverse_count = torch.full((), 1e-2), torch.full((), 1 / 64)
    assert isinstance(engine.optimizer, AdamW)
    return [train_step(engine.loss, engine.optimizer, batches, lr, inverse_count)[0].item() for _ in range(steps)]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_model_learns_in_fp8_what_it_does_in_bf16(recipe):
    """The same four rows until they are known: nearly bf16's losses, and not the same."""
    everything = {"fp8_recipe": recipe, "fp8_layers": ("blocks.*", "head")}
    fp8, bf16 = losses(SMALL.replace(train=everything)), losses(SMALL.replace(train={"precision": "bf16"}))
    assert fp8 != bf16
    assert fp8[-1] < 0.5 * fp8[0]
    assert all(math.isclose(a, b, rel_tol=0.05) for a, b in zip(fp8, bf16, strict=True))


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputing_changes_nothing_in_fp8(policy):
    plain = losses(SMALL, steps=3)
    assert losses(SMALL.replace(train={"recompute": policy}), steps=3) == plain


# --------------------------------------------------------------------------------------- what the committed record says

RECORDS = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "cpu"


def differences(result: dict, arm: str) -> curves.Paired:
    """The final validation loss less the baseline's, as a share of the baseline's mean, paired by seed."""
    finals = {row["name"]: [c["val_loss"][-1] for c in row["training"]["curves"]] for row in result["arms"]}
    base = finals[result["baseline"]]
    share = statistics.fmean(base)
    return curves.paired({arm: [(a - b) / share for a, b in zip(finals[arm], base, strict=True)]})[arm]


@pytest.fixture
def trained() -> dict:
    """The record of a training in fp8, everything that can be: the one that docs/claims.md names."""
    (path,) = RECORDS.glob("ablate_*_fp8.json")
    return record.read(path)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_the_record_shows_a_loss_within_1_percent_of_bf16s(trained, recipe):
    settings = trained["settings"]
    model = settings["config"]["model"]
    assert model["n_layer"] >= 4 and model["n_embd"] >= 256 and settings["seeds"] == 3 and settings["steps"] >= 300
    arm = next(row for row in trained["arms"] if f"fp8_{recipe}" in row["name"])
    assert (arm["status"], arm["precision"]) == ("ok", "fp8")
    backends = {(line["op"], line["backend"]) for line in arm["kernels"]}
    assert {("linear", f"fp8_{recipe}"), ("linear_cross_entropy", f"fp8_{recipe}")} <= backends
    assert not {line["backend"] for line in trained["arms"][0]["kernels"]} & {f"fp8_{recipe}"}
    for curve, other in zip(arm["training"]["curves"], trained["arms"][0]["training"]["curves"], strict=True):
        assert curve["val_loss"] != other["val_loss"] and curve["val_loss"][-1] < 0.7 * curve["val_loss"][0]
    found = differences(trained, arm["name"])
    assert found.n == 3
    assert -0.01 < found.low <= found.mean <= found.high < 0.01


def test_a_worse_loss_or_a_wider_interval_would_be_seen(trained):
    arm = trained["arms"][1]
    for curve in arm["training"]["curves"]:
        curve["val_loss"][-1] *= 1.01
    assert differences(trained, arm["name"]).high > 0.01
    for curve, factor in zip(arm["training"]["curves"], (0.995, 0.99, 0.985), strict=True):
        curve["val_loss"][-1] *= factor
    assert differences(trained, arm["name"]).high > 0.01
