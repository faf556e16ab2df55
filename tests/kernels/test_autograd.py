"""differentiable and update_op: one definition, the same numbers through every way an op can be called."""

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from tritium.kernels.autograd import bypass, differentiable, update_op

calls: list[str] = []


def forward(x: Tensor, w: Tensor, b: Tensor | None, power: int) -> tuple[Tensor, Tensor, Tensor]:
    """y = x^power · w (+ b), z = 3 x, and x^(power-1) for backward."""
    calls.append("forward")
    saved = x ** (power - 1)
    y = saved * x * w
    return (y if b is None else y + b), 3.0 * x, saved


def fake_forward(x: Tensor, w: Tensor, b: Tensor | None, power: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)


def backward(
    dy: Tensor, dz: Tensor, x: Tensor, w: Tensor, saved: Tensor, power: int, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    calls.append("backward")
    return dy * w * power * saved + 3.0 * dz, (dy * saved * x).sum(0), dy.sum(0) if bias else dy.new_empty(0)


def fake_backward(
    dy: Tensor, dz: Tensor, x: Tensor, w: Tensor, saved: Tensor, power: int, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(w), torch.empty_like(w) if bias else dy.new_empty(0)


two = differentiable(
    "test_two",
    forward=forward,
    backward=backward,
    fake_forward=fake_forward,
    fake_backward=fake_backward,
    save=lambda args, results: (args[0], args[1], results[2], args[3], args[2] is not None),
    gradients=(0, 1, 2),
    outputs=2,
    flops=lambda x, *_, **__: 7 * x[0] * x[1],
    flops_backward=lambda dy, *_, **__: 11 * dy[0] * dy[1],
)


def exp_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    calls.append("exp")
    return x.exp(), x.exp()


def exp_backward(dy: Tensor, y: Tensor) -> tuple[Tensor]:
    return (dy * y,)


one = differentiable(
    "test_one",
    forward=exp_forward,
    backward=exp_backward,
    fake_forward=lambda x: (torch.empty_like(x), torch.empty_like(x)),
    fake_backward=lambda dy, y: (torch.empty_like(y),),
    save=lambda args, results: (results[1],),
    gradients=(0,),
)


def reference(x: Tensor, w: Tensor, b: Tensor | None, power: int) -> tuple[Tensor, Tensor]:
    y = x**power * w
    return (y if b is None else y + b), 3.0 * x


def tensors(bias: bool = True) -> list[Tensor | None]:
    torch.manual_seed(0)
    x, w, b = torch.rand(4, 3) + 0.5, torch.rand(3), torch.rand(3)
    return [t.requires_grad_() for t in (x, w)] + [b.requires_grad_() if bias else None]


def gradients(function, args, use=(True, True)) -> list[Tensor]:
    outputs = function(*args, 3)
    loss = sum(((i + 1.0) * o.square()).sum() for i, (o, u) in enumerate(zip(outputs, use, strict=True)) if u)
    wanted = [a for a in args if a is not None]
    return [
        torch.zeros_like(a) if g is None else g
        for a, g in zip(wanted, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True)
    ]


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(lambda *args: function(*args), fullgraph=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def _clear():
    calls.clear()


@pytest.mark.parametrize("way", ["eager", "compiled", "registered"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use", [(True, True), (True, False), (False, True)])
def test_every_way_gives_the_references_gradients(way, bias, use, monkeypatch):
    args = tensors(bias)
    function = two
    if way == "compiled":
        function = compiled(two)
    if way == "registered":
        monkeypatch.setattr("tritium.kernels.autograd.bypass", lambda args: False)
    for output, want in zip(function(*args, 3), reference(*args, 3), strict=True):
        torch.testing.assert_close(output, want)
    for got, want in zip(gradients(function, args, use), gradients(reference, args, use), strict=True):
        torch.testing.assert_close(got, want)
    assert "backward" in calls


def test_the_registered_op_passes_opcheck():
    for bias in (True, False):
        opcheck(torch.ops.tritium.test_two.default, (*tensors(bias), 3))
    opcheck(torch.ops.tritium.test_one.default, (torch.rand(3, requires_grad=True),))


def test_gradients_of_a_subset_and_of_nothing():
    x, w, b = tensors()
    y, _ = two(x.detach(), w, b.detach(), 2)
    (dw,) = torch.autograd.grad(y.sum(), [w])
    torch.testing.assert_close(dw, (x.detach() ** 2).sum(0))
    y, z = two(x.detach(), w.detach(), b.detach(), 2)
    assert not y.requires_grad
    assert not z.requires_grad


def test_without_grad_nothing_is_saved():
    args = tensors()
    with torch.no_grad():
        y, _ = two(*args, 3)
    assert y.grad_fn is None
    with torch.inference_mode():
        y, _ = two(*args, 3)
    assert y.is_inference()
    assert calls == ["forward", "forward"]


def test_one_output_comes_alone():
    x = torch.rand(5, requires_grad=True)
    y = one(x)
    assert isinstance(y, Tensor)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], x.exp())
    torch.testing.assert_close(torch.autograd.grad(compiled(one)(x).sum(), x)[0], x.exp())


def test_eager_bypasses_the_library_and_whatever_must_see_the_op_gets_it():
    args = tensors()
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    assert bypass(args)
    assert type(two(*args, 3)[0].grad_fn).__name__ == "EagerBackward"
    with Watch():
        two(*args, 3)
    assert torch.ops.tritium.test_two.default in seen
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) for a in args]
        y, z = two(*fakes, 3)
    assert not bypass(fakes)
    assert (y.shape, z.shape) == ((4, 3), (4, 3))
    assert not bypass([[fakes[0]]])


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacfwd])
def test_a_transform_of_functions_is_told_that_there_is_no_rule(transform):
    with pytest.raises(RuntimeError, match=r"test_two has a forward and a backward and no rule .* choose reference"):
        transform(lambda x: two(x, torch.ones(3), None, 3)[0].sum())(torch.rand(4, 3))


def test_a_tensor_subclass_is_not_bypassed():
    class Sub(Tensor):
        pass

    assert not bypass([torch.rand(2).as_subclass(Sub)])
    assert bypass([torch.nn.Parameter(torch.rand(2)), None, 3, [torch.rand(1)]])


def test_flops_are_counted_forward_and_backward():
    args = tensors()
    with FlopCounterMode(display=False) as counter:
        y, z = two(*args, 3)
        (y.sum() + z.sum()).backward()
    assert counter.get_total_flops() == (7 + 11) * 4 * 3
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.tritium.test_two] == 7 * 12
    assert counts[torch.ops.tritium.test_two_backward] == 11 * 12


@pytest.mark.parametrize("saved", [True, False])
def test_selective_checkpointing_can_name_the_op(saved):
    args = tensors()

    def policy(ctx, op, *args, **kwargs):
        keep = saved and op == torch.ops.tritium.test_two.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def block(*args):
        y, z = two(*args, 3)
        return y.sin() + z.sin()

    y = checkpoint(
        block, *args, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )  # fmt: skip
    got = torch.autograd.grad(y.sum(), args)
    assert calls.count("forward") == (1 if saved else 2)
    want = torch.autograd.grad(sum(o.sin().sum() for o in reference(*args, 3)), args)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_plain_checkpointing_recomputes():
    args = tensors()
    y = checkpoint(lambda *a: two(*a, 3)[0].sin(), *args, use_reentrant=False)
    got = torch.autograd.grad(y.sum(), args)
    assert calls.count("forward") == 2
    for g, w in zip(got, torch.autograd.grad(reference(*args, 3)[0].sin().sum(), args), strict=True):
        torch.testing.assert_close(g, w)


def test_the_gradient_is_not_differentiable_again():
    args = tensors()
    (dx,) = torch.autograd.grad(two(*args, 3)[0].sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice|does not require grad"):
        torch.autograd.grad(dx.sum(), args[0])


def add_forward(x: Tensor, y: Tensor) -> tuple[Tensor]:
    return (x + y,)


def add_backward(dy: Tensor) -> tuple[Tensor]:
    calls.append("add backward")
    return (2.0 * dy,)


add = differentiable(
    "test_add",
    forward=add_forward,
    backward=add_backward,
    fake_forward=lambda x, y: (torch.empty_like(x),),
    fake_backward=lambda dy: (torch.empty_like(dy),),
    save=lambda args, results: (),
    gradients=((0, 1),),
)


@pytest.mark.parametrize("way", ["eager", "compiled", "registered"])
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_two_arguments_may_share_one_gradient(way, needed, monkeypatch):
    function = compiled(add) if way == "compiled" else add
    if way == "registered":
        monkeypatch.setattr("tritium.kernels.autograd.bypass", lambda args: False)
    args = [torch.rand(3).requires_grad_(n) for n in needed]
    for _ in range(2):  # .grad is added to: what two leaves were given must not be one piece of memory that doubles
        function(*args).sum().backward()
    for arg, n in zip(args, needed, strict=True):
        assert arg.grad is None if not n else torch.equal(arg.grad, torch.full((3,), 4.0))


def order_backward(dy: Tensor, power: int, y: Tensor) -> tuple[Tensor]:
    return (dy * y,)


def test_tensors_come_before_constants_in_what_is_saved(monkeypatch):
    wrong = differentiable(
        "test_order",
        forward=exp_forward,
        backward=order_backward,
        fake_forward=lambda x: (torch.empty_like(x), torch.empty_like(x)),
        fake_backward=lambda dy, power, y: (torch.empty_like(y),),
        save=lambda args, results: (3, results[1]),
        gradients=(0,),
    )
    monkeypatch.setattr("tritium.kernels.autograd.bypass", lambda args: False)
    with pytest.raises(TypeError, match="tensors and None first"):
        wrong(torch.rand(3, requires_grad=True))


# ------------------------------------------------------------------------------------------------------------ update_op


def nudge(params: list[Tensor], copies: list[Tensor], by: Tensor, factor: float) -> None:
    calls.append("nudge")
    for i, p in enumerate(params):
        p.add_(by * factor)
        if copies:
            copies[i].copy_(p)


update = update_op("test_nudge", nudge, mutates=("params", "copies"))


@pytest.mark.parametrize(
    ("mode", "with_copies"), [*itertools.product(["eager", "compiled", "registered"], [True, False])]
)
def test_an_update_mutates_what_it_names(mode, with_copies, monkeypatch):
    params = [torch.zeros(3), torch.ones(2, 2)]
    copies = [p.to(torch.bfloat16) for p in params] if with_copies else []
    function = compiled(lambda *args: update(*args)) if mode == "compiled" else update
    if mode == "registered":
        monkeypatch.setattr("tritium.kernels.autograd.bypass", lambda args: False)
    for _ in range(2):
        with torch.no_grad():
            assert function(params, copies, torch.tensor(2.0), 0.5) is None
    assert torch.equal(params[0], torch.full((3,), 2.0))
    assert torch.equal(params[1], torch.full((2, 2), 3.0))
    assert all(torch.equal(c, p.to(torch.bfloat16)) for c, p in zip(copies, params, strict=False))
    assert calls == ["nudge", "nudge"]


@pytest.mark.parametrize("mode", ["eager", "registered"])
def test_a_backward_notices_that_what_it_saved_was_updated(mode, monkeypatch):
    if mode == "registered":
        monkeypatch.setattr("tritium.kernels.autograd.bypass", lambda args: False)

    def silent(params: list[Tensor], copies: list[Tensor], by: Tensor, factor: float) -> None:
        for tensor in (*params, *copies):  # as a kernel writes: autograd does not see it
            tensor.detach().numpy()[:] = 7.0

    quiet = update_op(f"test_silent_{mode}", silent, mutates=("params", "copies"))
    weight, copy, x = torch.ones(3), torch.ones(3), torch.ones(3, requires_grad=True)
    for changed in (weight, copy):
        y = (x * changed).sum()
        quiet([weight], [copy], torch.tensor(2.0), 0.5)
        assert changed[0] == 7.0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_an_update_in_a_compiled_step_is_seen_by_what_follows():
    params = [torch.zeros(3)]

    def step(p: list[Tensor], by: Tensor) -> Tensor:
        before = p[0] + 1
        update(p, [], by, 1.0)
        return before + p[0]

    with torch.no_grad():
        y = compiled(step)(params, torch.tensor(2.0))
    assert torch.equal(y, torch.full((3,), 3.0))
    assert torch.equal(params[0], torch.full((3,), 2.0))


def test_an_update_under_fake_tensors_touches_nothing():
    with FakeTensorMode() as mode:
        p = mode.from_tensor(torch.zeros(3))
        assert update([p], [], torch.tensor(1.0), 1.0) is None
    assert calls == []


def test_a_single_result_is_no_list_to_the_library():
    """Whose tensors' sizes torch takes for constants (tests/kernels/test_dynamic_shapes.py)."""
    for name in ("test_add", "test_add_backward", "test_one_backward"):
        assert str(getattr(torch.ops.tritium, name).default._schema).endswith("-> Tensor"), name
    assert str(torch.ops.tritium.test_one.default._schema).endswith("-> (Tensor, Tensor)")


def test_a_bare_result_is_refused():
    def bare(x: Tensor) -> Tensor:
        return 2 * x

    with pytest.raises(TypeError, match=r"test_bare: .* write tuple\[Tensor\]"):
        differentiable(
            "test_bare",
            forward=bare,
            backward=bare,
            fake_forward=bare,
            fake_backward=bare,
            save=lambda *_: (),
            gradients=(0,),
        )


def scaled(factor: float):
    def forward(x: Tensor) -> tuple[Tensor]:
        return (x * factor,)

    def fake(x: Tensor) -> tuple[Tensor]:
        return (torch.empty_like(x),)

    return differentiable(
        "test_loaded_again",
        forward=forward,
        backward=forward,
        fake_forward=fake,
        fake_backward=fake,
        save=lambda args, results: (),
        gradients=(0,),
        flops=lambda x, *_, **__: int(factor),
    )


def test_an_op_lives_on_when_its_module_is_loaded_again():
    """torch frees the first op of a name when the name is registered again: whoever holds it computes the second's
    numbers, or reads freed memory."""
    first = scaled(2.0)
    second = scaled(3.0)
    for function, factor in ((first, 2.0), (second, 3.0), (first, 2.0)):
        x = torch.ones(3, requires_grad=True)
        with FlopCounterMode(display=False) as counted:
            y = function(x)
            y.backward(torch.ones(3))
        assert counted.get_total_flops() == factor
        assert torch.equal(y, torch.full((3,), factor))
        assert torch.equal(x.grad, torch.full((3,), factor))
        compiled = torch.compile(lambda x, f=function: f(x), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), torch.full((3,), factor))


def test_an_update_lives_on_when_its_module_is_loaded_again():
    def adds(amount: float):
        def function(params: list[Tensor]) -> None:
            params[0].add_(amount)

        return update_op("test_update_again", function, mutates=("params",))

    first, second = adds(2.0), adds(3.0)
    for function, amount in ((first, 2.0), (second, 3.0), (first, 2.0)):
        x = torch.zeros(2)
        with FlopCounterMode(display=False):
            function([x])
        assert torch.equal(x, torch.full((2,), amount))
