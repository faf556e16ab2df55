import dataclasses
import weakref

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tritium.engine import recompute
from tritium.engine.config import ConfigError
from tritium.engine.model import GPT, GPTConfig, call
from tritium.kernels import op, ops

T = 16
SMALL = GPTConfig(vocab_size=61, vocab_multiple=16, block_size=T, n_layer=3, n_head=4, n_embd=32, init_std=0.2)
LLAMA = dataclasses.replace(
    SMALL, position="rope", norm="rms_norm", activation="swiglu", n_kv_head=2, qk_norm=True, tie_head=False, bias=False
)
ARCHITECTURES = {
    "gpt2": SMALL,
    "llama": LLAMA,
    "dropout": dataclasses.replace(SMALL, dropout=0.3),
}
ON_A_CPU = [policy for policy in recompute.POLICIES if policy != "offload"]  # tests/engine/test_offload.py
IDS, TARGETS = torch.randint(61, (2, 4, T), generator=torch.Generator().manual_seed(0))


def build(config: GPTConfig = SMALL) -> GPT:
    torch.manual_seed(0)
    return GPT(config)


def step(model, forward=None) -> list[torch.Tensor]:
    """Loss and every gradient of one forward and backward, with the same random numbers each time."""
    torch.manual_seed(7)
    loss = (model if forward is None else forward)(IDS, TARGETS)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


class Executed(TorchDispatchMode):
    """Counts the ops executed, by name, and the bytes of the storages they made that are still alive."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}
        self.bytes, self.seen = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function._opname] = self.counts.get(function._opname, 0) + 1
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.seen:
                key, size = storage._cdata, storage.nbytes()
                self.seen.add(key)
                self.bytes += size
                weakref.finalize(storage, self._freed, key, size)
        return results

    def _freed(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.bytes -= size


def linear_layers_run(model: GPT) -> tuple[int, int]:
    """GEMMs (mm, addmm) of linear layers executed in (forward, backward)."""
    found = []
    with Executed() as mode:
        loss = model(IDS, TARGETS)
        found.append(sum(mode.counts.get(name, 0) for name in ("mm", "addmm")))
        loss.backward()
        found.append(sum(mode.counts.get(name, 0) for name in ("mm", "addmm")) - found[0])
    return tuple(found)


ROWS = len(IDS)


def budget_of(model: GPT, share: float) -> int:
    """Bytes between those of the blocks' inputs (0) and of everything (1)."""
    looked = recompute.look_at(model, ROWS)
    return int(len(model.blocks) * (looked.least + share * (looked.most - looked.least)))


@pytest.mark.parametrize("policy", ["full", "selective", "every", "budget"])
@pytest.mark.parametrize("attention", ["reference", "sdpa"])
@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_losses_and_gradients_are_the_same_bit_for_bit(config, attention, policy):
    model = build(config)
    if config.dropout == 0.0:  # sdpa has no repeatable dropout
        op.bind(model, {"attention": attention})
    expected = step(model)
    recompute.apply(model, policy, budget=budget_of(model, 0.5), rows=ROWS)
    for a, b in zip(step(model), expected, strict=True):
        if policy == "budget" and config is LLAMA:  # a kept reference of several aten ops adds gradients in its order
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("config", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_everything_kept_is_the_same(config):
    """With the references of several aten ops as one op each, bound and not: up to the order in which the gradients of
    a tensor that a reference reads twice are added."""
    expected = step(build(config))
    for bound in (False, True):
        model = build(config)
        if bound:
            op.bind(model, "reference")
        recompute.apply(model, "selective", recompute.KEEPABLE)
        for a, b in zip(step(model), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("bound", [False, True])
def test_a_reference_is_one_op_only_while_it_is_kept(bound):
    model = build(LLAMA)
    if bound:
        op.bind(model, {"*": "reference", "attention": "native"})
    sites = [site for _, site in op.call_sites(model.blocks)]
    before = [site.function for site in sites]
    recompute.apply(model, "selective", ("rms_norm", "rope", "attention", "linear"))
    named = {site.op.name for site, function in zip(sites, before, strict=True) if site.function is not function}
    assert named == {"rms_norm", "rope"} | (set() if bound else {"attention"})
    if bound:
        model.eval()
        assert [site.function for site in sites] == before
        model.train()
        assert all(
            (site.function is recompute.named(site.op)) == (site.op.name in named)
            for site in sites
            if site.op.name != "linear"
        )
    for policy in ("full", "none"):
        recompute.apply(model, "selective", ("rms_norm",))
        recompute.apply(model, policy)
        assert [site.function for site in sites] == before
    assert model.head.linear.function is ops.linear.reference


def test_a_kept_references_inside_is_computed_by_its_own_backward():
    """Its result is kept: rms_norm's rsqrt runs again once for each norm, and nothing before it does."""
    model = build(dataclasses.replace(LLAMA, qk_norm=False))
    recompute.apply(model, "selective", recompute.KEEPABLE)
    with Executed() as mode:
        loss = model(IDS, TARGETS)
        forward = dict(mode.counts)
        loss.backward()
    assert forward["rms_norm_reference"] == mode.counts["rms_norm_reference"] == 2 * 3
    assert forward["attention_reference"] == mode.counts["attention_reference"] == 3
    assert mode.counts["mm"] - forward["mm"] == 2 * (4 * 3 + 1), "two for each linear layer and the head, none again"


def test_dropout_draws_the_same_in_a_row_of_steps():
    """Recomputing must leave the generator where it was, or the next step would drop others."""
    losses = {}
    for policy in ON_A_CPU:
        model = build(ARCHITECTURES["dropout"])
        recompute.apply(model, policy, budget=budget_of(model, 0.5), rows=ROWS)
        torch.manual_seed(3)
        losses[policy] = []
        for _ in range(3):
            loss = model(IDS, TARGETS)
            loss.backward()
            losses[policy].append(loss.item())
    assert all(losses[policy] == losses["none"] for policy in ON_A_CPU)
    assert len(set(losses["none"])) == 3


def test_what_is_computed_again():
    """Four linear layers a block: full runs them all again, selective none that it keeps."""
    model = build()
    forward, backward = linear_layers_run(model)
    found = {}
    for policy, keep in (("full", ()), ("selective", ("linear",)), ("selective", ("attention",)), ("selective", ())):
        recompute.apply(model, policy, keep)
        again, recomputed = linear_layers_run(model)
        assert again == forward
        found[policy, keep] = recomputed - backward
    # full stops early, once nothing more is needed: a block's last projection has no consumer in backward
    assert found["full", ()] == 3 * 3
    assert found["selective", ("linear",)] == 0
    assert found["selective", ("attention",)] == found["selective", ()] == 3 * 3


def test_less_is_alive_after_forward():
    alive = {policy: alive_after_forward(policy) for policy in ("none", "full", "selective", "every")}
    N, C, layers = IDS.numel(), 32, 6
    # full keeps a block's input; selective adds qkv (3C), attention (C), projection (C), up (4C) and down (C)
    block = N * C * 4
    assert alive["none"] - alive["full"] > layers * 12 * block
    assert alive["selective"] - alive["full"] == pytest.approx(layers * 10 * block, rel=0.1)
    assert alive["every"] == pytest.approx((alive["none"] + alive["full"]) / 2, rel=0.01)


def alive_after_forward(policy: str, **options) -> int:
    model = build(dataclasses.replace(SMALL, n_layer=6))
    op.bind(model, {"attention": "sdpa"})
    recompute.apply(model, policy, **options)
    with Executed() as mode:
        loss = model(IDS, TARGETS)
        found = mode.bytes
    del loss
    return found


def test_a_budget_is_kept_and_used():
    """What the blocks keep beside full recomputing's inputs is within the budget, and leaves no room for one more."""
    model = build(dataclasses.replace(SMALL, n_layer=6))
    op.bind(model, {"attention": "sdpa"})
    looked = recompute.look_at(model, ROWS)
    useful = [item for item in looked.items if item.seconds > 0]
    full = alive_after_forward("full")
    for share in (0.0, 0.15, 0.3, 0.5):
        budget = budget_of(model, share)
        kept = alive_after_forward("budget", budget=budget, rows=ROWS) - full + 6 * looked.least
        assert kept <= budget
        if kept < 6 * (looked.least + sum(item.bytes for item in useful)):
            assert budget - kept < max(item.bytes for item in useful)
    assert alive_after_forward("budget", budget=budget_of(model, 1.0), rows=ROWS) == alive_after_forward("none")


def test_a_larger_budget_computes_less_again_and_first_what_is_dearest():
    model = build(SMALL)
    plain = linear_layers_run(model)[1]
    again = []
    for share in (0.0, 0.1, 0.2, 0.4, 0.6, 1.0):
        recompute.apply(model, "budget", budget=budget_of(model, share), rows=ROWS)
        again.append(linear_layers_run(model)[1] - plain)
        recompute.apply(model, "none")
    assert again[0] == 3 * 3 and again[-1] == 0 and again == sorted(again, reverse=True)
    assert len(set(again)) > 2


def test_a_block_is_looked_at_without_a_trace():
    """Items are the block's ops in order; the last projection's result is worth nothing: backward does not need it."""
    model = build(SMALL)
    before = [site.function for _, site in op.call_sites(model)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    looked = recompute.look_at(model, ROWS)
    assert torch.equal(torch.get_rng_state(), state)
    assert [site.function for _, site in op.call_sites(model)] == before
    assert all(p.grad is None for p in model.parameters())
    N, C, H = IDS.numel(), 32, 4
    sizes = {(item.op, item.number): item.bytes for item in looked.items}
    assert sizes[("linear", 0)] == 3 * N * C * 4 and sizes[("linear", 2)] == 4 * N * C * 4
    assert sizes[("layer_norm", 0)] == N * C * 4 + 2 * N * 4 and sizes[("attention", 0)] == N * C * 4 and H
    worthless = [(item.place, item.op) for item in looked.items if item.seconds == 0]
    assert worthless == [("mlp.down", "linear")]
    assert looked.least == N * C * 4


def test_the_solver_takes_the_dearest_for_their_size():
    item = recompute.Item
    looked = recompute.Looked(
        (item("linear", 0, "", 100, 5.0), item("gelu", 0, "", 50, 5.0), item("linear", 1, "", 10, 0.0)), 10, 300
    )
    chosen = lambda budget: recompute.choose(looked, 3, budget)  # noqa: E731
    nothing, gelu, linear = frozenset(), ("gelu", 0), ("linear", 0)
    assert chosen(30) == chosen(79) == [nothing] * 3
    assert chosen(80) == [nothing, nothing, frozenset({gelu})]
    assert chosen(180) == [frozenset({gelu})] * 3
    assert chosen(280) == [frozenset({gelu})] * 2 + [frozenset({gelu, linear})]
    assert chosen(899) == [frozenset({gelu, linear})] * 3
    assert chosen(900) is None
    with pytest.raises(ConfigError, match=r"budget_gb=2\.9e-08 is less than the blocks' inputs.*micro_rows"):
        chosen(29)


def test_evaluation_and_inference_recompute_nothing():
    model = build()
    recompute.apply(model, "full")
    model.eval()
    forward, backward = linear_layers_run(model)
    recompute.apply(model, "none")
    assert linear_layers_run(model) == (forward, backward)


def test_none_undoes():
    model = build()
    recompute.apply(model, "full")
    assert model.run_block is not call
    recompute.apply(model, "none")
    assert model.run_block is call


@pytest.mark.timeout(400)
def test_one_graph_recomputes_what_it_should():
    """Under compile, with dropout: equal results, and the backward graph holds the GEMMs that the policy says."""
    model = build(dataclasses.replace(ARCHITECTURES["dropout"], n_layer=2))
    expected, gemms = step(model), {}
    for policy in ON_A_CPU:
        torch._dynamo.reset()
        recompute.apply(model, policy, budget=budget_of(model, 0.5), rows=ROWS)
        graphs = []

        def record(graph, inputs, _graphs=graphs):
            _graphs.append(sum(str(n.target) in ("aten.mm.default", "aten.addmm.default") for n in graph.graph.nodes))
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition)
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
        for a, b in zip(step(model, compiled), expected, strict=True):
            torch.testing.assert_close(a, b)
        assert len(graphs) == 2
        gemms[policy] = graphs[1]
    assert gemms["none"] + 2 * 3 <= gemms["full"] <= gemms["none"] + 2 * 4  # the partitioner may redo the last one too
    assert gemms["selective"] == gemms["none"]
    assert gemms["none"] + 3 <= gemms["every"] <= gemms["none"] + 4
    assert gemms["none"] < gemms["budget"] < gemms["full"]


def test_our_custom_ops_are_known_by_their_op():
    made = []
    for name in ("layer_norm_named", "linear_cross_entropy_named", "linear_named", "layer_norm_named_backward"):

        def double(x: torch.Tensor) -> torch.Tensor:
            return x * 2

        made.append(torch.library.custom_op(f"tritium::{name}", double, mutates_args=()))
    found = [recompute.op_of(getattr(torch.ops.tritium, m._name).default) for m in made]
    assert found == ["layer_norm", "linear_cross_entropy", "linear", "layer_norm"]
    assert recompute.op_of(torch.ops.aten.addmm.default) == "linear"
    assert recompute.op_of(torch.ops.aten.add.Tensor) is None
    assert recompute.op_of(torch.ops.higher_order.flex_attention) == "attention"
    for name in ("_flash_attn_forward", "_flash_attn_varlen_forward"):  # the names flash-attn 2.8.3 registers
        other = torch.library.custom_op(f"flash_attn::{name}", double, mutates_args=())
        assert recompute.op_of(other._opoverload) == "attention"


def test_unknown_policies_and_ops_are_refused():
    model = build()
    with pytest.raises(ConfigError, match=r"one of none, full, every, selective, budget, offload, not 'some'"):
        recompute.apply(model, "some")
    with pytest.raises(ConfigError, match=r"recompute_keep names softmax, .*choose from attention"):
        recompute.apply(model, "selective", ("linear", "softmax"))
    assert model.run_block is call
