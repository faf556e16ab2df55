"""What an eager call of an op costs the host, over launching the same kernels by hand.

    python -P -m tritium.benchmarks.overhead [OP ...] [--backend triton] [--arch sm_90] [--device cuda]

One forward and backward is recorded: the Triton launches and the calls into torch that allocate or compute. *by hand*
makes the same calls again, one after the other, with nothing around them: ``torch.empty`` and ``kernel[grid](...)``.
*ours* is the op's function and torch.autograd's backward, several calls in one graph, as in a model. The difference is
what checks, tile choice, views and autograd add. *autograd* is what a torch.autograd.Function with the op's tensors
and no work costs, beside allocating its results. Most of it is the engine's, for every gradient that arrives at a
leaf: the last row is an operator of torch's own with three leaves, whose backward is in C++. *own* is the rest. An
update op has no backward: it walks lists of tensors, some 5 µs a tensor, and is no part of the verdict.

Without a GPU the kernels are compiled for ``--arch`` and not launched, on small CPU tensors: the host's part alone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tritium.kernels import autograd
from tritium.kernels.case import Case
from tritium.kernels.op import Backend, Op
from tritium.kernels.ops import OPS

if TYPE_CHECKING:
    from tritium.benchmarks.gpu_baseline import Bench

GOAL_US = 15.0
CALLS = 16  # of an op in one graph
# the shapes of a call do not matter to the host, only its options; small, so that a GPU is done before the host is
SHAPES: dict[str, dict[str, int]] = {
    "linear": {"N": 16, "C": 64, "F": 64},
    "embedding": {"B": 2, "T": 8, "V": 128, "C": 64},
    "attention": {"B": 1, "Tq": 16, "Tk": 16, "H": 2, "G": 2, "D": 64},
    "attention_lse": {"B": 1, "Tq": 16, "Tk": 16, "H": 2, "G": 2, "D": 64},
    "rope": {"B": 1, "T": 8, "H": 2, "G": 2, "D": 64, "R": 64},
    "cross_entropy": {"N": 8, "V": 100, "Vp": 128},
    "linear_cross_entropy": {"N": 8, "C": 64, "V": 100, "Vp": 128},
    "global_norm": {"K": 20, "P": 4096},
    "adamw": {"K": 20, "P": 4096},
    "adamw_8bit": {"K": 20, "P": 4096},
}
ROWS = {"N": 8, "C": 64}
WIDTH = {"N": 8, "F": 128}


@dataclass(frozen=True)
class Overhead:
    """Microseconds of one forward and backward (an update: one call), medians. launches: Triton kernels in it."""

    op: str
    backend: str
    launches: int
    ours_us: float
    by_hand_us: float
    autograd_us: float

    @property
    def over_us(self) -> float:
        return self.ours_us - self.by_hand_us

    @property
    def own_us(self) -> float:
        """What is over and not autograd's."""
        return self.over_us - self.autograd_us

    def __str__(self) -> str:
        numbers = (self.ours_us, self.by_hand_us, self.over_us, self.autograd_us, self.own_us)
        return f"{self.op:<22}{self.launches:>3}{''.join(f'{number:>10.1f}' for number in numbers)}"


HEAD = f"{'op':<22}{'n':>3}{'ours':>10}{'by hand':>10}{'over':>10}{'autograd':>10}{'own':>10}  µs a call"


def case_of(op: Op) -> Case:
    """A small case of every op, without options but those that a GPT sets."""
    letters = {letter for case in op.cases.CASES for letter in case.shape}
    shape = SHAPES.get(op.name) or (WIDTH if "F" in letters else ROWS)
    options = {"weight_decay": 0.1} if op.updates else {}
    return Case("overhead", shape, options)


class _Calls(TorchDispatchMode):
    """Records what allocates or computes; views cost a hand nothing."""

    def __init__(self, calls: list[Callable[[], object]]):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not function.is_view and function is not torch.ops.aten.detach.default:
            if function._schema.name.startswith("aten::empty") or function._schema.name.startswith("aten::new_empty"):
                how = {"dtype": result.dtype, "device": result.device}
                shape = tuple(result.shape)
                self.calls.append(lambda: torch.empty(shape, **how))
            else:
                self.calls.append(lambda: function(*args, **kwargs))
        return result


@contextlib.contextmanager
def _recording(calls: list[Callable[[], object]]) -> Iterator[list[str]]:
    """Within, Triton launches and torch calls are made and added to ``calls``; yields the launched kernels' names."""
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    run, bypass = JITFunction.run, autograd.bypass

    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        names.append(self.fn.__name__)
        launch = self[grid]
        calls.append(lambda: launch(*args, **options))
        return run(self, *args, grid=grid, warmup=warmup, **options)

    JITFunction.run = recorded
    autograd.bypass = lambda args: True  # the recorder is a dispatch mode, and the eager way is wanted under it
    try:
        with _Calls(calls):
            yield names
    finally:
        JITFunction.run, autograd.bypass = run, bypass


class _Nothing(torch.autograd.Function):
    """As many inputs, saved tensors, outputs and gradients as the op has, allocated, and no other work."""

    @staticmethod
    def forward(ctx: Any, outputs: int, *args: Any) -> Any:
        saved = [a for a in args if isinstance(a, Tensor)]
        ctx.save_for_backward(*saved)
        ctx.tensors = (False, *(isinstance(a, Tensor) for a in args))
        made = tuple(torch.empty(1, device=saved[0].device) for _ in range(outputs))
        return made if outputs > 1 else made[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved: Iterator[Any] = iter(ctx.saved_tensors)
        given: list[Any] = [next(saved) if there else None for there in ctx.tensors]
        return tuple(torch.empty_like(v) if n else None for v, n in zip(given, ctx.needs_input_grad, strict=True))


def measure(op: Op, backend: Backend, device: str, repeats: int = 30) -> Overhead:
    """Time one op. On a CPU, inside kernels/aot.py's ``compiling_for`` (see main)."""
    case, dtype = case_of(op), torch.bfloat16
    inputs = [op.cases.inputs(case, dtype, device, seed) for seed in range(1 if op.updates else CALLS)]
    function = backend.function
    if not op.updates and op.has_gradient:
        return _forward_and_backward(op.name, backend.name, function, inputs, device, repeats)
    hand: list[Callable[[], object]] = []
    one = inputs[0]
    function(**one)
    with _recording(hand) as names:
        function(**one)
    ours, by_hand, nothing = _interleaved([lambda: function(**one), lambda: _all(hand), lambda: None], repeats, calls=1)
    return Overhead(op.name, backend.name, len(names), ours, by_hand, nothing)


def yardstick(device: str, repeats: int = 30) -> Overhead:
    """The same of an operator of torch's own, all in C++, with three leaves: what the goal means on this host."""
    inputs = [{k: torch.ones(8, 64, device=device).requires_grad_() for k in "abc"} for _ in range(CALLS)]
    return _forward_and_backward(
        "torch.stack", "torch", lambda a, b, c: torch.stack((a, b, c)), inputs, device, repeats
    )


def _forward_and_backward(
    op: str,
    backend: str,
    function: Callable[..., Any],
    inputs: list[dict[str, Any]],
    device: str,
    repeats: int,
) -> Overhead:
    hand: list[Callable[[], object]] = []
    leaves = [[v for v in i.values() if isinstance(v, Tensor) and v.requires_grad] for i in inputs]
    outputs = _tuple(function(**inputs[0]))
    upstream = [torch.ones_like(o) for o in outputs if o.requires_grad]
    every = list(itertools.chain.from_iterable(leaves))
    torch.autograd.grad([o for o in outputs if o.requires_grad], leaves[0], upstream)
    with _recording(hand) as names, torch.autograd.set_multithreading_enabled(False):
        found = [o for o in _tuple(function(**inputs[0])) if o.requires_grad]
        torch.autograd.grad(found, leaves[0], upstream)

    def backward(made: Sequence[Any], upstream: list[Tensor]) -> None:
        roots = [o for one in made for o in _tuple(one) if o.requires_grad]
        torch.autograd.backward(roots, upstream * len(made), inputs=every)
        for leaf in every:
            leaf.grad = None

    given = [tuple(i.values()) for i in inputs]
    small = [torch.ones(1, device=device)] * len(upstream)
    names_of = list(inputs[0])
    results = [torch.empty(1, device=device) for _ in upstream] + leaves[0]
    ours, by_hand, nothing, allocating, idle = _interleaved(
        [
            lambda: backward([function(**i) for i in inputs], upstream),
            lambda: [_all(hand) for _ in inputs],
            lambda: backward([_Nothing.apply(len(upstream), *a) for a in given], small),
            lambda: [torch.empty_like(result) for _ in inputs for result in results],
            lambda: [dict(zip(names_of, a, strict=True)) for a in given],
        ],
        repeats,
        CALLS,
    )
    return Overhead(op, backend, len(names), ours - idle, by_hand, nothing - allocating - idle)


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


@torch.no_grad()
def _all(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _interleaved(arms: Sequence[Callable[[], object]], repeats: int, calls: int) -> list[float]:
    """Median microseconds a call of each arm, in turn. On a GPU the clock stops before the device is awaited; without
    one all happens in this thread, and its own time is not lengthened by what else the machine does.
    """
    gpu = torch.cuda.is_available()
    sync, clock = (torch.cuda.synchronize, time.perf_counter) if gpu else (lambda: None, time.thread_time)
    inner = max(1, 64 // calls)
    taken: list[list[float]] = [[] for _ in arms]
    for repeat in range(repeats + 3):
        for arm, times in zip(arms, taken, strict=True):
            sync()
            start = clock()
            for _ in range(inner):
                arm()
            if repeat >= 3:
                times.append((clock() - start) * 1e6 / (inner * calls))
    return [statistics.median(times) for times in taken]


def run(ops: Sequence[Op], backend: str, device: str, arch: str, repeats: int = 30) -> Iterator[Overhead]:
    """Measure ``ops``. Without a GPU nothing is launched, and Triton compiles for ``arch``."""
    for op in ops:
        loaded = op.load(backend)
        with contextlib.ExitStack() as stack:
            if device == "cpu":
                from triton.runtime.jit import JITFunction

                from tritium.kernels import aot

                plain = JITFunction.run
                stack.enter_context(aot.compiling_for(arch))
                watched, JITFunction.run = JITFunction.run, plain  # without the watcher, whose time would be counted
                stack.callback(setattr, JITFunction, "run", watched)
            yield measure(op, loaded, device, repeats)


def on_device(bench: Bench) -> None:
    """The stage ``overhead`` of ``make gpu``."""
    ops = [op for op in OPS.values() if "triton" in op.backends()]
    for row in run(ops[:1] if bench.tiny else ops, "triton", bench.device, "sm_90", repeats=3 if bench.tiny else 30):
        bench.lines.write(
            f"{row.op}.{row.backend}", row.over_us, "us over by hand", ours_us=round(row.ours_us, 2),
            by_hand_us=round(row.by_hand_us, 2), autograd_us=round(row.autograd_us, 2), own_us=round(row.own_us, 2),
            launches=row.launches, goal_us=GOAL_US,
        )  # fmt: skip
    row = yardstick(bench.device, repeats=3 if bench.tiny else 30)
    bench.lines.write(
        "stack.torch", row.over_us, "us over by hand",
        ours_us=round(row.ours_us, 2), by_hand_us=round(row.by_hand_us, 2), launches=0,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 when an op's own part is more than the goal."""
    parser = argparse.ArgumentParser(prog="tritium.benchmarks.overhead", description="The host's cost of eager calls.")
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: all that have the backend")
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--arch", default="sm_90", help="compiled for, where there is no GPU (default: sm_90)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=30)
    a = parser.parse_args(argv)
    if unknown := [name for name in a.ops if name not in OPS]:
        parser.error(f"there is no op {', '.join(unknown)}; ops: {', '.join(OPS)}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if a.device == "auto" else a.device
    ops = [OPS[name] for name in a.ops] or [op for op in OPS.values() if a.backend in op.backends()]
    print(HEAD)
    rows = []
    for row in run(ops, a.backend, device, a.arch, a.repeats):
        print(row, flush=True)
        rows.append(row)
    where = "on the device" if device == "cuda" else f"host only, nothing launched, compiled for {a.arch}"
    print(yardstick(device, a.repeats))
    print(f"{where}. More than {GOAL_US:g} µs over by hand, autograd's part included:", _above(rows, "over_us"))
    own = _above(rows, "own_us")
    print(f"More than {GOAL_US:g} µs of our own:", own)
    if updates := [row.op for row in rows if not OPS[row.op].has_gradient]:
        print("Updates walk lists of tensors and are no part of this:", ", ".join(updates))
    return int(own != "none")


def _above(rows: Sequence[Overhead], part: str) -> str:
    with_backward = [row for row in rows if OPS[row.op].has_gradient]
    return ", ".join(row.op for row in with_backward if getattr(row, part) > GOAL_US) or "none"


if __name__ == "__main__":
    sys.exit(main())
