"""The mode that forbids host synchronisation, on CPU tensors: what it sees, what it lets pass, and whole steps."""

import contextlib
import dataclasses
import inspect
import textwrap

import pytest
import torch

from tritium.engine import syncs, train
from tritium.engine.config import Config, GPTConfig, KernelsConfig, TrainConfig
from tritium.engine.optim import AdamW
from tritium.engine.step import MicroBatch, train_step
from tritium.kernels import autograd, contract, ops
from tritium.kernels.adamw import impl_torch_fused

MODEL = GPTConfig(vocab_size=61, vocab_multiple=16, block_size=8, n_layer=2, n_head=4, n_embd=32)
LLAMA = dataclasses.replace(
    MODEL, position="rope", norm="rms_norm", activation="swiglu", n_kv_head=2, qk_norm=True, tie_head=False, bias=False
)
IDS = torch.randint(61, (2, 4, 8), generator=torch.Generator().manual_seed(0))
X, MASK = torch.arange(6.0), torch.tensor([True, False, True, False, True, False])


def planted(function, before: str, after: str):
    """The function with ``before`` replaced in its source; its file and lines stay, so that messages name them."""
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))
    assert before in source, f"{function.__qualname__} no longer holds {before!r}"
    code = "\n" * (function.__code__.co_firstlineno - 1) + source.replace(before, after)
    names: dict[str, object] = {}
    exec(compile(code, inspect.getsourcefile(function), "exec"), function.__globals__, names)
    return names[function.__name__]


def engine(kernels: str = "auto", model: GPTConfig = MODEL, **settings) -> train.Engine:
    config = Config(
        model=model,
        train=TrainConfig(batch_rows=8, micro_rows=4, precision="bf16", **settings),
        kernels=KernelsConfig(default="reference", adamw="torch_fused")
        if kernels == "torch"
        else KernelsConfig(kernels),
    )
    return train.build(config, compile=False)


def step(made: train.Engine, device: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    with syncs.forbidden(device=device) as seen:
        batches = [MicroBatch(ids, ids.clone()) for ids in IDS]
        result = train_step(made.loss, made.optimizer, batches, torch.tensor(1e-3), torch.tensor(1 / 64))
    assert not seen
    return result


@pytest.mark.parametrize("model", [MODEL, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("kernels", ["reference", "native", "torch", "auto"])
def test_a_whole_step_waits_for_nothing(kernels, model):
    """bf16, two micro-batches, with the same results as without the mode."""
    loss, norm = step(engine(kernels, model))
    made = engine(kernels, model)
    batches = [MicroBatch(ids, ids.clone()) for ids in IDS]
    plain = train_step(made.loss, made.optimizer, batches, torch.tensor(1e-3), torch.tensor(1 / 64))
    assert torch.equal(loss, plain[0]) and torch.equal(norm, plain[1])


def test_a_step_that_recomputes_waits_for_nothing():
    for recompute in ("full", "selective"):
        step(engine("auto", recompute=recompute))


FORBIDDEN = {
    "item": lambda: X[0].item(),
    "float": lambda: float(X[0]),
    "bool": lambda: bool(X[0]),
    "if": lambda: 1 if X[0] > 0 else 0,
    "index": lambda: [1, 2][torch.tensor(1)],
    "in": lambda: 3.0 in X,
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "cpu": lambda: X.cpu(),
    "print": lambda: str(X),
    "format": lambda: f"{X[0]:.3f}",
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(MASK),
    "mask": lambda: X[MASK],
    "mask of bytes": lambda: X[MASK.to(torch.uint8)],
    "store tensor by mask": lambda: X.clone().index_put_((MASK,), torch.ones(3)),
    "masked_select": lambda: X.masked_select(MASK),
    "equal": lambda: torch.equal(X, X),
    "allclose": lambda: torch.allclose(X, X),
    "is_nonzero": lambda: torch.is_nonzero(X[0]),
    "unique": lambda: X.unique(),
    "unique_consecutive": lambda: X.unique_consecutive(),
    "bincount": lambda: torch.bincount(X.long()),
    "repeat_interleave": lambda: torch.repeat_interleave(X, X.long()),
    "one_hot": lambda: torch.nn.functional.one_hot(X.long()),
    "clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(_with_grad(), 1.0, error_if_nonfinite=True),
    "synchronize": lambda: torch.cuda.synchronize(),
    "to the host": lambda: torch.empty(3, device="meta").to("cpu"),
    "from the host": lambda: torch.empty(3).to("meta"),
    "copy to the host": lambda: torch.empty(3).copy_(torch.empty(3, device="meta")),
}
ALLOWED = {
    "fill by mask": lambda: X.clone().index_put_((MASK,), torch.tensor(0.0)),
    "masked_fill": lambda: X.masked_fill(MASK, 0.0),
    "where": lambda: torch.where(MASK, X, 0.0),
    "index": lambda: X[torch.tensor([1, 2])],
    "slice": lambda: X[1:3],
    "repeat_interleave": lambda: torch.repeat_interleave(X, X.long(), output_size=15),
    "repeat_interleave by a number": lambda: X.repeat_interleave(2),
    "fill_": lambda: X.clone().fill_(3.0),
    "copy_": lambda: X.clone().copy_(X),
    "to another dtype": lambda: X.to(torch.bfloat16),
    "shapes": lambda: (X.shape[0], X.stride(), X.dtype, X.numel(), len(X)),
    "from the host, not waiting": lambda: torch.empty(3).to("meta", non_blocking=True),
    "sort": lambda: X.sort(),
    "clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(_with_grad(), 1.0),
}


def _with_grad() -> torch.Tensor:
    leaf = torch.ones(3, requires_grad=True)
    leaf.grad = torch.ones(3)
    return leaf


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_waits_is_seen(name):
    """By op and place."""
    with (
        pytest.raises(syncs.HostSync, match=r"^\S+ at \S*test_syncs\.py:\d+ \(.*\) .*the host would wait"),
        syncs.forbidden(),
    ):
        FORBIDDEN[name]()


@pytest.mark.parametrize("name", ALLOWED)
def test_what_does_not_wait_passes(name):
    with syncs.forbidden():
        ALLOWED[name]()


def test_what_the_ops_arguments_decide():
    """Judged without being run: as a graph's nodes are."""
    host, device, aten = torch.empty(3), torch.empty(3, device="meta"), torch.ops.aten
    assert syncs.reason(aten.copy_.default, (host, device)) is not None
    assert syncs.reason(aten.copy_.default, (host, device), {"non_blocking": True}) is None
    assert syncs.reason(aten.copy_.default, (host, device, True)) is None
    assert syncs.reason(aten._to_copy.default, (device,), {"dtype": torch.float16}) is None
    assert syncs.reason(aten._to_copy.default, (device,), {"device": "cpu", "non_blocking": True}) is None
    assert syncs.reason(aten.one_hot.default, (device.long(), 6)) is None
    assert syncs.reason(aten.one_hot.default, (device.long(),)) is not None
    assert syncs.reason(aten.nonzero.default, (host,), {}, "meta") is None
    assert syncs.reason(aten.nonzero.default, (device,), {}, "meta") is not None
    assert syncs.reason(torch.ops.higher_order.flex_attention, (device,)) is None


def test_it_ends_with_its_block():
    before = torch.cuda.synchronize
    with pytest.raises(ZeroDivisionError), syncs.forbidden():
        1 / 0  # noqa: B018
    assert X[0].item() == 0.0
    assert torch.cuda.synchronize is before
    assert X.tolist() == [0, 1, 2, 3, 4, 5]
    assert autograd.watching == 0


def test_functions_may_be_allowed():
    def log(x):
        return x.item()

    with syncs.forbidden(allow=[log]) as seen:
        assert log(X[2]) == 2.0
        with pytest.raises(syncs.HostSync):
            X[2].item()
    (line,) = seen
    assert line.startswith("aten._local_scalar_dense.default at ") and "test_syncs.py:" in line


def test_the_hosts_own_tensors_may_be_read():
    """With the device named, a launcher's table of sizes, which it makes on the host, is no concern."""
    with syncs.forbidden(device="meta"):
        assert torch.repeat_interleave(torch.arange(2), torch.tensor([2, 1])).tolist() == [0, 0, 1]
        with pytest.raises(syncs.HostSync, match="copies from cpu to meta and waits"):
            torch.zeros(3).to("meta")


# ------------------------------------------------------------------------------------------------------ planted faults


def test_planted_in_the_clip(monkeypatch):
    norm = "norm = self.global_norm(grads) * inverse_count"
    monkeypatch.setattr(AdamW, "step", planted(AdamW.step, norm, norm + "; norm.item()"))
    with pytest.raises(syncs.HostSync, match=r"^aten\._local_scalar_dense\.default at engine/optim\.py:\d+ \(norm ="):
        step(engine())


def test_planted_in_the_clip_as_a_condition(monkeypatch):
    before = "if self.config.grad_clip > 0.0:"
    monkeypatch.setattr(AdamW, "step", planted(AdamW.step, before, "if norm > self.config.grad_clip:"))
    with pytest.raises(syncs.HostSync, match=r"at engine/optim\.py:\d+ \(if self"):
        step(engine())


def test_planted_in_the_update(monkeypatch):
    """In the reference, and inside torch_fused's custom op."""
    line = "keep = skip == 0"
    monkeypatch.setattr(ops.adamw, "_loaded", {})
    monkeypatch.setitem(ops.adamw.__dict__, "reference", planted(ops.adamw.reference, line, line + "; bool(keep)"))
    with pytest.raises(syncs.HostSync, match=r"at kernels/adamw/reference\.py:\d+ \(keep ="):
        step(engine("reference"))
    inner = planted(impl_torch_fused._adamw, "begin = 0", "begin = int(skip)")
    monkeypatch.setattr(
        impl_torch_fused._update.__closure__[_cell(impl_torch_fused._update, "function")], "cell_contents", inner
    )
    with pytest.raises(syncs.HostSync, match=r"at kernels/adamw/impl_torch_fused\.py:\d+ \(begin ="):
        step(engine("torch"))


def _cell(function, name: str) -> int:
    return function.__code__.co_freevars.index(name)


def test_planted_in_the_step(monkeypatch):
    """Where training would report its loss too soon."""
    line = "part.backward()"
    monkeypatch.setitem(globals(), "train_step", planted(train_step, line, "part.backward(); part.item()"))
    with pytest.raises(syncs.HostSync, match=r"at engine/step\.py:\d+ \(part.backward"):
        step(engine())


def test_planted_in_backward():
    """An autograd function of the model's that looks at its gradient."""

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient if gradient.isfinite().all() else None

    x = torch.ones(3, requires_grad=True)
    with pytest.raises(syncs.HostSync, match=r"test_syncs\.py:\d+ \(return gradient if"), syncs.forbidden():
        Looks.apply(x).sum().backward()


# ----------------------------------------------------------------------------------------------- other people's kernels


@torch.library.custom_op("tests::reads_inside", mutates_args=())
def reads_inside(x: torch.Tensor, how: str) -> torch.Tensor:
    {"item": lambda: x.sum().item(), "tolist": lambda: x.tolist(), "nothing": lambda: x.sum()}[how]()
    return 2 * x


@pytest.mark.parametrize("how", ["item", "tolist", "nothing"])
def test_the_python_of_a_custom_op_is_looked_into(how):
    x = torch.ones(3)
    with pytest.raises(syncs.HostSync, match="reads the data") if how != "nothing" else contextlib.nullcontext():
        with syncs.forbidden():
            y = reads_inside(x, how)
        assert torch.equal(y, 2 * x)
    if how != "nothing":
        with syncs.forbidden(device="cuda"):  # no tensor of it
            reads_inside(x, how)


def test_an_operator_that_takes_functions_runs():
    (case,) = (c for c in ops.attention.cases.CASES if c.name == "tiny")
    report = contract.check(ops.attention, "flex", case, phase="eval", watch=syncs.forbidden)
    assert report.ok, report


def test_a_users_own_file_is_named():
    code = compile("def read(x):\n    return x.sum().item()\n", "/elsewhere/mine.py", "exec")
    space: dict = {}
    exec(code, space)
    with pytest.raises(syncs.HostSync, match=r"at /elsewhere/mine\.py:2 "), syncs.forbidden():
        space["read"](torch.ones(2))
