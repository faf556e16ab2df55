"""Selective recomputing knows every op by its name, on a fake H100: kept results are not computed again, others are.

A block is what checkpointing sees: values that need recomputing, the op, and something that needs the op's results.
"""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
from fake_gpu import DEVICE, H100, MODELS, Executed, Graphs, batch, build, layers, present
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tritium.engine import recompute
from tritium.kernels import op as binding
from tritium.kernels import ops
from tritium.kernels.case import Case
from tritium.kernels.contract import site_of

BF16 = torch.bfloat16


def first_large(op: binding.Op) -> Case:
    return next(case for case in op.cases.CASES if case.large)


def serving(compiled: bool) -> list[tuple[str, str]]:
    """(op, backend) for every op that can be kept and every backend that serves its first GPU case on an H100."""
    found = []
    for op in map(ops.OPS.__getitem__, recompute.KEEPABLE):
        table = op.why_not(site_of(op, first_large(op), BF16, H100, compiled=compiled))
        found += [(op.name, backend) for backend, why in table.items() if why is None]
    return found


EAGER = serving(compiled=False)
# a graph takes a second: torch's own attention once, since all four are told apart by the same table
COMPILED = [
    (op, backend) for op, backend in serving(compiled=True) if backend in ("reference", "triton", "flex", "sdpa_flash")
]


def function_of(name: str, backend: str):
    op = ops.OPS[name]
    return recompute.named(op) if backend == "reference" else op.load(backend).function


class Block:
    """sin, the op, sin: its gradients need the op's arguments and its results."""

    def __init__(self, name: str, backend: str):
        op = ops.OPS[name]
        self.name, self.function = name, function_of(name, backend)
        self.arguments = op.cases.inputs(first_large(op), BF16, DEVICE, 0)
        self.leaves = {n: a for n, a in self.arguments.items() if isinstance(a, torch.Tensor) and a.requires_grad}

    def __call__(self, *leaves: torch.Tensor) -> torch.Tensor:
        before = {n: leaf.sin() for n, leaf in zip(self.leaves, leaves, strict=True)}
        results = self.function(*{**self.arguments, **before}.values())
        results = results if isinstance(results, tuple) else (results,)
        return sum(result.sin().sum(dtype=torch.float32) for result in results)

    def checkpointed(self, keep: frozenset[str], leaves: tuple[torch.Tensor, ...]) -> torch.Tensor:
        contexts = functools.partial(create_selective_checkpoint_contexts, recompute.keeping(keep))
        return checkpoint(self, *leaves, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def computes(functions, name: str) -> int:
    """How often the op ``name`` was computed, its backward not counted."""
    return sum(recompute.op_of(f) == name and "backward" not in str(f) for f in functions if hasattr(f, "name"))


def eager(name: str, backend: str, keep: frozenset[str]) -> tuple[int, int]:
    """How often the op is computed in forward and in backward of a step."""
    with present():
        block = Block(name, backend)
        with Executed() as forward:
            result = block.checkpointed(keep, tuple(block.leaves.values()))
        with Executed() as backward:
            result.backward()
        assert all(leaf.grad is not None for leaf in block.leaves.values())
    return computes(forward.functions, name), computes(backward.functions, name)


def compiled(name: str, backend: str, keep: frozenset[str]) -> tuple[int, int]:
    """How often the op is in the forward and in the backward graph."""
    torch._dynamo.reset()
    graphs = Graphs()
    with present(graphs):
        block = Block(name, backend)
        step = torch.compile(lambda *leaves: block.checkpointed(keep, leaves), fullgraph=True)
        step(*block.leaves.values()).backward()
    assert len(graphs.graphs) == 2
    return computes(graphs.targets(0), name), computes(graphs.targets(1), name)


def check(run, name: str, backend: str) -> None:
    """AssertionError unless the op is computed again exactly when it is not kept."""
    plain = ("reference", "fp8_tensorwise", "fp8_rowwise")
    gradients = 2 if name == "linear" and backend in plain else 0  # backward's own GEMMs have the op's name
    assert run(name, backend, frozenset({name})) == (1, gradients), f"{name}={backend} is kept"
    others = frozenset(recompute.KEEPABLE) - {name}
    assert run(name, backend, others) == (1, 1 + gradients), f"{name}={backend} is not kept"


@pytest.mark.parametrize(("name", "backend"), EAGER)
def test_kept_or_computed_again(name, backend):
    check(eager, name, backend)


@pytest.mark.parametrize(("name", "backend"), COMPILED)
def test_kept_or_computed_again_in_a_graph(name, backend):
    check(compiled, name, backend)


def test_every_op_that_can_be_kept_is_here():
    assert {name for name, backend in EAGER if backend == "reference"} == set(recompute.KEEPABLE)
    for name in recompute.KEEPABLE:
        assert ((name, "triton") in EAGER) == ("triton" in ops.OPS[name].backends())
    assert {backend for name, backend in COMPILED if name == "attention"} == {
        "reference", "triton", "flex", "sdpa_flash",
    }  # fmt: skip


@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_a_models_block_keeps_what_it_is_told_to(kernels):
    """Through recompute.apply, as training does it: every op of two models, one at a time."""
    for model in ("gpt2", "llama"):
        config = layers(MODELS[model], 1)
        with present():
            engine = build(config, kernels)
            names = {site.op.name for _, site in binding.call_sites(engine.model.blocks[0])}
            data = batch(config)
            for name in names:
                forward, again = {}, {}
                for policy, keep in (("selective", {name}), ("selective", names - {name}), ("none", ())):
                    recompute.apply(engine.model, policy, keep)
                    key = (policy, name in keep)
                    with Executed() as executed:
                        loss = engine.loss(data)
                    forward[key] = computes(executed.functions, name)
                    with Executed() as executed:
                        loss.backward()
                    again[key] = computes(executed.functions, name)
                kept, not_kept, plain = again["selective", True], again["selective", False], again["none", False]
                assert forward["selective", True] > 0 and kept == plain, f"{model}: {name} is kept"
                # a reference has no name where nobody asks for it
                nameless = kernels == "reference" and name not in ("linear", "layer_norm", "gelu")
                assert not_kept > plain or nameless, f"{model}: {name} is not kept"
                assert forward["none", False] == (0 if nameless else forward["selective", True])


# ------------------------------------------------------------------------------------------------------ planted faults


def test_a_name_that_is_not_known_is_seen():
    """Without its name the op is computed again though it shall be kept."""
    op_of = recompute.op_of

    def forgetful(function):
        return None if "layer_norm" in str(function) else op_of(function)

    with mock.patch.object(recompute, "op_of", forgetful), pytest.raises(AssertionError):
        check(eager, "layer_norm", "triton")
    with mock.patch.dict(recompute._TORCH), pytest.raises(AssertionError):
        del recompute._TORCH["_scaled_dot_product_flash_attention"]
        check(eager, "attention", "sdpa_flash")


def test_a_reference_without_a_name_is_seen():
    def unnamed(op):
        return op.reference

    with mock.patch.object(recompute, "named", unnamed), pytest.raises(AssertionError):
        check(eager, "rms_norm", "reference")


@pytest.mark.parametrize("run", [eager, compiled])
@pytest.mark.parametrize(
    ("policy", "said"),
    [(CheckpointPolicy.MUST_SAVE, "is not kept"), (CheckpointPolicy.MUST_RECOMPUTE, "is kept")],
    ids=["keeps all", "keeps none"],
)
def test_a_policy_that_does_not_look_is_seen(policy, said, run):
    def keeping(keep):
        return lambda *args, **kwargs: policy

    with mock.patch.object(recompute, "keeping", keeping), pytest.raises(AssertionError, match=said):
        check(run, "gelu", "triton")
