"""``tritium bench train``: figures against arithmetic done by hand, and faults that must fail it."""

import functools
import os
import pathlib
import subprocess
import sys
import types

import pytest
import torch
from torch._dynamo.utils import counters

from tritium.benchmarks import kernels as kernels_bench
from tritium.benchmarks import ours, peers, record, training
from tritium.engine import metrics, presets
from tritium.engine.config import Config, GPTConfig, TrainConfig
from tritium.kernels import ops
from tritium.kernels.op import call_sites

MODEL = GPTConfig(vocab_size=300, block_size=32, n_layer=2, n_head=2, n_embd=32)
CONFIG = Config(name="few", model=MODEL, train=TrainConfig(precision="fp32", compile="false"))

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def quick(monkeypatch):
    """Rates from a few repeats, and attention's contract taken as kept: neither is in question."""
    measure = metrics.matmul_rate
    monkeypatch.setattr(metrics, "matmul_rate", lambda *args, seconds: measure(*args, seconds=0.01))
    monkeypatch.setattr(kernels_bench.Gate, "admits", lambda *args: True)


def figures(result):
    return {f["name"]: f["value"] for f in result["figures"]}


def samples(result):
    """Medians of an even number of samples need not be each other's inverse: under load the middle two differ."""
    return {f["name"]: f["samples"] for f in result["figures"]}


def failed(result):
    return [check["name"] for check in result["checks"] if not check["ok"]]


# ------------------------------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize(
    ("preset", "T", "full", "causal", "tokens_per_s", "of_full", "of_causal"),
    [
        # GPT-2 124M: 12 layers of 12·768² weights and a head of 768·50304, 6 FLOPs each; 12·12·768·1024 and half.
        # 600,000 tokens/s × 854,654,976 FLOPs = 512.79 TFLOP/s; × 798,031,872 = 478.82. An H100 has 989.4
        ("gpt2_124m", 1024, 854_654_976, 798_031_872, 600_000, 0.51829, 0.48395),
        # GPT-2 1558M: 48 layers of 12·1600², head 1600·50304; 12·48·1600·1024 and half.
        # 40,000 × 10,273,996,800 = 410.96; × 9,802,137,600 = 392.09
        ("gpt2_1558m", 1024, 10_273_996_800, 9_802_137_600, 40_000, 0.41536, 0.39629),
        # Llama 3 8B: 32 layers of 4096·(4096 + 2·1024) + 4096² + 3·4096·14336, head 4096·128256; 12·32·4096·8192 and
        # half. 8,000 × 57,912,852,480 = 463.30; × 51,470,401,536 = 411.76
        ("llama_8b", 8192, 57_912_852_480, 51_470_401_536, 8_000, 0.46827, 0.41617),
    ],
)
def test_flops_per_token_and_mfu_are_the_hand_computed_ones(preset, T, full, causal, tokens_per_s, of_full, of_causal):
    config, _, _ = training.configured(preset, T, "cuda")
    found = {c: metrics.flops_per_token(config.model, T, c) for c in ("full", "causal")}
    assert found == {"full": full, "causal": causal}
    peak = training.datasheet({"device": "cuda", "name": "NVIDIA H100 80GB HBM3"})
    assert training.utilisation(tokens_per_s, found["full"], peak) == pytest.approx(of_full, abs=5e-6)
    assert training.utilisation(tokens_per_s, found["causal"], peak) == pytest.approx(of_causal, abs=5e-6)


def test_the_products_of_a_step_are_what_flops_per_token_counts():
    for name in ("gpt2_124m", "llama_8b", "tiny"):
        config, T, B = training.configured(name, None, "cpu")
        products = sum(g.flops for g in training.gemms(config, B * T))
        assert products == 6 * metrics.matmul_parameters(config.model) * B * T


def test_flops_that_are_done_are_counted_and_recomputing_adds_to_them():
    """Of a token, 6 a weight, and the whole square of attention, which the reference computes, three times."""
    by = {}
    for recompute in ("none", "full"):
        config = CONFIG.replace(kernels={"default": "reference"}, train={"recompute": recompute})
        by[recompute] = training.flops_done(ours.build(config, "cpu", 2), 2, 16)
    weights = 2 * 12 * 32 * 32  # of the blocks
    head = 32 * MODEL.padded_vocab_size
    attention = 4 * 16 * 32 * 2  # forward, of a token, two layers, the whole square: the reference computes it
    assert by["none"] == 32 * (6 * (weights + head) + 3 * attention)
    # full: the blocks' forward again, but for each block's last projection, whose result backward does not need
    last = 2 * 4 * 32 * 32
    assert by["full"] - by["none"] == 32 * (2 * (weights - last) + attention)


@pytest.mark.parametrize("backend", ["sdpa", "sdpa_flash", "native"])
def test_flops_are_those_of_the_functions_that_training_is_bound_to(backend):
    """And not of what auto would mean in an eager step: attention over half the square, put at the sites by hand. All
    of these do the same: two products forward and five backward, which computes the scores again. torch's own formulas
    have the whole square, and tritium's, of the model's FLOPs, no scores computed again."""
    trained = ours.build(CONFIG.replace(kernels={"default": "reference"}), "cpu", 2)
    before = training.flops_done(trained, 2, 16)
    for _, site in call_sites(trained.engine.model):
        if site.op.name == "attention":
            site.function = ops.attention.load(backend).function
    product = 32 * 2 * 16 * 32 * 2  # over the whole square, of all tokens and layers; the reference has six
    assert training.flops_done(trained, 2, 16) == before - 6 * product + 7 * product // 2


@pytest.mark.parametrize(("op", "backend", "products"), [("attention", "native", 5), ("attention", "triton", 7)])
def test_scores_that_backward_computes_again_are_counted(op, backend, products):
    """impl_triton.py: its two walks share no products."""
    formula = training.attention_formulas()[getattr(torch.ops.tritium, f"{op}_{backend}_backward")]
    B, T, H, D = shape = (2, 64, 4, 16)
    passed = (shape, shape, shape, shape, None, None, shape, (B, H, T), True, 0.25, 0)
    assert formula(*passed, 0.0, 0.0) == products * 2 * B * H * D * T * T // 2


@pytest.fixture
def planted(monkeypatch):
    """planted(op, function) → the name of a module that computes the op so."""
    names = []

    def plant(op, function):
        module = types.ModuleType("planted_by_test.backend")
        setattr(module, op, function)
        monkeypatch.setitem(sys.modules, "planted_by_test", types.ModuleType("planted_by_test"))
        monkeypatch.setitem(sys.modules, "planted_by_test.backend", module)
        names.append("planted_by_test.backend")
        return names[-1]

    yield plant
    for op in ops.OPS.values():
        for name in names:
            op._loaded.pop(name, None)


@torch.library.custom_op("planted_by_test::product", mutates_args=())
def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.t()


product.register_fake(lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]))
product.register_autograd(
    lambda ctx, dy: (dy @ ctx.saved_tensors[1], dy.flatten(0, -2).t() @ ctx.saved_tensors[0].flatten(0, -2)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_an_op_that_torch_cannot_count_gives_no_hfu_and_fails_the_run(planted, quick):
    def linear(x, weight, bias=None):
        y = product(x, weight)
        return y if bias is None else y + bias

    result = training.bench(CONFIG.replace(kernels={"linear": planted("linear", linear)}), 16, 2, rounds=2)
    assert failed(result) == ["FLOPs that are done were counted"]
    (check,) = [check for check in result["checks"] if not check["ok"]]
    assert "planted_by_test.product" in check["detail"]
    assert result["model"]["flops_per_token_done"] is None
    assert not any(name.startswith("HFU") for name in figures(result))
    shown = training.summary(result)  # of what is wrong no speed is shown
    assert "FAILED: FLOPs that are done were counted" in shown
    assert "tokens/s" not in shown and "MFU" not in shown and "ms" not in shown.split()
    check["ok"] = True
    assert "not counted" in training.summary(result)
    assert f"tokens/s            {figures(result)['tokens/s']:,.0f}" in training.summary(result)
    for stable in (True, False):
        result["warm_up"]["stable"] = stable
        assert ("NOT SETTLED" in training.summary(result)) != stable


@pytest.mark.parametrize(("factor", "red"), [(1.0, []), (-1.0, ["the kernels keep their contract"])])
def test_a_kernel_that_breaks_its_contract_fails_the_run(planted, monkeypatch, factor, red):
    """Its losses are finite and its graph is whole."""
    norm = ops.layer_norm.load("reference").function

    def layer_norm(x, weight, bias=None, eps=1e-5):
        return norm(x, weight, bias, eps) * factor

    monkeypatch.setattr(training, "matmul_rate", lambda *args: (1e12, "planted"))
    monkeypatch.setattr(training, "attention_call", lambda *args: ("sdpa", lambda: None, {}))
    name = planted("layer_norm", layer_norm)
    chosen = {"default": "reference", "layer_norm": name}
    result = training.bench(CONFIG.replace(kernels=chosen), 16, 2, rounds=2, contract=True)
    assert failed(result) == red
    (check,) = [check for check in result["checks"] if check["name"] == "the kernels keep their contract"]
    assert f"layer_norm.{name}" in check["detail"]
    assert ("max error" in check["detail"]) == bool(red)


def test_the_step_is_held_to_its_products_and_attention_of_the_same_run(quick, monkeypatch):
    """Times as planted: a step of 12 ms beside products of 6 and attention of 2 is 1.5 times what it needs."""

    def interleave(arms, rounds, between):
        assert list(arms) == ["step", "products", "attention"]
        arms["step"]()  # for its loss
        planted = {"step": (12.0, 12.6), "products": (6.0, 6.3), "attention": (2.0, 2.1)}
        return {name: training.timing.Samples((pair,) * rounds) for name, pair in planted.items()}

    monkeypatch.setattr(training.timing, "interleave", interleave)
    result = training.bench(CONFIG, 16, 2, rounds=3)
    assert figures(result)["step over its products and attention"] == pytest.approx(1.5)
    assert result["step_over_own"]["median"] == pytest.approx(1.5)
    assert figures(result)["tokens/s"] == pytest.approx(32e3 * (1 / 12.0 + 1 / 12.6) / 2, rel=1e-3)


def test_the_products_that_are_timed_are_those_that_are_listed():
    """Counted as they run: six FLOPs a weight and token, in the dtype that was asked for."""
    from torch.utils.flop_counter import FlopCounterMode

    products = training.gemms(CONFIG, 32)
    call = training.gemm_call(products, torch.bfloat16, "cpu")
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == sum(g.flops for g in products)
    assert counter.get_total_flops() == 32 * 6 * metrics.matmul_parameters(MODEL)


@pytest.mark.parametrize(("cold", "different"), [(1 << 30, 3), (1, 1)])
def test_the_products_that_are_timed_find_nothing_in_a_cache_that_a_step_does_not(monkeypatch, cold, different):
    """Forward through all layers and back, each layer with weights and inputs of its own, and gradients that stay; but
    no more memory than that takes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.mm.default:
                calls.append((tuple(args[0].shape), args[0].data_ptr(), args[1].data_ptr(), out.data_ptr()))
            return out

    monkeypatch.setattr(training, "COLD", cold)
    products = training.gemms(CONFIG.replace(model={"n_layer": 3}), 32)
    call, calls = training.gemm_call(products, torch.float32, "cpu"), []
    with Seen():
        call()
    forward, backward = calls[:13], calls[13:]
    assert len({w for _, _, w, _ in forward}) == len({x for _, x, _, _ in forward}) == 4 * different + 1
    assert [w for _, _, w, _ in backward[::2]] == [w for _, _, w, _ in reversed(forward)]  # dx, from the head on
    gradients = [out for _, _, _, out in backward[1::2]]
    assert all(len(set(gradients[i : i + 5 * different])) == 5 * different for i in range(13 - 5 * different))


# ----------------------------------------------------------------------------------------------------------- for real


def test_a_record_of_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(presets, "names", lambda: ["few"])
    monkeypatch.setattr(presets, "load", lambda name: CONFIG)
    words = ["few", "--T", "16", "--B", "2", "--rounds", "3", "--anatomy", "--out", str(tmp_path)]
    status = training.main([*words, "--train.recompute", "full"])
    (path,) = tmp_path.glob("train_few_T16_B2_*.json")
    result = record.read(path)
    assert record.problems(result, {**record.COMMON, **training.SCHEMA}) == []
    assert result["command"].startswith("tritium bench train few --T 16")
    assert result["settings"]["config"]["train"]["recompute"] == "full"
    value, sampled = figures(result), samples(result)
    assert sampled["tokens/s"] == pytest.approx([32e3 / ms for ms in sampled["step"]])
    rate = result["rates"]["measured_matmul"]
    flops = metrics.flops_per_token(MODEL, 16)
    assert value["MFU, full of measured matmul"] == pytest.approx(value["tokens/s"] * flops / rate)
    done = result["model"]["flops_per_token_done"]
    assert value["HFU of measured matmul"] / value["MFU, full of measured matmul"] == pytest.approx(done / flops)
    assert result["rates"]["datasheet"] is None
    assert not any("datasheet" in name for name in value)
    assert value["step over its products and attention"] > 1.0
    assert {row["op"] for row in result["kernels"]} >= {"attention", "layer_norm", "adamw"}
    assert len(result["sources"]) >= 8
    assert path.with_suffix(".png").exists()
    assert sum(row["share"] for row in result["anatomy"]) == pytest.approx(1.0, abs=0.01)
    assert failed(result) == []
    assert status == 0
    assert value["profiled step"] == pytest.approx(sum(row["ms"] for row in result["anatomy"]), rel=0.01)
    shown = capsys.readouterr().out
    assert "tokens/s" in shown
    assert "no datasheet figure for this device" in shown
    assert "where a step goes" in shown


TOGETHER = """
import sys, time
import torch.distributed as dist
from test_training import CONFIG
from tritium.benchmarks import kernels, training
from tritium.engine import metrics, presets

kernels.Gate.admits = lambda *args: True
metrics.matmul_rate = lambda *args, seconds: 1e11
presets.names, presets.load = lambda: ["few"], lambda name: CONFIG
reduce = dist.all_reduce

def slow(tensor, *args, **kwargs):
    if tensor.numel() > 1000:  # a bucket of gradients
        time.sleep(0.05)
    return reduce(tensor, *args, **kwargs)

dist.all_reduce = slow
words = ["few", "--T", "16", "--B", "2", "--rounds", "3", "--anatomy", "--device", "cpu", "--out", sys.argv[1]]
sys.exit(training.main(words))
"""


def test_processes_train_together_and_what_they_say_to_each_other_has_a_row(tmp_path):
    """Started as a user would, with 50 ms planted into the reduction of the gradients, which are one bucket."""
    (tmp_path / "run.py").write_text(TOGETHER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    here = str(pathlib.Path(__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": here}
    command = [*torchrun, str(tmp_path / "run.py"), str(tmp_path / "out")]
    both = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert both.returncode == 0, both.stdout + both.stderr
    assert both.stdout.count("written: ") == 1
    assert "T=16, B=2 in each of 2 processes" in both.stdout
    (path,) = (tmp_path / "out").glob("*.json")
    result = record.read(path)
    assert (path.stem, result["settings"]["processes"]) == ("train_few_T16_B2_P2", 2)
    assert result["command"].startswith("torchrun --nproc-per-node=2 -m tritium.engine.cli bench train few --T 16")
    sampled = samples(result)
    assert sampled["tokens/s"] == pytest.approx([2 * 32e3 / ms for ms in sampled["step"]])
    (row,) = (row for row in result["anatomy"] if row["row"] == "communication")
    assert row["ms"] > 50.0
    assert failed(result) == []


class Shortening(ours.Training):
    """Its rows become shorter when it is told to, as a last batch does: a compiled model is compiled again."""

    shorter = False

    def step(self, ids, targets):
        if self.shorter:
            ids, targets = ids[:, :-4].contiguous(), targets[:, :-4].contiguous()
        return super().step(ids, targets)


@pytest.fixture
def traced(monkeypatch):
    """torch.compile traces, guards and counts as ever, and runs the graphs as they are: no C++ compiler's seconds."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


COMPILED = CONFIG.replace(train={"compile": "true"}, kernels={"default": "reference"})


def test_compiling_after_the_warm_up_fails_the_run(traced, quick, monkeypatch):
    monkeypatch.setattr(ours, "build", Shortening)
    result = training.bench(COMPILED, 16, 2, rounds=2)
    assert failed(result) == []
    assert result["compilation"]["graphs"] == 1
    assert result["compilation"]["seconds"] > 0.0

    real = training.attention_call

    def attention_call(*args):  # called when the warm-up is over
        found = real(*args)
        monkeypatch.setattr(Shortening, "shorter", True)
        return found

    monkeypatch.setattr(training, "attention_call", attention_call)
    result = training.bench(COMPILED, 16, 2, rounds=2)
    assert failed(result) == ["nothing compiled after the warm-up"]
    assert result["compilation"]["compiled_after_warm_up"] == 1


def test_a_model_is_compiled_from_nothing(traced, quick, monkeypatch, tmp_path):
    folders = []

    class Looking(ours.Training):
        def step(self, ids, targets):
            folders.append(pathlib.Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR", "/")))
            if len(folders) == 1:
                assert not list(folders[0].iterdir())
                (folders[0] / "left behind").touch()
            return super().step(ids, targets)

    monkeypatch.setattr(ours, "build", Looking)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for _ in range(2):  # the second time too: dynamo would have it all
        folders.clear()
        result = training.bench(COMPILED, 16, 2, rounds=2)
        assert failed(result) == []
        assert result["compilation"]["graphs"] == 1
        assert len(set(folders)) == 1
        assert not folders[0].exists()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    assert not list(tmp_path.iterdir())


def broken_gelu(x, approximate="tanh"):
    torch._dynamo.graph_break()
    return torch.nn.functional.gelu(x, approximate=approximate)


def test_a_graph_that_breaks_ends_the_run_and_is_named(planted, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(presets, "names", lambda: ["few"])
    monkeypatch.setattr(presets, "load", lambda name: CONFIG)
    words = ["few", "--T", "16", "--B", "2", "--kernels.gelu", planted("gelu", broken_gelu), "--out", str(tmp_path)]
    assert training.main([*words, "--train.compile", "true"]) == 1
    said = capsys.readouterr().err
    assert "the graph of the model breaks" in said
    assert "broken_gelu" in said
    assert not list(tmp_path.iterdir())


class Breaking(ours.Training):
    """Every step of it breaks a graph that it has compiled apart from the model."""

    def step(self, ids, targets):
        counters["graph_break"]["planted"] += 1
        return super().step(ids, targets)


def test_graph_breaks_are_counted_in_the_steps_and_not_in_what_is_measured_beside_them(quick, monkeypatch):
    real = training.attention_call

    def attention_call(*args):
        counters["graph_break"]["of an attention backend"] += 1
        return real(*args)

    monkeypatch.setattr(training, "attention_call", attention_call)
    assert failed(training.bench(CONFIG, 16, 2, rounds=2)) == []
    monkeypatch.setattr(ours, "build", Breaking)
    assert failed(training.bench(CONFIG, 16, 2, rounds=2)) == ["no graph break"]


def test_compiling_twice_before_the_warm_up_ends_is_more_than_one_graph(quick, monkeypatch):
    class Twice(ours.Training):
        def step(self, ids, targets):
            if not self.engine.config.run.out:  # once
                self.engine.config = self.engine.config.replace(run={"out": "x"})
                counters["stats"]["unique_graphs"] += 1
            return super().step(ids, targets)

    monkeypatch.setattr(ours, "build", Twice)
    assert failed(training.bench(CONFIG, 16, 2, rounds=2)) == ["one graph"]


def test_attention_that_fails_at_the_steps_size_is_passed_over(quick, monkeypatch):
    real = kernels_bench.call_of

    def call_of(backend, inputs, **how):
        if backend.name == "reference":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")
        return real(backend, inputs, **how)

    monkeypatch.setattr(kernels_bench, "call_of", call_of)
    clock = training.timing.clock_for("cpu")
    chosen, _, why_not = training.attention_call(CONFIG, 2, 16, torch.float32, "cpu", clock)
    assert chosen != "reference"
    assert "fails at this size: OutOfMemoryError: CUDA out of memory" in why_not["reference"]


def test_attention_that_breaks_its_contract_is_not_held_against_the_step(monkeypatch):
    def admits(gate, op, backend, dtype):
        gate.red += ["max error 3"] * (backend.name == "native")
        return backend.name != "native"

    monkeypatch.setattr(kernels_bench.Gate, "admits", admits)
    monkeypatch.setattr(ops.attention, "backends", lambda: ["reference", "native"])
    clock = training.timing.clock_for("cpu")
    chosen, _, why_not = training.attention_call(CONFIG, 2, 16, torch.float32, "cpu", clock)
    assert chosen == "reference"
    assert why_not == {"native": "it breaks the contract: max error 3"}


def test_the_fastest_attention_is_the_one_whose_time_is_shortest(quick, monkeypatch):
    class Clock:
        """Tells planted times, in the order in which the backends are tried; the first run of each is a warm-up."""

        def __init__(self):
            self.ms = iter([1.0, 5.0, 6.0, 7.0, 2.0, 3.0, 3.5, 9.0, 2.5, 4.0, 4.5, 4.0])

        def times_ms(self, calls):
            return [next(self.ms) for _ in calls]

    monkeypatch.setattr(ops.attention, "backends", lambda: ["reference", "sdpa", "sdpa_flash"])
    chosen, _, why_not = training.attention_call(CONFIG, 2, 16, torch.float32, "cpu", Clock())
    assert chosen == "sdpa"
    assert why_not == {"reference": "1.67 × as long", "sdpa_flash": "1.33 × as long"}


def test_a_loss_that_is_not_finite_fails_the_run(quick, monkeypatch):
    class Broken(ours.Training):
        def step(self, ids, targets):
            return super().step(ids, targets) * float("nan")

    monkeypatch.setattr(ours, "build", Broken)
    assert failed(training.bench(CONFIG, 16, 2, rounds=2)) == ["finite losses"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpt2_125m"], "gpt2_124m"),
        (["tiny", "--rounds", "1"], "at least 2"),
        (["tiny", "--B", "0"], "at least 1"),
        (["tiny", "--seed", "-1"], "--seed must be"),
        (["tiny", "--round", "3"], "--rounds"),
        (["tiny", "--trian.compile", "false"], "--train"),
        (["tiny", "--train.recompte", "full"], "recompute"),
        (["tiny", "--device", "cuda"], "--device cpu"),
    ],
)
def test_a_wrong_command_line_ends_with_status_2(words, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        training.main(words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_kernel_choice_that_cannot_be_met_says_why(tmp_path, capsys):
    assert (
        training.main(["tiny", "--kernels.layer_norm", "apex", "--model.norm", "layer_norm", "--out", str(tmp_path)])
        == 1
    )
    assert "apex" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.documents", "true"], "data.documents"),
        (["--data.folder", "there/is/none", "--model.vocab_size", "0"], "there/is/none"),
        (["--data.folder", "there/is/none", "--model.vocab_size", "256"], "there/is/none"),
    ],
)
def test_what_cannot_be_timed_says_why(words, said, tmp_path, capsys):
    assert training.main(["tiny", *words, "--out", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_datasheet_is_found_by_the_devices_name():
    def of(name, device="cuda"):
        return training.datasheet({"device": device, "name": name})

    assert of("NVIDIA H100 80GB HBM3") == of("NVIDIA H200") == 989.4e12
    assert of("NVIDIA A100-SXM4-80GB") == of("NVIDIA A100 80GB PCIe") == 312e12
    assert of("NVIDIA B200") == 2250e12
    # other boards of these names, and names that only contain them, have other figures
    for name in ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA GB200", "NVIDIA GH200 480GB"):
        assert of(name) is None
    assert of("NVIDIA GeForce RTX 4090") is None
    assert of("a CPU named H100", "cpu") is None


def test_the_profiled_steps_read_the_folder_that_is_named(tmp_path):
    from tritium.engine.data.prepare import prepare

    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{"ab" * 40} {i}"}}\n' for i in range(40)))
    prepare(tmp_path / "a.jsonl", tmp_path / "data", tokenizer="bytes", val_fraction=0.1, say=lambda _: None)
    trained = ours.build(CONFIG.replace(data={"folder": str(tmp_path / "data")}), "cpu", 2)
    random = peers.batches(MODEL, 2, 16, 2, "cpu")
    with training.handing_out(trained, random) as source:
        batch = source()
        assert batch.ids.shape == batch.targets.shape == (2, 16)
        assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
        assert set(batch.ids.flatten().tolist()) <= {*b"ab 0123456789", 256}  # the text's bytes and the end of one
    with training.handing_out(ours.build(CONFIG, "cpu", 2), random) as source:
        assert [source().ids is pair[0] for pair in (*random, random[0])] == [True] * 3


def test_an_out_that_cannot_be_written_is_said_before_anything_is_built(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(training, "bench", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(SystemExit) as raised:
        training.main(["tiny", "--device", "cpu", "--out", str(tmp_path / "file")])
    assert raised.value.code == 2
    assert "cannot hold a record" in capsys.readouterr().err
