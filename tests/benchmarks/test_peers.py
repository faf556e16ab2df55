"""The peers compute what tritium computes, step after step; and a peer that does not is found out."""

import dataclasses
import importlib.util
import pathlib
import sys

import pytest
import torch

from tritium.benchmarks import ours, peers
from tritium.benchmarks.peers import huggingface, huggingface_liger, litgpt, textbook, torchtitan
from tritium.benchmarks.throughput import LOSS_STEPS, equal_losses
from tritium.engine import presets
from tritium.engine.config import Config, GPTConfig, TrainConfig
from tritium.kernels.rope.reference import rope

FAKES = str(pathlib.Path(__file__).with_name("fakes"))
MODEL = GPTConfig(vocab_size=500, vocab_multiple=64, block_size=48, n_layer=2, n_head=2, n_embd=64)
LLAMA = GPTConfig(
    vocab_size=449, vocab_multiple=64, block_size=48, n_layer=2, n_head=4, n_kv_head=2, n_embd=64, mlp_width=96,
    position="rope", rope_theta=500.0, norm="rms_norm", activation="swiglu", bias=False, tie_head=False,
)  # fmt: skip
INSTALLED = [name for name in peers.NAMES if peers.peer(name).why_not("cpu") is None]
EAGER = peers.Variant(compile="false")


def losses(training, model=MODEL):
    training.load(peers.initial_weights(model))
    return [training.step(*batch).item() for batch in peers.batches(model, 2, 32, LOSS_STEPS, "cpu")]


def own_losses(precision="fp32", model=MODEL):
    config = Config(model=model, train=TrainConfig(precision=precision, compile="false"))
    return losses(ours.build(config, "cpu", 2), model)


def arms_of(module, model, precision="fp32"):
    """The losses of every variant, eager, on ``model``, and of tritium's arm of the model that the peer was given."""
    fitted, _ = module.fit(model)
    arms = {"tritium": (own_losses(precision, fitted), precision)}
    variants = {*module.variants("cpu"), *module.variants("cuda")}
    for variant in sorted({dataclasses.replace(v, precision=precision, compile="false") for v in variants}, key=str):
        arms[str(variant)] = (losses(module.build(fitted, variant), fitted), precision)
    return arms


@pytest.fixture
def with_litgpt(monkeypatch):
    """The real litgpt where it is installed, else the fake with its layouts."""
    if importlib.util.find_spec("litgpt") is None:
        monkeypatch.syspath_prepend(FAKES)
    yield
    for name in [n for n in sys.modules if n.split(".")[0] == "litgpt" and "fakes" in str(sys.modules[n].__file__)]:
        del sys.modules[name]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_variant_of_every_peer_trains_alike(precision):
    assert {"textbook", "huggingface", "huggingface_eager"} <= set(INSTALLED)
    for name in INSTALLED:
        arms = arms_of(peers.peer(name), MODEL, precision)
        assert len(arms) >= 3
        equal = equal_losses(arms)
        assert equal["ok"], equal["problems"]
        assert 0 <= equal["worst_relative"] < (1e-5 if precision == "fp32" else 2e-3)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (MODEL, "litgpt's parts"),
        (LLAMA, ""),
        (dataclasses.replace(MODEL, position="rope", rope_fraction=0.5, activation="geglu"), ""),
    ],
    ids=("gpt2", "llama", "geglu"),
)
def test_litgpt_trains_alike_at_the_nearest_model_that_it_has(model, words, with_litgpt):
    fitted, said = litgpt.fit(model)
    assert said == words
    assert peers.changed(model, fitted) == ("position=rope" if words else "")
    equal = equal_losses(arms_of(litgpt, model))
    assert equal["ok"], equal["problems"]


@pytest.mark.parametrize("model", [MODEL, LLAMA], ids=("gpt2", "llama"))
@pytest.mark.parametrize("name", INSTALLED)
def test_every_peer_trains_alike_at_the_nearest_model_that_it_has(name, model):
    module = peers.peer(name)
    fitted, words = module.fit(model)
    assert (words == "") == (fitted == model)
    assert module.fit(fitted) == (fitted, "")
    equal = equal_losses(arms_of(module, model))
    assert equal["ok"], equal["problems"]


def test_litgpts_parts_are_the_nearest():
    odd = dataclasses.replace(MODEL, activation="relu2", bias=False, qk_norm=True, dropout=0.1, z_loss=1e-4)
    fitted, _ = litgpt.fit(odd)
    assert (fitted.activation, fitted.bias, fitted.qk_norm) == ("gelu", True, False)
    assert (fitted.dropout, fitted.z_loss) == (0.0, 0.0)
    rms, _ = litgpt.fit(dataclasses.replace(odd, norm="rms_norm"))
    assert not rms.bias


def test_torchtitans_parts_are_llamas():
    fitted, words = torchtitan.fit(MODEL)
    assert words == "Llama's parts"
    assert torchtitan.fit(LLAMA) == (LLAMA, "")
    assert (fitted.n_layer, fitted.n_embd, fitted.tie_head) == (MODEL.n_layer, MODEL.n_embd, MODEL.tie_head)
    assert (fitted.position, fitted.norm, fitted.activation, fitted.bias) == ("rope", "rms_norm", "swiglu", False)


def test_rows_that_turn_neighbours_give_the_scores_of_rows_that_turn_halves():
    H, D, C, T = 2, 8, 6, 5
    wq, wk = torch.randn(2, H * D, C).unbind()
    x = torch.randn(1, T, C)
    angle = torch.arange(T)[:, None] * 0.3 ** torch.arange(D // 2)

    def scores(q, k):
        return torch.einsum("bihd,bjhd->bhij", q, k)

    wanted = scores(*rope(*((x @ w.t()).view(1, T, H, D) for w in (wq, wk)), angle.cos(), angle.sin()))
    turned = []
    for w in (wq, wk):
        pairs = (x @ torchtitan._adjacent(w, D).t()).view(1, T, H, D // 2, 2)
        z = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()), angle)[None, :, None]
        turned.append(torch.view_as_real(z).flatten(3))
    assert torch.allclose(scores(*turned), wanted, atol=1e-5)


def test_torchtitans_projection_holds_each_key_head_below_its_queries():
    G, D = 2, 3
    q = torch.arange(4 * D)[:, None].float()
    k, v = 100 + torch.arange(G * D)[:, None].float(), 200 + torch.arange(G * D)[:, None].float()
    rows = torchtitan._grouped(q, k, v, G, D)[:, 0].tolist()
    assert rows == [0, 1, 2, 3, 4, 5, 100, 101, 102, 200, 201, 202, 6, 7, 8, 9, 10, 11, 103, 104, 105, 203, 204, 205]


def test_a_peer_that_cannot_run_says_how_it_could(monkeypatch):
    monkeypatch.setattr(peers.importlib.metadata, "version", nothing_is_installed)
    for name, package in (("huggingface", "transformers"), ("litgpt", "litgpt"), ("torchtitan", "torchtitan")):
        wanted = f"needs the package {package}, which is not installed; in the source tree: pip install -e '.[peers]'"
        assert peers.peer(name).why_not("cpu") == wanted
    assert textbook.why_not("cpu") is None


def nothing_is_installed(package):
    raise peers.importlib.metadata.PackageNotFoundError(package)


def test_what_is_installed_and_cannot_run_says_why(monkeypatch):
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda package: "1.0")
    reason = huggingface_liger.why_not("cpu")
    assert "for GPUs and this device is cpu; use --device cuda" in reason
    assert huggingface_liger.why_not("cuda") is None

    def fails(name):
        raise RuntimeError("no such op in this torch")

    monkeypatch.setattr(torchtitan.importlib, "import_module", fails)
    reason = torchtitan.why_not("cpu")
    assert f"beside torch {torch.__version__}: RuntimeError: no such op in this torch; install a torchtitan" in reason


def test_a_loss_that_counts_padding_is_not_given_any():
    for module, extra in ((huggingface, huggingface.OWN_LOSS), (litgpt, litgpt.OWN_LOSS)):
        assert all(not v.padded for v in module.variants("cpu") if extra in v.extra)
    with pytest.raises(ValueError, match="counts the padding"):
        huggingface.build(MODEL, dataclasses.replace(EAGER, extra=huggingface.OWN_LOSS))


def settings(training):
    return training.settings(*peers.batches(MODEL, 2, 32, 1, "cpu")[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", INSTALLED)
def test_every_variant_tells_tritiums_settings(name, precision):
    """All products and attention of a peer are in its precision: none is left in fp32, which would make it slow."""
    module = peers.peer(name)
    model, _ = module.fit(MODEL)
    config = Config(model=model, train=TrainConfig(precision=precision, compile="false"))
    wanted = settings(ours.build(config, "cpu", 2))
    assert wanted == {
        "precision": precision, "lr": "0.0006", "beta1": "0.9", "beta2": "0.95", "eps": "1e-08", "grad_clip": "1",
        "decay_of_matrices": "0.1", "decay_of_vectors": "0",
    }  # fmt: skip
    for variant in peers.variants_in(name, "cpu", precision):
        assert variant.precision == precision
        training = module.build(model, dataclasses.replace(variant, compile="false"))
        assert settings(training) == wanted
        before = settings(training)
        with training.in_fp32():
            assert settings(training)["precision"] == "fp32"
        assert settings(training) == before


def no_autocast(training):
    training.bf16 = False


def fp32_head(training):
    """As where a part is kept out of autocast."""
    loss = training.uncompiled

    def half(ids, targets):
        with torch.autocast("cpu", enabled=False):
            torch.ones(2, 2) @ torch.ones(2, 2)
        return loss(ids, targets)

    training.uncompiled = half


def other_lr(training):
    training.optimizer.param_groups[1]["lr"] *= 1.1


def no_decay(training):
    training.optimizer.param_groups[0]["weight_decay"] = 0.0


def other_clip(training):
    training.optim = dataclasses.replace(training.optim, grad_clip=2.0)


def other_beta(training):
    training.optimizer.param_groups[0]["betas"] = (0.9, 0.99)


@pytest.mark.parametrize(
    ("fault", "name", "value"),
    [
        (no_autocast, "precision", "fp32"),
        (fp32_head, "precision", "bf16 and fp32"),
        (other_lr, "lr", "0.0006 and 0.00066"),
        (no_decay, "decay_of_matrices", "0"),
        (other_clip, "grad_clip", "2"),
        (other_beta, "beta2", "0.95 and 0.99"),
    ],
)
def test_a_planted_setting_is_told(fault, name, value):
    """Each is within bf16's bound on losses, or nearly."""
    training = textbook.build(MODEL, dataclasses.replace(EAGER, precision="bf16"))
    before = settings(training)
    fault(training)
    told = settings(training)
    assert told[name] == value
    assert {key for key in told if told[key] != before[key]} == {name}


def test_on_a_cpu_no_peer_is_set_to_a_lesser_matmul():
    """It is another precision where the CPU has bf16, and on others up to a quarter slower."""
    for name in peers.NAMES:
        assert {variant.matmul for variant in peers.peer(name).variants("cpu")} <= {"highest", "high"}
        if name != "huggingface_liger":  # not for CPUs
            assert {v.matmul for v in peers.variants_in(name, "cpu", "fp32")} == {"highest"}


def test_an_exact_and_a_padded_vocabulary_give_one_loss():
    model = dataclasses.replace(MODEL, vocab_size=449)  # padded to 512
    padded, exact = (losses(textbook.build(model, dataclasses.replace(EAGER, padded=p)), model) for p in (True, False))
    assert padded == pytest.approx(exact, rel=1e-6)
    assert own_losses(model=model) == pytest.approx(exact, rel=1e-5)


def no_causal_mask(training):
    training.module.blocks[1].forward = lambda x: x


def no_norm_bias(training):
    training.module.norm.bias.data.zero_()


def no_positions(training):
    training.module.wpe.weight.data.zero_()


def no_momentum(training):
    for group in training.optimizer.param_groups:
        group["betas"] = (0.0, 0.95)


def other_weights(training):
    training.module.blocks[0].up.weight.data[0] *= 1.5


def one_token_fewer(training):
    step = training.step
    training.step = lambda ids, targets: step(ids[:, :-1], targets[:, :-1])


def half_precision(training):
    training.bf16 = True


FAULTS = [
    no_causal_mask, no_norm_bias, no_positions, no_momentum, other_weights, one_token_fewer, half_precision, other_lr,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_makes_losses_unequal(fault):
    wanted = own_losses()
    training = textbook.build(MODEL, EAGER)
    load = training.load
    training.load = lambda weights: (load(weights), fault(training))
    equal = equal_losses({"tritium": (wanted, "fp32"), "faulty": (losses(training), "fp32")})
    assert not equal["ok"]
    assert "faulty" in equal["problems"][0]


def test_a_loss_that_is_not_a_number_is_unequal():
    nan = float("nan")
    assert not equal_losses({"a": ([1.0, 1.0], "fp32"), "b": ([1.0, nan], "fp32")})["ok"]
    assert not equal_losses({"a": ([nan, 1.0], "fp32"), "b": ([nan, 1.0], "fp32")})["ok"]


def test_transformers_builds_no_mask_in_the_mask_free_variant():
    """The registered attention function asserts it; here the plain variant shows that the assertion has something to
    find.
    """
    training = huggingface.build(MODEL, dataclasses.replace(EAGER, extra=huggingface.CAUSAL))
    assert training.module.config._attn_implementation == "causal_sdpa"
    ids, _ = peers.batches(MODEL, 2, 32, 1, "cpu")[0]
    mask = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    with pytest.raises(AssertionError, match="built a mask"):
        training.module(input_ids=ids, attention_mask=mask)


def test_initial_weights_are_a_function_of_the_seed():
    a, b, c = (peers.initial_weights(MODEL, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["wte.weight"], c["wte.weight"])
    assert sum(value.numel() for value in a.values()) == 500 * 64 + 48 * 64 + 2 * (12 * 64**2 + 13 * 64) + 2 * 64


def test_weights_that_do_not_fit_are_refused():
    weights = peers.initial_weights(MODEL)
    training = textbook.build(MODEL, EAGER)
    missing = {name: value for name, value in weights.items() if name != "h.1.ln_2.bias"}
    with pytest.raises(ValueError, match=r"norm2\.bias"):
        training.load(missing)
    with pytest.raises(ValueError, match="shape"):
        training.load(weights | {"wpe.weight": torch.zeros(48, 65)})


def test_weights_of_every_part_reach_tritiums_model():
    untied = dataclasses.replace(LLAMA, norm="layer_norm", bias=True)
    for model in (MODEL, LLAMA, untied):
        weights = peers.initial_weights(model)
        training = ours.build(Config(model=model, train=TrainConfig(compile="false")), "cpu", 2)
        training.load(weights)
        assert ("lm_head.weight" in weights) == (not model.tie_head)
        assert (
            sum(w.numel() for w in weights.values())
            == sum(p.numel() for p in training.engine.model.parameters())
            - (1 if model.tie_head else 2) * (model.padded_vocab_size - model.vocab_size) * model.n_embd
        )


def test_gpt2s_are_compared_as_they_are():
    for name in ("gpt2_124m", "gpt2_1558m"):
        model = presets.load(name).model
        assert textbook.fit(model) == (model, "")
    model = presets.load("llama_8b").model
    fitted, words = textbook.fit(model)
    assert words == "GPT-2's parts"
    assert "norm=layer_norm" in peers.changed(model, fitted)
    assert (fitted.n_layer, fitted.kv_heads, fitted.hidden_width) == (32, 32, 4 * 4096)
