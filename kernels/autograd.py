"""``differentiable``: one definition of forward and backward gives a fast eager path and a custom op under compile.

A ``torch.library`` custom op costs tens of microseconds a call, so plain eager training bypasses it through an
autograd.Function. Everything that must *see* the op gets the registered one: torch.compile, fake tensors, FLOP
counters, selective checkpointing, and tensor subclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAMESPACE = "tritium"
_PLAIN = (Tensor, torch.nn.Parameter)


def bypass(args: Sequence[Any]) -> bool:
    """Whether the library boundary may be skipped: not compiling, no dispatch mode active, every tensor a plain one."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    for arg in args:
        if isinstance(arg, Tensor):
            if type(arg) not in _PLAIN:
                return False
        elif isinstance(arg, (list, tuple)) and not bypass(arg):
            return False
    return True


def differentiable(
    name: str,
    *,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    fake_forward: Callable[..., tuple[Tensor, ...]],
    fake_backward: Callable[..., tuple[Tensor, ...]],
    save: Callable[[tuple[Any, ...], tuple[Tensor, ...]], tuple[Any, ...]],
    gradients: Sequence[int],
    outputs: int = 1,
    flops: Callable[..., int] | None = None,
    flops_backward: Callable[..., int] | None = None,
    backward_fuses: bool = False,
) -> Callable[..., Any]:
    """Build a callable with autograd from a forward and a backward over plain tensors. It takes positional arguments.

    name: "layer_norm_triton" registers ``tritium::layer_norm_triton`` and ``..._backward``.
    forward(*args) -> results: a tuple; the first ``outputs`` are what the caller gets, the rest (mean, lse, ...) only
        feed backward.
    save(args, results) -> values: tensors, None or constants that backward needs.
    backward(*grads_of_outputs, *values) -> one tensor for each entry of ``gradients``, the positions in ``args`` they
        belong to. A gradient for an argument that was None is dropped, so return an empty tensor for it.
    forward and backward carry type annotations (they become the schema); no result may alias an argument or another.
    backward_fuses: backward is plain torch that a compiler may see into and fuse with what follows: under compile it is
        traced instead of called as an op of its own.
    fake_*: same signatures, allocate only. flops*: torch.utils.flop_counter formulas, called with shapes for tensors.
    Works once: the returned gradient is not itself differentiable.
    """
    forward_op = torch.library.custom_op(f"{NAMESPACE}::{name}", forward, mutates_args=())
    forward_op.register_fake(fake_forward)
    backward_op = torch.library.custom_op(f"{NAMESPACE}::{name}_backward", backward, mutates_args=())
    backward_op.register_fake(fake_backward)
    gradients = tuple(gradients)

    def stash(ctx: Any, args: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
        values = save(args, results)
        ctx.save_for_backward(*(v for v in values if isinstance(v, Tensor)))
        ctx.constants = tuple(None if isinstance(v, Tensor) else (v,) for v in values)  # None marks a tensor's place
        ctx.absent = tuple(i for i in gradients if args[i] is None)
        ctx.arity = len(args)
        ctx.grad_shapes = None
        if outputs > 1:  # an output the loss does not use arrives as None: backward then gets zeros
            ctx.grad_shapes = [(r.shape, r.dtype, r.device) for r in results[:outputs]]

    def unstash(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        values = [next(saved) if constant is None else constant[0] for constant in ctx.constants]
        if ctx.grad_shapes is not None:
            grads = [
                torch.zeros(s, dtype=t, device=d) if g is None else g
                for g, (s, t, d) in zip(grads, ctx.grad_shapes, strict=True)
            ]
        return (*grads, *values)

    def place(ctx: Any, found: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * ctx.arity
        for position, gradient in zip(gradients, found, strict=True):
            result[position] = None if position in ctx.absent else gradient
        return tuple(result)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        stash(ctx, inputs, output)

    def op_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if backward_fuses and any(g is not None for g in grads[outputs:]):
            raise RuntimeError(
                f"{name}: a gradient of its gradient was asked for, and it has none (it works once); choose reference"
            )
        run = backward if backward_fuses else backward_op
        return place(ctx, run(*unstash(ctx, grads[:outputs])))

    forward_op.register_autograd(op_backward, setup_context=setup_context)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.set_materialize_grads(False)
            results = forward(*args)
            stash(ctx, args, results)
            return results[0] if outputs == 1 else results[:outputs]

        @staticmethod
        @once_differentiable  # backward may be plain torch, whose second derivative would miss what forward saved
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return place(ctx, backward(*unstash(ctx, grads)))

    if flops is not None:
        _register_flops(name, flops)
    if flops_backward is not None:
        _register_flops(f"{name}_backward", flops_backward)

    def call(*args: Any) -> Any:
        if not bypass(args):
            results = forward_op(*args)
        elif torch.is_grad_enabled():
            return Eager.apply(*args)
        else:
            results = forward(*args)
        return results[0] if outputs == 1 else results[:outputs]

    call.__name__ = name
    return call


def _register_flops(name: str, formula: Callable[..., int]) -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name))(formula)


def update_op(name: str, function: Callable[..., None], mutates: Sequence[str]) -> Callable[..., None]:
    """Register a mutating op without autograd (an optimizer's update); the callable bypasses the library in eager.

    function(...) -> None, annotated; ``mutates`` names the arguments it writes.
    """
    registered = torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=tuple(mutates))
    registered.register_fake(lambda *args, **kwargs: None)

    def call(*args: Any) -> None:
        if bypass(args):
            function(*args)
        else:
            registered(*args)

    call.__name__ = name
    return call
