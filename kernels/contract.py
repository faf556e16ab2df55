"""The conformance tests of a backend, shipped: pytest calls them, and so does ``tritium kernels check``.

A backend is right when, on every case it does not refuse, forward and every gradient stay within

    error ≤ FACTOR × (the error of the reference in the same dtype) + floor

of the reference computed in fp64 from the same inputs, for the largest error (max) and for the root
mean square (rms). The constants are FACTOR and FLOORS; docs/numerics.md explains them. Beyond the numbers a backend

    leaves its arguments and the upstream gradients as they were (an update op: all but what it is there to update),
    takes any strides, and upstream gradients that are expanded or strided,
    reads no memory that it did not write: allocations are filled with NaN,
    writes within what it allocates (where a watcher is given),
    gives gradients for any subset of its inputs, and works without grad,
    returns and saves memory of its own: another call between forward and backward changes nothing,
    repeats bit for bit when its module says ``DETERMINISTIC = True``,
    runs inside one full graph of torch.compile, where the fakes of its custom ops tell the truth,
    and never lets the host wait for a GPU that it could serve (where a watcher is given).

A backend whose module says ``PRECISION = "fp8"`` is held to the reference on operands that are rounded to fp8's
digits, and on operands that have no more than those: there rounding changes nothing, and the bound is the compute
dtype's.

A case that a backend refuses through ``unsupported(site)`` is reported as refused, never as passed.
"""

from __future__ import annotations

import contextlib
import math
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import deterministic as _memory
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tritium.kernels import autograd
from tritium.kernels.case import Case
from tritium.kernels.op import Backend, Op
from tritium.kernels.site import Machine, Site

FACTOR = 2.0
# (max, rms) floors in units of roundoff, relative to the largest value and to the rms of the fp64 result. They cover
# what the first term cannot: a reference that happens to be exact on few elements, and another order of summation.
FLOORS: Mapping[torch.dtype, tuple[float, float]] = {
    torch.float64: (64.0, 32.0),
    torch.float32: (32.0, 16.0),
    torch.float16: (1.0, 0.5),
    torch.bfloat16: (1.0, 0.5),
}
# Tensor cores take the attention weights and their gradient in 16 bits, which the reference keeps in fp32; so do all
# fused kernels, torch's on the CPU among them, which besides adds blocks of dk and dv in 16 bits.
OP_FLOORS: Mapping[tuple[str, torch.dtype], tuple[float, float]] = {
    ("attention", torch.float16): (4.0, 1.5),
    ("attention", torch.bfloat16): (4.0, 1.5),
    ("attention_lse", torch.float16): (4.0, 1.5),
    ("attention_lse", torch.bfloat16): (4.0, 1.5),
    # gradients made in the forward pass are rounded there, and again when they are multiplied in backward
    ("cross_entropy", torch.float16): (2.0, 1.0),
    ("cross_entropy", torch.bfloat16): (2.0, 1.0),
}
# Few numbers may be all small by chance beside the terms that they are sums of, and the reference's error with them.
FEW, FEW_FACTOR = 16, 4.0
# tensors whose floor is the compute dtype's although they are wider: one sum over logits rounded to the compute dtype
COARSE = frozenset({("linear_cross_entropy", "output")})
# What PRECISION = "fp8" rounds to: significant bits of the arguments (e4m3) and of upstream gradients (e5m2).
ARGUMENT_BITS, UPSTREAM_BITS = 4, 3
# Of operands that come up inside an op (the gradient of the logits) the reference rounds none: u, of e5m2, is added to
# the floors of the gradients that are made of them. They lie on no grid, so there only the output is looked at.
INNER_OPERANDS: Mapping[str, float] = {"linear_cross_entropy": 2.0**-3}
Watch = Callable[[], contextlib.AbstractContextManager[object]]
GPU = Machine("cuda", "sm_90")  # with this machine's packages
VARIANTS = ("plain", "strided", "expanded", "partial", "no_grad")


def unit_roundoff(dtype: torch.dtype) -> float:
    """Half the spacing of the numbers next to 1: 2⁻²⁴ for fp32, 2⁻⁸ for bf16."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Compared:
    """One tensor of one variant: its errors against fp64 and the bounds they must keep."""

    variant: str
    tensor: str
    max_error: float
    max_bound: float
    rms_error: float
    rms_bound: float

    @property
    def ok(self) -> bool:
        return self.max_error <= self.max_bound and self.rms_error <= self.rms_bound  # False for NaN

    @property
    def ratio(self) -> float:
        """How much of the bound is used; above 1 is red."""
        pairs = ((self.max_error, self.max_bound), (self.rms_error, self.rms_bound))
        return max((0.0 if error == 0.0 else error / bound if bound > 0.0 else math.inf) for error, bound in pairs)

    def __str__(self) -> str:
        return (
            f"{self.variant} {self.tensor}: max error {self.max_error:.3g} (bound {self.max_bound:.3g}), "
            f"rms error {self.rms_error:.3g} (bound {self.rms_bound:.3g})"
        )


@dataclass(frozen=True)
class Report:
    """What :func:`check` found. ``ok``: the case ran and kept every bound; a refused case is not ok."""

    op: str
    backend: str
    case: str
    dtype: torch.dtype
    device: str
    phase: str
    compiled: bool
    ok: bool
    refused: bool
    reason: str
    errors: tuple[Compared, ...] = ()

    @property
    def status(self) -> str:
        return "passed" if self.ok else "refused" if self.refused else "failed"

    @property
    def worst(self) -> Compared | None:
        return max(self.errors, key=lambda e: e.ratio if not math.isnan(e.ratio) else math.inf, default=None)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        mode = "compiled" if self.compiled else "eager"
        line = f"{self.status:<8}{self.op}.{self.backend}  {self.case}  {dtype} {self.device} {self.phase} {mode}"
        if self.ok:
            return f"{line}  worst {self.worst.ratio:.2f} of the bound ({self.worst})" if self.worst else line
        return f"{line}: {self.reason}"


class _Broken(AssertionError):
    """A rule of the contract that does not hold; its text is the report's reason."""


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """fp32 products in fp32: with TF32 the fp32 reference would be wrong, and the bound that follows from it wide."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# ------------------------------------------------------------------------------------------------------------ checking


def check(
    op: Op,
    backend: str | Backend,
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    compiled: bool | str = False,
    seed: int = 0,
    phase: str = "train",
    variants: Sequence[str] = VARIANTS,
    machine: Machine | None = None,
    watch: Watch | None = None,
) -> Report:
    """Hold one backend to the contract on one case.

    compiled: True runs inside ``torch.compile(fullgraph=True)`` by Inductor, a string names another compiler
    ("aot_eager"); it resets Dynamo's caches. phase: "train" checks forward and gradients, any other the forward only.
    machine: what the backend is asked about, by default this one. watch: a context to call and differentiate the
    backend in once more, eagerly; what it raises fails the case (engine/syncs.py: the host would wait for the device).
        Not of a backend that refuses a GPU.
    """
    device = torch.device(device)
    loaded = backend if isinstance(backend, Backend) else op.load(backend)
    site = site_of(op, case, dtype, machine or Machine.here(device), phase=phase, compiled=bool(compiled))

    def report(ok: bool, reason: str = "", errors: Sequence[Compared] = (), refused: bool = False) -> Report:
        return Report(
            op=op.name, backend=loaded.name, case=case.name, dtype=dtype, device=str(device), phase=phase,
            compiled=bool(compiled), ok=ok, refused=refused, reason=reason, errors=tuple(errors),
        )  # fmt: skip

    reason = loaded.unsupported(site)
    if reason is not None:
        return report(False, reason, refused=True)
    fenced = watch is not None
    if watch is not None and device.type == "cpu" and loaded.unsupported(site.replace(machine=GPU)) is not None:
        watch = None  # it is for CPUs alone, whose tensors the host may read
    errors: list[Compared] = []
    try:
        with _full_precision():
            if op.updates:
                _check_update(op, loaded, case, dtype, device, compiled, seed, errors, watch)
            else:
                if fenced:  # before the runs whose memory, without fences, is others'
                    _check_fences(op, loaded, case, dtype, device, seed, train=phase == "train")
                _check_function(op, loaded, case, dtype, device, compiled, seed, phase, variants, errors, watch)
    except _Broken as broken:
        return report(False, "; ".join([str(broken), *(str(e) for e in errors if not e.ok)]), errors)
    except Exception as error:  # whatever a backend raises on a case it accepted is a finding, with its place
        return report(False, f"raised {type(error).__name__}: {error}\n{_place(error)}", errors)
    red = [e for e in errors if not e.ok]
    return report(not red, "; ".join(map(str, red)), errors)


def check_all(
    op: Op,
    backend: str | Backend,
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
    device: str | torch.device = "cpu",
    *,
    compiled: bool | str = False,
    seed: int = 0,
    large: bool = False,
    cases: Iterable[Case] | None = None,
    variants: Sequence[str] = VARIANTS,
    watch: Watch | None = None,
) -> list[Report]:
    """:func:`check` over the op's cases (``large`` ones only when asked for) and dtypes.

    A case that is refused for training is tried forward only as well.
    """
    reports = []
    for case in op.cases.CASES if cases is None else cases:
        if case.large and not large:
            continue
        for dtype in dtypes:
            phases = ("train",) if op.updates else ("train", "eval")
            for phase in phases:
                report = check(
                    op, backend, case, dtype, device, compiled=compiled, seed=seed, phase=phase, variants=variants,
                    watch=watch,
                )  # fmt: skip
                if phase == "train" or not report.refused:
                    reports.append(report)
                if not report.refused:
                    break
    return reports


def format_reports(reports: Sequence[Report]) -> str:
    """Reports as text: failures in full, refusals by reason, passes by number and worst use of their bound."""
    lines = [str(r) for r in reports if r.status == "failed"]
    refusals: dict[tuple[str, str, str], list[str]] = {}
    for r in reports:
        if r.refused:
            refusals.setdefault((r.op, r.backend, r.reason), []).append(r.case)
    lines += [
        f"refused {op}.{backend}  {len(names)} of {sum(r.op == op and r.backend == backend for r in reports)} cases "
        f"({', '.join(dict.fromkeys(names))}): {reason}"
        for (op, backend, reason), names in refusals.items()
    ]
    for op, backend in dict.fromkeys((r.op, r.backend) for r in reports):
        passed = [r for r in reports if r.ok and (r.op, r.backend) == (op, backend)]
        worst = max((r.worst for r in passed if r.worst), key=lambda e: e.ratio, default=None)
        note = f", worst {worst.ratio:.2f} of its bound ({worst})" if worst else ""
        lines.append(f"passed  {op}.{backend}  {len(passed)} cases{note}")
    return "\n".join(lines)


def site_of(
    op: Op,
    case: Case,
    dtype: torch.dtype,
    machine: Machine,
    *,
    phase: str = "train",
    compiled: bool = False,
    deterministic: bool = False,
) -> Site:
    """The call site a case stands for."""
    return Site(
        op=op.name, machine=machine, name=f"case {case.name}", phase=phase, dtype=dtype, shape=case.shape,
        options=case.options, compiled=compiled, deterministic=deterministic,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- functions


def _check_function(
    op: Op, backend: Backend, case: Case, dtype: torch.dtype, device: torch.device, compiled: bool | str, seed: int,
    phase: str, variants: Sequence[str], errors: list[Compared], watch: Watch | None,
) -> None:  # fmt: skip
    train = phase == "train"
    arguments = op.cases.inputs(case, dtype, device, seed)
    if not train:
        arguments = {n: v.detach() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    call = _prepared(backend, _compile(backend.function, compiled))

    fp8 = backend.precision == "fp8"

    def alike(arguments: Mapping[str, Any], upstream: Sequence[Tensor]) -> _Result:
        """The reference in the backend's precision."""
        if fp8:
            arguments = {n: _digits(v, ARGUMENT_BITS) for n, v in arguments.items()}
            upstream = [_digits(g, UPSTREAM_BITS) for g in upstream]
        return _run(op.reference, arguments, upstream, train)

    first = _run(op.reference, arguments, None, train)
    upstream = _upstream(first.outputs, seed)
    exact = _run(op.reference, _wide(arguments), _wide(upstream), train)
    same = alike(arguments, upstream)
    masks = op.cases.exact_zeros(case, arguments) if hasattr(op.cases, "exact_zeros") else {}

    def compare(variant: str, got: _Result, exact: _Result, same: _Result) -> None:
        if got.names() != same.names():
            raise _Broken(
                f"{variant}: returns {', '.join(got.names())} where the reference returns {', '.join(same.names())}"
            )
        for name, value in got.items():
            inner = INNER_OPERANDS.get(op.name, 0.0) if fp8 and name not in exact.outputs_only() else 0.0
            errors.append(_compare(op, variant, name, value, exact[name], same[name], dtype, exact.scale, inner))
            mask = masks.get(name)
            if mask is not None and bool((value[mask] != 0).any()):
                raise _Broken(f"{variant} {name}: must be exactly 0 where the op says so (padding, ignored rows)")

    for variant in variants:
        if variant == "plain":
            with contextlib.nullcontext() if compiled else _poisoned():
                got = _run(call, arguments, upstream, train, unchanged=True)
            compare(variant, got, exact, same)
            if fp8:
                grid = {n: _on_grid(v, ARGUMENT_BITS) for n, v in arguments.items()}
                above = [_on_grid(g, UPSTREAM_BITS) for g in upstream]
                want, near = _run(op.reference, _wide(grid), _wide(above), train), alike(grid, above)
                got_there = _run(call, grid, above, train)
                if op.name in INNER_OPERANDS:
                    got_there, want, near = (r.outputs_only() for r in (got_there, want, near))
                compare("on the grid", got_there, want, near)
            if getattr(backend.module, "DETERMINISTIC", False):
                with contextlib.nullcontext() if compiled else _poisoned():
                    again = _run(call, arguments, upstream, train)
                for name, value in again.items():
                    if not _same_bits(value, got[name]):
                        raise _Broken(f"{name}: two equal calls differ, and the module says DETERMINISTIC = True")
        elif variant == "strided" and not compiled:
            layout = {n: _strided(v, i + seed) for i, (n, v) in enumerate(arguments.items())}
            grads = [_strided(g, i + seed + 1) for i, g in enumerate(upstream)]
            # a model's next layer, whose call comes before this one's backward; here, to spare a run of its own
            other = op.cases.inputs(case, dtype, device, seed + 1)
            if not train:
                other = {n: v.detach() if isinstance(v, Tensor) else v for n, v in other.items()}
            before = len(errors)
            try:
                between = _run(call, layout, grads, train, unchanged=True, between=partial(call, **other))
                compare(variant, between, exact, same)
                kept = all(e.ok for e in errors[before:])
            except Exception:  # of whatever kind: the run alone raises it too, or the other call is to blame
                kept = False
            if not kept:
                del errors[before:]
                compare(variant, _run(call, layout, grads, train, unchanged=True), exact, same)
                if all(e.ok for e in errors[before:]):
                    raise _Broken(
                        "another call between this one's forward and backward changes what it gives: what it returns "
                        "and what it saves must be memory of its own, allocated in every call"
                    )
        elif variant == "expanded" and train:
            one = [g.flatten()[:1].reshape([1] * g.dim()).expand(g.shape) if g.numel() else g for g in upstream]
            want, near = _run(op.reference, _wide(arguments), _wide(one), True), alike(arguments, one)
            compare(variant, _run(call, arguments, one, train, unchanged=True), want, near)
        elif variant == "partial" and train and not compiled:
            differentiable = [n for n, v in arguments.items() if isinstance(v, Tensor) and v.requires_grad]
            for kept in differentiable if len(differentiable) > 1 else []:
                subset = {n: v.detach() if isinstance(v, Tensor) and n != kept else v for n, v in arguments.items()}
                got = _run(call, subset, upstream, train)
                compare(f"gradient of {kept} alone:", got, exact.only(got), same.only(got))
        elif variant == "no_grad" and not compiled:
            got = _run(call, arguments, None, False)
            compare(variant, got, exact.only(got), same.only(got))
    if watch is not None:
        _run(_prepared(backend, backend.function), arguments, upstream, train, around=watch)
    if compiled:  # first argument and upstream gradient transposed: of row-major ones any fake's strides are right
        layout = {n: _strided(v, i + 1) for i, (n, v) in enumerate(arguments.items())}
        grads = [_strided(g, i + 1) for i, g in enumerate(upstream)]
        _run(_prepared(backend, backend.function), layout, grads, train, around=_TrueFakes)


def _check_fences(
    op: Op, backend: Backend, case: Case, dtype: torch.dtype, device: torch.device, seed: int, train: bool
) -> None:
    arguments = op.cases.inputs(case, dtype, device, seed)
    if not train:
        arguments = {n: v.detach() if isinstance(v, Tensor) else v for n, v in arguments.items()}
    upstream = _upstream(_run(op.reference, arguments, None, train).outputs, seed)
    fences = _Fences()
    # what is raised here is raised in the runs without fences too; or the backend compiles itself, and torch compiles
    # nothing under a dispatch mode, which Dynamo then remembers of that code
    with contextlib.suppress(Exception):
        _run(_prepared(backend, backend.function), arguments, upstream, train, around=lambda: fences)
    torch._dynamo.reset()
    fences.look()


class _Fences(TorchDispatchMode):
    """Puts a fence before and after the memory of every tensor that is allocated uninitialised."""

    BYTES = 4096  # a multiple of what any allocator aligns to, and some rows
    MARK = 0xFF  # of every float dtype this is NaN: who reads beyond his own is likely to show it
    supports_higher_order_operators = True  # they run as they are
    ALLOCATE = frozenset({"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"})

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, Tensor]] = []

    def __enter__(self) -> _Fences:
        autograd.watching += 1  # what runs without this mode runs with it
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        autograd.watching -= 1
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        allocates = getattr(function, "_opname", "") in self.ALLOCATE and function.namespace == "aten"
        pinned = allocates and (kwargs or {}).get("pin_memory")
        if not allocates or pinned or type(made) is not Tensor or made.is_meta or made.layout != torch.strided:
            return made
        size = made.untyped_storage().nbytes()
        block = torch.full((size + 2 * self.BYTES,), self.MARK, dtype=torch.uint8, device=made.device)
        self.all.append((f"{made.dtype} {tuple(made.shape)}", block))
        first = self.BYTES // made.element_size()
        return torch.empty(0, dtype=made.dtype, device=made.device).set_(
            block.untyped_storage(), first, made.shape, made.stride()
        )

    def look(self) -> None:
        """Raise where a fence is not as it was put."""
        for what, block in self.all:
            for place, fence in (("before", block[: self.BYTES]), ("after", block[-self.BYTES :])):
                if bool((fence != self.MARK).any()):
                    raise _Broken(f"writes {place} the memory of a tensor that it allocates, {what}")


class _TrueFakes(TorchDispatchMode):
    """Raises where a custom op gives other results than its fake says: a compiler has laid out memory by the fake."""

    supports_higher_order_operators = True  # they run as they are

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        real = function(*args, **kwargs)
        custom = isinstance(function, torch._ops.OpOverload) and function.namespace not in ("aten", "prim", "prims")
        if not custom or function._schema.is_mutable:
            return real
        with FakeTensorMode() as mode:
            fake_args, fake_kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
            fake = function(*fake_args, **fake_kwargs)
        said, given = ([_layout(t) for t in tree_leaves(results)] for results in (fake, real))
        if said != given:
            raise _Broken(
                f"compiled: the fake of {function} says {'; '.join(said)} where the op gives {'; '.join(given)}"
            )
        return real


def _layout(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    # the stride of an axis of one element, and all strides of no elements, lead nowhere
    strides = [s if n > 1 and value.numel() else "-" for n, s in zip(value.shape, value.stride(), strict=True)]
    return f"{value.dtype} {tuple(value.shape)} on {value.device}, strides ({', '.join(map(str, strides))})"


class _Result(dict[str, Tensor]):
    """Tensors by name: "output" (or "output 0", ...) and "gradient of NAME"."""

    def names(self) -> list[str]:
        return sorted(self)

    @property
    def outputs(self) -> list[Tensor]:
        return [v for n, v in self.items() if n.startswith("output")]

    @property
    def scale(self) -> float:
        """The largest finite value of any tensor: what a result that is exactly zero by cancellation was made from."""
        return max((_finite(v).abs().max().item() for v in self.values() if v.numel()), default=0.0)

    def only(self, other: _Result) -> _Result:
        return _Result({n: v for n, v in self.items() if n in other})

    def outputs_only(self) -> _Result:
        return _Result({n: v for n, v in self.items() if n.startswith("output")})


def _run(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    upstream: Sequence[Tensor] | None,
    train: bool,
    *,
    unchanged: bool = False,
    around: Watch = contextlib.nullcontext,
    between: Callable[[], object] | None = None,
) -> _Result:
    """Call ``function`` on fresh leaves of ``arguments``; with ``upstream`` gradients, differentiate as well; both in
    the context ``around()``, and ``between`` them."""
    leaves = {n: _leaf(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    before = {n: _storage(v).clone() for n, v in leaves.items() if isinstance(v, Tensor)} if unchanged else {}
    grads_before = [_storage(g).clone() for g in upstream or []] if unchanged else []
    with torch.set_grad_enabled(train), around():
        raw = function(**leaves)
        if between is not None:
            between()
    outputs = list(raw) if isinstance(raw, (tuple, list)) else [raw]
    if not all(isinstance(o, Tensor) for o in outputs):
        raise _Broken(f"returns {', '.join(type(o).__name__ for o in outputs)}; an op returns tensors")
    if upstream is not None and [o.shape for o in outputs] != [g.shape for g in upstream]:
        returned, expected = ([tuple(t.shape) for t in group] for group in (outputs, upstream))
        raise _Broken(f"returns shapes {returned} where the reference returns {expected}")
    names = ["output"] if not isinstance(raw, (tuple, list)) else [f"output {i}" for i in range(len(outputs))]
    result = _Result({n: o.detach() for n, o in zip(names, outputs, strict=True)})
    wanted = {n: v for n, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}
    if train and upstream is not None and wanted:
        pairs = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
        if not pairs:
            raise _Broken(f"no output requires grad although {', '.join(wanted)} does")
        with around():
            found = torch.autograd.grad(
                [o for o, _ in pairs], list(wanted.values()), [g for _, g in pairs], allow_unused=True
            )
        for (name, leaf), gradient in zip(wanted.items(), found, strict=True):
            result[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    for name, storage in before.items():
        if not torch.equal(storage, _storage(leaves[name])):
            raise _Broken(f"changes its argument {name}, or the memory between its elements")
    for index, (now, storage) in enumerate(zip(upstream or [], grads_before, strict=False)):
        if not torch.equal(storage, _storage(now)):
            raise _Broken(f"backward changes the upstream gradient of output {index}")
    return result


def _storage(value: Tensor) -> Tensor:
    """All bytes that a tensor lies in, those between its elements included."""
    return torch.empty(0, dtype=torch.uint8, device=value.device).set_(value.detach().untyped_storage())


def _leaf(value: Tensor) -> Tensor:
    """A fresh leaf with the same values *and strides* (its gaps too), so that one run cannot disturb the next."""
    if value.numel() == 0 or value.is_contiguous():
        fresh = value.detach().clone(memory_format=torch.preserve_format)
    else:
        whole = value.detach().untyped_storage().clone()
        fresh = torch.empty(0, dtype=value.dtype, device=value.device).set_(
            whole, value.storage_offset(), value.shape, value.stride()
        )
    return fresh.requires_grad_(value.requires_grad)


def _prepared(backend: Backend, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the backend's ``prepare`` run on ``seq_start``, as the engine does once per micro-batch."""
    prepare = backend.prepare
    if prepare is None:
        return function

    def call(**arguments: Any) -> Any:
        if isinstance(arguments.get("seq_start"), Tensor):
            arguments = {**arguments, "seq_start": prepare(arguments["seq_start"])}
        return function(**arguments)

    return call


def _compile(function: Callable[..., Any], compiled: bool | str) -> Callable[..., Any]:
    if not compiled:
        return function
    torch._dynamo.reset()  # one code object serves every case: without this the recompile limit ends the session
    return torch.compile(
        lambda **arguments: function(**arguments),
        fullgraph=True,
        dynamic=False,
        backend="inductor" if compiled is True else compiled,
    )


def _upstream(outputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    made = []
    for index, output in enumerate(outputs):
        generator = torch.Generator("cpu").manual_seed(1_000_003 * (seed + 1) + index)
        made.append(torch.randn(output.shape, generator=generator).to(output.device, output.dtype))
    return made


def _wide(value: Any) -> Any:
    """The same in fp64; integers, flags and numbers as they are."""
    if isinstance(value, Tensor):
        return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {n: _wide(v) for n, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_wide(v) for v in value]
    return value


def _digits(value: Any, bits: int) -> Any:
    """The same with ``bits`` significant bits; what is no floating tensor of an axis or more, as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0:
        return value
    with torch.no_grad():
        mantissa, exponent = torch.frexp(value.float())
        near = torch.ldexp((mantissa * 2.0**bits).round() / 2.0**bits, exponent).to(value.dtype)
    return near.requires_grad_(value.requires_grad)


def _on_grid(value: Any, bits: int) -> Any:
    """Like ``value``, in numbers that fp8 holds exactly: ``bits`` significant bits, six binary places, and a largest
    number of 3.5 in every row and column, so that a scale that follows it is a power of two."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() == 0 or value.numel() == 0:
        return value
    with torch.no_grad():
        rows = value.detach().float().reshape(-1, value.shape[-1])
        rows = _digits(rows * (3.5 / rows.abs().max().clamp(min=torch.finfo(torch.float32).tiny)), bits)
        rows = torch.where(rows.abs() < 2.0**-6, 0.0, rows)
        diagonal = torch.arange(max(rows.shape), device=value.device)
        at = (diagonal % rows.shape[0], diagonal % rows.shape[1])
        rows[at] = torch.full_like(rows[at], 3.5).copysign(rows[at])
        made = rows.reshape(value.shape).to(value.dtype)
    return made.requires_grad_(value.requires_grad)


def _strided(value: Any, kind: int) -> Any:
    """The same values in one of three other layouts, the gaps filled with NaN (integers: 0, to stay in range)."""
    if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() == 0:
        return value
    gap = math.nan if value.is_floating_point() else 0
    if kind % 3 == 0 and value.dim() > 1:  # a slice of wider rows, as q in a fused qkv
        block = torch.full((*value.shape[:-1], value.shape[-1] + 8), gap, dtype=value.dtype, device=value.device)
        view = block[..., 5 : 5 + value.shape[-1]]
    elif kind % 3 == 1 and value.dim() > 1:  # transposed
        order = [*range(value.dim() - 2), value.dim() - 1, value.dim() - 2]
        block = torch.full([value.shape[i] for i in order], gap, dtype=value.dtype, device=value.device)
        view = block.permute(order)
    else:  # every second element
        block = torch.full((*value.shape[:-1], 2 * value.shape[-1]), gap, dtype=value.dtype, device=value.device)
        view = block[..., ::2]
    with torch.no_grad():
        view.copy_(value)
    return view.detach().requires_grad_(value.requires_grad)


def _finite(value: Tensor) -> Tensor:
    """Zeros in the place of infinities, which have no size that an error could be relative to."""
    return value.masked_fill(value.isinf(), 0.0)


def _compare(
    op: Op, variant: str, name: str, got: Tensor, exact: Tensor, same: Tensor, dtype: torch.dtype, scale: float,
    inner: float = 0.0,
) -> Compared:  # fmt: skip
    """``scale`` stands in for the size of a result that is nothing beside it: errors are those of what cancelled.
    inner: what is added to both floors, relative."""
    if got.shape != exact.shape:
        raise _Broken(f"{variant} {name}: shape {tuple(got.shape)} where the reference has {tuple(exact.shape)}")
    if got.dtype != same.dtype or got.device != same.device:
        raise _Broken(
            f"{variant} {name}: is {got.dtype} on {got.device} where the reference gives {same.dtype} on {same.device}"
        )
    if exact.numel() == 0:
        return Compared(variant, name, 0.0, 0.0, 0.0, 0.0)
    floor_dtype = dtype if (op.name, name) in COARSE else got.dtype
    floor_max, floor_rms = OP_FLOORS.get((op.name, floor_dtype), FLOORS[floor_dtype])
    if exact.numel() <= FEW:
        floor_max, floor_rms = FEW_FACTOR * floor_max, FEW_FACTOR * floor_rms
    u = unit_roundoff(floor_dtype)
    finite = _finite(exact)
    largest, typical = finite.abs().max().item(), finite.square().mean().sqrt().item()
    if largest < scale * 2.0**-40:  # zero, up to fp64's own rounding
        largest = typical = scale
    # equal infinities agree; they would differ by NaN
    error, reference_error = (torch.where(t == exact, 0.0, (t - exact).abs()) for t in (got.double(), same.double()))

    def rms(t: Tensor) -> float:
        return t.square().mean().sqrt().item()

    return Compared(
        variant,
        name,
        error.max().item(),
        FACTOR * reference_error.max().item() + (floor_max * u + inner) * largest,
        rms(error),
        FACTOR * rms(reference_error) + (floor_rms * u + inner) * typical,
    )


# ---------------------------------------------------------------------------------------------------------- update ops


def _check_update(
    op: Op,
    backend: Backend,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    compiled: bool | str,
    seed: int,
    errors: list[Compared],
    watch: Watch | None,
) -> None:
    """An update op: several steps, each from the state the one before left; what is mutated is compared after each.

    Where the op's cases can unpack what it mutates, the exact run has it so, and what is compared is that.
    """
    unpacked = getattr(op.cases, "unpacked", dict)
    function = _compile(backend.function, compiled)
    states: dict[str, dict[str, Any]] = {}
    runs = [("got", function, _copy), ("exact", op.reference, _wide), ("same", op.reference, _copy)]
    twice = getattr(backend.module, "DETERMINISTIC", False)
    for step in range(1, op.cases.STEPS + 1):
        arguments = op.cases.inputs(case, dtype, device, seed, step=step)
        if watch is not None:
            with torch.no_grad(), watch():
                backend.function(**{n: _copy(v) for n, v in arguments.items()})
        for label, run, convert in runs:
            mine = {
                n: v if n in op.updates and step > 1 else convert(v)
                for n, v in {
                    **(unpacked(arguments) if label == "exact" else arguments),
                    **states.get(label, {}),
                }.items()
            }
            read = {n: _copy(v) for n, v in mine.items() if n not in op.updates}
            poison = _poisoned() if label == "got" and not compiled else contextlib.nullcontext()
            again = {n: _copy(v) for n, v in mine.items()} if label == "got" and twice else None
            with torch.no_grad(), poison:
                if run(**mine) is not None:
                    raise _Broken("returns a value; an update op returns None")
                if again is not None:
                    run(**again)
            for name, value in read.items():
                if not _same_bits(value, mine[name]):
                    raise _Broken(f"step {step}: changes its argument {name}, which it only reads")
            if again is not None and not all(_same_bits(mine[n], again[n]) for n in op.updates):
                raise _Broken(f"step {step}: two equal calls differ, and the module says DETERMINISTIC = True")
            states[label] = {n: mine[n] for n in op.updates}
        got, same = unpacked(states["got"]), unpacked(states["same"])
        for name in op.updates:
            for index, value in enumerate(got[name]):
                want, near = states["exact"][name][index], same[name][index]
                errors.append(_compare(op, f"step {step}", f"{name}[{index}]", value, want, near, dtype, 0.0))


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return [_copy(v) for v in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------------------------------------------------- small parts


def _same_bits(a: Any, b: Any) -> bool:
    """Equal to the last bit, NaN equal to the same NaN."""
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same_bits(x, y) for x, y in zip(a, b, strict=True))
    if not isinstance(a, Tensor):
        return a is b or a == b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Fill every new allocation with NaN: torch does in its deterministic mode (operations without one only warn)."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = _memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    _memory.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        _memory.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _place(error: BaseException) -> str:
    return "".join(traceback.format_tb(error.__traceback__)[-3:]).rstrip()
