"""The peers compute what tritium computes, step after step; and a peer that does not is found out."""

import dataclasses

import pytest
import torch

from tritium.benchmarks import ours, peers
from tritium.benchmarks.peers import huggingface, textbook
from tritium.benchmarks.throughput import LOSS_STEPS, equal_losses
from tritium.engine import presets
from tritium.engine.config import Config, GPTConfig, TrainConfig

MODEL = GPTConfig(vocab_size=500, vocab_multiple=64, block_size=48, n_layer=2, n_head=2, n_embd=64)
EAGER = peers.Variant(compile="false")


def losses(training, model=MODEL):
    training.load(peers.initial_weights(model))
    return [training.step(*batch).item() for batch in peers.batches(model, 2, 32, LOSS_STEPS, "cpu")]


def own_losses(precision="fp32", model=MODEL):
    config = Config(model=model, train=TrainConfig(precision=precision, compile="false"))
    return losses(ours.build(config, "cpu", 2), model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_variant_of_every_peer_trains_alike(precision):
    arms = {"tritium": (own_losses(precision), precision)}
    for name in peers.NAMES:
        module = peers.peer(name)
        assert module.why_not() is None
        variants = {*module.variants("cpu"), *module.variants("cuda")}
        for variant in {dataclasses.replace(v, precision=precision, compile="false") for v in variants}:
            arms[f"{name} {variant}"] = (losses(module.build(MODEL, variant)), precision)
    assert len(arms) >= 7
    equal = equal_losses(arms)
    assert equal["ok"], equal["problems"]
    assert 0 < equal["worst_relative"] < (1e-5 if precision == "fp32" else 2e-3)


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


@pytest.mark.parametrize("fault", [no_causal_mask, no_norm_bias, no_positions, no_momentum])
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


def test_only_gpt2s_are_compared():
    for name in ("gpt2_124m", "gpt2_1558m"):
        assert peers.why_not_gpt2(presets.load(name).model) is None
    reason = peers.why_not_gpt2(presets.load("llama_8b").model)
    assert reason is not None
    assert "rms_norm" in reason
    assert "n_kv_head=8" in reason
