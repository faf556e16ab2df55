"""The memory of a compiled forward and backward, without compiling: the graphs that Inductor is given, and which of
their values it would put into memory.

torch.compile is stopped where Inductor would begin to make code: by then the compiler has decided what forward keeps
for backward, and that is exact. What lies in between is an image of Inductor's rules:

  - a pointwise result lives in registers, inside the kernels that use it, unless it is a result of the graph, something
    that is no kernel of Inductor's reads it (a product of matrices, an op of ours), or too many reads would be repeated
    (config.realize_reads_threshold, realize_acc_reads_threshold; on a CPU also for exp and sigmoid used twice);
  - reductions, products and ops of ours have their results in memory; ops of ours run their launchers;
  - a value is freed after its last use, what forward kept too, and a pointwise result may take the place of an argument
    that dies with it, unless a reduction read that too.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from tritium.kernels.autograd import LAUNCHERS, NAMESPACE

REDUCTIONS = {"sum", "mean", "var", "var_mean", "amax", "amin", "max", "min", "any", "all", "prod", "argmax", "argmin"}
POINTWISE = {
    "where", "clone", "copy", "_to_copy", "convert_element_type", "full", "full_like", "zeros_like", "ones_like",
    "empty_like", "zeros", "ones", "arange", "iota", "expand", "constant_pad_nd", "slice_scatter", "select_scatter",
    "index", "embedding", "gather", "scalar_tensor", "fill", "inductor_random", "inductor_lookup_seed", "rand",
    "bernoulli",
}  # fmt: skip
# arguments go into the result
FILLED = {"cat", "index_put", "_unsafe_index_put", "scatter", "scatter_add", "index_add"}
READS, ACCUMULATED_READS = 4, 8
DEAR = {"exp", "sigmoid"}
_numbers = itertools.count()


@dataclasses.dataclass
class Graphs:
    """Of one micro-batch: forward and backward, as Inductor gets them."""

    forward: fx.GraphModule
    backward: fx.GraphModule


def capture(model: Callable[..., Tensor], inputs: tuple[Any, ...]) -> Graphs:
    """Of ``model(*inputs)``, a loss; everything on tensors without contents, under their mode. It leaves
    gradients of such, which are the caller's to remove."""
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    found: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, example_inputs: Any, **options: Any) -> Any:
        found.append(graph)
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        results = [node.meta.get("val") if isinstance(node, fx.Node) else node for node in output.args[0]]
        return make_boxed_func(lambda *args: [like(value) for value in results])  # nothing need run

    def backend(graph: fx.GraphModule, example_inputs: Any) -> Any:
        return compile_fx(graph, example_inputs, inner_compile=keep)

    def call(*inputs: Any) -> Tensor:
        return model(*inputs)

    # code of its own: what is compiled here is not remembered beside, and not counted with, what training compiles
    code = call.__code__.replace(co_name=f"captured_{next(_numbers)}")
    fresh = types.FunctionType(code, call.__globals__, "captured", None, call.__closure__)
    loss = torch.compile(fresh, fullgraph=True, dynamic=False, backend=backend)(*inputs)
    loss.backward()
    assert len(found) == 2, f"a training step is one forward and one backward graph, these are {len(found)}"
    return Graphs(*found)


def _name(node: fx.Node) -> str:
    target = node.target
    return target.name().rpartition("::")[2].partition(".")[0] if hasattr(target, "name") else str(target)


def _kind(node: fx.Node) -> str:
    """alias, pointwise, reduction, filled or extern."""
    if node.target is operator.getitem:
        return "alias"
    name = _name(node)
    schema = getattr(node.target, "_schema", None)
    if name in ("_unsafe_view", "reshape", "view", "lift_fresh_copy") or (
        schema is not None and schema.returns and all(r.alias_info is not None for r in schema.returns)
    ):
        return "alias"
    if name in FILLED:
        return "filled"
    if name in REDUCTIONS:
        return "reduction"
    if name in POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return "pointwise"
    return "extern"


class Replay:
    """One graph, its values made and freed as Inductor's code would. cpu: whether its rules are those for a CPU."""

    def __init__(self, graph: fx.GraphModule, cpu: bool):
        self.nodes = list(graph.graph.nodes)
        self.kinds = {n: _kind(n) for n in self.nodes if n.op == "call_function"}
        self.names = {n.name: n for n in self.nodes}
        self.virtual: set[fx.Node] = set()  # in registers
        sources: dict[fx.Node, set[fx.Node]] = {}
        for node in self.nodes:
            if node.op != "call_function":
                continue
            parts: set[fx.Node] = set()
            for argument in node.all_input_nodes:
                parts |= sources[argument] if argument in self.virtual else {argument}
            sources[node] = parts
            if self._in_registers(node, len(parts), cpu):
                self.virtual.add(node)
        at = {node: i for i, node in enumerate(self.nodes)}
        self.until: dict[fx.Node, int] = {}
        for node in reversed(self.nodes):
            ends = (self.until[u] if u in self.virtual else at[u] for u in node.users)
            self.until[node] = max(ends, default=at[node])

    def _in_registers(self, node: fx.Node, reads: int, cpu: bool) -> bool:
        kind = self.kinds[node]
        if kind == "alias":
            return any(a in self.virtual for a in node.all_input_nodes)
        if kind != "pointwise" or self._is_read_from_memory(node):
            return False
        many = len(node.users) > 1 and (reads > READS or (cpu and _name(node) in DEAR))
        return not many and reads <= ACCUMULATED_READS

    def _is_read_from_memory(self, node: fx.Node) -> bool:
        for user in node.users:
            if user.op == "output" or self.kinds.get(user) == "extern":
                return True
            if self.kinds.get(user) == "alias" and self._is_read_from_memory(user):
                return True
        return False

    def run(self, given: dict[str, Any], foreign: Callable[[Any], Any]) -> tuple[Any, dict[str, Any]]:
        """(the graph's results, those by name). given: values of placeholders by name, which are taken out of it;
        foreign: makes a value like one that it is given, for the other placeholders, which are not the graph's."""
        values: dict[fx.Node, Any] = {}
        dying: dict[int, list[fx.Node]] = {}
        for node, end in self.until.items():
            dying.setdefault(end, []).append(node)
        for i, node in enumerate(self.nodes):
            if node.op == "placeholder":
                value = given.pop(node.name, None)
                values[node] = foreign(node.meta.get("val")) if value is None else value
            elif node.op == "get_attr":
                values[node] = None
            elif node.op == "output":
                results = tree_map(lambda x: values.get(x) if isinstance(x, fx.Node) else x, node.args[0])
                by_name = {x.name: values.get(x) for x in tree_leaves(node.args[0]) if isinstance(x, fx.Node)}
                values.clear()
                return results, by_name
            elif node in self.virtual:
                pass
            elif self.kinds[node] == "alias":
                values[node] = self._alias(node, values)
            else:
                if (early := self._replaced(node, values, dying.get(i, ()))) is not None:
                    values.pop(early)
                values[node] = self._make(node, values)
            for dead in dying.get(i, ()):
                values.pop(dead, None)
        raise AssertionError("a graph without output")

    def _alias(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.target is operator.getitem:
            results = values.get(node.args[0])  # type: ignore[arg-type]
            if results is None:  # of an operator whose results the compiler describes one by one
                return like(node.meta.get("val"))
            return results[node.args[1]]  # type: ignore[index]
        base = next((values[a] for a in node.all_input_nodes if values.get(a) is not None), None)
        if not isinstance(base, Tensor):
            return base

        def view(t: Any) -> Any:
            return base.as_strided(t.size(), t.stride(), t.storage_offset()) if isinstance(t, Tensor) else t

        return tree_map(view, node.meta.get("val"))

    def _replaced(self, node: fx.Node, values: dict[fx.Node, Any], dying: Any) -> fx.Node | None:
        """A dying argument in whose place a pointwise result may be written."""
        if self.kinds[node] != "pointwise":
            return None
        size = _bytes(node.meta.get("val"))
        same = (d for d in dying if isinstance(values.get(d), Tensor) and _bytes(values[d]) == size)
        return next((d for d in same if not self._is_reduced(d)), None)

    def _is_reduced(self, node: fx.Node) -> bool:
        """Whether a reduction reads it: its kernel reads the value once more after the sum."""
        through = (u for u in node.users if u in self.virtual or self.kinds.get(u) == "alias")
        return any(self.kinds.get(u) == "reduction" for u in node.users) or any(map(self._is_reduced, through))

    def _make(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        target: Any = node.target
        if getattr(target, "namespace", "") == NAMESPACE and (launcher := LAUNCHERS.get(_name(node))):
            args, kwargs = tree_map(lambda x: values[x] if isinstance(x, fx.Node) else x, (node.args, node.kwargs))
            try:
                return launcher(*args, **kwargs)
            except Exception:  # it asks for values: its results alone
                pass
        return like(node.meta.get("val"))


def _bytes(value: Any) -> int:
    return value.untyped_storage().nbytes() if isinstance(value, Tensor) else -1


def like(value: Any) -> Any:
    """New tensors of these shapes, strides and dtypes."""

    def made(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        size, stride = ([int(n) for n in sizes] for sizes in (t.size(), t.stride()))  # no symbols
        return torch.empty_strided(size, stride, dtype=t.dtype)

    return tree_map(made, value)


class Stub(torch.autograd.Function):
    """A loss whose forward and backward replay two graphs; for autograd it is a function of the leaves."""

    @staticmethod
    def forward(ctx: Any, replays: tuple[Replay, Replay], foreign: Callable[[Any], Any], *leaves: Tensor) -> Tensor:
        _, by_name = replays[0].run({}, foreign)
        wanted = {n.name for n in replays[1].nodes if n.op == "placeholder"}
        ctx.kept = {name: value for name, value in by_name.items() if name in wanted}
        ctx.backward_graph, ctx.foreign = replays[1], foreign
        ctx.leaves = [(leaf.shape, leaf.dtype) for leaf in leaves]
        return torch.zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept, ctx.kept = ctx.kept, None
        results, _ = ctx.backward_graph.run(kept, ctx.foreign)
        found = [g for g in tree_leaves(results) if isinstance(g, Tensor)]
        del results
        ordered: list[Tensor | None] = []
        for shape, _ in ctx.leaves:
            at = next((i for i, g in enumerate(found) if g.shape == shape), None)
            ordered.append(None if at is None else found.pop(at))
        return None, None, *ordered


def leaves_of(model: torch.nn.Module) -> Iterator[Tensor]:
    return (p for p in model.parameters() if p.requires_grad)
