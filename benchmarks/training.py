"""What training a preset does on this machine: speed, utilisation in every convention, memory, compilation.

    tritium bench train [PRESET] [--T 256] [--B 2] [--rounds 10] [--anatomy] [--FIELD VALUE ...]

A step is what ``tritium train`` runs (:mod:`ours`), on batches of random tokens. In the same rounds as the steps, and
between them (:mod:`timing`), run the two things that a step cannot do without: the products of its matrices, as bare
calls of torch, and attention by the fastest backend that is right here. The step's time over theirs is what is lost to
all else; unlike tokens/s it can be compared across machines.

The benchmark fails (exit status 1, the record says why) when something is compiled after the warm-up, when the model is
not one graph, when a loss is not finite, when a kernel breaks its contract, or when the anatomy does not explain the
step. Compilation starts from nothing, whatever was compiled before. Any field of the configuration is a flag, as for
``tritium train``. Under torchrun the processes train together, each with B rows of its own; the first one reports.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tritium.benchmarks import anatomy, record, stages, timing
from tritium.engine import presets
from tritium.engine.config import Config, ConfigError
from tritium.kernels.op import KernelError, nearest

if TYPE_CHECKING:
    import torch

    from tritium.benchmarks.ours import Training
    from tritium.engine.parallel import World
    from tritium.engine.step import MicroBatch

    Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x, w, dy

SHAPES = {"cpu": {"tiny": (256, 16), "gpt2_124m": (256, 2)}, "cuda": {"tiny": (256, 64), "gpt2_124m": (1024, 32)}}
COLD = 256 << 20  # bytes, more than caches hold
VOCAB_SIZE = 1024  # for a preset that takes its vocabulary from the data

GEMM: record.Schema = {
    "name": str, "N": int, "C": int, "F": int,  # (N, C) × (C, F)
    "count": int,  # of this product in a step
}  # fmt: skip
SCHEMA: record.Schema = {
    "settings": {
        "T": int, "B": int,  # of each process
        "processes": int, "rounds": int, "seed": int, "config": dict,
    },
    "model": {
        "parameters": int, "flops_per_token": {"full": int, "causal": int},
        "flops_per_token_done": (int, type(None)),  # by torch's counter, recomputing included; null: see the checks
    },
    "rates": {  # FLOP/s
        "datasheet": (*record.NUMBER, type(None)),  # null where the device is not in kernels/peaks.py
        "measured_matmul": record.NUMBER,  # of the best product tried here, in the step's dtype
        "measured_at": str,
    },
    "gemms": [GEMM],
    "attention": {"backend": str, "why_not": {str: str}},
    "compilation": {
        "compiled": bool, "first_step_s": record.NUMBER, "seconds": record.NUMBER, "graphs": int, "graph_breaks": int,
        "compiled_after_warm_up": int,
    },
    "dtype": str,
    "deterministic": bool,
    "warm_up": {"runs": int, "stable": bool},
    "noise": record.NUMBER,  # the step against itself, within a round
    "step_over_own": {"median": record.NUMBER, "low": record.NUMBER, "high": record.NUMBER, "level": record.NUMBER},
    "anatomy": [anatomy.ROW],  # of the step that the figure "profiled step" is of; empty where it was not asked for
}  # fmt: skip


class BrokenGraph(RuntimeError):
    """torch.compile cannot make one graph of the model; the message says where and why."""


def configured(name: str, T: int | None, device: str, fields: Sequence[str] = ()) -> tuple[Config, int, int]:
    """(configuration, T, default B) of a preset as it is benchmarked. fields: flags as of ``tritium train``.

    ConfigError for data.documents, DataError when data.folder is named and is none.
    """
    config = presets.load(name)
    T_default, B = SHAPES[device].get(name, (256, 2))
    if fields:
        from tritium.engine import cli

        config = cli.parse(Config, fields, f"bench train {name}", "", default=config)
    if config.data.documents:
        raise ConfigError(
            "bench train times rows of random tokens, which have no documents, and data.documents is true: attention "
            "would be timed without its mask. Leave the flag off"
        )
    T = T or min(T_default, config.model.block_size)
    vocab_size = config.model.vocab_size
    if config.data.folder:
        from tritium.engine.data.shards import open_dataset

        dataset = open_dataset(config.data.folder)  # also where its vocabulary is not asked for: it has to be one
        vocab_size = vocab_size or dataset.tokenizer.vocab_size
    model = dataclasses.replace(
        config.model, vocab_size=vocab_size or VOCAB_SIZE, block_size=max(T, config.model.block_size)
    )
    return dataclasses.replace(config, model=model), T, B


# ------------------------------------------------------------------------------------------------ what cannot be spared


@dataclasses.dataclass(frozen=True)
class Gemm:
    """``count`` products of (N, C) and (C, F) in a step, each with its two backward products."""

    name: str
    N: int
    C: int
    F: int
    count: int

    @property
    def flops(self) -> int:
        """Forward and backward, all of them."""
        return 6 * self.N * self.C * self.F * self.count


def gemms(config: Config, tokens: int) -> list[Gemm]:
    """Every product of a training step with ``tokens`` tokens, from the configuration."""
    m = config.model
    C, F, D = m.n_embd, m.hidden_width, m.head_width
    up = 2 * F if m.activation in ("swiglu", "geglu") else F
    return [
        Gemm("qkv", tokens, C, (m.n_head + 2 * m.kv_heads) * D, m.n_layer),
        Gemm("attention projection", tokens, m.n_head * D, C, m.n_layer),
        Gemm("mlp up", tokens, C, up, m.n_layer),
        Gemm("mlp down", tokens, F, C, m.n_layer),
        Gemm("head", tokens, C, m.padded_vocab_size, 1),
    ]


def gemm_call(products: Sequence[Gemm], dtype: torch.dtype, device: str) -> Callable[[], None]:
    """A call that computes every product of a step as torch does, forward and backward, without a bias.

    As in the step: one layer after the other and back again, each with weights, inputs and gradients of its own, which
    no cache still holds from the time before. (Beyond COLD bytes a layer takes those of an earlier one.)
    """
    import torch

    draw = torch.Generator(device).manual_seed(0)
    layers = max(g.count for g in products)
    layer = sum((g.N * g.C + g.F * g.C) * dtype.itemsize for g in products if g.count == layers)  # bytes
    different = math.ceil(COLD / layer)

    def some(count: int, *shape: int) -> list[torch.Tensor]:
        return [
            torch.randn(shape, device=device, dtype=dtype, generator=draw) for _ in range(max(1, min(count, different)))
        ]

    def operands(g: Gemm) -> Callable[[int], Operands]:
        xs, ws, (dy,) = some(g.count, g.N, g.C), some(g.count, g.F, g.C), some(1, g.N, g.F)
        return lambda i: (xs[i % len(xs)], ws[i % len(ws)], dy)

    work = [(g.count, operands(g)) for g in products]
    order = [of(i) for i in range(layers) for count, of in work if count == layers]
    order += [of(i) for count, of in work if count < layers for i in range(count)]  # the head

    def call() -> None:
        gradients: collections.deque[torch.Tensor] = collections.deque(maxlen=different * len(products))
        for x, w, _ in order:
            torch.nn.functional.linear(x, w)
        for x, w, dy in reversed(order):
            torch.mm(dy, w)
            gradients.append(torch.mm(dy.t(), x))

    return call


def attention_call(
    config: Config, B: int, T: int, dtype: torch.dtype, device: str, clock: timing.Clock
) -> tuple[str, Callable[[], object], dict[str, str]]:
    """(backend, a call of it forward and backward for every layer of a step, backend → why it was not the one).

    The fastest of those that serve the step's attention and keep the contract (benchmarks/kernels.py's gate).
    """
    from tritium.benchmarks import kernels
    from tritium.kernels import contract, ops
    from tritium.kernels.case import Case
    from tritium.kernels.site import Machine

    m, op = config.model, ops.attention
    shape = {"B": B, "Tq": T, "Tk": T, "H": m.n_head, "G": m.kv_heads, "D": m.head_width}
    case = Case("step", shape)
    site = contract.site_of(op, case, dtype, Machine.here(device))
    gate, why_not, calls, best = kernels.Gate(device), {}, {}, {}
    inputs = op.cases.inputs(case, dtype, device, 0)
    for name in op.backends():
        try:
            backend = op.load(name)
            reason = backend.unsupported(site)
        except KernelError as error:
            reason = str(error)
        if reason is None and not gate.admits(op, backend, dtype):
            reason = f"it breaks the contract: {gate.red[-1]}"
        if reason is not None:
            why_not[name] = reason
            continue
        try:
            calls[name] = kernels.call_of(backend, inputs, backward=True)
            clock.times_ms([calls[name]])
            best[name] = min(clock.times_ms([calls[name]] * 3))
        except RuntimeError as error:  # the whole square of scores may not fit into memory
            why_not[name] = f"it fails at this size: {_first_line(error)}"
    chosen = min(best, key=best.__getitem__)
    why_not |= {name: f"{ms / best[chosen]:.2f} × as long" for name, ms in best.items() if name != chosen}

    def call() -> None:
        for _ in range(m.n_layer):
            calls[chosen]()

    return chosen, call, why_not


def matmul_rate(products: Sequence[Gemm], dtype: torch.dtype, device: str) -> tuple[float, str]:
    """(FLOP/s, shape) of the best product here: the step's own shapes, and a square one that a GPU needs."""
    import torch

    from tritium.engine import metrics

    side = 8192 if device == "cuda" else 1536
    shapes = {(g.N, g.C, g.F) for g in products} | {(side, side, side)}
    rates = {s: metrics.matmul_rate(torch.device(device), dtype, *s, seconds=0.3) for s in sorted(shapes)}
    best = max(rates, key=rates.__getitem__)
    return rates[best], "{} × {} × {}".format(*best)


# ------------------------------------------------------------------------------------------------------------- FLOPs


class Uncounted(RuntimeError):
    """An op contains products of matrices and torch's counter has no formula for it; the message names it."""


def attention_formulas() -> dict[Any, Callable[..., int]]:
    """The FLOPs that fused attention executes, by operator, where the formula that is registered has others: torch's
    have a causal square as a whole one, of which its kernels skip half, and do not know the CPU's; tritium's are the
    model's, without the scores that backward computes again. Documents and windows are not known to any."""
    import torch
    from torch.utils.flop_counter import flop_registry

    from tritium.kernels import ops
    from tritium.kernels.op import KernelError

    def of_torch(packet: Any, backward: bool) -> Callable[..., int]:
        names = [argument.name for argument in packet.default._schema.arguments]

        def formula(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
            given = dict(zip(names, args, strict=False)) | kwargs
            (B, H, Tq, D), (_, _, Tk, _), (*_, Dv) = (given[name] for name in ("query", "key", "value"))
            widths = 3 * D + 2 * Dv if backward else D + Dv  # backward: s, dq, dk and dp, dv
            return 2 * B * H * Tq * Tk * widths // (2 if given.get("is_causal") else 1)

        return formula

    def of_tritium(packet: Any, products: int) -> Callable[..., int]:
        """products: that its backward executes; four are the model's."""
        model = flop_registry[packet]
        return lambda *args, out_shape=None, **kwargs: model(*args, **kwargs) * products // 4

    found: dict[Any, Callable[..., int]] = {}
    for kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"):
        for name, backward in ((f"_scaled_dot_product_{kind}", False), (f"_scaled_dot_product_{kind}_backward", True)):
            if (packet := getattr(torch.ops.aten, name, None)) is not None:
                found[packet] = of_torch(packet, backward)
    for op, backend, products in (
        (ops.attention, "native", 5), (ops.attention, "triton", 7), (ops.attention_lse, "triton", 7),
    ):  # fmt: skip
        with contextlib.suppress(KernelError):  # registers its operators; one that cannot be loaded trains nothing
            op.load(backend)
            packet = getattr(torch.ops.tritium, f"{op.name}_{backend}_backward")
            found[packet] = of_tritium(packet, products)
    return found


def flops_done(training: Training, B: int, T: int) -> int:
    """FLOPs of one step as it is run, what is computed again included: torch's counter over a step of the same model
    with the very functions that the call sites are bound to, eager, on tensors without contents. Raises Uncounted."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    from tritium.engine import recompute, train
    from tritium.engine.parallel import World
    from tritium.engine.step import MicroBatch
    from tritium.kernels.op import call_sites
    from tritium.kernels.peaks import ON_TENSOR_CORES

    attention = attention_formulas()
    formulas = {**flop_registry, **attention}
    missing: set[str] = set()

    class Missing(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # of a user's own op nobody knows what is in it
            known = function.namespace in ("aten", "prims", "prim", "tritium")
            products = not known or recompute.op_of(function) in ON_TENSOR_CORES
            if products and function._overloadpacket not in formulas:
                missing.add(str(function))
            return function(*args, **(kwargs or {}))

    dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[training.engine.dtype]
    config = training.config.replace(train={"precision": dtype})
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        alone = World(device=training.world.device)
        engine = train.build(config, alone, compile=False)
        # what auto means may differ between compiled and eager
        for (_, ours), (_, theirs) in zip(call_sites(engine.model), call_sites(training.engine.model), strict=True):
            ours.function = theirs.function
        ids = torch.zeros(B, T, dtype=torch.int64, device=training.world.device)
        with FlopCounterMode(display=False, custom_mapping=attention) as counter, Missing():
            engine.loss(MicroBatch(ids, ids)).backward()
    if missing:
        raise Uncounted(
            f"torch counts {', '.join(sorted(missing))} as no work; register a formula with "
            "torch.utils.flop_counter.register_flop_formula"
        )
    return counter.get_total_flops()


def utilisation(tokens_per_s: float, flops_per_token: float, peak: float) -> float:
    """The part of ``peak`` FLOP/s that training at this speed is: MFU with the model's FLOPs (metrics.flops_per_token,
    in either convention), HFU with those really done (Chowdhery et al., PaLM, arXiv:2204.02311, appendix B)."""
    return tokens_per_s * flops_per_token / peak


# -------------------------------------------------------------------------------------------------------- compilation


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What torch.compile has done in this process so far, or between two moments."""

    graphs: int  # a graph that is compiled again counts again
    breaks: int

    def __add__(self, other: Compiled) -> Compiled:
        return Compiled(self.graphs + other.graphs, self.breaks + other.breaks)

    def __sub__(self, other: Compiled) -> Compiled:
        return Compiled(self.graphs - other.graphs, self.breaks - other.breaks)

    @staticmethod
    def now() -> Compiled:
        from torch._dynamo.utils import counters

        return Compiled(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))


@contextlib.contextmanager
def from_nothing(compiled: bool) -> Iterator[None]:
    """Compile anew and into an empty folder: what was compiled before, in this process or another, would make the
    seconds of compilation mean nothing."""
    if not compiled:
        yield
        return
    import torch
    from torch._inductor.utils import clear_caches

    torch._dynamo.reset()
    with tempfile.TemporaryDirectory(prefix="tritium-bench-") as folder:
        places = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        before = {name: os.environ.get(name) for name in places}
        os.environ.update(places)
        clear_caches()
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            clear_caches()  # or what is compiled next would look for files of this folder


@contextlib.contextmanager
def one_graph() -> Iterator[None]:
    """BrokenGraph, with dynamo's own words, where the model cannot be compiled as a whole."""
    from torch._dynamo.exc import Unsupported

    try:
        yield
    except Unsupported as error:
        raise BrokenGraph(
            f"the graph of the model breaks, so it cannot be compiled as a whole:\n{str(error).strip()}\n"
            "Choose another backend for that call site, or train eagerly with --train.compile false"
        ) from error


# ---------------------------------------------------------------------------------------------------------- the record


def bench(
    config: Config,
    T: int,
    B: int,
    *,
    rounds: int = 10,
    device: str = "cpu",
    seed: int = 0,
    explain: bool = False,
    command: str = "",
    say: Callable[[str], object] = lambda text: None,
    picture: pathlib.Path | None = None,
    world: World | None = None,
    contract: bool = False,
) -> dict[str, Any]:
    """Train for a while and return the record (:data:`SCHEMA`). KernelError when a kernel choice cannot be met,
    BrokenGraph, DataError when the data that is named cannot feed the model.

    explain: profile too (:mod:`anatomy`). picture: where to draw that (PNG). world: the processes that train together,
    each of which calls this; every figure but tokens/s is this process's own. contract: a check, too, that every
    backend that trains keeps its op's contract (on a GPU that takes minutes).
    """
    import torch

    from tritium.benchmarks import arm, ours, peers
    from tritium.engine import allocator, metrics, parallel, train

    result = record.begin("train", command, device, config.name)
    clock = timing.clock_for(device)
    compiles = train.should_compile(config, torch.device(device))[0]
    with allocator.freed_memory_kept(device == "cpu"), from_nothing(compiles):
        world = world or parallel.World(device=torch.device(device))
        batches = peers.batches(config.model, B, T, 4, device, seed + world.rank)
        baseline, before = arm.resident_bytes(), Compiled.now()
        training = ours.build(config, device, B, world)
        start = time.perf_counter()
        with anatomy.kernels_named(device) if explain else contextlib.nullcontext(), one_graph():
            losses = [training.step(*batches[0]).item()]
        first_step_s = time.perf_counter() - start
        say(f"first step done after {first_step_s:.1f} s, loss {losses[0]:.4f}")
        losses.append(training.step(*batches[1]).item())
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else arm.peak_bytes() - baseline
        turn = itertools.cycle(batches)
        last: list[torch.Tensor] = []

        def step() -> None:
            last[:] = [training.step(*next(turn))]

        timed_step = timing.timed(step, clock)

        def step_arm() -> float:
            world.barrier()  # what came before may have taken another process longer
            return timed_step()

        warm = timing.warm_up(step_arm, limit_runs=20, agreed=lambda stop: not world.any(not stop))
        settled = Compiled.now() - before
        dtype, products = training.engine.dtype, gemms(training.config, B * T)
        rate, rate_at = matmul_rate(products, dtype, device)
        backend, attend, why_not = attention_call(config, B, T, dtype, device, clock)
        say(f"measured {rate / 1e12:.3g} TFLOP/s at {rate_at}; the fastest attention is {backend}")
        own = {
            "products": timing.timed(gemm_call(products, dtype, device), clock),
            "attention": timing.timed(attend, clock),
        }
        for run in own.values():
            timing.warm_up(run, limit_runs=6)
        between = Compiled.now()  # what the attention backends compiled is not the step's
        samples = timing.interleave({"step": step_arm, **own}, rounds, lambda done: say(f"round {done} of {rounds}"))
        record.after(result)
        losses.append(last[0].item())
        rows, profiled_ms = _explained(training, batches, rate, picture, config.name) if explain else ([], None)
        later = Compiled.now() - between
    compiled = settled + later
    compile_s = max(first_step_s - samples["step"].median_ms / 1e3, 0.0) if training.engine.compiled else 0.0
    per_token = {c: metrics.flops_per_token(config.model, T, c) for c in ("full", "causal")}  # type: ignore[arg-type]
    executed, uncounted = _executed(training, B, T)
    described = ours.describe(training)
    peak_rate = datasheet(result["machine"])
    over = timing.speedup(_sum(samples["products"], samples["attention"]), samples["step"])
    ms = samples["step"].ms
    figures = [
        record.figure("tokens/s", "tokens/s", "higher", [1e3 * world.size * B * T / t for t in ms]),
        record.figure("step", "ms", "lower", ms),
        record.figure("own products", "ms", "", samples["products"].ms),
        record.figure("best attention", "ms", "", samples["attention"].ms),
        record.figure("step over its products and attention", "×", "lower", _ratios(samples)),
        record.figure("peak memory", "bytes", "lower", value=peak),
        record.figure("compilation", "s", "lower", value=compile_s),
        record.figure("first step", "s", "lower", value=first_step_s),
    ]
    conventions: dict[str, int | None] = {f"MFU, {c}": flops for c, flops in per_token.items()}
    conventions["HFU"] = executed
    for name, flops in conventions.items():
        for against, divisor in (("measured matmul", rate), ("datasheet", peak_rate)):
            if flops is not None and divisor is not None:
                shares = [utilisation(1e3 * B * T / t, flops, divisor) for t in ms]
                label = f"{name} of {against}"
                better = "" if label.endswith(record.OF_A_RATE) else "higher"
                figures.append(record.figure(label, "fraction", better, shares))
    checks = [
        record.check("nothing compiled after the warm-up", later.graphs == 0, f"{later.graphs} graphs"),
        record.check("one graph", settled.graphs == int(training.engine.compiled), f"{settled.graphs} graphs"),
        record.check("no graph break", compiled.breaks == 0, f"{compiled.breaks}"),
        record.check("finite losses", all(map(math.isfinite, losses)), f"first and last {losses[0]:g}, {losses[-1]:g}"),
        record.check("FLOPs that are done were counted", executed is not None, uncounted),
    ]
    if contract:
        checks.append(_contract(described["kernels"], dtype, device))
    if profiled_ms is not None:
        checks += anatomy.checks(rows)
        figures.append(record.figure("profiled step", "ms", "", value=profiled_ms))
    return result | {
        "settings": {
            "T": T, "B": B, "processes": world.size, "rounds": rounds, "seed": seed,
            "config": json.loads(training.config.to_json()),
        },
        "model": {
            "parameters": training.engine.model.num_parameters(), "flops_per_token": per_token,
            "flops_per_token_done": executed,
        },
        "rates": {"datasheet": peak_rate, "measured_matmul": rate, "measured_at": rate_at},
        "gemms": [dataclasses.asdict(g) for g in products],
        "attention": {"backend": backend, "why_not": why_not},
        "compilation": {
            "compiled": training.engine.compiled, "first_step_s": first_step_s, "seconds": compile_s,
            "graphs": settled.graphs, "graph_breaks": compiled.breaks, "compiled_after_warm_up": later.graphs,
        },
        "dtype": str(dtype).removeprefix("torch.") + " and fp8" * (ours.precision(training.engine) == "fp8"),
        "deterministic": training.deterministic,
        "warm_up": {"runs": warm.runs, "stable": warm.stable},
        "noise": timing.noise(samples["step"]),
        "step_over_own": over.to_json(),
        "anatomy": rows,
        "kernels": described["kernels"],
        "sources": record.sources((row["op"], row["backend"]) for row in described["kernels"]),
        "figures": figures,
        "checks": checks,
    }  # fmt: skip


def _contract(table: Sequence[dict[str, Any]], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The check that what trained is right, on its op's small cases: speed is easily had without."""
    from tritium.benchmarks import kernels
    from tritium.kernels.ops import OPS

    gate = kernels.Gate(device)
    trained = sorted({(row["op"], row["backend"]) for row in table if row["phase"] == "train"})
    for op, backend in trained:
        gate.admits(OPS[op], OPS[op].load(backend), dtype)
    told = ", ".join(f"{op}.{backend}" for op, backend in trained if backend != "reference") or "all are references"
    return record.check("the kernels keep their contract", not gate.red, "; ".join(gate.red)[:2000] or told)


def _sum(a: timing.Samples, b: timing.Samples) -> timing.Samples:
    return timing.Samples(tuple((x[0] + y[0], x[1] + y[1]) for x, y in zip(a.rounds, b.rounds, strict=True)))


def _ratios(samples: dict[str, timing.Samples]) -> list[float]:
    """The step over its products and attention, round by round."""
    own = _sum(samples["products"], samples["attention"])
    return [sum(a) / sum(b) for a, b in zip(samples["step"].rounds, own.rounds, strict=True)]


def _executed(training: Training, B: int, T: int) -> tuple[int | None, str]:
    """(FLOPs done per token, "") or (None, why torch could not count them)."""
    try:
        return flops_done(training, B, T) // (B * T), ""
    except Exception as error:  # an op of a user's without fake tensors: HFU is not known then, the rest is
        return None, _first_line(error)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def _explained(
    training: Training, batches: Sequence[Any], matmul: float, picture: pathlib.Path | None, name: str
) -> tuple[list[dict[str, Any]], float]:
    """(the anatomy's rows, milliseconds of the step that they are of)."""
    B, T = batches[0][0].shape
    device = training.world.device.type
    with handing_out(training, batches) as source:
        times, wall_ms = anatomy.profile(training, source)
    best = anatomy.roofline(training, B, T, matmul, anatomy.copy_rate(device))
    rows = anatomy.table(times, wall_ms, best)
    if picture is not None:
        anatomy.draw(rows, f"{name}, T={T}, B={B}: where a training step of {wall_ms:.0f} ms goes", picture)
    return rows, wall_ms


@contextlib.contextmanager
def handing_out(training: Training, batches: Sequence[Any]) -> Iterator[Callable[[], MicroBatch]]:
    """What gives the profiled steps their batches, on the host and as ``tritium train`` has them (page-locked for a
    GPU): the loader of the folder that the configuration names, or else ``batches``, which cost no wait."""
    from tritium.engine.step import MicroBatch

    config, cuda = training.config, training.world.device.type == "cuda"
    B, T = batches[0][0].shape
    if config.data.folder:
        from tritium.engine.data.loader import Loader  # whose libraries a bare machine with a GPU need not have

        loader = Loader(
            config.data.folder, "train", T=T, batch_rows=B, seed=config.data.seed, vocab_size=config.model.vocab_size,
            pin_memory=cuda,
        )  # fmt: skip
        with loader:
            yield lambda: MicroBatch(*next(loader)[:2])
        return
    host = [MicroBatch(*(tensor.cpu().pin_memory() if cuda else tensor for tensor in pair)) for pair in batches]
    turn = itertools.cycle(host)
    yield lambda: next(turn)


def datasheet(machine: dict[str, Any]) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its marketing name, or None: also for a board of the same name that is slower than
    the one in kernels/peaks.py (of Hopper, PCIe and NVL)."""
    from tritium.kernels import peaks

    name = machine["name"]
    peak = peaks.by_name(name) if machine["device"] == "cuda" else None
    return peak.matrix if peak is not None and peak.same_matrix(name) else None


# ------------------------------------------------------------------------------------------------------------- command


def summary(result: dict[str, Any]) -> str:
    """The record in lines for a terminal."""
    found = {f["name"]: f for f in result["figures"]}
    s, c = result["settings"], result["compilation"]
    q = timing.Samples(tuple((x, x) for x in found["step"]["samples"]))
    over = result["step_over_own"]
    each = f" in each of {s['processes']} processes" if s["processes"] > 1 else ""
    title = (
        f"{result['preset']}, T={s['T']}, B={s['B']}{each}, {result['dtype']}, "
        f"{'compiled' if c['compiled'] else 'eager'}"
        f"{', deterministic' if result['deterministic'] else ''}, on {result['machine']['name']}"
    )
    red = [f"  FAILED: {check['name']}: {check['detail']}" for check in result["checks"] if not check["ok"]]
    if red:  # speeds of something wrong are no speeds
        return "\n".join([title, *red, "  so its figures do not count and are not shown; the record has them"])
    lines = [
        title,
        f"  tokens/s            {found['tokens/s']['value']:,.0f}",
        f"  step                {q.quantile_ms(0.5):.1f} ms "
        f"[p20 {q.quantile_ms(0.2):.1f}, p80 {q.quantile_ms(0.8):.1f}], noise {100 * result['noise']:.1f} %",
        f"  over its own        {over['median']:.3f} [{over['low']:.3f}, {over['high']:.3f}]: the step over its matrix "
        f"products ({found['own products']['value']:.1f} ms) and attention ({found['best attention']['value']:.1f} ms, "
        f"{result['attention']['backend']})",
    ]
    for name in ("MFU, full", "MFU, causal", "HFU"):
        shares = [
            f"{100 * found[key]['value']:.1f} % of {against}"
            for against in ("measured matmul", "datasheet") if (key := f"{name} of {against}") in found
        ]  # fmt: skip
        lines.append(f"  {name:<20}{', '.join(shares) or 'not counted'}")
    rates = result["rates"]
    lines.append(
        f"  matmul              {rates['measured_matmul'] / 1e12:.3g} TFLOP/s measured at {rates['measured_at']}; "
        + (
            f"datasheet {rates['datasheet'] / 1e12:.0f}"
            if rates["datasheet"]
            else "no datasheet figure for this device"
        )
    )
    lines += [
        f"  peak memory         {found['peak memory']['value'] / 2**30:.2f} GiB",
        f"  compilation         {c['seconds']:.1f} s, {c['graphs']} graphs, {c['graph_breaks']} breaks, "
        f"{c['compiled_after_warm_up']} compiled after the warm-up",
    ]
    if not result["warm_up"]["stable"]:
        lines.append(
            f"  NOT SETTLED: after {result['warm_up']['runs']} steps two windows of three still differed by over 5 %, "
            "so the figures may be of a machine that was not steady: repeat it when nothing else runs"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tritium bench train",
        usage="%(prog)s [PRESET] [options] [--SECTION.NAME VALUE ...]",
        allow_abbrev=False,
        description="Speed, utilisation, memory, compilation of training a preset (default: tiny). Every field of the "
        "configuration is a flag too, as for `tritium train` (--train.recompute full, --kernels.attention native).",
    )
    made.add_argument("--T", type=int, help="tokens in a row (default: by preset)")
    made.add_argument("--B", type=int, help="rows in a step (default: by preset)")
    made.add_argument("--rounds", type=int, default=10, help="of two steps each (default: %(default)s)")
    made.add_argument(
        "--anatomy", action="store_true",
        help="profile: where the time of a step goes, with a picture; its batches come from --data.folder if named",
    )  # fmt: skip
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--seed", type=int, default=0, help="of the batches (default: %(default)s)")
    made.add_argument("--out", type=pathlib.Path, help="folder of the record (default: benchmarks/results/MACHINE)")
    return made


@stages.ended_by_signals()
def main(argv: Sequence[str] | None = None) -> int:
    """``tritium bench train``; exit status 0, 1 when a check fails or the run cannot be made (kernels, data, memory, a
    graph that breaks), 2 for a wrong command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    made = parser()
    first = argv[:1] if argv and not argv[0].startswith("-") else []
    a, fields = made.parse_known_args(argv[len(first) :])
    a.preset = first[0] if first else "tiny"
    if a.preset not in presets.names():
        made.error(
            f"there is no preset {a.preset!r}; the nearest are {nearest(a.preset, presets.names())}. "
            f"All: {', '.join(presets.names())}"
        )
    for field, least, why in (("rounds", 2, ", or there is no interval"), ("T", 1, ""), ("B", 1, "")):
        value = getattr(a, field)
        if value is not None and value < least:
            made.error(f"--{field} must be at least {least}{why}; it is {value}")
    if not 0 <= a.seed < 2**63:
        made.error(f"--seed must be from 0 to {2**63 - 1}; it is {a.seed}")
    own = [flag for action in made._actions for flag in action.option_strings]
    sections = [f"--{field.name}" for field in dataclasses.fields(Config)]  # cli.parse knows what is in them
    for flag in (word.partition("=")[0] for word in fields if word.startswith("--")):
        if flag.partition(".")[0] not in sections:
            made.error(f"there is no flag {flag!r}; the nearest are {nearest(flag, own + sections)}")
    import torch

    if a.device == "cuda" and not torch.cuda.is_available():
        made.error("--device cuda: torch finds no GPU here, so there is nothing to time; use --device cpu")
    device = a.device if a.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    from tritium.benchmarks import throughput
    from tritium.engine import parallel
    from tritium.engine.cli import UsageError
    from tritium.engine.data.errors import DataError

    machine = record.machine(device)
    folder = a.out or throughput.results_folder({"machine": machine})
    if why := record.unwritable(folder / "record.json"):
        made.error(f"--out: {why}")
    try:
        config, T, B = configured(a.preset, a.T, device, fields)
        B = a.B or B
        stem = f"train_{a.preset}_T{T}_B{B}" + (f"_{_digest(fields)}" if fields else "")
        with parallel.world(device) as world:
            stem += f"_P{world.size}" if world.size > 1 else ""
            start = ["torchrun", f"--nproc-per-node={world.size}", "-m", "tritium.engine.cli"]
            result = bench(
                config, T, B, rounds=a.rounds, device=device, seed=a.seed, explain=a.anatomy,
                command=shlex.join([*(start if world.size > 1 else ["tritium"]), "bench", "train", *argv]),
                say=lambda text: print(text, file=sys.stderr, flush=True) if world.first else None,
                picture=folder / f"{stem}.png" if a.anatomy and world.first else None,
                world=world, contract=True,
            )  # fmt: skip
    except UsageError as error:
        made.error(str(error))
    except torch.OutOfMemoryError as error:
        print(
            f"{a.preset}: T={T}, B={B} needs more memory than the GPU has; use a smaller --B. {error}", file=sys.stderr
        )
        return 1
    except (KernelError, ConfigError, DataError, BrokenGraph) as error:
        print(f"{a.preset}: {error}", file=sys.stderr)
        return 1
    if not world.first:
        return _status(result)
    path = folder / f"{stem}.json"
    replaced = record.write(result, SCHEMA, path)
    print(f"\n{summary(result)}")
    if result["anatomy"]:
        value = {f["name"]: f["value"] for f in result["figures"]}
        print(
            f"\n{anatomy.text(result['anatomy'])}\nof a profiled step of {value['profiled step']:.1f} ms, "
            f"{value['profiled step'] / value['step']:.2f} × the one that was timed\ndrawn: {path.with_suffix('.png')}"
        )
    print(f"written: {path}{replaced}", flush=True)
    return _status(result)


def _status(result: dict[str, Any]) -> int:
    return int(not all(check["ok"] for check in result["checks"]))


def _digest(fields: Sequence[str]) -> str:
    """A few letters that tell apart the records of one preset with other settings."""
    import hashlib

    return hashlib.sha256("\0".join(fields).encode()).hexdigest()[:6]


if __name__ == "__main__":
    sys.exit(main())
