"""Whole training steps of GPT-2 124M and its variants on a fake H100, compiled, for every backend that serves there."""

import contextlib
import copy
from unittest import mock

import pytest
import torch
from fake_gpu import DEVICE, GPT2, H100, MODELS, B, Executed, Graphs, T, batch, build, layers, present, scalars, serving
from torch.utils._pytree import tree_map_only

from tritium.engine import recompute, syncs, train
from tritium.engine.model import Norm
from tritium.kernels import ops
from tritium.kernels.contract import site_of

# Which serve no call site on an H100 that has triton and nothing else, and what they say. All others are traced.
NOT_TRACED = {
    "native": "the native kernels run on the CPU",
    "apex": "needs the package apex",
    "flash_attn": "needs the package flash-attn",
    "flash_attn_4": "needs the package flash-attn-4",
    "liger": "needs the package liger-kernel",
    "quack": "needs the package quack-kernels",
    "cut_cross_entropy": "needs the package cut-cross-entropy",
    **dict.fromkeys(
        ("torchao_tensorwise", "torchao_rowwise", "torchao_rowwise_with_gw_hp"), "needs the package torchao"
    ),
}
NOT_TRACED_WITH_DOCUMENTS = {"attention sdpa_flash": "torch's flash attention takes no mask, and documents"}
# what an op's backend is called in a graph, where that is not OP_BACKEND
NAMES = {
    "attention sdpa": "_scaled_dot_product_flash_attention",
    "attention sdpa_flash": "_scaled_dot_product_flash_attention",
    "attention sdpa_cudnn": "_scaled_dot_product_cudnn_attention",
    "attention sdpa_efficient": "_scaled_dot_product_efficient_attention",
    "attention flex": "flex_attention",
    "cross_entropy triton": "cross_entropy_triton_one_pass",  # gradients in forward, its backward a product that fuses
    **{f"{op} fp8_{recipe}": "_scaled_mm" for op in ("linear", "linear_cross_entropy")
       for recipe in ("tensorwise", "rowwise")},
    # an aten op that of all references only this one calls in these models
    "attention reference": "_softmax", "linear reference": "t", "embedding reference": "embedding",
    "layer_norm reference": "native_layer_norm", "rms_norm reference": "rsqrt", "rope reference": "cat",
    "gelu reference": "gelu", "geglu reference": "gelu", "swiglu reference": "silu", "relu2 reference": "relu",
    "cross_entropy reference": "logsumexp", "linear_cross_entropy reference": "logsumexp",
    "adamw reference": "lerp", "global_norm reference": "_foreach_norm",
}  # fmt: skip
NAMES_WITH_DOCUMENTS = {"attention sdpa": "_scaled_dot_product_efficient_attention"}


def rounds() -> list[tuple[str, int]]:
    """(model, n): in its n-th round every op runs its n-th serving backend, so that each is traced once."""
    found = []
    for model, config in MODELS.items():
        most = max(sum(why is None for why in table.values()) for table in serving(config, compiled=True).values())
        # the last two models are for what the others lack: their attention has been traced
        found += [(model, n) for n in range(most if model in ("gpt2", "llama") else 2)]
    return found


def chosen(model: str, n: int) -> dict[str, str]:
    """Op → backend of round n."""
    table = serving(MODELS[model], compiled=True)
    able = {op: sorted(name for name, why in known.items() if why is None) for op, known in table.items()}
    able = {
        op: ["triton", "reference"] if "triton" in names and len(names) == 2 else names for op, names in able.items()
    }
    return {op: names[n % len(names)] for op, names in able.items()}


def name_of(model: str, op: str, backend: str) -> str:
    key = f"{op} {backend}"
    documents = NAMES_WITH_DOCUMENTS if MODELS[model].data.documents else {}
    return documents.get(key) or NAMES.get(key) or f"{op}_{backend}"


def opname(target: object) -> str:
    return getattr(target, "_opname", None) or str(getattr(target, "name", lambda: target)()).rpartition("::")[2]


class Traced:
    """A compiled training step of two micro-batches, taken apart: graphs, gradients, what the update executed."""

    def __init__(self, model: str, choices: dict[str, str], count: int = 1):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = layers(MODELS[model], count).replace(train={"batch_rows": 2 * B})
        self.graphs = Graphs()
        with present(self.graphs):
            self.engine = build(config, choices, compile=True)
            data, self.updates = batch(config), Executed()
            self.before = versions(self.engine)
            for _ in range(2):
                self.loss = self.engine.loss(data)
                self.loss.backward()
            self.grads = {n: p.grad for n, p in self.engine.model.named_parameters()}
            with self.updates:
                self.norm = self.engine.optimizer.step(*scalars())
        self.breaks = dict(torch._dynamo.utils.counters["graph_break"])

    def check(self, model: str, choices: dict[str, str]) -> None:
        """AssertionError unless all is as it must be."""
        assert not self.breaks
        assert len(self.graphs.graphs) == 2, "one graph forward, one backward, the same for both micro-batches"
        self.check_names(model, choices)
        self.check_syncs()
        self.check_tensors()

    def check_names(self, model: str, choices: dict[str, str]) -> None:
        forward, backward = ({opname(t) for t in self.graphs.targets(i)} for i in (0, 1))
        for op, backend in choices.items():
            name = name_of(model, op, backend)
            if op in ("adamw", "global_norm"):
                assert name in self.updates.names(), f"{op}={backend}: the update ran no {name}"
                continue
            assert name in forward, f"{op}={backend}: no {name} in the forward graph {sorted(forward)}"
            if backend != "reference":
                fuses = name == NAMES["cross_entropy triton"] or (name == "_scaled_mm" and name in backward)
                assert fuses or any(name in other and "backward" in other for other in backward), (
                    f"{op}={backend}: {backward}"
                )
                target = next(t for t in self.graphs.targets(0) if opname(t) == name)
                known = "linear" if name == "_scaled_mm" else op
                assert recompute.op_of(target) == known, f"recompute does not know {name} as {known}"

    def check_syncs(self) -> None:
        for graph in self.graphs.graphs:
            for node in graph.graph.nodes:
                if node.op == "call_function":
                    args, kwargs = tree_map_only(torch.fx.Node, lambda n: n.meta.get("val"), (node.args, node.kwargs))
                    assert (why := syncs.reason(node.target, args, kwargs)) is None, f"{node.format_node()}: {why}"

    def check_tensors(self) -> None:
        for scalar in (self.loss, self.norm):
            assert (scalar.shape, scalar.dtype, scalar.device) == ((), torch.float32, DEVICE)
        model, optimizer = self.engine.model, self.engine.optimizer
        leaves = dict(model.named_parameters())
        narrow = set(model.compute_parameters())
        assert narrow
        for name, leaf in leaves.items():
            assert leaf.dtype == (torch.bfloat16 if name in narrow else torch.float32), name
            grad = self.grads[name]
            assert grad.dtype == torch.float32, f"{name}: gradients of two micro-batches are summed in fp32"
            assert (grad.shape, grad.stride(), grad.device) == (leaf.shape, leaf.stride(), DEVICE), name
        masters = optimizer.master_weights()
        assert masters.keys() == leaves.keys()
        for group in optimizer.groups:
            assert len(group.copies) in (0, len(group.params))
            for i, (name, leaf) in enumerate(zip(group.names, group.leaves, strict=True)):
                for tensor in (group.params[i], group.exp_avgs[i], group.exp_avg_sqs[i]):
                    assert (tensor.shape, tensor.stride()) == (leaf.shape, leaf.stride()), name
                    assert (tensor.dtype, tensor.device) == (torch.float32, DEVICE), name
                storage = (group.copies[i] if group.copies else group.params[i]).untyped_storage()._cdata
                assert storage == leaf.untyped_storage()._cdata, f"{name}: what is updated is not what is computed with"
                assert bool(group.copies) == (name in narrow), name
        written = {name for name, version in versions(self.engine).items() if version > self.before[name]}
        assert written == self.before.keys(), f"not updated: {sorted(self.before.keys() - written)}"


def versions(engine: train.Engine) -> dict[str, int]:
    """How often each tensor that an update must write has been written."""
    found = {}
    for group in engine.optimizer.groups:
        for kind in ("params", "copies", "exp_avgs", "exp_avg_sqs"):
            found |= {f"{kind} {n}": t._version for n, t in zip(group.names, getattr(group, kind), strict=False)}
    return found


@pytest.mark.parametrize(("model", "n"), rounds())
def test_a_compiled_step(model, n):
    choices = chosen(model, n)
    Traced(model, choices).check(model, choices)


def test_every_backend_is_traced_or_says_why_not():
    traced = {(op, backend) for model, n in rounds() for op, backend in chosen(model, n).items()}
    for model, config in MODELS.items():
        for op, known in serving(config, compiled=True).items():
            assert list(known) == ops.OPS[op].backends()
            for backend, why in known.items():
                if why is None:
                    assert (op, backend) in traced, f"{model}: {op}={backend} serves and is not traced"
                    continue
                expected = NOT_TRACED.get(backend)
                if config.data.documents:
                    expected = NOT_TRACED_WITH_DOCUMENTS.get(f"{op} {backend}", expected)
                assert expected is not None and why.startswith(expected), f"{model}: {op}={backend}: {why}"


def without_call_site() -> list[str]:
    """Of a model; the update of moments in 8 bits is the optimizer's, and no graph's."""
    functions = {name for name, op in ops.OPS.items() if not op.updates}
    return sorted(functions - {op for config in MODELS.values() for op in serving(config, compiled=True)})


@pytest.mark.parametrize("name", without_call_site())
def test_ops_without_a_call_site(name):
    """Those that no model calls, alone: one graph for every backend, at the first of the cases for a GPU, all outputs
    used."""
    op = ops.OPS[name]
    case = next(case for case in op.cases.CASES if case.large)
    for backend in map(op.load, op.backends()):
        why = backend.unsupported(site_of(op, case, torch.bfloat16, H100, compiled=True))
        if why is not None:
            assert why.startswith(NOT_TRACED[backend.name]), f"{name}={backend.name}: {why}"
            continue
        torch._dynamo.reset()
        graphs = Graphs()
        with present(graphs):
            arguments = op.cases.inputs(case, torch.bfloat16, DEVICE, 0)
            expected = op.reference(**arguments)
            expected = expected if isinstance(expected, tuple) else (expected,)
            results = torch.compile(lambda kwargs, f=backend.function: f(**kwargs), fullgraph=True)(arguments)
            results = results if isinstance(results, tuple) else (results,)
            sum(result.float().sum() for result in results).backward()
        for result, other in zip(results, expected, strict=True):
            assert (result.shape, result.dtype, result.device) == (other.shape, other.dtype, DEVICE)
        for argument in arguments.values():
            if isinstance(argument, torch.Tensor) and argument.requires_grad:
                assert (argument.grad.shape, argument.grad.dtype) == (argument.shape, argument.dtype)
        assert len(graphs.graphs) == 2
        if backend.name != "reference":
            found = {opname(target) for target in graphs.targets()}
            assert {f"{name}_{backend.name}", f"{name}_{backend.name}_backward"} <= found


# ------------------------------------------------------------------------------------------------------ planted faults


@pytest.fixture(scope="module")
def good():
    choices = chosen("gpt2", 0) | {"attention": "triton", "layer_norm": "triton", "adamw": "reference"}
    traced = Traced("gpt2", choices)
    traced.check("gpt2", choices)
    return traced, choices


@contextlib.contextmanager
def broken(traced: Traced, **attributes: object):
    with mock.patch.multiple(traced, **attributes), pytest.raises(AssertionError) as info:
        yield info


def test_a_graph_break_is_seen():
    forward = Norm.forward

    def with_a_break(self, x):
        torch._dynamo.graph_break()
        return forward(self, x)

    with mock.patch.object(Norm, "forward", with_a_break), pytest.raises(torch._dynamo.exc.Unsupported):
        Traced("gpt2", {"*": "reference"})


def test_a_backend_that_is_not_in_the_graph_is_seen(good):
    traced, choices = good
    with pytest.raises(AssertionError, match="attention=flex: no flex_attention in the forward graph"):
        traced.check("gpt2", choices | {"attention": "flex"})
    with pytest.raises(AssertionError, match="adamw=torch_fused: the update ran no adamw_torch_fused"):
        traced.check("gpt2", choices | {"adamw": "torch_fused"})


def test_a_wrong_dtype_stride_or_master_is_seen(good):
    traced, _ = good
    name = traced.engine.model.compute_parameters()[0]
    with broken(traced, grads=traced.grads | {name: traced.grads[name].bfloat16()}) as info:
        traced.check_tensors()
    assert "summed in fp32" in str(info.value)
    with broken(traced, grads=traced.grads | {name: traced.grads[name].t().contiguous().t()}):
        traced.check_tensors()
    with broken(traced, loss=traced.loss.bfloat16()):
        traced.check_tensors()
    optimizer = copy.copy(traced.engine.optimizer)
    optimizer.groups = [copy.copy(group) for group in optimizer.groups]
    group = next(group for group in optimizer.groups if group.copies)
    group.copies = [c.clone() for c in group.copies]
    with mock.patch.object(traced.engine, "optimizer", optimizer), pytest.raises(AssertionError, match="computed with"):
        traced.check_tensors()


def test_an_update_that_forgets_something_is_seen(good):
    """The copies: the model would go on computing with the weights it began with."""
    _, choices = good

    def forgets(params, copies, *rest):
        return reference(params, [], *rest)

    reference = ops.adamw.reference
    with mock.patch.dict(ops.adamw.__dict__, {"reference": forgets, "_loaded": {}}):
        faulty = Traced("gpt2", choices)
    with pytest.raises(AssertionError, match="not updated: .*copies blocks.0.attention.qkv.weight"):
        faulty.check("gpt2", choices)


def test_a_host_sync_in_a_graph_is_seen(good):
    traced, _ = good
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(8, device="meta")
    graph.call_function(torch.ops.aten.nonzero.default, (x,))
    graphs = Graphs()
    graphs.graphs = [torch.fx.GraphModule({}, graph)]
    with broken(traced, graphs=graphs) as info:
        traced.check_syncs()
    assert "reads the shape of its result from the data" in str(info.value)


def test_the_models_are_what_they_say():
    assert (GPT2.model.n_layer, GPT2.model.n_embd, GPT2.model.block_size) == (12, 768, T)
    llama = MODELS["llama"].model
    assert (llama.position, llama.norm, llama.activation, llama.qk_norm) == ("rope", "rms_norm", "swiglu", True)
    assert llama.kv_heads < llama.n_head and not llama.tie_head and MODELS["llama"].data.documents
