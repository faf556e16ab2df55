"""The native library itself: its element functions, instruction sets, threads, and what it says when it is missing."""

import pathlib
import re

import pytest
import torch
from torch import Tensor

from tritium.kernels import contract, ops
from tritium.kernels.case import Case
from tritium.kernels.lib import native
from tritium.kernels.site import Machine, Site

CPU = Machine("cpu", "x86_64")
ISAS = native.isas() or ("missing",)
OPS = ("layer_norm", "cross_entropy", "linear_cross_entropy", "adamw", "gelu")


def call(op: str):
    return getattr(ops, op).load("native").function


def test_the_library_is_built_from_these_sources():
    assert native.missing() is None
    header = pathlib.Path(native.__file__).parent / "csrc" / "tritium.h"
    assert f"#define TRITIUM_ABI {native.ABI} " in header.read_text()


def test_one_openmp_runtime_serves_torch_and_the_kernels():
    call("layer_norm")(torch.randn(300, 300), torch.ones(300))
    maps = pathlib.Path("/proc/self/maps").read_text()
    assert "_native.so" in maps
    assert len(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)\S*", maps))) == 1


# ------------------------------------------------------------------------------------------------- element functions

elementary = native.Function("elementary", "ippl")
EXP, TANH, BF16 = range(3)


def apply(function: int, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    elementary(function, x.data_ptr(), y.data_ptr(), x.numel())
    return y


def ulps(y: Tensor, exact: Tensor) -> float:
    """The largest error in units of the last place of the exact value. y fp32, exact fp64."""
    _, exponent = torch.frexp(exact)
    return ((y.double() - exact).abs() / torch.exp2((exponent - 24).double())).max().item()


@pytest.mark.parametrize("isa", ISAS)
def test_exp_is_within_one_ulp(isa):
    x = torch.cat([torch.linspace(-87.33, 88.0, 1_000_003), -torch.logspace(-30, 1.9, 20_001), torch.zeros(1)])
    with native.use_isa(isa):
        assert ulps(apply(EXP, x), x.double().exp()) <= 1.0
        ends = apply(EXP, torch.tensor([0.0, -0.0, -87.34, -1000.0, -torch.inf, torch.nan]))
    assert ends[:5].tolist() == [1, 1, 0, 0, 0]
    assert ends[5].isnan()


@pytest.mark.parametrize("isa", ISAS)
def test_tanh_is_within_two_ulps(isa):
    x = torch.cat([torch.linspace(-12, 12, 1_000_003), torch.logspace(-30, 1, 20_001), torch.linspace(0.6, 0.65, 5001)])
    with native.use_isa(isa):
        assert ulps(apply(TANH, x), x.double().tanh()) <= 2.0
        ends = apply(TANH, torch.tensor([0.0, 100.0, -100.0, torch.inf, -torch.inf, torch.nan]))
    assert ends[:5].tolist() == [0, 1, -1, 1, -1]
    assert ends[5].isnan()


@pytest.mark.parametrize("isa", ISAS)
def test_bf16_rounding_is_torchs(isa):
    bits = torch.cat(
        [
            torch.randint(-(2**31), 2**31, (300_000,), generator=torch.Generator().manual_seed(0)),
            (torch.arange(2**16) << 16) - 2**31 + 0x8000,  # every tie
            torch.tensor([0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF, -1, 1, 0x007FFFFF]),
        ]
    )
    x = bits.to(torch.int32).view(torch.float32)
    with native.use_isa(isa):
        y = apply(BF16, x)
    expected = x.bfloat16().float()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[~y.isnan()], expected[~y.isnan()])


# ----------------------------------------------------------------------------------------- instruction sets, threads


# sizes around the vector widths (4, 8, 16), the four streams of a row's sum, the blocks of rows and of columns
CASES = {
    "layer_norm": [Case(f"{N}x{C}", {"N": N, "C": C}) for N, C in ((1, 2), (3, 4), (2, 15), (33, 17), (31, 63), (70,
    259))],
    "cross_entropy": [
        Case(f"{V}of{Vp}", {"N": 5, "V": V, "Vp": Vp}, options)
        for V, Vp, options in (
            (2, 3, {}),
            (1023, 1024, {"label_smoothing": 0.2}),
            (1025, 1040, {"softcap": 20.0}),
            (2049, 2049, {"z_loss": 1e-3, "ignored": 0.3}),
        )
    ],
    "linear_cross_entropy": [],
    "adamw": [Case("tails", {"K": 9, "P": 37}, {"weight_decay": 0.1})],
    "gelu": [Case(f"{F}", {"F": F}) for F in (15, 17, 8191, 8193)] + [Case("threads", {"N": 3, "F": 8192})],
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_holds_the_contract(isa, op, dtype):
    the_op = getattr(ops, op)
    small = [case for case in the_op.cases.CASES if not case.large]
    with native.use_isa(isa):
        for case in [*small, *CASES[op]]:
            report = contract.check(the_op, "native", case, dtype, variants=("plain",))
            assert report.ok, f"{isa} {op} {case}: {report.reason}"


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match=r"'v9' is not one of this library on this CPU: .*base"), native.use_isa("v9"):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    """Bit for bit: forward, and the sums over rows in layer_norm's weight gradients."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(1500, 96, generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(96, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    logits = torch.randn(300, 700, generator=generator).to(dtype)
    targets = torch.randint(0, 700, (300,), generator=generator)

    def everything() -> list[Tensor]:
        x_, logits_ = x.clone().requires_grad_(), logits.clone().requires_grad_()
        y = call("layer_norm")(x_, weight, bias)
        losses = call("cross_entropy")(logits_, targets, 690, label_smoothing=0.1)
        state = [[t.detach().float().clone() for t in (x, dy)] for _ in range(3)]
        state[2] = [t.square() for t in state[2]]
        copies = [t.clone() for t in (x, dy)]
        scalars = [torch.tensor(value) for value in (1e-2, 3.0, 0.5, 0.0)]
        call("adamw")(state[0], copies, [dy, x], state[1], state[2], *scalars)
        return [
            *(y, *torch.autograd.grad(y, (x_, weight, bias), dy)),
            *(losses, *torch.autograd.grad(losses, logits_, torch.linspace(0, 1, 300))),
            *(*state[0], *state[1], *state[2], *copies),
        ]

    targets = targets.clamp(max=689)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(everything())
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


# ------------------------------------------------------------------------------------------------- refusing, missing


@pytest.mark.parametrize("op", OPS)
def test_a_site_it_cannot_serve_gets_rule_value_and_remedy(op):
    unsupported = getattr(ops, op).load("native").module.unsupported
    assert unsupported(Site(op, CPU)) is None
    assert unsupported(Site(op, CPU, dtype=torch.bfloat16)) is None
    on_gpu = unsupported(Site(op, Machine("cuda", "sm_90")))
    assert "run on the CPU" in on_gpu and "cuda" in on_gpu and "choose" in on_gpu
    double = unsupported(Site(op, CPU, dtype=torch.float64))
    assert "float32 and bfloat16" in double and "float64" in double and "choose reference" in double


@pytest.fixture
def without_library(tmp_path, monkeypatch):
    """No library where it is looked for; what was loaded before comes back afterwards."""
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    monkeypatch.setattr(native, "REASON", tmp_path / "_native_missing.txt")
    native._load.cache_clear()
    yield tmp_path
    native._load.cache_clear()


def test_a_missing_library_is_explained_by_what_the_installation_recorded(without_library):
    site = Site("layer_norm", CPU)
    unsupported = ops.layer_norm.load("native").module.unsupported
    assert "has not been built; rebuild it (make train" in unsupported(site)
    native._load.cache_clear()
    native.REASON.write_text("no C++ compiler was found; install one\n")
    assert unsupported(site) == "native library missing: no C++ compiler was found; install one"
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler was found; install one"):
        native.Function("layer_norm_forward", "i")(0)


def test_a_library_that_does_not_load_or_does_not_fit_is_explained(without_library, monkeypatch):
    native.LIBRARY.write_bytes(b"not a library")
    assert re.search(r"native library unusable: .*(invalid ELF|too short).*; rebuild it", native.missing())


def test_a_library_of_another_interface_is_refused(monkeypatch):
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    native._load.cache_clear()
    try:
        assert re.search(
            rf"built with interface {native.ABI - 1} and these sources need {native.ABI}; rebuild", native.missing()
        )
    finally:
        native._load.cache_clear()


# ------------------------------------------------------------------------------------------------------------ inductor


def test_inductor_takes_the_ops_into_one_graph():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, head = (torch.randn(s, generator=generator) for s in ((40, 24), (24,), (24,), (56, 24)))
    targets = torch.randint(0, 50, (40,), generator=generator)

    def loss(x: Tensor, weight: Tensor, bias: Tensor, head: Tensor) -> Tensor:
        return call("linear_cross_entropy")(call("layer_norm")(x, weight, bias), head, targets, 50, chunk=16)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, head)]
        value = function(*leaves)
        value.backward()
        results.append([value, *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
