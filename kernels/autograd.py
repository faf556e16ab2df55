"""``differentiable``: one definition of forward and backward gives a fast eager path and a custom op under compile.

A ``torch.library`` custom op costs tens of microseconds a call, so plain eager training bypasses it through an
autograd.Function. Everything that must *see* the op gets the registered one: torch.compile, fake tensors, FLOP
counters, selective checkpointing, and tensor subclasses.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import CustomOpDef

NAMESPACE = "tritium"
_SIMPLE = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, str})
LAUNCHERS: dict[str, Callable[..., Any]] = {}  # name of a registered op → what computes it, returning what the op does
watching = 0  # dispatch modes at work that only watch (engine/syncs.py): what they see must be what runs without them


def bypass(args: Sequence[Any]) -> bool:
    """Whether the library boundary may be skipped: not compiling, no dispatch mode or transform of torch.func at work,
    every tensor a plain one."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > watching
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    for arg in args:
        kind = type(arg)
        if kind in _SIMPLE:
            continue
        if isinstance(arg, (list, tuple)):
            if not (_SIMPLE.issuperset(map(type, arg)) or bypass(arg)):
                return False
        elif isinstance(arg, Tensor):
            return False
    return True


def register(name: str, function: Callable[..., Any], **options: Any) -> CustomOpDef:
    """``torch.library.custom_op`` in our namespace, under a name of its own: a name that is taken gets a number.

    A second registration of a name would free the first op beneath whoever holds it (a model bound before its kernel's
    module was loaded again, say), whose calls then compute the second's numbers or read freed memory.
    """
    free, number = name, 1
    while hasattr(getattr(torch.ops, NAMESPACE), free):
        number += 1
        free = f"{name}_{number}"
    return torch.library.custom_op(f"{NAMESPACE}::{free}", function, **({"mutates_args": ()} | options))


def differentiable(
    name: str,
    *,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    fake_forward: Callable[..., tuple[Tensor, ...]],
    fake_backward: Callable[..., tuple[Tensor, ...]],
    save: Callable[[tuple[Any, ...], tuple[Tensor, ...]], tuple[Any, ...]],
    gradients: Sequence[int | tuple[int, ...]],
    outputs: int = 1,
    flops: Callable[..., int] | None = None,
    flops_backward: Callable[..., int] | None = None,
    backward_fuses: bool = False,
) -> Callable[..., Any]:
    """Build a callable with autograd from a forward and a backward over plain tensors. It takes positional arguments.

    name: "layer_norm_triton" registers ``tritium::layer_norm_triton`` and ``..._backward`` (:func:`register`).
    forward(*args) -> results: a tuple, annotated ``tuple[Tensor, ...]`` with every result; the first ``outputs`` are
        what the caller gets, the rest (mean, lse, ...) only feed backward. Likewise backward.
    save(args, results) -> values that backward needs: tensors and None first, then constants.
    backward(*grads_of_outputs, *values) -> one tensor for each entry of ``gradients``: the position in ``args`` it
        belongs to, or a tuple of positions that share it (the two sides of an addition). A gradient that nobody needs
        (for an argument that was None) is dropped, so return an empty tensor for it.
    forward and backward carry type annotations (they become the schema); no result may alias an argument or another.
    backward_fuses: backward is plain torch that a compiler may see into and fuse with what follows: under compile it is
        traced instead of called as an op of its own.
    fake_*: same signatures, allocate only. flops*: torch.utils.flop_counter formulas, called with shapes for tensors.
    Works once: the returned gradient is not itself differentiable.
    """
    forward_op, run_forward = _register(name, forward, fake_forward)
    backward_op, run_backward = _register(f"{name}_backward", backward, fake_backward)
    places = tuple((position,) if isinstance(position, int) else tuple(position) for position in gradients)

    # What follows runs at every eager call, beside kernels of some 10 µs: it is written for few steps.
    def stash(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Any, ...]:
        values = save(args, results)
        count = 0
        for value in values:
            if value is not None and not isinstance(value, Tensor):
                break
            count += 1
        ctx.save_for_backward(*values[:count])
        ctx.constants = values[count:]
        return ctx.constants

    def unstash(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        return (*grads, *ctx.saved_tensors, *ctx.constants)

    def place(ctx: Any, found: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        result: list[Tensor | None] = [None] * len(needed)
        for positions, gradient in zip(places, found, strict=True):
            for position in positions:
                if needed[position]:
                    result[position] = gradient
        return tuple(result)

    # the op's context, unlike Eager's, has the results that only feed backward: no zeros are to be made for those
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        output = (output,) if isinstance(output, Tensor) else output
        ctx.set_materialize_grads(False)
        ctx.grad_shapes = [(r.shape, r.dtype, r.device) for r in output[:outputs]]
        if any(isinstance(value, Tensor) for value in stash(ctx, inputs, output)):
            raise TypeError(f"{name}: save must return tensors and None first, then constants")

    def op_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if backward_fuses and any(g is not None for g in grads[outputs:]):
            raise RuntimeError(
                f"{name}: a gradient of its gradient was asked for, and it has none (it works once); choose reference"
            )
        run = backward if backward_fuses else run_backward
        wanted = [  # zeros for an output that the loss does not use
            torch.zeros(s, dtype=t, device=d) if g is None else g
            for g, (s, t, d) in zip(grads, ctx.grad_shapes, strict=False)
        ]
        return place(ctx, run(*unstash(ctx, wanted)))

    forward_op.register_autograd(op_backward, setup_context=setup_context)

    @once_differentiable  # backward may be plain torch, whose second derivative would miss what forward saved
    def create_graph(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return place(ctx, backward(*unstash(ctx, grads)))

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            results = forward(*args)
            stash(ctx, args, results)
            return results[0] if outputs == 1 else results[:outputs]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():
                return create_graph(ctx, *grads)
            return place(ctx, backward(*unstash(ctx, grads)))

    # Function.apply would ask for transforms again and look through all arguments, for 2 of a call's 8 microseconds
    apply = super(torch.autograd.Function, Eager).apply

    if flops is not None:
        _register_flops(forward_op, flops)
    if flops_backward is not None:
        _register_flops(backward_op, flops_backward)

    def call(*args: Any) -> Any:
        if not bypass(args):
            if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
                raise RuntimeError(
                    f"{name} has a forward and a backward and no rule for torch.func's transforms, and one is at work "
                    "(grad, vmap, jvp, ...); use torch.autograd, or choose reference"
                )
            results = run_forward(*args)
        elif torch.is_grad_enabled():
            return apply(*args)
        else:
            results = forward(*args)
        return results[0] if outputs == 1 else results[:outputs]

    call.__name__ = name
    return call


def _register(
    name: str, function: Callable[..., tuple[Tensor, ...]], fake: Callable[..., tuple[Tensor, ...]]
) -> tuple[CustomOpDef, Callable[..., tuple[Tensor, ...]]]:
    """The library's op of a function that returns a tuple of tensors, and how to call it for that tuple.

    A single result is a bare Tensor there: a tuple of one would be a list to the library, ``-> ((Tensor))``, and torch
    takes every symbolic size of a list's tensors for a constant: a compiled model would be compiled for every shape.
    """
    schema = torch.library.infer_schema(function, mutates_args=())
    single = re.sub(r"-> \(+Tensor\)+$", "-> Tensor", schema)
    if schema.endswith("-> Tensor"):
        raise TypeError(
            f"{name}: the function is annotated to return a Tensor; return (result,), and write tuple[Tensor]"
        )
    if single == schema:
        op = register(name, function)
        op.register_fake(fake)
        LAUNCHERS[op._name] = function
        return op, op

    def first(*args: Any) -> Tensor:
        return function(*args)[0]

    op = register(name, first, schema=single)
    LAUNCHERS[op._name] = first
    op.register_fake(lambda *args: fake(*args)[0])
    return op, lambda *args: (op(*args),)


def _register_flops(op: CustomOpDef, formula: Callable[..., int]) -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), op._name))(formula)


def update_op(
    name: str, function: Callable[..., None], mutates: Sequence[str], in_library: Callable[..., None] | None = None
) -> Callable[..., None]:
    """Register a mutating op without autograd (an optimizer's update); the callable bypasses the library in eager.

    function(...) -> None, annotated; ``mutates`` names the arguments it writes. in_library: what the library calls in
    its place, if that is another (kernels/lib/triton_lists.py).
    """
    registered = register(name, in_library or function, mutates_args=tuple(mutates))
    registered.register_fake(lambda *args, **kwargs: None)
    written = [i for i, parameter in enumerate(inspect.signature(function).parameters) if parameter in mutates]

    def call(*args: Any) -> None:
        if bypass(args):
            function(*args)
            # as the library does: a backward that saved an older value must say so, not use the new one
            for position in written:
                torch.autograd.graph.increment_version(args[position])
        else:
            registered(*args)

    call.__name__ = name
    return call
