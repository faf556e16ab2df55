import collections
import dataclasses
import sys

import pytest
import torch

from tritium.engine import precision
from tritium.engine.generate import GenerateError, generate, sample, stream
from tritium.engine.model import GPT, GPTConfig
from tritium.kernels import op, ops

SMALL = GPTConfig(vocab_size=53, vocab_multiple=16, block_size=16, n_layer=2, n_head=4, n_embd=32, init_std=0.3)
ARCHITECTURES = {
    "gpt2": SMALL,
    "rope": dataclasses.replace(SMALL, position="rope", n_kv_head=2),
    "llama": dataclasses.replace(
        SMALL, position="rope", rope_fraction=0.5, norm="rms_norm", activation="swiglu", n_kv_head=1, qk_norm=True,
        tie_head=False, bias=False, logit_softcap=10.0,
    ),
    "grouped": dataclasses.replace(SMALL, n_kv_head=2, qk_norm=True),
}  # fmt: skip
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15]]
GREEDY = {"temperature": 0.0}


def build(config: GPTConfig = SMALL, **changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(dataclasses.replace(config, **changes)).eval()


@torch.no_grad()
def by_hand(model: GPT, prompt: list[int], tokens: int) -> list[int]:
    """Greedy generation as nanoGPT does it: one row, nothing cached, the context cropped to block_size."""
    ids = list(prompt)
    for _ in range(tokens):
        logits = model(torch.tensor([ids[-model.config.block_size :]]))
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


# ---------------------------------------------------------------------------------------------- the same tokens always


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_greedy_rows_of_any_length_equal_one_row_by_hand(config, cache):
    """Beyond block_size too: the longest row slides after 7 tokens."""
    model = build(config)
    expected = [by_hand(model, prompt, 12) for prompt in PROMPTS]
    assert generate(model, PROMPTS, 12, cache=cache, **GREEDY) == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)  # not all the same rut


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_cached_draws_equal_uncached_ones(config):
    model = build(config)
    options = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 11}
    cached = generate(model, PROMPTS, 12, **options)
    assert cached == generate(model, PROMPTS, 12, cache=False, **options)
    assert all(len(set(row)) > 3 for row in cached)


def test_a_row_does_not_depend_on_the_rows_beside_it():
    model = build()
    together = generate(model, PROMPTS, 9, seed=[5, 6, 7, 8])
    for r, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], 9, seed=[5 + r]) == [together[r]]
    assert generate(model, PROMPTS, 9, seed=5) == together
    assert generate(model, PROMPTS[::-1], 9, seed=[8, 7, 6, 5]) == together[::-1]
    assert generate(model, PROMPTS, 9, seed=6) != together


def test_the_cache_is_used(monkeypatch):
    model = build()
    widths = []
    model.wte.register_forward_hook(lambda module, args, out: widths.append(args[0].shape))
    generate(model, [[1, 2, 3], [4, 5]], 5, **GREEDY)
    assert widths == [(2, 3)] + [(2, 1)] * 4
    widths.clear()
    generate(model, [[1, 2, 3], [4, 5]], 3, cache=False, **GREEDY)
    assert widths == [(2, 3), (2, 4), (2, 5)]
    widths.clear()
    generate(model, [[1] * 14], 5, **GREEDY)  # full after two: then every token is a prefill of the last 16
    assert widths == [(1, 14), (1, 1), (1, 1), (1, 16), (1, 16)]


def test_a_prompt_longer_than_block_size_is_cropped():
    model = build()
    prompt = [i % 53 for i in range(3, 43)]
    assert generate(model, [prompt], 3, **GREEDY) == generate(model, [prompt[-16:]], 3, **GREEDY)


def test_stopped_rows_leave_the_others_alone():
    model = build()
    free = generate(model, PROMPTS, 12, **GREEDY)
    stop = free[2][2]  # the longest row stops early; the others go on, through the point where it would have slid
    stopped = generate(model, PROMPTS, 12, stop_ids=(stop,), **GREEDY)
    for row, expected in zip(stopped, free, strict=True):
        assert row == (expected[: expected.index(stop) + 1] if stop in expected else expected)
    assert len(stopped[2]) == free[2].index(stop) + 1
    assert max(map(len, stopped)) == 12


def test_stream_yields_what_generate_returns():
    model = build()
    stop = generate(model, PROMPTS, 6, **GREEDY)[1][2]
    steps = list(stream(model, PROMPTS, 6, stop_ids=(stop,), **GREEDY))
    rows = [[step[r] for step in steps if step[r] is not None] for r in range(4)]
    assert rows == generate(model, PROMPTS, 6, stop_ids=(stop,), **GREEDY)
    assert len(steps) == 6 and steps[-1][1] is None


def test_ends_when_every_row_has_stopped():
    model = build()
    assert len(list(stream(model, [[1], [2]], 10, stop_ids=range(53)))) == 1
    assert generate(model, PROMPTS, 0) == [[]] * 4
    assert generate(model, [], 5) == []


def test_a_tensor_of_prompts():
    model = build()
    assert generate(model, torch.tensor([[1, 2], [3, 4]]), 4) == generate(model, [[1, 2], [3, 4]], 4)


def test_bf16_compute():
    model = build()
    exact = generate(model, PROMPTS, 6, cache=False, **GREEDY)
    precision.to_compute_dtype(model, torch.bfloat16)
    rows = generate(model, PROMPTS, 6, **GREEDY)
    assert sum(a == b for x, y in zip(rows, exact, strict=True) for a, b in zip(x, y, strict=True)) >= 12


# ------------------------------------------------------------------------------------------------------------- drawing


def frequencies(logits: torch.Tensor, draws: int = 4000, **options: float) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    counts = collections.Counter(sample(logits.expand(draws, -1), [generator] * draws, **options))
    return {token: count / draws for token, count in counts.items()}


PROBABILITIES = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.15, 0.1]])  # ids 0 and 2 are impossible


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {1: 0.5, 3: 0.25, 4: 0.15, 5: 0.1}),
        ({"top_k": 2}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_k": 100}, {1: 0.5, 3: 0.25, 4: 0.15, 5: 0.1}),
        ({"top_p": 0.8}, {1: 5 / 9, 3: 2.5 / 9, 4: 1.5 / 9}),  # 0.75 does not reach 0.8, so 4 belongs to it
        ({"top_p": 0.74}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_p": 1e-9}, {1: 1.0}),
        ({"top_k": 3, "top_p": 0.8}, {1: 2 / 3, 3: 1 / 3}),  # 0.75 / 0.9 reaches 0.8
        ({"temperature": 0.5}, {1: 0.25 / 0.345, 3: 0.0625 / 0.345, 4: 0.0225 / 0.345, 5: 0.01 / 0.345}),
        ({"temperature": 1e-300}, {1: 1.0}),
        ({"temperature": 0.0}, {1: 1.0}),
    ],
)
def test_frequencies(options, expected):
    logits = torch.where(PROBABILITIES > 0, PROBABILITIES.log(), -200.0)
    found = frequencies(logits + 3.0, **options)
    assert set(found) == set(expected)
    for token, probability in expected.items():
        assert found[token] == pytest.approx(probability, abs=0.03)


def test_a_token_of_probability_zero_is_never_drawn(monkeypatch):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).clamp(min=-1e30)
    for u, token in ((0.0, 1), (0.4999999, 1), (0.5, 3), (1.0 - 2**-53, 3), (1.0, 3)):
        monkeypatch.setattr(torch, "rand", lambda *shape, generator, dtype, u=u: torch.full(shape, u, dtype=dtype))
        assert sample(logits, [None]) == [token]


# ----------------------------------------------------------------------------------------------- what it leaves behind


def test_model_and_random_state_stay_as_they_were():
    model = build(dropout=0.5).train()
    state = torch.get_rng_state()
    rows = generate(model, PROMPTS, 5, **GREEDY)
    assert rows == generate(model, PROMPTS, 5, **GREEDY) == generate(build(), PROMPTS, 5, **GREEDY)  # no dropout
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    generate(model, PROMPTS, 1)
    assert not any(module.training for module in model.modules())


def test_an_abandoned_stream_restores_the_mode_and_never_the_callers_grad_mode():
    model = build().train()
    steps = stream(model, PROMPTS, 5)
    next(steps)
    assert torch.is_grad_enabled()
    steps.close()
    assert model.training


BACKEND = """
from tritium.kernels import ops

widths = []


def attention(q, k, v, seq_start=None, causal=True, scale=None, window=0, softcap=0.0, dropout=0.0, seed=None):
    widths.append((q.shape[1], k.shape[1]))
    return ops.attention.reference(q, k, v, seq_start, causal, scale, window, softcap, dropout, seed)


def unsupported(site):
    return None
"""


def test_prefill_and_decode_use_the_kernels_of_their_phase(tmp_path, monkeypatch):
    names = {phase: f"backends_of_generate.{phase}_phase" for phase in ("prefill", "decode")}
    (tmp_path / "backends_of_generate").mkdir()
    for name in names.values():
        (tmp_path / f"{name.replace('.', '/')}.py").write_text(BACKEND)
        monkeypatch.setitem(ops.attention._loaded, name, None)  # restored afterwards: the names are gone then
        del ops.attention._loaded[name]
    monkeypatch.syspath_prepend(tmp_path)
    model = build(n_layer=1)
    expected = generate(model, PROMPTS, 4, **GREEDY)
    op.bind(model, {f"attention@{phase}": name for phase, name in names.items()})
    assert generate(model, PROMPTS, 4, **GREEDY) == expected
    assert sys.modules[names["prefill"]].widths == [(9, 9)]
    assert sys.modules[names["decode"]].widths == [(1, 10), (1, 11), (1, 12)]
    model(torch.tensor([[1, 2]]))  # back in evaluation: neither of the two
    assert len(sys.modules[names["prefill"]].widths) == 1

    served = build(n_layer=1)
    op.bind(served, "reference", phases=("prefill", "decode"))  # bound for generation alone
    assert generate(served, PROMPTS, 4, **GREEDY) == expected


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": [[1], []]}, "prompt 1 is empty"),
        ({"ids": [[1, 53]]}, "prompt 0 holds id 53, and the model has ids 0 to 52"),
        ({"ids": [[-1]]}, "prompt 0 holds id -1"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, not -1"),
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"seed": [1, 2]}, "seed must be an integer or one integer for each of the 1 prompts"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_at_once(arguments, message):
    with pytest.raises(GenerateError, match=message):
        stream(build(n_layer=1), **{"ids": [[1]], "max_new_tokens": 1, **arguments})


def test_a_diverged_model_is_named():
    model = build(n_layer=1)
    with torch.no_grad():
        model.norm.weight[3] = torch.nan
    with pytest.raises(GenerateError, match="not finite"):
        generate(model, [[1]], 1)
    assert not model.training
