"""``tritium ablate`` from the command line to the record, on a model of a few thousand parameters, and what it must
find: a planted 5 % of a step, a planted gradient × 1.02, a planted breach of the contract."""

import contextlib
import dataclasses
import functools
import importlib.machinery
import inspect
import json
import math
import pathlib
import shlex
import subprocess
import sys
import time
import types

import pytest
import torch

from tritium.benchmarks import ablate, ablate_results, curves, record, timing, training
from tritium.engine import presets
from tritium.engine.config import Config, GPTConfig, KernelsConfig, OptimConfig, TrainConfig
from tritium.kernels import op as contract
from tritium.kernels import ops

MODEL = GPTConfig(vocab_size=300, block_size=32, n_layer=1, n_head=2, n_embd=32)
CONFIG = Config(
    name="few",
    model=MODEL,
    train=TrainConfig(precision="fp32", compile="false", batch_rows=4, micro_rows=4),
    optim=OptimConfig(lr=1e-2, warmup_steps=0),
    kernels=KernelsConfig(default="reference"),
)
NAMES, LOAD = presets.names, presets.load
SMALL = ["--T", "16", "--B", "4", "--rounds", "2"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(presets, "names", lambda: ["few", "llama_8b"])
    monkeypatch.setattr(presets, "load", lambda name: CONFIG)


@pytest.fixture
def plant(monkeypatch):
    """plant(op, function): a module planted.OP_N with ``function`` as the op, and the reference's signature."""
    package = types.ModuleType("planted")
    package.__spec__ = importlib.machinery.ModuleSpec("planted", None)
    monkeypatch.setitem(sys.modules, "planted", package)
    made = []

    def plant(name, function):
        module = types.ModuleType(f"planted.{name}_{len(made)}")
        made.append((name, module.__name__))
        function.__signature__ = inspect.signature(ops.OPS[name].reference)
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module.__name__

    yield plant
    for name, module in made:
        ops.OPS[name]._loaded.pop(module, None)


def run(tmp_path, *words):
    """(exit status, the record or None)"""
    status = ablate.main(["few", *words, "--out", str(tmp_path)])
    found = list(tmp_path.glob("ablate_*.json"))
    return status, record.read(found[0]) if found else None


def by_name(result):
    return {row["name"]: row for row in result["arms"]}


# ----------------------------------------------------------------------------------------------------------------- axes


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("grid", ["gelu=auto adamw=reference", "gelu=auto adamw=native", "gelu=reference adamw=reference",
                  "gelu=reference adamw=native"]),
        ("one", ["gelu=auto adamw=reference", "gelu=reference", "adamw=native"]),
    ],
)  # fmt: skip
def test_the_arms_of_a_mode(mode, wanted):
    axes = [ablate.Axis.parse("gelu=auto,reference"), ablate.Axis.parse("adamw=reference,native")]
    arms = ablate.choices(CONFIG, axes, mode)
    assert [arm.name for arm in arms] == wanted
    for arm in arms:
        assert arm.settings == {"gelu": arm.config.kernels.gelu, "adamw": arm.config.kernels.adamw}
        assert arm.config.kernels.default == "reference"


def test_leaving_one_out_takes_what_auto_does_not_leave_to_the_reference():
    config = dataclasses.replace(CONFIG, kernels=KernelsConfig())
    chosen = {row.op for row in ablate.planned(config, "cpu") if row.phase == "train" and row.backend != "reference"}
    arms = ablate.left_out(config, [], "cpu")
    assert chosen
    assert [arm.name for arm in arms] == ["all", *(f"{op}=reference" for arm in arms[1:] for op in arm.settings)]
    assert {op for arm in arms[1:] for op in arm.settings} == chosen
    assert arms[0].config == config
    assert arms[1].config.kernels.choices() == {"*": "auto", **arms[1].settings}
    assert [arm.name for arm in ablate.left_out(config, ["adamw"], "cpu")] == ["all", "adamw=reference"]


@pytest.mark.parametrize(
    ("axis", "field", "typed"),
    [
        ("precision=bf16", "train.precision", "bf16"),
        ("dtype=bf16", "train.precision", "bf16"),
        ("kernels=native", "kernels.default", "native"),
        ("kernels.gelu=triton", "kernels.gelu", "triton"),
        ("vocab_multiple=64", "model.vocab_multiple", 64),
        ("vocabulary_padding=64", "model.vocab_multiple", 64),
        ("micro_batch=2", "train.micro_rows", 2),
        ("gemm_layout=in_out", "train.weight_layout", "in_out"),
        ("compile_mode=max-autotune-no-cudagraphs", "train.compile_mode", "max-autotune-no-cudagraphs"),
        ("optimizer=native", "kernels.adamw", "native"),
        ("optim.lr=3e-3", "optim.lr", 3e-3),
        ("tie_head=false", "model.tie_head", False),
        ("recompute_keep=attention+linear", "train.recompute_keep", ("attention", "linear")),
        ("blocks.0.*:attention=sdpa", "kernels.override", ("blocks.0.*:attention=sdpa",)),
    ],
)
def test_an_axis_sets_its_field(axis, field, typed):
    made = ablate.Axis.parse(axis)
    section, _, name = field.partition(".")
    assert made.field == field
    found = made.apply(CONFIG, made.values[0])
    assert getattr(getattr(found, section), name) == typed
    assert found.replace(**{section: {name: getattr(getattr(CONFIG, section), name)}}) == CONFIG


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fwe", "gelu=auto,reference"], "no preset 'fwe'; the nearest are few"),
        ([], "PRESET is missing"),
        (["few"], "no axis was given"),
        (["few", "atention=sdpa,native"], "no axis 'atention'; the nearest are attention"),
        (["few", "attention=sdpa,natve"], "attention has no backend 'natve'; the nearest are native"),
        (["few", "kernels=auto,refrence"], "has no backend 'refrence'; the nearest are reference"),
        (["few", "precision=fp32,fp61"], "one of auto, fp32, bf16, fp8, not 'fp61'"),
        (["few", "micro_rows=4,x"], "wants a whole number, not 'x'"),
        (["few", "gelu"], "reads NAME=VALUE,VALUE"),
        (["few", "gelu=auto,"], "reads NAME=VALUE,VALUE"),
        (["few", "gelu=auto,auto"], "given twice"),
        (["few", "gelu=auto", "gelu=reference"], "an axis is given twice"),
        (["few", "dtype=fp32,bf16", "precision=fp32,bf16"], "dtype and precision both set train.precision"),
        (["few", "gelu=auto,triton", "kernels.gelu=auto,reference"], "gelu and kernels.gelu both set kernels.gelu"),
        (["few", "optim.lr=1e-3,0.001"], "1e-3 and 0.001 are one value"),
        (["few", "dtype=fp32,bf16", "--train.precision", "bf16"], "--train.precision sets what the axis dtype varies"),
        (["few", "gelu=auto,triton", "--kernels.gelu=triton"], "--kernels.gelu sets what the axis gelu varies"),
        (["few", "gelu=auto"], "one arm and nothing to compare"),
        (["few", "optimizer=native,muon"], "adamw has no backend 'muon'"),
        (["few", "gemm_layout=tn,nn"], "one of auto, out_in, in_out, not 'tn'"),
        (["few", "seed=1,2"], "may mean data.seed or train.seed"),
        (["few", "train.seed=1,2"], "cannot be an axis: arms are compared from the same seed"),
        (["few", "run.keep=1,2"], "cannot be an axis: it decides where results go"),
        (["few", "blocks.0.*:atention=sdpa,native"], "no op 'atention'; the nearest are attention"),
        (["few", "rms_norm=reference,triton"], "no arm calls rms_norm"),
        (["few", "gelu=auto,reference", "--roundz", "3"], "no flag '--roundz'; the nearest are --rounds"),
        (["few", "gelu=auto,reference", "--train.presicion", "fp32"], "the nearest are --train.precision"),
        (["few", "gelu=auto,reference", "--mode", "gird"], "no mode 'gird'; the nearest are grid"),
        (["few", "--mode", "leave-one-out", "adamv"], "PRESET AXIS"),
        (["few", "adamv", "--mode", "leave-one-out"], "'adamv' is none; the nearest are adamw"),
        (["few", "gelu", "--mode", "leave-one-out"], "gelu is computed by its reference already"),
        (["few", "gelu=auto,reference", "--rounds", "1"], "--rounds must be at least 2, or there is no interval"),
        (["few", "gelu=auto,reference", "--steps", "5", "--seeds", "2"], "--seeds must be at least 3"),
        (["few", "gelu=auto,reference", "--target-loss", "3"], "wants --steps N"),
        (["few", "gelu=auto,reference", "--seed", "-1"], "--seed must be from 0"),
        (["few", "precision=fp32,bf16", "--write-tuning"], "no axis is an op"),
        (["few", "gelu=auto,triton", "--device", "cuda"], "--device cuda: torch finds no GPU here"),
        (["few", "gelu=auto,triton", "--write-tuning", "--no-gate"], "leave --no-gate out"),
        (["few", "gelu=auto,triton", "--write-tuning", "--no-twin"], "leave --no-twin out"),
        (["few", "--mode", "leave-one-out", "adamw"], "'adamw' comes after the flags; axes and ops come before them"),
        (["few", "--mode", "grid", "gelu=auto,triton"], "'gelu=auto,triton' comes after the flags"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_exits_2_with_the_nearest(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        ablate.main(words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def commands(beginning):
    """The words behind ``tritium`` in every command of README, docs/ablate.md and --help that begins so."""
    root = pathlib.Path(ablate.__file__).resolve().parent.parent
    texts = [(root / name).read_text() for name in ("README.md", "docs/ablate.md")] + [ablate.parser().format_help()]
    for line in "\n".join(texts).splitlines():
        for part in line.strip().split("`"):
            command = part.partition("  #")[0].strip()
            if command.startswith(f"tritium {beginning} ") and "PRESET" not in command:
                yield shlex.split(command)[1:]


def test_documented_commands_can_be_meant(monkeypatch, plant):
    """Every axis, op and flag of them is one of the preset's; nothing is run."""
    monkeypatch.setattr(presets, "names", NAMES)
    monkeypatch.setattr(presets, "load", LOAD)
    seen = []
    own = plant("attention", ops.OPS["attention"].reference)
    for _, *words in commands("ablate"):
        words = [word.replace("my_pkg.my_attention", own) for word in words]
        count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        a, fields = ablate.parser().parse_known_args(
            [*words[count:], *(["--data", "markov"] if "--steps" in words else [])]
        )
        a.preset, a.axes = words[0], words[1:count]
        ablate._check(ablate.parser(), a, fields)
        request = ablate.request_of(a, fields, "cpu")
        assert len(request.arms) >= 2
        seen.append(request)
    assert len(seen) >= 10
    for _, preset, *fields in commands("train"):
        if not any("my_pkg" in field or field.startswith("runs/") for field in [preset, *fields]):
            config, _, _ = training.configured(preset, None, "cpu", [f for f in fields if f not in ("...",)])
            assert ablate.planned(config, "cpu")


def test_help_is_quick():
    code = (
        "import sys\nfrom tritium.benchmarks import ablate\n"
        "try:\n    ablate.main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "PRESET AXIS=VALUE" in done.stdout


# ------------------------------------------------------------------------------------------------------------ the check


def test_nothing_to_compare_with_the_baseline_fails_the_run(tmp_path):
    status, result = run(tmp_path, "layer_norm=reference,apex", *SMALL, "--no-twin", "--no-gate")
    (red,) = [check for check in result["checks"] if not check["ok"]]
    assert status == 1
    assert red["name"] == "an arm was compared with the baseline"
    assert "layer_norm=apex: " in red["detail"]


def test_an_ablation_leaves_record_picture_and_page(tmp_path, capsys):
    """One arm that is right, one that cannot be had here with its reason; the contract is run."""
    status, result = run(tmp_path, "layer_norm=reference,native,apex", *SMALL, "--no-twin")
    assert record.problems(result, {**record.COMMON, **ablate.SCHEMA}) == []
    for row in result["arms"]:
        assert record.problems(row, ablate.ARM) == []
    rows = by_name(result)
    assert [rows[name]["status"] for name in rows] == ["ok", "ok", "unavailable"]
    assert "apex" in rows["layer_norm=apex"]["reason"]
    assert rows["layer_norm=apex"]["speed"] is None
    base, native = rows["layer_norm=reference"], rows["layer_norm=native"]
    assert base["verdict"] == "baseline"
    assert base["ratio"]["median"] == 1.0
    assert len(native["times"]["rounds_ms"]) == 2
    speeds = [2e3 * 64 / sum(pair) for pair in native["times"]["rounds_ms"]]
    assert native["speed"]["median"] == pytest.approx(math.prod(speeds) ** 0.5)
    assert 0 < native["speed"]["low"] < native["speed"]["high"]  # two rounds: an interval of ± their spread is below 0
    assert len(result["machine"]["load_after"]) == 3
    assert 0 < abs(native["gradient_error"]["relative"]) < 1e-5
    assert 0 <= abs(native["loss_delta"]) < 1e-5
    assert {line["backend"] for line in native["kernels"] if line["op"] == "layer_norm"} == {"native"}
    assert "layer_norm.native" in result["sources"]
    assert {f["name"] for f in result["figures"]} >= {"layer_norm=native tokens/s", "layer_norm=native peak memory"}
    assert not any("apex" in f["name"] for f in result["figures"])
    assert base["peak_bytes"] > base["own_bytes"] > 3 * 4 * 20_000
    shown = capsys.readouterr().out
    assert "layer_norm=apex: unavailable:" in shown
    page = next(tmp_path.glob("*.html")).read_text()
    assert "layer_norm=native" in page
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")
    assert next(tmp_path.glob("*.png")).read_bytes().startswith(b"\x89PNG")
    assert result["command"].startswith("tritium ablate few layer_norm=reference,native,apex")
    assert status == int(not all(check["ok"] for check in result["checks"])) == 0


def test_what_a_record_is_written_over_is_said(tmp_path):
    committed = next(pathlib.Path(record.ROOT, "benchmarks", "results", "cpu").glob("ablate_tiny_T256*.json"))
    result = record.read(committed)
    assert ablate.save(result, tmp_path / "a.json").endswith("a.html")
    when = result["date"][:16].replace("T", " ")
    assert f"a.html, in place of that of {when}, commit {result['commit'][:10]}" in ablate.save(
        result, tmp_path / "a.json"
    )


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g * 1.02


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_2_percent_too_large_is_red_and_gets_no_speed(tmp_path, capsys, plant, precision):
    """Of the norm's weight alone: neither the losses nor the gradient norm show it."""

    def layer_norm(x, weight, bias=None, eps=1e-5):
        return ops.layer_norm.reference(x, Scaled.apply(weight), bias, eps)

    name = plant("layer_norm", layer_norm)
    words = [f"layer_norm=reference,{name}", *SMALL, "--no-gate", "--no-twin", "--train.precision", precision]
    status, result = run(tmp_path, *words)
    row = by_name(result)[f"layer_norm={name}"]
    assert status == 1
    assert row["status"] == "red"
    assert "norm" in row["reason"]
    assert row["gradient_error"]["factor"] == pytest.approx(0.02, abs=0.006)
    assert row["speed"] is row["ratio"] is row["times"] is row["peak_bytes"] is None
    assert not any(name in f["name"] for f in result["figures"])
    shown = capsys.readouterr().out
    assert "withheld" in shown
    assert "RED" in shown
    assert by_name(result)["layer_norm=reference"]["status"] == "ok"


def test_every_kind_of_deviation_is_red_and_so_is_what_is_no_number():
    def said(losses=(0.0, 0.0, 0.0), norm=0.0, tensor=(0.0, 0.0), same=None):
        found = ablate.Deviation(list(losses), norm, {"w": tensor})
        return ablate.wrong(found, same, "fp32" if same is None else "bf16")

    nan, inf = math.nan, math.inf
    assert said() == said((9e-5, -9e-5, 0), 4e-3, (9e-4, -9e-4)) == []
    for losses in ((0, 0, 2e-4), (-2e-4, 0, 0), (0, nan, 0), (inf, 0, 0)):
        assert "the loss of step" in said(losses)[0]
    for norm in (6e-3, -6e-3, nan):
        assert "gradient norm" in said(norm=norm)[0]
    for tensor in ((2e-3, 0.0), (0.0, 2e-3), (0.0, -2e-3), (nan, nan), (inf, 0.0)):
        assert "the gradient of w" in said(tensor=tensor)[0]
    # in bf16, twice what the reference deviates in bf16 is added
    same = ablate.Deviation([1e-3] * 3, 1e-2, {"w": (1e-2, -1e-3)})
    assert said((3.9e-3, 0, 0), 2.4e-2, (3.9e-2, 6.9e-3), same) == []
    assert len(said((4.1e-3, 0, 0), 2.6e-2, (4.1e-2, 0.0), same)) == 3
    assert len(said(tensor=(0.0, 7.1e-3), same=same)) == 1


def test_deviations_are_of_tensors_norms_and_of_padding():
    reference = ablate.Observed({"w": torch.tensor([[3.0], [4.0]]), "unused": torch.zeros(2)}, [2.0, 1.0, 1.0], 5.0)

    def deviation(w, unused=(0.0, 0.0), losses=(2.0, 1.0, 1.0), norm=5.0):
        got = {"w": torch.tensor(w)[:, None], "unused": torch.tensor(unused)}
        return ablate.deviation(ablate.Observed(got, list(losses), norm), reference)

    same = deviation((3.0, 4.0, 0.0))
    assert (same.losses, same.norm, same.tensors) == ([0, 0, 0], 0, {"w": (0, 0), "unused": (0, 0)})
    longer = deviation((3.06, 4.08), losses=(2.0, 1.1, 1.0), norm=5.1)
    assert longer.tensors["w"] == (pytest.approx(0.02, rel=1e-5), pytest.approx(0.02, rel=1e-5))
    assert (longer.loss, longer.norm) == (pytest.approx(0.1), pytest.approx(0.02))
    assert longer.worst[0] == "w"
    assert deviation((3.0, 4.0, 1.0)).tensors["w"] == (0.2, 0.0)  # a row of padding that has a gradient
    assert deviation((3.0, 4.0), unused=(0.0, 1e-9)).tensors["unused"][0] == math.inf
    assert deviation((math.nan, 4.0)).worst[0] == "w"


def test_a_bias_that_is_left_out_is_red_though_training_begins_with_none(tmp_path, plant):
    """Its gradient is right: weights are wider in the check than at the start of training."""

    def layer_norm(x, weight, bias=None, eps=1e-5):
        return ops.layer_norm.reference(x, weight, bias - bias.detach(), eps)

    name = plant("layer_norm", layer_norm)
    status, result = run(tmp_path, f"layer_norm=reference,{name}", *SMALL, "--no-gate", "--no-twin")
    assert (by_name(result)[f"layer_norm={name}"]["status"], status) == ("red", 1)


@pytest.mark.parametrize("gate", [True, False])
def test_a_breach_of_the_contract_that_this_model_does_not_show_is_red(tmp_path, plant, gate):
    def gelu(x):
        return ops.gelu.reference(x if x.is_contiguous() else torch.zeros_like(x))

    name = plant("gelu", gelu)
    status, result = run(tmp_path, f"gelu=reference,{name}", *SMALL, "--no-twin", *([] if gate else ["--no-gate"]))
    row = by_name(result)[f"gelu={name}"]
    assert (row["status"], status) == (("red", 1) if gate else ("ok", 0))
    assert row["reason"] == (f"gelu.{name} breaks the contract" if gate else "")


def test_a_backend_that_breaks_is_said_and_the_other_arms_go_on(tmp_path, plant, capsys):
    def gelu(x):
        raise ArithmeticError("planted")

    name = plant("gelu", gelu)
    status, result = run(tmp_path, f"gelu=reference,{name},auto", *SMALL, "--no-gate", "--no-twin")
    rows = by_name(result)
    assert status == 1
    assert (rows[f"gelu={name}"]["status"], rows[f"gelu={name}"]["reason"]) == ("failed", "ArithmeticError: planted")
    assert rows["gelu=auto"]["status"] == "ok"
    assert rows["gelu=auto"]["speed"] is not None


def test_without_a_baseline_there_is_nothing_to_compare(tmp_path, capsys):
    status, result = run(tmp_path, "layer_norm=apex,reference", *SMALL)
    assert (status, result) == (1, None)
    assert "the baseline (layer_norm=apex) is unavailable: layer_norm=apex" in capsys.readouterr().err


def test_arms_that_took_more_memory_than_they_hold_leave_room_for_fewer(tmp_path, monkeypatch):
    """An arm too many, and the system kills the process with all that was measured."""
    free, admit = [1 << 40], ablate._Run.admit

    def admitted(self, choice):
        free[0] >>= 8  # after three arms 64 KiB
        return admit(self, choice)

    def released():
        free[0] = 1 << 40

    monkeypatch.setattr(ablate, "free_bytes", lambda device: free[0])
    monkeypatch.setattr(ablate._Run, "admit", admitted)
    monkeypatch.setattr(ablate, "_release", released)
    status, result = run(tmp_path, "optim.lr=1e-2,1e-3,1e-4,1e-5", *SMALL, "--no-gate", "--no-twin")
    assert status == 0
    assert [row["group"] for row in result["arms"]] == [0, 0, 0, 1]


def test_settings_that_change_no_result_are_green(tmp_path):
    """Precision, recomputing, micro-batches and padding against one reference; every arm in a group of its own."""
    axes = [
        "precision=fp32,bf16",
        "recompute=none,full",
        "micro_rows=4,2,3",
        "vocab_multiple=128,1",
        "linear=auto,triton",
    ]
    status, result = run(tmp_path, *axes, *SMALL, "--no-gate", "--together", "2", "--no-twin")
    rows = by_name(result)
    assert status == 0
    assert rows["micro_rows=3"]["status"] == "unavailable"
    assert "must be a multiple of train.micro_rows=3" in rows["micro_rows=3"]["reason"]
    assert "Triton compiles for GPUs" in rows["linear=triton"]["reason"]
    done = {name: row for name, row in rows.items() if row["status"] == "ok"}
    assert [row["group"] for row in done.values()] == [0, 0, 0, 1, 1]
    assert all(row["ratio"] is not None for row in done.values())
    assert rows["precision=bf16"]["precision"] == "bf16"
    base = rows[result["baseline"]]
    assert rows["precision=bf16"]["gradient_error"]["relative"] > 1e-3 > base["gradient_error"]["relative"]
    assert rows["recompute=full"]["peak_bytes"] < base["peak_bytes"]
    assert rows["vocab_multiple=1"]["own_bytes"] == base["own_bytes"] - 3 * 4 * 32 * (384 - 300)


def test_dropout_is_refused_since_its_arms_draw_different_masks(tmp_path):
    status, result = run(tmp_path, "dropout=0,0.1", *SMALL, "--no-gate", "--no-twin")
    assert status == 1  # nothing was compared
    assert "different masks" in by_name(result)["dropout=0.1"]["reason"]


def test_an_arm_takes_its_own_tensors_and_the_most_that_a_step_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "peak_bytes", lambda call, device: 1000)
    _, result = run(tmp_path, "adamw=reference,native", *SMALL, "--no-gate", "--no-twin")
    weights = (384 + 32 + 12 * 32) * 32 + 9 * 32 + 3 * 64  # tables and matrices, biases, norms
    own = ablate.Arm(CONFIG.replace(train={"batch_rows": 4}), "cpu").engine.model.num_parameters()
    assert own == weights
    for row in result["arms"]:
        assert row["own_bytes"] == 3 * 4 * own + 9 * 4  # a weight and two moments, fp32; a counter and the guard's
        assert row["peak_bytes"] == row["own_bytes"] + 1000


def test_peak_memory_counts_what_is_held_at_once():
    MiB = 2**20

    def call():
        a = torch.empty(8 * MiB, dtype=torch.uint8)
        b = torch.empty(4 * MiB, dtype=torch.uint8)
        del a
        c = torch.empty(2 * MiB, dtype=torch.uint8)
        return b.numel() + c.numel()

    assert ablate.peak_bytes(call, "cpu") == pytest.approx(12 * MiB, rel=0.001)


def test_every_arm_compiles_for_itself(tmp_path, monkeypatch):
    """The arms differ in the optimizer alone, so dynamo would find the first one's compiled model for the second. It is
    asked here without Inductor, which would take a minute."""
    asked = []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(ablate, "_nothing_cached", lambda: contextlib.nullcontext(asked.append(1)))
    status, result = run(
        tmp_path, "adamw=reference,native", *SMALL, "--no-gate", "--no-twin", "--train.compile", "true"
    )
    assert status == 0, [row["reason"] for row in result["arms"]]
    for row in result["arms"]:
        assert row["compiled"]
        assert row["compile_s"] == pytest.approx(row["first_step_s"] - row["times"]["p50_ms"] / 500)
        assert row["compile_s"] > 0.1
    assert len(asked) == 2
    assert record.check("nothing compiled while timing", True, "0 frames") in result["checks"]


def test_compiling_from_nothing_finds_no_code_of_before():
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    usual = pathlib.Path(cache_dir())
    with ablate._nothing_cached():
        fresh = pathlib.Path(cache_dir())
        assert fresh != usual
        assert list(fresh.iterdir()) == []
    assert not fresh.exists()


# ------------------------------------------------------------------------------------------------------------ the speed


class CpuTime(timing.WallClock):
    """The seconds that this thread computed: other processes on the machine do not count."""

    def times_ms(self, calls):
        times = []
        for call in calls:
            start = time.thread_time_ns()
            call()
            times.append((time.thread_time_ns() - start) / 1e6)
        return times


def spin(ms):
    end = time.thread_time_ns() + 1e6 * ms
    while time.thread_time_ns() < end:
        pass


def test_a_planted_5_percent_of_a_step_is_found_and_an_equal_arm_is_not(tmp_path, monkeypatch, plant):
    """A backend that spins for 5 % of a step, measured; and one that does not.

    An interval of 95 % may miss, and where an arm's memory lies is worth a percent or two: one unlucky measurement is
    outvoted by the next two. (That none is found in noise is shown on made-up timings, in test_timing.py.)
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(timing, "clock_for", lambda device: CpuTime())
    cost_ms = [0.0]

    def slow(tensors):
        spin(cost_ms[0])
        return ops.global_norm.reference(tensors)

    def same(tensors):
        return ops.global_norm.reference(tensors)

    slow_name, same_name = plant("global_norm", slow), plant("global_norm", same)

    def problems(number):
        arm = ablate.Arm(CONFIG.replace(model={"n_embd": 128}, train={"batch_rows": 8, "micro_rows": 8}), "cpu")
        batch = ablate.curves.Markov(300, 8, 32).held_out
        times = CpuTime().times_ms([lambda: arm.step(batch)] * 30)
        cost_ms[0] = 0.05 * sorted(times)[15]
        axis = f"global_norm=reference,{slow_name},{same_name}"
        words = ["--T", "32", "--B", "8", "--rounds", "60", "--no-gate", "--model.n_embd", "128"]
        _, result = run(tmp_path / str(number), axis, *words)
        rows = by_name(result)
        slow_row, same_row = rows[f"global_norm={slow_name}"], rows[f"global_norm={same_name}"]
        slow_ratio, same_ratio = slow_row["ratio"]["median"], same_row["ratio"]["median"]
        held = {
            "the planted arm is slower": slow_row["verdict"] == "slower" and slow_row["ratio"]["high"] < 1.0,
            "by 5 %": 1 / slow_ratio - 1 == pytest.approx(0.05, abs=0.025),
            "and by tokens/s": slow_row["delta_tokens_per_s"]["high"] < 0.0,
            "the equal arm is equal": abs(same_ratio - 1) < 0.025,
            "two arms, each as far off by its memory": same_ratio / slow_ratio - 1 == pytest.approx(0.05, abs=0.035),
        }
        return [f"{claim}: {slow_row}, {same_row}" for claim, true in held.items() if not true]

    try:
        if first := problems(0):
            assert not (problems(1) or problems(2)), first
    finally:
        torch.set_num_threads(threads)


def fabricated(**ms):
    """Stands for timing.interleave: arm → milliseconds by round; "" is the twin."""

    def interleave(arms, rounds, between):
        return {name: timing.Samples(tuple((t, t) for t in ms.get(name.rpartition("=")[2] or "twin", (100.0,) * 20)))
                for name in arms}  # fmt: skip

    return interleave


def wobble(ms, by=0.002):
    return tuple(ms * (1 + by * ((7 * i) % 5 - 2)) for i in range(20))


@pytest.mark.parametrize(
    ("twin", "noisy", "verdict"),
    [(wobble(100.0), False, "slower"), (wobble(103.0), True, "slower"), (wobble(108.0), True, "no difference shown")],
)
def test_a_twin_that_differs_says_that_the_machine_is_too_noisy(tmp_path, monkeypatch, capsys, twin, noisy, verdict):
    """And no difference is shown that is not larger than the twin's."""
    monkeypatch.setattr(timing, "interleave", fabricated(twin=twin, native=wobble(105.0)))
    status, result = run(tmp_path, "adamw=reference,native", *SMALL, "--no-gate")
    row = by_name(result)["adamw=native"]
    assert row["ratio"]["median"] == pytest.approx(100 / 105, rel=1e-3)
    assert row["verdict"] == verdict
    assert status == int(noisy)
    assert ("TOO NOISY" in capsys.readouterr().out) == noisy
    assert result["resolution"] == pytest.approx(max(twin) / 100.0 - 1, abs=0.006)


# --------------------------------------------------------------------------------------------------------------- curves


def test_where_a_difference_begins_to_be_told_is_where_its_verdict_says():
    low, high = ablate_results.untold({"resolution": 0.25})
    assert (low, high) == pytest.approx((-20.0, 25.0))
    for end, verdict in ((low, "slower"), (high, "faster")):
        for more, wanted in ((1.02, verdict), (0.98, "no difference shown")):
            median = 1 + more * end / 100
            ratio = {"median": median, "low": median - 0.01, "high": median + 0.01}
            assert ablate.verdict(ratio, 0.25) == wanted


def test_student_and_sign_flips_are_those_of_the_tables():
    # two-sided 95 % points of Student's distribution, any textbook
    for freedom, t in {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 10: 2.228, 30: 2.042}.items():
        assert curves.student_quantile(0.95, freedom) == pytest.approx(t, abs=6e-4)
        assert curves.student_t(t, freedom) == pytest.approx(0.95, abs=3e-5)
    assert curves.sign_flips([1.0, 2.0, 3.0]) == 0.25  # all signs alike: 2 of 8
    assert curves.sign_flips([1.0, -1.0, 1.0, -1.0]) == 1.0
    assert curves.sign_flips([3.0, 1.0, -1.0, 2.0]) == 6 / 16  # |sum| ≥ 5: none turned, or one of the ones; ±
    found = curves.paired({"a": [0.1, 0.2, 0.3], "b": [0.1, -0.1, 0.0], "none": [0.0, 0.0, 0.0]})
    a = found["a"]
    # mean 0.2, s/√3 = 0.0577350: t = 3.4641, p = 1 - t/√(t² + 2) for 2 degrees of freedom
    assert (a.mean, a.p) == (pytest.approx(0.2), pytest.approx(1 - math.sqrt(12 / 14)))
    assert (a.high - a.mean) == pytest.approx(4.3027 * 0.0577350, rel=1e-4)
    assert a.p_holm == pytest.approx(3 * a.p)
    assert not a.shown
    assert (found["b"].p_holm, found["none"].p, found["none"].low) == (1.0, 1.0, 0.0)
    assert curves.corrected({"x": 0.01, "y": 0.04, "z": 0.03}) == pytest.approx({"x": 0.03, "z": 0.06, "y": 0.06})
    with pytest.raises(ValueError, match="at least two seeds"):
        curves.paired({"a": [1.0]})


def test_curves_of_equal_arms_are_equal_and_a_worse_rate_is_shown(tmp_path, monkeypatch, capsys):
    """The kernels differ and the learning rate: only the latter changes what is learned, and the target is not reached
    with it. Evaluating takes a second on this clock and does not count."""
    words = ["--T", "16", "--B", "8", "--rounds", "2", "--no-gate", "--no-twin", "--steps", "40", "--seeds", "3"]
    words += ["--model.vocab_size", "64"]
    axes = ["optim.lr=1e-2,1e-5", "adamw=reference,native", "vocab_multiple=128,1"]
    slept = []
    real = curves.Markov.validation_loss

    def validation_loss(self, model, device):
        assert model.training
        slept.append(1.0)
        return real(self, model, device)

    monkeypatch.setattr(curves.Markov, "validation_loss", validation_loss)
    status, result = run(tmp_path, *axes, *words, "--data", "markov", "--eval-every", "10", "--target-loss", "3.5")
    assert status == 0
    rows = by_name(result)
    base, slow, native, exact = rows.values()
    assert len(slept) == 4 * 3 * 5
    for row in rows.values():
        assert [c["steps"] for c in row["training"]["curves"]] == [[0, 10, 20, 30, 40]] * 3
        assert [c["seed"] for c in row["training"]["curves"]] == [0, 1, 2]
    losses = [[c["val_loss"] for c in row["training"]["curves"]] for row in rows.values()]
    assert losses[0][0] != losses[0][1] != losses[0][2]  # seeds differ
    assert losses[2] == [pytest.approx(c, rel=1e-4) for c in losses[0]]
    assert losses[3] == [pytest.approx(c, rel=1e-4) for c in losses[0]]
    assert losses[1][0][0] == losses[0][0][0]  # the same weights to begin with
    assert base["training"]["final"] is None
    p = slow["training"]["final"]
    assert p["mean"] == pytest.approx(sum(b[-1] - a[-1] for a, b in zip(*losses[:2], strict=True)) / 3)
    assert p["low"] > 0.0
    assert p["p_holm"] < 0.05
    assert p["p_signs"] == 0.25
    assert native["training"]["final"]["p_holm"] > 0.05 or abs(native["training"]["final"]["mean"]) < 1e-4
    target = base["training"]["target"]
    assert target["reached"] == 3
    at = next(i for i, loss in enumerate(losses[0][0]) if loss <= 3.5)
    assert target["tokens"][0] == 128 * 10 * at
    assert target["seconds"][0] == base["training"]["curves"][0]["train_s"][at] > 0.0
    assert exact["training"]["target"]["seconds_ratio"] is not None
    assert slow["training"]["target"] == {"reached": 0, "of": 3, "seconds": [], "tokens": [], "seconds_ratio": None}
    shown = capsys.readouterr().out
    assert "never" in shown
    assert "cannot go below 0.25" in shown


def test_arms_of_a_seed_see_the_same_batches_and_turns_are_taken():
    order = []

    class Learner:
        def __init__(self, name):
            self.name, self.seen, self.left = name, [], 0.0

        def restart(self, seed):
            self.seen.append(seed)

        def train(self, batch, lr):
            order.append(self.name)
            self.seen.append((batch.ids.sum().item(), lr))
            return 0.5

        def evaluate(self, data):
            return 3.0 - len(self.seen)

    arms = {"a": Learner("a"), "b": Learner("b")}
    data = curves.Markov(50, 2, 8)
    found = curves.train(arms, data, [5, 6], 4, 3, lambda name, step: float(step))
    assert arms["a"].seen == arms["b"].seen
    assert arms["a"].seen[1] != arms["a"].seen[6]  # another seed, other batches
    assert [x[1] for x in arms["a"].seen[1:5]] == [0.0, 1.0, 2.0, 3.0]
    assert order[:8] == ["a", "b", "b", "a", "b", "a", "a", "b"]
    curve = found["b"][0]
    assert (curve.steps, curve.train_s, curve.seed) == ([0, 3, 4], [0.0, 1.5, 2.0], 5)
    assert curve.mean == pytest.approx((3 * (2.0 - 1.0) / 2 + (-1.0 - 2.0) / 2) / 4)
    assert curve.reached(-1.0) == 1
    assert curve.reached(-9.0) is None


class Breaks:
    """gelu, and from the call number ``at`` on something else."""

    def __init__(self, at, then):
        self.calls, self.at, self.then = 0, at, then

    def __call__(self, x, approximate="tanh"):
        self.calls += 1
        return ops.OPS["gelu"].reference(x, approximate) if self.calls < self.at else self.then(x)


def breaks(x):
    raise RuntimeError("an illegal access")


def test_an_arm_that_diverges_or_breaks_in_training_costs_itself(tmp_path, plant, capsys):
    nan, broken = plant("gelu", Breaks(60, lambda x: x * math.nan)), plant("gelu", Breaks(60, breaks))
    words = [*SMALL, "--no-gate", "--no-twin", "--steps", "14", "--seeds", "3", "--data", "markov"]
    status, result = run(tmp_path, f"gelu=reference,{nan},{broken}", "optim.lr=1e-2,1e-3", *words)
    rows = by_name(result)
    assert status == 1
    assert {name for name, row in rows.items() if row["training"]} == {"gelu=reference optim.lr=1e-2", "optim.lr=1e-3"}
    assert all(row["speed"] for row in rows.values())
    red = {check["name"]: check["detail"] for check in result["checks"] if not check["ok"]}
    assert red.keys() == {f"gelu={nan} trains to the end", f"gelu={broken} trains to the end"}
    assert "a validation loss of nan, from seed" in red[f"gelu={nan} trains to the end"]
    assert "RuntimeError: an illegal access, from seed" in red[f"gelu={broken} trains to the end"]
    assert "FAILED: gelu=" in capsys.readouterr().out


def test_without_the_baselines_curves_none_are_compared(tmp_path, plant):
    nan = plant("gelu", Breaks(60, lambda x: x * math.nan))
    words = [*SMALL, "--no-gate", "--no-twin", "--steps", "14", "--seeds", "3", "--data", "markov"]
    status, result = run(tmp_path, f"gelu={nan},reference", *words)
    assert status == 1
    assert all(row["speed"] and not row["training"] for row in result["arms"])
    (red,) = (check for check in result["checks"] if not check["ok"])
    assert red["name"] == f"gelu={nan} trains to the end"


def interrupts(x):
    raise KeyboardInterrupt


def test_ctrl_c_leaves_what_was_measured(tmp_path, monkeypatch, plant, capsys):
    """The seeds that were finished in training, where there are two; arms that were not begun are said."""
    monkeypatch.setattr(timing, "warm_up", lambda arm, **more: None)  # so that calls can be counted
    stops = plant("gelu", Breaks(90, interrupts))
    words = [*SMALL, "--no-gate", "--no-twin", "--steps", "14", "--seeds", "9", "--data", "markov", "--together", "1"]
    status, result = run(tmp_path, f"gelu=reference,{stops}", "optim.lr=1e-2,1e-3", *words)
    assert status == 130
    rows = by_name(result)
    assert rows[f"gelu={stops}"]["speed"]
    seeds = [curve["seed"] for curve in rows[f"gelu={stops}"]["training"]["curves"]]
    assert seeds == list(range(len(seeds))) and 2 <= len(seeds) < 9
    assert (rows["optim.lr=1e-3"]["status"], rows["optim.lr=1e-3"]["reason"]) == ("not run", "stopped by Ctrl-C")
    said = capsys.readouterr().out
    assert "FAILED: the run went to its end: stopped by Ctrl-C" in said
    assert f"from each of {len(seeds)} seeds" in said
    admit, admitted = ablate._Run.admit, []

    def until_the_second_twin(self, choice):
        admitted.append(choice.name)
        return admit(self, choice) if len(admitted) < 5 else interrupts(choice)

    with monkeypatch.context() as patch:
        patch.setattr(ablate._Run, "admit", until_the_second_twin)
        axes = ["optim.lr=1e-2,1e-3,1e-4", "--together", "1"]
        status, result = run(tmp_path / "second", *axes, *SMALL, "--no-gate")
    assert (status, [row["status"] for row in result["arms"]]) == (130, ["ok", "ok", "not run"])
    assert [bool(row["speed"]) for row in result["arms"]] == [True, True, False]
    monkeypatch.setattr(timing, "interleave", lambda *a: interrupts(a))
    with pytest.raises(KeyboardInterrupt):  # nothing is there to be written
        run(tmp_path / "early", "gelu=reference,auto", *SMALL, "--no-gate", "--no-twin")
    assert list((tmp_path / "early").glob("*.json")) == []


@pytest.mark.filterwarnings("error")  # matplotlib warns of a layout that has no room, and then cuts names off
def test_names_of_many_axes_have_room_in_the_picture():
    def arm(name, median):
        ratio = {"median": median, "low": median - 0.1, "high": median + 0.1}
        return {"name": name, "ratio": ratio, "training": None, "verdict": "no difference shown"}

    many = " ".join(f"axis_{i}=a_value_of_it" for i in range(10))
    settings, machine = {"T": 16, "B": 2}, {"name": "a CPU"}
    arms = [arm(many, 1.0), arm("optim.lr=3e-3", 1.1), arm("x" * 300, 0.9)]
    found = {"arms": arms, "resolution": 0.01, "preset": "few", "settings": settings, "machine": machine}
    assert ablate_results.draw(found).startswith(b"\x89PNG")


def test_an_arm_that_breaks_while_it_is_timed_costs_itself(tmp_path, plant, capsys):
    broken = plant("gelu", Breaks(12, breaks))
    status, result = run(tmp_path, f"gelu=reference,{broken}", "optim.lr=1e-2,1e-3", *SMALL, "--no-gate", "--no-twin")
    rows = by_name(result)
    assert status == 1
    assert (rows[f"gelu={broken}"]["status"], rows[f"gelu={broken}"]["speed"]) == ("failed", None)
    assert "while it was timed: RuntimeError: an illegal access" in rows[f"gelu={broken}"]["reason"]
    assert rows["optim.lr=1e-3"]["speed"]
    assert run(tmp_path / "first", f"gelu={plant('gelu', Breaks(12, breaks))},reference", *SMALL, "--no-gate",
               "--no-twin") == (1, None)  # fmt: skip
    assert "the baseline (gelu=planted.gelu_1) is failed: while it was timed" in capsys.readouterr().err


@pytest.mark.parametrize("at", ["building", "timing"])
def test_a_later_group_whose_baseline_breaks_costs_no_figure_of_those_before(tmp_path, monkeypatch, plant, capsys, at):
    """As where the memory suffices for one group and not for the next: arms left over are said not to have been run."""
    admit, interleave, groups = ablate._Run.admit, timing.interleave, []

    def second_time_out_of_memory(self, choice):
        if at == "building" and self.groups and choice.name == "gelu=reference optim.lr=1e-2":
            self.rows[choice.name] |= {"status": "failed", "reason": "RuntimeError: can't allocate memory"}
            return None
        return admit(self, choice)

    def second_time_broken(arms, *more):
        groups.append(arms)
        if at == "timing" and len(groups) == 2:
            arms["gelu=reference optim.lr=1e-2"] = ablate._told_apart("gelu=reference optim.lr=1e-2", lambda: breaks(0))
        return interleave(arms, *more)

    monkeypatch.setattr(ablate._Run, "admit", second_time_out_of_memory)
    monkeypatch.setattr(timing, "interleave", second_time_broken)
    status, result = run(
        tmp_path,
        "gelu=reference,native",
        "optim.lr=1e-2,1e-3,1e-4",
        *SMALL,
        "--no-gate",
        "--no-twin",
        "--together",
        "1",
    )
    assert (status, [row["status"] for row in result["arms"]]) == (1, ["ok", "ok", "not run", "not run"])
    assert [bool(row["speed"]) for row in result["arms"]] == [True, True, False, False]
    assert {f["name"] for f in result["figures"]} >= {"gelu=native tokens/s", "gelu=reference optim.lr=1e-2 tokens/s"}
    why = "the baseline (gelu=reference optim.lr=1e-2) is failed: "
    assert all(row["reason"].startswith(why) for row in result["arms"][2:])
    (red,) = [check for check in result["checks"] if not check["ok"]]
    assert (red["name"], red["detail"].startswith(why)) == ("the run went to its end", True)
    assert "gelu=native" in capsys.readouterr().out


def test_training_starts_from_the_weights_that_tritium_train_starts_from():
    from tritium.engine import train

    torch.manual_seed(9)
    mine = ablate.initial_weights(CONFIG.replace(model={"vocab_multiple": 1}), 3, "cpu")
    theirs = train.build(CONFIG.replace(model={"vocab_multiple": 1}, train={"seed": 3})).optimizer.master_weights()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# --------------------------------------------------------------------------------------------------------------- tuning


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    """A folder of tuning files with entries for another op and, more widely, for this one."""
    folder = tmp_path / "kernels" / "tuning"
    folder.mkdir(parents=True)
    entries = [
        {"arch": "*", "op": "gelu", "order": ["triton"], "evidence": "none"},
        {"arch": "*", "op": "adamw", "order": ["torch_fused"], "evidence": "none"},
    ]
    (folder / "cpu.json").write_text(json.dumps(entries))
    monkeypatch.setattr(contract, "_FOLDER", folder.parent)
    contract.tuning.cache_clear()
    yield folder / "cpu.json"
    contract.tuning.cache_clear()


def test_the_winning_order_is_written_once_and_auto_takes_it(tmp_path, monkeypatch, tuning, capsys):
    before = json.loads(tuning.read_text())
    fast = fabricated(native=wobble(90.0), torch_fused=wobble(104.0))
    monkeypatch.setattr(timing, "interleave", fast)
    words = ["adamw=reference,torch_fused,native", *SMALL, "--write-tuning"]
    assert run(tmp_path, *words)[0] == 0
    entries = json.loads(tuning.read_text())
    assert entries[1:] == before
    new = entries[0]
    assert (new["op"], new["order"], new["compiled"], new["dtype"], new["phase"]) == (
        "adamw", ["native", "reference"], False, "float32", "train")  # fmt: skip
    assert "native 1.111 [" in new["evidence"]
    assert "few, T=16, B=4" in new["evidence"]
    assert "adamw: native > reference written to" in capsys.readouterr().out
    auto = ablate.planned(CONFIG.replace(kernels={"adamw": "auto"}), "cpu")
    assert next(row for row in auto if row.op == "adamw").backend == "native"
    text = tuning.read_text()
    assert run(tmp_path, *words)[0] == 0
    assert tuning.read_text() == text


@pytest.mark.parametrize(
    ("native", "said"),
    [
        (wobble(99.9, by=0.005), "not shown to be faster than the baseline"),
        (wobble(100.1, by=0.005), "not shown to be faster than native"),
    ],
)
def test_no_order_is_written_where_none_is_shown(tmp_path, monkeypatch, tuning, capsys, native, said):
    before = tuning.read_text()
    monkeypatch.setattr(timing, "interleave", fabricated(native=native))
    words = ["adamw=reference,native", *SMALL, "--write-tuning"]
    run(tmp_path, *words)
    assert said in capsys.readouterr().out
    assert tuning.read_text() == before


def test_an_order_that_auto_would_not_follow_is_taken_back(tmp_path, monkeypatch, tuning, capsys):
    """Another file, read before this one, decides for the same place."""
    first = tuning.with_name("a.json")
    first.write_text(json.dumps([{"arch": "*", "op": "adamw", "order": ["torch_fused"], "evidence": "none"}]))
    before = tuning.read_text()
    monkeypatch.setattr(timing, "interleave", fabricated(native=wobble(90.0)))
    words = ["adamw=reference,native", *SMALL, "--write-tuning"]
    assert run(tmp_path, *words)[0] == 1
    assert "auto would choose torch_fused and not native" in capsys.readouterr().err
    assert tuning.read_text() == before


def test_no_order_is_written_on_a_noisy_machine_or_of_a_backend_that_others_lack(
    tmp_path, monkeypatch, tuning, capsys, plant
):
    before = tuning.read_text()
    monkeypatch.setattr(timing, "interleave", fabricated(native=wobble(90.0), twin=wobble(103.0)))
    assert run(tmp_path, "adamw=reference,native", *SMALL, "--write-tuning")[0] == 1
    assert "adamw: no order was written: the baseline is as fast as its twin: 0.97" in capsys.readouterr().out
    name = plant("gelu", lambda x, approximate="tanh": ops.OPS["gelu"].reference(x, approximate))
    monkeypatch.setattr(timing, "interleave", lambda *a: {
        arm: timing.Samples(tuple((t, t) for t in wobble(90.0 if arm.endswith(name) else 100.0))) for arm in a[0]
    })  # fmt: skip
    status, _ = run(tmp_path / "own", f"gelu=reference,{name}", *SMALL, "--write-tuning")
    assert f"gelu: no order was written: {name} is the fastest, and a module that" in capsys.readouterr().out
    assert (status, tuning.read_text()) == (0, before)


def test_an_arm_in_fp8_is_compared_and_auto_does_not_take_it(tmp_path, monkeypatch, tuning, capsys):
    before = tuning.read_text()
    monkeypatch.setattr(timing, "interleave", lambda *a: {
        arm: timing.Samples(tuple((t, t) for t in wobble(50.0 if "fp8" in arm else 100.0))) for arm in a[0]
    })  # fmt: skip
    words = ["linear=reference,fp8_rowwise", *SMALL, "--train.precision", "bf16", "--write-tuning"]
    status, result = run(tmp_path, *words)
    row = by_name(result)["linear=fp8_rowwise"]
    assert (status, row["status"], row["precision"], row["verdict"]) == (0, "ok", "fp8", "faster")
    assert by_name(result)["linear=reference"]["precision"] == "bf16"
    assert "linear: no order was written: fewer than two backends of it" in capsys.readouterr().out
    assert tuning.read_text() == before


def test_a_wrong_gradient_in_fp8_gets_no_speed(tmp_path, plant):
    """The floors are wide; a fifth too much shows."""
    fp8 = ops.OPS["linear"].load("fp8_rowwise")

    def linear(x, weight, bias=None):
        for _ in range(10):  # 1.02 each
            weight = Scaled.apply(weight)
        return fp8.function(x, weight, bias)

    name = plant("linear", linear)
    sys.modules[name].PRECISION = "fp8"
    status, result = run(tmp_path, f"linear=reference,{name}", *SMALL, "--train.precision", "bf16", "--no-gate")
    row = by_name(result)[f"linear={name}"]
    assert (status, row["status"], row["precision"]) == (1, "red", "fp8")
    assert "the gradient of" in row["reason"]


def test_a_tuning_file_that_cannot_be_written_costs_no_result(tmp_path, monkeypatch, tuning, capsys):
    monkeypatch.setattr(timing, "interleave", fabricated(native=wobble(90.0)))

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ablate_results, "_replace", full)
    status, result = run(tmp_path, "adamw=reference,native", *SMALL, "--write-tuning")
    assert (status, result["kind"]) == (1, "ablate")
    assert "--write-tuning: adamw: [Errno 28] No space left on device" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_said_before_anything_is_built(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(ablate, "ablate", lambda request: pytest.fail("it was begun"))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "file", "gelu=auto,triton", *SMALL)
    assert stop.value.code == 2
    assert "--out: " in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_end_costs_the_files_and_not_the_table(tmp_path, monkeypatch, capsys):
    def full(result, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ablate, "save", full)
    monkeypatch.setattr(timing, "interleave", fabricated(native=wobble(90.0)))
    with pytest.raises(OSError, match="No space"):
        run(tmp_path, "adamw=reference,native", *SMALL, "--no-gate")
    assert "adamw=native" in capsys.readouterr().out
