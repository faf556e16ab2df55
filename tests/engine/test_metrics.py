import json

import pytest
import torch

from tritium.engine import presets
from tritium.engine.config import GPTConfig
from tritium.engine.metrics import MetricsFile, flops_per_token, matmul_parameters, matmul_rate, read_metrics


def test_gpt2_124m_flops_are_the_hand_computed_literals():
    # 12 blocks of 12·768² weights and a head of 768·50304; attention 12·12·768·1024 or half of it
    config = GPTConfig(vocab_size=50304)
    assert flops_per_token(config) / 1e9 == pytest.approx(0.854655, abs=5e-7)
    assert flops_per_token(config, convention="causal") / 1e9 == pytest.approx(0.798032, abs=5e-7)
    assert GPTConfig().padded_vocab_size == 50304


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("gpt2_350m", 24 * 12 * 1024**2 + 1024 * 50304),
        ("gpt2_1558m", 48 * 12 * 1600**2 + 1600 * 50304),
        # Llama 3 8B: q and o 4096², k and v 4096·1024, three 4096·14336 matrices, head 4096·128256
        ("llama_8b", 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256),
    ],
)
def test_matmul_parameters_of_known_models(name, weights):
    assert matmul_parameters(presets.load(name).model) == weights


def test_matmul_parameters_count_what_the_model_holds():
    from tritium.engine.model import GPT

    for config in (
        GPTConfig(vocab_size=100, block_size=8, n_layer=2, n_head=4, n_embd=32),
        GPTConfig(
            vocab_size=100,
            block_size=8,
            n_layer=2,
            n_head=4,
            n_kv_head=2,
            n_embd=32,
            activation="swiglu",
            tie_head=False,
            position="rope",
        ),
    ):
        held = sum(p.numel() for n, p in GPT(config).named_parameters() if p.ndim == 2 and "wpe" not in n)
        embedding = 0 if config.tie_head else config.padded_vocab_size * config.n_embd
        assert matmul_parameters(config) == held - embedding


def test_matmul_rate_scales_with_the_work_it_is_told_of():
    rate = matmul_rate(torch.device("cpu"), torch.float32, 128, 128, 128, seconds=0.05)
    assert 1e8 < rate < 1e14


def test_metrics_file_keeps_one_curve_across_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, 0)
    for step in (1, 2, 3):
        first.write(kind="step", step=step, loss=float(step))
    first.close()
    with path.open("a") as file:
        file.write('{"kind": "step", "step": 4, "lo')  # a kill in the middle of a line
    second = MetricsFile(path, 2)
    second.write(kind="step", step=3, loss=30.0)
    second.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_measuring_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    matmul_rate(torch.device("cpu"), torch.float32, 8, 8, 8, seconds=0.01)
    assert torch.equal(before, torch.get_rng_state())
