"""Every registered op, compiled once with its sizes left open, serves them all, forward and backward.

Triton's launchers run and launch nothing (kernels/aot.py stands in for their driver); what is native runs.
"""

import contextlib
import inspect
import re

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import RecompileError
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from tritium.kernels import ops
from tritium.kernels.autograd import NAMESPACE, differentiable
from tritium.kernels.case import Case
from tritium.kernels.op import Op

aot = pytest.importorskip("tritium.kernels.aot")

# all sizes of an op differ: torch takes equal ones for one symbol
SHAPES = {
    "linear": {"B": 5, "T": 7, "C": 32, "F": 48},
    "embedding": {"B": 5, "T": 7, "V": 128, "C": 64},
    "attention": {"B": 5, "Tq": 11, "Tk": 13, "H": 4, "G": 2, "D": 16},
    "attention_lse": {"B": 5, "Tq": 11, "Tk": 13, "H": 4, "G": 2, "D": 16},
    "rope": {"B": 5, "T": 7, "H": 4, "G": 2, "D": 32, "R": 12},
    "cross_entropy": {"N": 7, "V": 100, "Vp": 128},
    "linear_cross_entropy": {"N": 7, "C": 64, "V": 100, "Vp": 128},
    "global_norm": {"K": 3, "P": 409},
    "adamw": {"K": 3, "P": 409},
    "adamw_8bit": {"K": 3, "P": 409},
}
VARY = ("B", "T", "Tq", "Tk", "N", "P")  # what changes from batch to batch; the rest is the model's
STEPS = (0, 4, 8, 12)
# options with which another registered op, or other shapes, come into play; the names of those ops
OPTIONS = {
    "linear": ({"bias": False},),
    "attention": ({"documents": True}, {"dropout": 0.1}),
    "attention_lse": ({"documents": True},),
    "layer_norm": ({"bias": False}, {"wide": True}),
    "rms_norm": ({"weight": False},),
    "cross_entropy": ({"reduction": "mean"}, {"reduction": "sum"}),
    "linear_cross_entropy": ({"chunk": 5}, {"with_grad": False}),
}
OTHER_NAMES = {("cross_entropy", "triton", "reduction"): "cross_entropy_triton_one_pass"}
FUSES = {"cross_entropy_triton_one_pass", "linear_cross_entropy_native"}  # backward_fuses: its backward is no op
REGISTERS = re.compile(
    r'(?:differentiable|update_op)\(\s*"(\w+)"|custom_op\((?:f"\{NAMESPACE\}|"tritium)::(\w+|\{_NAME\})"'
)


def registered(op: Op, backend: str) -> set[str]:
    """The ops that a backend's file registers, ``..._backward`` aside."""
    found = REGISTERS.findall(inspect.getsource(op.load(backend).module))
    return {(a or b).replace("{_NAME}", f"{op.name}_{backend}") for a, b in found}


WAYS = [
    (op.name, backend, options)
    for op in ops.OPS.values()
    for backend in op.backends()
    if registered(op, backend)
    for options in ({}, *OPTIONS.get(op.name, ()))
]


def name_of(op: str, backend: str, options: dict) -> str:
    return next((OTHER_NAMES[key] for o in options if (key := (op, backend, o)) in OTHER_NAMES), f"{op}_{backend}")


def arguments_of(op: Op, options: dict, more: int) -> dict:
    letters = {letter for case in op.cases.CASES for letter in case.shape}
    shape = SHAPES.get(op.name) or {"B": 5, "T": 7, ("F" if "F" in letters else "C"): 64}
    shape = {letter: size + more * (letter in VARY) for letter, size in shape.items()}
    return op.cases.inputs(Case("open", shape, options), torch.float32, "cpu", 0)


class Compiler:
    """AOTAutograd, which runs its graphs as they are; keeps which of our ops are in them."""

    def __init__(self):
        self.found: list[str] = []

    def __call__(self, graph, inputs):
        return aot_autograd(fw_compiler=self.keep, bw_compiler=self.keep)(graph, inputs)

    def keep(self, graph, inputs):
        targets = [
            value for node in graph.graph.nodes for value in (node.target, *node.args)
        ]  # an update: functionalised
        self.found += [t._opname for t in targets if getattr(t, "namespace", "") == NAMESPACE]
        return make_boxed_func(graph.forward)


def results_of(function, arguments: dict, differentiates: bool) -> list[Tensor]:
    """Outputs and gradients."""
    results = function(**arguments)
    results = [] if results is None else list(results) if isinstance(results, (tuple, list)) else [results]
    wanted = [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]
    outputs = [r for r in results if r.requires_grad]
    if differentiates and outputs:
        results += torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])
    return [r.detach() for r in results]


def run(function, inputs, *, marked: bool, differentiates: bool, expected=None) -> list[str]:
    """Compile once and call with the sizes of all STEPS; a second compilation raises. Returns our ops in the graphs.

    inputs(more) -> arguments whose sizes are open by so much. expected: a function to agree with.
    """
    torch._dynamo.reset()
    compiler = Compiler()
    compiled = torch.compile(
        lambda **arguments: function(**arguments), fullgraph=True, dynamic=None if marked else True, backend=compiler
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for more in STEPS:
            arguments = inputs(more)
            if marked:
                mark(arguments, inputs(more + STEPS[1]))
            found = results_of(compiled, arguments, differentiates)
            if expected is not None:
                again = inputs(more)
                torch.testing.assert_close(found, results_of(expected, again, differentiates))
                torch.testing.assert_close(list(tensors(arguments)), list(tensors(again)))  # what an update wrote
    return compiler.found


def tensors(arguments: dict):
    for value in arguments.values():
        yield from (t for t in (value if isinstance(value, list) else [value]) if isinstance(t, Tensor))


def mark(arguments: dict, other: dict) -> None:
    """Mark the sizes in which two calls' arguments differ."""
    for mine, theirs in zip(tensors(arguments), tensors(other), strict=True):
        for axis, (a, b) in enumerate(zip(mine.shape, theirs.shape, strict=True)):
            if a != b:
                torch._dynamo.mark_dynamic(mine, axis)


MARKED = pytest.mark.parametrize("marked", [False, True], ids=["dynamic", "marked"])


@MARKED
@pytest.mark.parametrize(("name", "backend", "options"), WAYS, ids=str)
def test_one_graph_for_all_sizes(name, backend, options, marked):
    op, function = ops.OPS[name], ops.OPS[name].load(backend).function
    with aot.compiling_for("sm_90", compile=False) if backend == "triton" else contextlib.nullcontext():
        found = run(
            function,
            lambda more: arguments_of(op, options, more),
            marked=marked,
            differentiates=op.has_gradient,
            expected=None if backend == "triton" else function,
        )
    mine = name_of(name, backend, options)
    assert mine in found
    trains = op.has_gradient and options.get("with_grad", True)
    assert (f"{mine}_backward" in found) == (trains and mine not in FUSES)


def test_every_registered_op_is_tried():
    tried = {name_of(*way) for way in WAYS}
    assert {name for op in ops.OPS.values() for b in op.backends() for name in registered(op, b)} == tried
    assert len(tried) > 20


# ------------------------------------------------------------------------------------------------------- planted fault


def double(x: Tensor) -> tuple[Tensor]:
    return (2 * x,)


def list_of_one(name, function, fake):
    """As the library registers a tuple of one when left to itself."""
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=())
    op.register_fake(fake)
    return op, op


@MARKED
@pytest.mark.parametrize("fault", [False, True])
def test_a_size_that_becomes_a_constant_is_seen(marked, fault, monkeypatch):
    if fault:
        monkeypatch.setattr("tritium.kernels.autograd._register", list_of_one)
    name = f"test_open_{marked}_{fault}".lower()
    function = differentiable(
        name, forward=double, backward=double, fake_forward=double, fake_backward=double, save=lambda *_: (),
        gradients=(0,),
    )  # fmt: skip

    def check() -> list[str]:
        return run(
            lambda x: function(x),
            lambda more: {"x": torch.ones(5 + more, 3, requires_grad=True)},
            marked=marked, differentiates=True, expected=lambda x: 2 * x,
        )  # fmt: skip

    if fault:
        with pytest.raises((RecompileError, ConstraintViolationError), match=r"size mismatch|dynamic"):
            check()
    else:
        assert check() == [name, f"{name}_backward"]
