import dataclasses
import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F

from tritium.engine import precision
from tritium.engine.config import ConfigError
from tritium.engine.model import GPT, Embedding, GPTConfig, Linear, Norm
from tritium.kernels import op, ops
from tritium.kernels.op import KernelError
from tritium.kernels.site import Machine, Site

T = 12
SMALL = GPTConfig(vocab_size=61, vocab_multiple=16, block_size=T, n_layer=2, n_head=4, n_embd=32, init_std=0.2)
LLAMA = dataclasses.replace(
    SMALL, position="rope", norm="rms_norm", activation="swiglu", n_kv_head=2, qk_norm=True, tie_head=False, bias=False
)
MIXED = dataclasses.replace(
    SMALL, position="rope", rope_fraction=0.5, activation="relu2", n_kv_head=1, fused_loss=False, logit_softcap=5.0
)
ARCHITECTURES = {"gpt2": SMALL, "llama": LLAMA, "mixed": MIXED}
every_architecture = pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)


def build(config: GPTConfig = SMALL, seed: int = 0, **changes: object) -> GPT:
    torch.manual_seed(seed)
    return GPT(dataclasses.replace(config, **changes))


def batch(B: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(SMALL.vocab_size, (B, T), generator=generator) for _ in range(2))


def gradients(model: GPT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


# ------------------------------------------------------------------------------------------ parameters and their values


def test_gpt2_124m_has_as_many_parameters_as_published():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_multiple=1))
    assert model.num_parameters() == 124_439_808
    assert model.num_parameters(positions=False) == 123_653_376


def test_llama_8b_has_as_many_parameters_as_published():
    from tritium.engine.presets.llama_8b import config

    with torch.device("meta"):
        assert GPT(config().model).num_parameters() == 8_030_261_248


@pytest.mark.parametrize("tie_head", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_initial_distributions_are_those_of_the_table(tie_head, activation):
    model = build(n_embd=128, n_layer=3, init_std=0.02, tie_head=tie_head, activation=activation)
    V, residual = SMALL.vocab_size, 0.02 / math.sqrt(2 * 3)
    assert model.wte.weight.shape == (64, 128)
    for table in (model.wte.weight, model.head_weight):
        assert table[:V].std().item() == pytest.approx(0.02, rel=0.05)
        assert not table[V:].any()
    assert (model.head_weight is model.wte.weight) == tie_head
    assert model.wpe.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith(("proj.weight", "down.weight")):
            assert parameter.std().item() == pytest.approx(residual, rel=0.03), name
        elif name.startswith("blocks"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name
        assert abs(parameter.mean().item() - float("norm" in name and "weight" in name)) < 2e-3, name


def test_a_model_made_without_memory_can_be_filled_later():
    with torch.device("meta"):
        model = GPT(LLAMA)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    ids, targets = batch()
    assert torch.equal(model(ids, targets), build(LLAMA, seed=3)(ids, targets))


def test_weights_that_will_be_loaded_are_not_drawn():
    before = torch.get_rng_state()
    model = GPT(LLAMA, fill=False)
    assert torch.equal(torch.get_rng_state(), before)
    filled = build(LLAMA)
    assert torch.equal(model.cos, filled.cos) and torch.equal(model.sin, filled.sin)
    model.load_state_dict(filled.state_dict())
    ids, targets = batch()
    assert torch.equal(model(ids, targets), filled(ids, targets))


@pytest.mark.parametrize("config", [SMALL, LLAMA], ids=["tied", "untied"])
def test_compute_parameters_are_the_linear_layers_of_the_blocks(config):
    layers = ("attention.qkv", "attention.proj", "mlp.up", "mlp.down")
    kinds = ("weight", "bias") if config.bias else ("weight",)
    blocks = {f"blocks.{i}.{layer}.{kind}" for i in range(2) for layer in layers for kind in kinds}
    model = build(config)
    assert set(model.compute_parameters()) == blocks
    assert model.get_parameter(model.head_name) is model.head_weight


# ------------------------------------------------------------------------------------------------------------- loss


@every_architecture
def test_loss_is_the_sum_over_counted_targets_of_the_real_vocabulary(config):
    model = build(config)
    ids, targets = batch()
    targets[0, 3:] = -100
    logits = model(ids)
    assert logits.shape == (3, T, 61)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    loss = model(ids, targets)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


@every_architecture
def test_padding_rows_never_contribute(config):
    model = build(config)
    ids, targets = batch()
    before = model(ids, targets)
    assert not gradients(model, before)["wte.weight"][61:].any()
    with torch.no_grad():
        model.wte.weight[61:] = 100.0
        model.head_weight[61:] = 100.0
    assert torch.equal(model(ids, targets), before)


def test_fused_and_separate_loss_agree():
    ids, targets = batch()
    found = {}
    for fused in (True, False):
        model = build(fused_loss=fused, label_smoothing=0.1, z_loss=1e-2, logit_softcap=3.0)
        loss = model(ids, targets)
        found[fused] = [loss, *gradients(model, loss).values()]
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fused_loss", [True, False])
def test_smoothing_and_z_loss_train_but_do_not_evaluate(fused_loss):
    ids, targets = batch()
    plain, shaped = build(), build(label_smoothing=0.2, z_loss=0.1, fused_loss=fused_loss)
    assert shaped(ids, targets) > plain(ids, targets) + 1.0
    torch.testing.assert_close(shaped.eval()(ids, targets), plain.eval()(ids, targets))


def test_no_gradient_is_promised_only_where_none_can_be_asked_for():
    model, (ids, targets) = build(), batch()
    asked = []

    def recorded(*args, with_grad=True):
        asked.append(with_grad)
        return ops.linear_cross_entropy.reference(*args, with_grad=with_grad)

    model.head.linear_cross_entropy.function = recorded
    model(ids, targets)
    with torch.no_grad():
        model(ids, targets)
    model.eval()(ids, targets)
    assert asked == [True, False, True]


# ----------------------------------------------------------------------------------------------------- architecture


@every_architecture
def test_no_position_sees_a_later_token(config):
    model = build(config)
    ids, _ = batch()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=(0, 2)).min() > 1e-4


@every_architecture
def test_a_document_in_a_packed_row_is_computed_as_if_alone(config):
    model = build(config)
    ids, _ = batch(B=2)
    bounds = ([0, 5, 6, T], [0, 9, T])
    seq_start = torch.zeros(2, T, dtype=torch.int32)
    for row, cuts in enumerate(bounds):
        for a, b in itertools.pairwise(cuts):
            seq_start[row, a:b] = a
    packed = model(ids, seq_start=seq_start)
    for row, cuts in enumerate(bounds):
        for a, b in itertools.pairwise(cuts):
            torch.testing.assert_close(packed[row, a:b], model(ids[row : row + 1, a:b])[0], atol=2e-5, rtol=2e-5)
    assert (packed - model(ids)).abs().max() > 1e-2


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_order_matters(position):
    model = build(position=position)
    ids = torch.tensor([[1, 2, 3, 4]])
    swapped = torch.tensor([[2, 1, 3, 4]])
    assert (model(ids)[0, -1] - model(swapped)[0, -1]).abs().max() > 1e-4


def test_rope_sees_distances_only():
    """Attention over rotary positions is unchanged when all positions shift."""
    model = build(LLAMA)
    attention, x = model.blocks[0].attention, torch.randn(1, 5, 32)
    here = attention(x, (model.cos[:5], model.sin[:5]))
    torch.testing.assert_close(attention(x, (model.cos[4:9], model.sin[4:9])), here, atol=1e-5, rtol=1e-5)
    assert (attention(x, (model.cos[:5] * 0 + 1, model.sin[:5] * 0)) - here).abs().max() > 1e-3


def test_rotary_tables_hold_the_angles():
    model = build(LLAMA, rope_theta=100.0)
    for t, i in ((0, 0), (3, 1), (11, 3)):
        angle = t * 100.0 ** (-2 * i / 8)
        assert model.cos[t, i].item() == pytest.approx(math.cos(angle), abs=1e-5)
        assert model.sin[t, i].item() == pytest.approx(math.sin(angle), abs=1e-5)
    assert model.cos.shape == (T, 4) and build(MIXED).cos.shape == (T, 2)
    assert "cos" not in model.state_dict()


def test_grouped_heads_equal_full_heads_with_repeated_weights():
    grouped, full = build(n_kv_head=2), build()
    full.load_state_dict({k: v for k, v in grouped.state_dict().items() if "qkv" not in k}, strict=False)
    with torch.no_grad():
        for a, b in zip(grouped.blocks, full.blocks, strict=True):
            for kind in ("weight", "bias"):
                q, k, v = getattr(a.attention.qkv, kind).split([32, 16, 16])
                k, v = (t.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for t in (k, v))
                getattr(b.attention.qkv, kind).copy_(torch.cat((q, k, v)))
    ids, _ = batch()
    torch.testing.assert_close(grouped(ids), full(ids))


def test_qk_norm_forgets_the_scale_of_queries_and_keys():
    model = build(qk_norm=True, bias=False)
    ids, _ = batch()
    before = model(ids)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.qkv.weight[:64] *= 7.0  # q and k; v stays
    torch.testing.assert_close(model(ids), before, atol=1e-3, rtol=1e-3)
    plain = build(bias=False)
    first = plain(ids)
    with torch.no_grad():
        plain.blocks[0].attention.qkv.weight[:64] *= 7.0
    assert (plain(ids) - first).abs().max() > 1e-2


@pytest.mark.parametrize("activation", ["gelu", "swiglu", "geglu", "relu2"])
def test_mlp_formula(activation):
    mlp = build(activation=activation, bias=False, mlp_width=24).blocks[0].mlp
    x = torch.randn(5, 32)
    up, down = mlp.up.weight.T, mlp.down.weight.T
    if activation == "swiglu":
        gate, value = x @ up[:, :24], x @ up[:, 24:]
        hidden = gate * torch.sigmoid(gate) * value
    elif activation == "geglu":
        hidden = torch.nn.functional.gelu(x @ up[:, :24], approximate="tanh") * (x @ up[:, 24:])
    else:
        hidden = x @ up
        if activation == "relu2":
            hidden = hidden.clamp(min=0) ** 2
        else:
            hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(mlp(x), hidden @ down)


def test_no_bias_means_none_at_all():
    assert not [name for name, _ in build(bias=False).named_parameters() if name.endswith("bias")]


def test_queries_keys_and_values_are_views_of_one_projection():
    model = build()
    seen = []

    def recorded(q, k, v, *args, **kwargs):
        seen.append((q, k, v))
        return ops.attention.reference(q, k, v, *args, **kwargs)

    model.blocks[0].attention.attention.function = recorded
    model(batch()[0])
    q, k, v = seen[0]
    assert q.shape == k.shape == v.shape == (3, T, 4, 8)
    assert len({t.untyped_storage().data_ptr() for t in (q, k, v)}) == 1 and q.stride(-1) == 1


# ---------------------------------------------------------------------------------------------------------- dropout


def test_dropout_trains_repeatably_and_is_off_in_evaluation():
    model, plain = build(dropout=0.3), build()
    ids, targets = batch()

    def loss(seed):
        torch.manual_seed(seed)
        return model(ids, targets)

    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))
    model.eval()
    assert torch.equal(model(ids, targets), plain.eval()(ids, targets))


def test_attention_dropout_has_a_seed_of_its_own_in_every_layer_and_call():
    model = build(dropout=0.3)
    calls = []
    for block in model.blocks:

        def recorded(*args, dropout, seed):
            calls.append((dropout, seed))
            return ops.attention.reference(*args, dropout=dropout, seed=seed)

        block.attention.attention.function = recorded
    ids, _ = batch()
    model(ids)
    model(ids)
    assert all(dropout == 0.3 and seed.shape == () and seed.dtype == torch.int64 for dropout, seed in calls)
    assert len({seed.item() for _, seed in calls}) == 4
    calls.clear()
    model.eval()(ids)
    assert calls == [(0.0, None)] * 2


@pytest.mark.parametrize("place", ["embedding", "attention", "mlp"])
def test_dropout_sits_at_gpt2s_places(place):
    """With everything behind it blind to other channels, each dropout zeroes its share of its branch."""
    model = build(dropout=0.5, n_layer=1)
    seen = {}
    block = model.blocks[0]
    block.norm1.register_forward_hook(lambda m, args, out: seen.update(embedding=args[0]))
    block.norm2.register_forward_hook(lambda m, args, out: seen.update(attention=args[0] - seen["embedding"]))
    model.norm.register_forward_hook(lambda m, args, out: seen.update(stream=args[0]))
    model(batch(B=8)[0])
    seen["mlp"] = seen["stream"] - seen["attention"] - seen["embedding"]
    share = (seen[place].abs() < 1e-7).float().mean().item()
    assert share == pytest.approx(0.5, abs=0.05)


# -------------------------------------------------------------------------------------------------- compute in bf16


@pytest.mark.parametrize("head", [False, True])
@every_architecture
def test_bf16_stream_beside_fp32_leaves(config, head):
    ids, targets = batch()
    model = build(config)
    exact = model(ids, targets)
    wide = gradients(model, exact)
    precision.to_compute_dtype(model, torch.bfloat16, head)
    streams = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, out: streams.append(out.dtype))
    loss = model(ids, targets)
    narrow = gradients(model, loss)
    assert streams == [torch.bfloat16] * 2 and model(ids).dtype == torch.bfloat16
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.03 * exact
    compute = {*model.compute_parameters(), *([model.head_name] if head else [])}
    assert {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16} == compute
    for name, gradient in narrow.items():
        assert gradient.dtype == (torch.bfloat16 if name in compute else torch.float32), name
        assert (gradient - wide[name]).norm() < 0.2 * wide[name].norm() + 1e-3, name


# ------------------------------------------------------------------------------------------------------- call sites

RECORDING = '''
"""A backend that records which calls reach it."""
from tritium.kernels import ops

calls, prepared = [], []


def prepare(seq_start):
    prepared.append(seq_start)
    return seq_start


def attention(q, k, v, seq_start=None, causal=True, scale=None, window=0, softcap=0.0, dropout=0.0, seed=None):
    calls.append(seq_start)
    return ops.attention.reference(q, k, v, seq_start, causal, scale, window, softcap, dropout, seed)


def unsupported(site):
    return None
'''


@pytest.fixture
def recording(tmp_path, monkeypatch, request):
    """Names of two modules, each a backend of attention with lists ``calls`` and ``prepared``."""
    package = f"backends_of_{request.node.name}"
    names = [f"{package}.{kind}" for kind in ("first", "second")]
    (tmp_path / package).mkdir()
    for name in names:
        (tmp_path / f"{name.replace('.', '/')}.py").write_text(RECORDING)
    monkeypatch.syspath_prepend(tmp_path)
    yield names
    for name in names:
        ops.attention._loaded.pop(name, None)
        sys.modules.pop(name, None)


def test_every_op_is_called_through_a_call_site():
    expected = {
        "gpt2": {"embedding", "linear", "attention", "layer_norm", "gelu", "linear_cross_entropy"},
        "llama": {"embedding", "linear", "attention", "rms_norm", "rope", "swiglu", "linear_cross_entropy"},
        "mixed": {"embedding", "linear", "attention", "layer_norm", "rope", "relu2", "cross_entropy"},
    }
    for name, config in ARCHITECTURES.items():
        model = build(config)
        called = set()
        for _, site in op.call_sites(model):

            def recorded(*args, _site=site, _called=called, **kwargs):
                _called.add(_site.op.name)
                return _site.op.reference(*args, **kwargs)

            site.function = recorded
        model(*batch(), seq_start=torch.zeros(3, T, dtype=torch.int32))
        assert called == expected[name], name


def told(model: GPT, phase: str = "train", dtype: torch.dtype = torch.float32) -> dict[tuple[str, str], Site]:
    """What the backends are told of every place."""
    here = Machine("cpu", "x86_64")
    return {(path, call.op.name): call.site(here, path, phase, dtype) for path, call in op.call_sites(model)}


def test_sites_state_the_facts():
    model = GPT(dataclasses.replace(LLAMA, dropout=0.1), documents=True)
    sites = told(model)
    assert sites["blocks.1.attention", "attention"].shape == {"H": 4, "G": 2, "D": 8}
    facts = {"causal": True, "documents": True, "dropout": 0.1, "window": 0, "softcap": 0.0}
    assert sites["blocks.1.attention", "attention"].options == facts
    assert sites["blocks.1.attention.qkv", "linear"].shape == {"C": 32, "F": 64}
    assert sites["blocks.0.norm1", "rms_norm"].shape == {"C": 32}
    assert told(model, dtype=torch.bfloat16)["wte", "embedding"].dtype == torch.float32
    head = sites["head", "linear_cross_entropy"]
    assert head.shape == {"C": 32, "V": 61, "Vp": 64} and head.options["tied"] is False


@pytest.mark.parametrize("phase", ["eval", "prefill", "decode"])
@pytest.mark.parametrize("fused_loss", [True, False])
def test_what_is_for_training_only_is_no_fact_of_the_other_phases(phase, fused_loss):
    changes = {"dropout": 0.1, "label_smoothing": 0.2, "z_loss": 0.3, "fused_loss": fused_loss}
    model = GPT(dataclasses.replace(SMALL, **changes))
    loss = ("head", "linear_cross_entropy" if fused_loss else "cross_entropy")
    attention = ("blocks.0.attention", "attention")
    training, other = told(model), told(model, phase)
    assert training[attention].options["dropout"] == 0.1 and not other[attention].option("dropout")
    assert {training[loss].options[name] for name in ("label_smoothing", "z_loss")} == {0.2, 0.3}
    assert not other[loss].option("label_smoothing") and not other[loss].option("z_loss")
    with pytest.raises(KernelError, match=r"attention=sdpa .* \(train; cpu\)"):
        op.bind(model, {"attention": "sdpa"})
    op.bind(model, {f"attention@{phase}": "sdpa"})  # sdpa has no repeatable dropout, and there it needs none


@every_architecture
def test_norms_say_that_their_weights_stay_fp32(config):
    """So that NVIDIA's apex, whose mixed-dtype norms cannot be traced, is refused under compile and only then."""
    model = GPT(config)
    norms = {key for key in told(model) if key[1] in ("layer_norm", "rms_norm") and "norm" in key[0]}
    assert len(norms) == 5
    for dtype, wide in ((torch.bfloat16, True), (torch.float32, False)):
        sites = told(model, dtype=dtype)
        assert {bool(sites[key].option("wide")) for key in norms} == {wide}
        assert not any(site.option("wide") for key, site in sites.items() if key not in norms)
    h100 = Machine("cuda", "sm_90", packages={"apex": "0.1"})
    choice = {f"*norm*:{config.norm}": "apex"}
    with pytest.raises(KernelError, match="apex was chosen .* cannot be traced by torch.compile"):
        op.bind(model, choice, machine=h100, dtype=torch.bfloat16, compiled=True)
    op.bind(model, choice, machine=h100, dtype=torch.bfloat16)
    op.bind(model, choice, machine=h100, dtype=torch.float32, compiled=True)


def test_train_and_eval_use_the_kernels_of_their_phase(recording):
    model = build()
    name = recording[0]
    op.bind(model, {"attention@eval": name})
    calls = sys.modules[name].calls
    ids, _ = batch()
    model(ids)
    assert len(calls) == 0
    model.eval()(ids)
    assert len(calls) == 2
    model.train()(ids)
    assert len(calls) == 2


def test_documents_are_prepared_once_a_call_for_each_backend(recording):
    first, second = recording
    model = GPT(dataclasses.replace(SMALL, n_layer=3), documents=True)
    op.bind(model, {"attention": first, "blocks.1.*:attention": second})
    ids, targets = batch()
    seq_start = torch.zeros(3, T, dtype=torch.int32)
    model(ids, targets, seq_start)
    modules = [sys.modules[name] for name in recording]
    assert [len(m.prepared) for m in modules] == [1, 1]
    assert [len(m.calls) for m in modules] == [2, 1]
    model(ids, targets)
    assert [len(m.prepared) for m in modules] == [1, 1] and modules[0].calls[-1] is None


# ---------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixed"])
def test_one_graph_equals_eager(name):
    torch._dynamo.reset()
    model = build(ARCHITECTURES[name], dropout=0.2 if name == "gpt2" else 0.0)
    other = {"blocks.0.*:attention": "sdpa"} if name != "gpt2" else {}
    op.bind(model, {"*": "reference", **other})
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    ids, targets = batch()
    seq_start = torch.zeros(3, T, dtype=torch.int32) if name == "llama" else None
    if seq_start is not None:
        seq_start[:, 5:] = 5
    torch.manual_seed(9)
    expected = model(ids, targets, seq_start)
    torch.manual_seed(9)
    loss = compiled(ids, targets, seq_start)
    torch.testing.assert_close(loss, expected)
    for (key, a), b in zip(gradients(model, loss).items(), gradients(model, expected).values(), strict=True):
        torch.testing.assert_close(a, b, msg=key)


@pytest.mark.timeout(400)
def test_inductor_compiles_the_model_as_one_graph():
    torch._dynamo.reset()
    model = build(n_layer=1)
    op.bind(model, {"attention": "sdpa"}, compiled=True)
    ids, targets = batch()
    loss = torch.compile(model, fullgraph=True, dynamic=False)(ids, targets)
    expected = model(ids, targets)
    torch.testing.assert_close(loss, expected)
    for (key, a), b in zip(gradients(model, loss).items(), gradients(model, expected).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=key)


# ----------------------------------------------------------------------------------------------------------- errors


def test_a_row_longer_than_block_size_is_refused():
    model = build()
    with pytest.raises(ValueError, match=rf"block_size={T} tokens, this one has {T + 1}.*crop"):
        model(torch.zeros(1, T + 1, dtype=torch.int64))


def test_a_configuration_that_cannot_be_built_says_why():
    with pytest.raises(ConfigError, match=r"vocab_size is 0"):
        GPT(dataclasses.replace(SMALL, vocab_size=0))
    with pytest.raises(ConfigError, match=r"n_embd=32 must be a multiple of model.n_head=5"):
        GPT(dataclasses.replace(SMALL, n_head=5))


def test_linear_and_norm_layers_are_all_of_them():
    """No parameter hides from init_weights or precision: each belongs to Linear, Norm, Embedding or the head."""
    model = build(LLAMA)
    owned = {id(p) for m in model.modules() if isinstance(m, (Linear, Norm)) for p in m.parameters(recurse=False)}
    owned |= {id(model.wte.weight), id(model.head_weight)}
    assert {id(p) for p in model.parameters()} == owned


# ------------------------------------------------------------------------------------- one gradient of a tied table


def _tied(**model) -> GPT:
    torch.manual_seed(3)
    return GPT(GPTConfig(vocab_size=50, vocab_multiple=4, block_size=12, n_layer=1, n_head=2, n_embd=16, **model))


def _table_gradients(model: GPT, ids: torch.Tensor, targets: torch.Tensor, compiled: bool) -> dict[str, torch.Tensor]:
    forward = torch.compile(model, fullgraph=True) if compiled else model
    model.zero_grad()
    forward(ids, targets).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True])
def test_the_rows_gradient_joins_the_heads(compiled, monkeypatch):
    """As autograd alone would sum the two; ids that repeat included."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    model = _tied()
    ids = torch.tensor([[1, 1, 1, 7, 49, 0], [7, 2, 1, 3, 3, 48]])
    targets = torch.tensor([[1, 1, 7, 49, 0, 2], [-100, 1, 3, 3, 48, 5]])
    if compiled:
        with torch._inductor.config.patch(fx_graph_cache=False):
            ours, code = run_and_get_code(_table_gradients, model, ids, targets, True)
        # no table of zeros is made for the rows, and no second table is added
        assert "embedding_dense_backward" not in "".join(code) and "index_put" in "".join(code)
    else:
        ours = _table_gradients(model, ids, targets, False)
    monkeypatch.setattr(Embedding, "with_table", lambda self, ids: (self(ids), self.weight))
    plain = _table_gradients(model, ids, targets, False)
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    monkeypatch.undo()
    # a table that somebody else holds is not written to
    upstream = torch.ones(52, 16)
    rows, table = model.wte.with_table(ids)
    torch.autograd.backward([rows, table], [torch.ones_like(rows), upstream])
    assert torch.equal(upstream, torch.ones(52, 16))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_rows_of_a_table_whose_copy_is_narrow_are_the_masters(compiled):
    """Rows are read unrounded; a frequent id's gradient is summed in fp32 and rounded once."""
    model = _tied()
    exact = model.wte.weight.detach().clone()
    masters = precision.to_compute_dtype(model, torch.bfloat16, head=True)
    assert model.wte.weight.dtype == torch.bfloat16 and model.wte.master is masters["wte.weight"]
    assert torch.equal(model.wte.master, exact) and not torch.equal(exact.bfloat16().float(), exact)
    ids = torch.tensor([[5] * 12, [5] * 11 + [7]])

    def both(ids, upstream, head):
        rows, table = model.wte.with_table(ids)
        return (rows * upstream).sum() + (table * head).sum(), rows

    upstream = torch.full((2, 12, 16), 2**-8)  # to 1, in bf16, none of these can be added
    upstream[1, 11] = 3.0
    head = torch.ones(52, 16, dtype=torch.bfloat16)
    loss, rows = (torch.compile(both, fullgraph=True) if compiled else both)(ids, upstream, head)
    assert torch.equal(rows, exact[ids])
    with torch.no_grad():
        assert torch.equal(model.wte(ids), exact[ids]) and model.wte.with_table(ids)[1] is model.wte.weight
    loss.backward()
    wanted = torch.ones(52, 16)
    wanted[5] += 23 * 2**-8
    wanted[7] += 3.0
    assert model.wte.weight.grad.dtype == torch.bfloat16
    assert torch.equal(model.wte.weight.grad, wanted.bfloat16())
    lost = head.index_put((ids,), upstream.bfloat16(), accumulate=True)  # what this is not
    assert torch.equal(lost[5], head[5])
