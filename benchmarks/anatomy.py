"""Where the time of a training step goes: one row for each class of work, and what it could be at best.

A few steps run under torch.profiler. On a CPU every moment of the step belongs to the innermost event that was open
(events nest on one thread), so the rows add up to the step. On a GPU a row is the time of its kernels, each of which
belongs where the host launched it; *gaps* is the time in which the device had nothing to do, and *communication* only
what no other kernel hides.

Which row an event belongs to:
  - eager: the call site of the op it ran under (every site is marked for the occasion), in backward too, by the number
    that autograd gives a forward operator and its gradient;
  - compiled: the names of kernels; Inductor's list what was fused into them, and a fused kernel goes to the first class
    of CLASSES that it names, so that a norm's residual addition counts as the norm;
  - products of matrices are GEMM wherever they run, but for attention's own.
"""

from __future__ import annotations

import bisect
import contextlib
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tritium.benchmarks import record

if TYPE_CHECKING:
    from tritium.benchmarks.ours import Training
    from tritium.engine.step import MicroBatch

ROW: record.Schema = {
    "row": str,
    "ms": record.NUMBER,  # of the profiled step of median length
    "backward_ms": record.NUMBER,  # the part of it in backward
    "share": record.NUMBER,  # of the step
    "roofline_ms": (*record.NUMBER, type(None)),  # at this device's measured rates; null where no work is defined
    "fraction": (*record.NUMBER, type(None)),  # roofline_ms / ms
    "top": [{"name": str, "ms": record.NUMBER}],  # what took longest in it
}
ROWS = (
    "data wait", "host to device", "GEMM", "attention", "norm", "position", "activation", "loss", "embedding",
    "elementwise", "optimizer", "communication", "gaps", "other",
)  # fmt: skip
OTHER_LIMIT = 0.05

OP_ROWS = {
    "linear": "GEMM", "attention": "attention", "attention_lse": "attention", "rope": "position",
    "layer_norm": "norm", "rms_norm": "norm", "add_layer_norm": "norm", "add_rms_norm": "norm",
    "gelu": "activation", "swiglu": "activation", "geglu": "activation", "relu2": "activation",
    "cross_entropy": "loss", "linear_cross_entropy": "loss", "embedding": "embedding",
    "adamw": "optimizer", "adamw_8bit": "optimizer", "global_norm": "optimizer",
}  # fmt: skip
PRODUCT = re.compile(
    r"^aten::(mm|addmm|bmm|baddbmm|addbmm|matmul|linear|_scaled_mm|dot|mv)$"
    r"|gemm|cublas|cutlass|^nvjet|_mkl_linear|mkldnn_linear|onednn|wgrad|tritium::linear_(?!cross)"
    r"|^triton_tem_fused_(add)?(b?mm|baddbmm)",
    re.IGNORECASE,
)
# before all else: attention's kernels carry the names of what they are written with (cutlass) and compute with (gemm)
ATTENTION = re.compile(r"attention|flash_?(fwd|bwd|fprop|bprop)|flash::|fmha|sdpa", re.IGNORECASE)
# class → what names it, in the order in which they are looked for
CLASSES = {
    "communication": re.compile(r"nccl|c10d::|gloo", re.IGNORECASE),
    "host to device": re.compile(r"memcpy h(to|2)d|memcpy htod", re.IGNORECASE),
    "optimizer": re.compile(r"adamw|fused_?adam|global_norm|_foreach_norm|foreach_norm|LpNormFunctor", re.IGNORECASE),
    "loss": re.compile(r"cross_entropy|log_softmax|logsumexp|nll_loss", re.IGNORECASE),
    "activation": re.compile(r"gelu|silu|swiglu|geglu|relu|threshold_backward|_erf(_|$)|_tanh(_|$)|sigmoid"),
    "embedding": re.compile(r"embedding|_TiedRows|index_select|index_put"),
    "norm": re.compile(r"layer_norm|rms_norm|_rsqrt|var_mean|fused_[a-z_]*div_expand_mul_pow|_norm_"),
    "position": re.compile(r"rope|split_with_sizes|fused_[a-z_]*(neg|sub)_[a-z_]*(slice|split|unsqueeze)"),
}
HOST = re.compile(
    r"^tritium::step$|^autograd::|^torch::autograd|Backward\d*$|^Eager$|^## Call Compiled|Dynamo|^CompiledFunction"
    r"|^Torch-Compiled|AOTDispatcher|^cuda[A-Z]|^cu[A-Z]|^Inductor|^ProfilerStep|Runtime Wrapper|Optimizer\."
)
# what moves, makes, compares or adds up elements; any other operator of torch's (a sort, a convolution) is work that
# nobody expects in a step, and "other"
_MOVES = (
    "copy clone contiguous to _to_copy type_as lift_fresh cat concat concatenate stack hstack vstack pad "
    "constant_pad_nd slice select narrow diagonal split split_with_sizes chunk unbind view reshape view_as "
    "unsafe_view _unsafe_view _reshape_alias unflatten flatten transpose t permute movedim swapaxes expand "
    "expand_as broadcast_to repeat repeat_interleave tile as_strided unsqueeze squeeze detach alias unfold roll "
    "flip index index_put _index_put_impl index_add index_copy index_fill gather scatter scatter_add "
    "scatter_reduce masked_fill masked_scatter take take_along_dim view_as_real view_as_complex real imag set "
    "resize result_type item _local_scalar_dense is_nonzero is_pinned pin_memory _pin_memory record_stream"
)
_MAKES = (
    "empty zeros ones full arange scalar_tensor empty_like zeros_like ones_like full_like new_empty new_zeros "
    "new_ones new_full new_empty_strided empty_strided fill zero tril triu eye one_hot bernoulli dropout "
    "native_dropout _fused_dropout rand randn randint random"
)
_COMPUTES = (
    "add sub rsub mul multiply div divide true_divide floor_divide remainder fmod neg negative pow square sqrt "
    "rsqrt reciprocal exp exp2 expm1 log log2 log1p abs sign sgn sin cos tan atan2 floor ceil round trunc frac "
    "clamp clamp_min clamp_max maximum minimum fmax fmin where lerp addcmul addcdiv isfinite isnan isinf isin eq "
    "ne lt le gt ge equal logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not "
    "bitwise_xor nan_to_num sum mean prod amax amin max min aminmax any all std var norm linalg_vector_norm "
    "vector_norm tanh sigmoid erf softmax _softmax cumsum _amp_foreach_non_finite_check_and_unscale"
)
ELEMENTWISE = re.compile(
    rf"^aten::(_foreach_)?({'|'.join(' '.join((_MOVES, _MAKES, _COMPUTES)).split())})(_|_backward|_copy)?$"
    r"|^graph_\d+_|^triton_|elementwise|vectorized|reduce_kernel|fused_|[Mm]em(cpy|set)"
)
LAUNCH = re.compile(r"^(cuda|cu|hip)[A-Z]")  # the host's calls of the device's runtime and driver
RANGES = {
    "tritium::data": "data wait", "tritium::to_device": "host to device", "tritium::optimizer": "optimizer",
    "tritium::communication": "communication",  # with the packing of what is sent, and, on a CPU, the wait for it
}  # fmt: skip


@dataclass(frozen=True)
class Event:
    """Something that the profiler saw on the host. Times in microseconds. parent: index of the event it ran inside, -1:
    none. sequence: autograd's number for a forward operator and its gradient, -1: none."""

    name: str
    start: float
    end: float
    parent: int = -1
    sequence: int = -1
    backward: bool = False


@dataclass(frozen=True)
class Kernel:
    """Something that ran on a device. Times in microseconds. launched: index of the event of the host in which it was
    launched, -1: not known."""

    name: str
    start: float
    end: float
    launched: int = -1


def classify(name: str) -> str | None:
    """The row of a kernel or operator by its name alone; None for one that tells nothing (host work, plain additions).

    Products of matrices come before the other classes: ``tritium::linear_cross_entropy`` is a loss, the ``aten::mm`` in
    it a GEMM.
    """
    if ATTENTION.search(name):
        return "attention"
    if PRODUCT.search(name):
        return "GEMM"
    return next((row for row, pattern in CLASSES.items() if pattern.search(name)), None)


def rows_of(events: Sequence[Event]) -> list[str]:
    """The row of every event, in order; "gaps" for the host's own work and "other" for what cannot be told."""
    place = [_by_range(events, i) for i in range(len(events))]
    forward = {
        event.sequence: row for event, row in zip(events, place, strict=True)
        if event.sequence >= 0 and not event.backward and row in OP_ROWS.values() and event.name not in RANGES
    }  # fmt: skip
    found: list[str] = []
    for i, event in enumerate(events):
        row = place[i]
        named = classify(event.name)
        inherited, up = None, i
        while row is None and up >= 0:  # the nearest event that says what it is for
            if events[up].backward and events[up].sequence in forward:
                row = forward[events[up].sequence]
            inherited = inherited or classify(events[up].name)
            up = events[up].parent
        if row in (None, "loss", "GEMM") and named == "GEMM":
            row = "GEMM"
        elif row is None:
            row = named or inherited
            if HOST.search(event.name):
                row = "gaps"
            elif row is None:
                row = "elementwise" if ELEMENTWISE.search(event.name) else "other"
        found.append(row)
    return found


def _by_range(events: Sequence[Event], i: int) -> str | None:
    """The row of the nearest mark around an event; what lies in the optimizer or in the data's range is theirs."""
    row = None
    while i >= 0:
        name = events[i].name
        if name in RANGES:
            return RANGES[name]
        if row is None and name.startswith("tritium::op::"):
            row = OP_ROWS.get(name.removeprefix("tritium::op::"))
        i = events[i].parent
    return row


Times = dict[str, dict[tuple[str, bool], float]]  # row → (name, whether in backward) → milliseconds


def _in_backward(events: Sequence[Event]) -> list[bool]:
    found: list[bool] = []
    for event in events:  # a parent comes before what is in it
        found.append(event.backward or (event.parent >= 0 and found[event.parent]))
    return found


def cpu_rows(events: Sequence[Event]) -> Times:
    """The time of every row and name, by each event's own time: what no event inside it covers."""
    own = [event.end - event.start for event in events]
    for event in events:
        if event.parent >= 0:
            own[event.parent] -= event.end - event.start
    found: Times = {}
    for event, row, us, backward in zip(events, rows_of(events), own, _in_backward(events), strict=True):
        names = found.setdefault(row, {})
        names[event.name, backward] = names.get((event.name, backward), 0.0) + us / 1e3
    return found


def device_rows(events: Sequence[Event], kernels: Sequence[Kernel], start: float, end: float) -> Times:
    """The same for a GPU. events: the host's; kernels: everything that ran on the device between ``start`` and ``end``.
    Where streams overlap, a moment counts for the row that began first; communication only where it is alone. While the
    host waits for data, an idle device waits for it too: that is no gap."""
    rows, backward = rows_of(events), _in_backward(events)
    found: Times = {}

    def add(row: str, name: str, us: float, backward: bool = False) -> None:
        if us > 0:
            names = found.setdefault(row, {})
            names[name, backward] = names.get((name, backward), 0.0) + us / 1e3

    covered: list[tuple[float, float]] = []
    messages, at = [], start
    for kernel in sorted(kernels, key=lambda k: (k.start, k.end)):
        if classify(kernel.name) == "communication":
            messages.append((kernel.start, kernel.end))
            continue
        begin = max(kernel.start, at)
        if kernel.end > begin:
            covered.append((begin, kernel.end))
        known = kernel.launched >= 0
        row = _row_of(kernel, rows[kernel.launched] if known else "gaps")
        add(row, kernel.name, kernel.end - begin, known and backward[kernel.launched])
        at = max(at, kernel.end)
    alone = _uncovered(messages, covered)
    add("communication", "exposed", alone)
    idle = (end - start) - sum(e - s for s, e in covered) - alone
    wait = [(e.start, e.end) for e in events if RANGES.get(e.name) == "data wait"]
    waited = min(_uncovered(sorted(wait), covered), max(idle, 0.0))
    add("data wait", "wait", waited)
    add("gaps", "idle", idle - waited)
    return found


def _row_of(kernel: Kernel, host: str) -> str:
    """A kernel's row by the row of the event that launched it; by its own name where that tells nothing."""
    if host not in ("gaps", "elementwise", "other"):
        return host
    plain = host == "elementwise" or ELEMENTWISE.search(kernel.name)
    return classify(kernel.name) or ("elementwise" if plain else "other")


def _uncovered(spans: Iterable[tuple[float, float]], covered: Sequence[tuple[float, float]]) -> float:
    """The length of the union of ``spans`` outside ``covered`` (disjoint, sorted)."""
    total, at = 0.0, float("-inf")
    for start, end in spans:
        start = max(start, at)
        at = max(at, end)
        if end <= start:
            continue
        total += end - start
        total -= sum(max(0.0, min(end, e) - max(start, s)) for s, e in covered)
    return total


# ------------------------------------------------------------------------------------------------------------ profiling


@contextlib.contextmanager
def kernels_named(device: str) -> Iterator[None]:
    """While a model is compiled: make Inductor's C++ kernels show up in a profile, by name."""
    import torch._inductor.config

    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}) if device == "cpu" else _nothing():
        yield


def _nothing() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@contextlib.contextmanager
def _marked(training: Training) -> Iterator[None]:
    """Every call site inside a range of its op's name, where nothing is compiled (a compiled graph does not see them);
    the optimizer's and the processes' communication always."""
    import torch

    from tritium.engine.parallel import World
    from tritium.kernels.op import call_sites

    class Marked(World):
        def sum_(self, tensors: Sequence[torch.Tensor]) -> None:
            with torch.profiler.record_function("tritium::communication"):
                super().sum_(tensors)

    engine = training.engine
    holders = [engine.optimizer] if engine.compiled else [engine.model, engine.optimizer]
    sites = [site for _, site in call_sites(holders)]
    before = [site.function for site in sites]

    def marked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(name):
                return function(*args, **kwargs)

        return call

    step = engine.optimizer.step
    engine.optimizer.step = marked(step, "tritium::optimizer")  # type: ignore[method-assign]
    world = training.world
    training.world = engine.world = Marked(world.rank, world.size, world.device)
    for site in sites:
        site.function = marked(site.function, f"tritium::op::{site.op.name}")
    try:
        yield
    finally:
        training.world = engine.world = world
        del engine.optimizer.step  # type: ignore[method-assign]
        for site, function in zip(sites, before, strict=True):
            site.function = function


def profile(training: Training, source: Callable[[], MicroBatch], steps: int = 5) -> tuple[Times, float]:
    """Train ``steps`` steps on the batches that ``source`` hands out (on the host) under the profiler, each in a
    profile of its own and after one that is not profiled.

    Returns its times and its own milliseconds, of the step of median length.
    """
    import torch

    device = training.world.device
    cuda = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if cuda else [])

    def one() -> None:
        with torch.profiler.record_function("tritium::step"):
            with torch.profiler.record_function("tritium::data"):
                batch = source()
            with torch.profiler.record_function("tritium::to_device"):
                batch = batch.to(device)
            training.step(batch.ids, batch.targets)
            if cuda:
                torch.cuda.synchronize()

    marks: list[tuple[float, float, list[Event], list[Kernel]]] = []
    with _marked(training):
        for _ in range(steps):
            # What a profile keeps of a step splits the heap, and the next step's large blocks pay for page faults (80
            # of 660 ms of GPT-2 124M, which then show as GEMM): a step alone in its profile, after one that pays.
            one()
            with torch.profiler.profile(activities=activities) as seen:
                one()
            marks += _steps(seen.events())
    marks.sort(key=lambda step: step[1] - step[0])
    start, end, events, timeline = marks[len(marks) // 2]  # of one step, so that the rows add up to it
    return device_rows(events, timeline, start, end) if cuda else cpu_rows(events), (end - start) / 1e3


def _steps(events: Iterable[Any]) -> Iterator[tuple[float, float, list[Event], list[Kernel]]]:
    """(start, end, the host's events, the device's) of each marked step, from torch.profiler's events.

    A kernel and the call that launched it have one id; the call lies within the operator or the mark that made it. (The
    list that torch attaches to operators leaves out what is launched without one, as Triton's kernels are.)
    """
    from torch.autograd import DeviceType

    seen = list(events)
    host = [e for e in seen if e.device_type == DeviceType.CPU and not e.is_async]
    calls = {e.id: e for e in host if LAUNCH.search(e.name)}
    host = [e for e in host if not LAUNCH.search(e.name)]
    # marks show on the device too, around the kernels in them
    device = [e for e in seen if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    for mark in (e for e in host if e.name == "tritium::step"):
        start, end = mark.time_range.start, mark.time_range.end
        inside = [e for e in host if e.time_range.start >= start and e.time_range.end <= end]
        found: list[Event] = []
        open_: list[int] = []
        thread = None
        # the step's own thread, then backward's, where there is a device
        for e in sorted(
            inside, key=lambda e: (e.thread != mark.thread, e.thread, e.time_range.start, -e.time_range.end)
        ):
            if e.thread != thread:
                open_, thread = [], e.thread
            while open_ and found[open_[-1]].end < e.time_range.end - 1e-9:
                open_.pop()
            in_backward = e.name.startswith("autograd::engine") or e.scope == 1
            parent = open_[-1] if open_ else -1
            found.append(Event(e.name, e.time_range.start, e.time_range.end, parent, e.sequence_nr, in_backward))
            open_.append(len(found) - 1)
        where = _Innermost(found)
        yield start, end, found, [
            Kernel(
                e.name, e.time_range.start, e.time_range.end,
                where(calls[e.id].time_range.start) if e.id in calls else -1,
            )
            for e in device if start <= e.time_range.start <= end
        ]  # fmt: skip


class _Innermost:
    """The innermost of ``events`` that was open at a time, as its index, -1: none. Of two threads, that of the event
    which began last: while one runs backward the other waits for it."""

    def __init__(self, events: Sequence[Event]):
        self.events = events
        self.order = sorted(range(len(events)), key=lambda i: events[i].start)
        self.starts = [events[i].start for i in self.order]

    def __call__(self, at: float) -> int:
        i = bisect.bisect_right(self.starts, at) - 1
        while i >= 0:
            inner = self.order[i]
            while inner >= 0 and self.events[inner].end < at:
                inner = self.events[inner].parent
            if inner >= 0:
                return inner
            i -= 1
        return -1


# ------------------------------------------------------------------------------------------------------------- roofline


def roofline(training: Training, B: int, T: int, matmul: float, copy: float) -> dict[str, float]:
    """Row → least milliseconds of a step: the work of every call site by its op's cases.py, forward and backward, at
    ``matmul`` FLOP/s or ``copy`` bytes/s (read + written), whichever takes longer.

    linear_cross_entropy's products count as GEMM. What has no formula (gaps, elementwise, ...) has no row.
    """
    from tritium.kernels.case import Case
    from tritium.kernels.op import call_sites
    from tritium.kernels.peaks import ON_TENSOR_CORES

    engine = training.engine
    total: dict[str, float] = {}
    known = {"N": B * T, "B": B, "T": T, "Tq": T, "Tk": T}
    heads = _heads(training)
    for path, site in call_sites([engine.model, engine.optimizer]):
        op, cases = site.op, site.op.cases
        if (
            op.updates
            or not op.has_gradient
            or (op.name == "linear" and path.endswith("head") and engine.config.model.fused_loss)
        ):
            continue  # the last: for generation only, training has it inside linear_cross_entropy
        letters = {letter for case in cases.CASES for letter in case.shape}
        if letters >= {"B", "T"}:  # an op whose cases have rows either way
            letters.discard("N")
        shape = {k: v for k, v in {**known, **heads, **site.shape}.items() if k in letters}
        if op.name == "rms_norm" and path.endswith("attention"):  # QK-norm: one site for the heads of q and of k
            shape["N"] = B * T * (heads["H"] + heads["G"])
        if not letters <= shape.keys():
            continue
        case = Case("step", shape)
        flops = cases.flops(case) + cases.flops_backward(case)
        moved = cases.bytes(case, engine.dtype) + cases.bytes_backward(case, engine.dtype)
        row = "GEMM" if op.name == "linear_cross_entropy" else OP_ROWS[op.name]
        seconds = max(flops / matmul if op.name in ON_TENSOR_CORES else 0.0, moved / copy)
        total[row] = total.get(row, 0.0) + 1e3 * seconds
    parameters = sum(p.numel() for group in engine.optimizer.groups for p in group.params)
    copies = sum(p.numel() * p.element_size() for group in engine.optimizer.groups for p in group.copies)
    # master, two moments read and written, the gradient read twice (norm and update), copies written
    total["optimizer"] = 1e3 * (parameters * 6 * 4 + 2 * engine.optimizer.gradient_bytes + copies) / copy
    return total


def _heads(training: Training) -> dict[str, int]:
    m = training.engine.config.model
    return {"H": m.n_head, "G": m.kv_heads, "D": m.head_width, "R": int(m.head_width * m.rope_fraction) // 2 * 2}


def copy_rate(device: str, seconds: float = 0.3) -> float:
    """Bytes/s that a copy of a tensor far larger than any cache reads and writes here, the median of repeats."""
    import torch

    n = (1 << 30 if device == "cuda" else 1 << 28) // 4
    x, y = torch.ones(n, device=device), torch.empty(n, device=device)
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    y.copy_(x)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        sync()
        start = time.perf_counter()
        y.copy_(x)
        sync()
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / statistics.median(times)


# -------------------------------------------------------------------------------------------------------------- results


def table(times: Times, wall_ms: float, best: Mapping[str, float]) -> list[dict[str, Any]]:
    """The record's rows (:data:`ROW`), largest first, gaps and other last. best: row → least ms."""
    total = {row: sum(times.get(row, {}).values()) for row in ROWS}
    found = []
    for row in sorted(filter(total.get, total), key=lambda r: (r in ("gaps", "other"), -total[r])):
        names: dict[str, float] = {}
        for (name, _), ms in times[row].items():
            names[name] = names.get(name, 0.0) + ms
        found.append({
            "row": row, "ms": total[row], "share": total[row] / wall_ms,
            "backward_ms": sum(ms for (_, backward), ms in times[row].items() if backward),
            "roofline_ms": best.get(row), "fraction": best[row] / total[row] if row in best else None,
            "top": [{"name": name[:100], "ms": names[name]} for name in sorted(names, key=lambda n: -names[n])[:3]],
        })  # fmt: skip
    return found


def checks(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """That the rows explain the step."""
    other = sum(row["share"] for row in rows if row["row"] == "other")
    total = sum(row["share"] for row in rows)
    return [
        record.check("other is at most 5 % of the step", other <= OTHER_LIMIT, f"{100 * other:.1f} %"),
        record.check("the rows add up to the step", abs(total - 1) <= OTHER_LIMIT, f"{100 * total:.1f} %"),
    ]


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for a terminal."""
    lines = [f"{'where a step goes':<18}{'ms':>10}{'share':>8}{'backward':>10}{'at best':>10}{'of it':>7}  most of it"]
    for row in rows:
        best = f"{row['roofline_ms']:>10.2f}{100 * row['fraction']:>6.0f}%" if row["roofline_ms"] is not None else ""
        top = ", ".join(f"{t['name'][:44]} {t['ms']:.1f}" for t in row["top"][:1])
        share = f"{100 * row['share']:>7.1f}%"
        lines.append(f"{row['row']:<18}{row['ms']:>10.2f}{share}{row['backward_ms']:>10.2f}{best:>17}  {top}")
    return "\n".join(lines)


COLOURS = {
    "data wait": "#8c564b", "host to device": "#c49c94", "GEMM": "#1f5f99", "attention": "#4f9bd6", "norm": "#2f8f5b",
    "position": "#8fcf9f", "activation": "#d9a21b", "loss": "#c23b22", "embedding": "#e8967a", "elementwise": "#9a78b8",
    "optimizer": "#5e4b8b", "communication": "#d16ba5", "gaps": "#b8b8b8", "other": "#555555",
}  # fmt: skip


def draw(rows: Sequence[Mapping[str, Any]], title: str, path: pathlib.Path) -> None:
    """A stacked bar of the step, and beneath it one of what each row could be at best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    left = {"measured": 0.0, "at best": 0.0}
    whole = sum(row["ms"] for row in rows)
    for row in rows:
        colour = COLOURS[row["row"]]
        label = f"{row['row']}  {row['ms']:.1f} ms, {100 * row['share']:.0f} %" if row["share"] > 0.0005 else None
        axes.barh("measured", row["ms"], left=left["measured"], color=colour, edgecolor="white", linewidth=0.6,
                  label=label)  # fmt: skip
        if row["share"] > 0.06:
            axes.text(left["measured"] + row["ms"] / 2, 0, row["row"], ha="center", va="center",
                      color="white", fontsize=8)  # fmt: skip
        left["measured"] += row["ms"]
        if row["roofline_ms"] is not None:
            axes.barh("at best", row["roofline_ms"], left=left["at best"], color=colour, edgecolor="white",
                      linewidth=0.6)  # fmt: skip
            left["at best"] += row["roofline_ms"]
    axes.text(left["at best"] + 0.01 * whole, 1, f"{left['at best']:.1f} ms", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
