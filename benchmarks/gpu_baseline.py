"""What a GPU gives to anyone: ceilings, library kernels and other people's GPT-2. No kernel of tritium is used.

Each function is a stage of ``make gpu`` (gpu.py). Shapes: B batch · T time · H heads · D head width · C model width ·
V vocabulary · N rows. FLOP/s of causal attention count the causal half; a backward counts 2.5 forwards. With
``bench.tiny`` every stage is rehearsed at shapes that a CPU finishes at once: its figures mean nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tritium.benchmarks import peers, record, timing
from tritium.benchmarks.gpu_records import Run
from tritium.benchmarks.stages import Lines, read_lines
from tritium.engine import presets
from tritium.engine.config import Config, GPTConfig
from tritium.engine.metrics import flops_per_token

if TYPE_CHECKING:
    from tritium.benchmarks import ours

GPT2S = {"gpt2_124m": 32, "gpt2_350m": 16, "gpt2_774m": 16, "gpt2_1558m": 8}  # preset → rows of a step
TINY = GPTConfig(vocab_size=500, block_size=64, n_layer=2, n_head=2, n_embd=64)


class Bench:
    """What the stages of one run share: the device, whether this is a rehearsal, and where lines go.

    seconds: how long one figure is measured. Between calls a buffer larger than the L2 cache is overwritten, so that
    inputs come from memory, and inputs rotate where there are several.
    """

    def __init__(self, lines: Lines, device: str, tiny: bool, seconds: float = 0.3, run: Run | None = None):
        self.lines, self.device, self.tiny = lines, device, tiny
        self.seconds = 0.0 if tiny else seconds
        self.run = run or Run()
        torch.manual_seed(0)

    @functools.cached_property
    def cold(self) -> timing.Clock:  # on demand: a stage whose children do the work takes no memory of the GPU's
        return timing.clock_for(self.device, scrub_bytes=0 if self.tiny else 256 << 20)

    @functools.cached_property
    def warm(self) -> timing.Clock:
        return timing.clock_for(self.device)

    def quantiles_ms(
        self, calls: Callable[[], object] | Sequence[Callable[[], object]], clock: timing.Clock | None = None
    ) -> list[float]:
        """The 20th, 50th and 80th percentile of one call's milliseconds; several calls take turns."""
        turns = itertools.cycle([calls] if callable(calls) else calls)
        clock = clock or self.cold
        once = max(clock.times_ms([next(turns) for _ in range(1 if self.tiny else 4)])[-1], 1e-3)
        repeats = int(min(max(1e3 * self.seconds / once, 1 if self.tiny else 7), 200))
        times = [
            t for _ in range(-(-repeats // 20)) for t in clock.times_ms([next(turns) for _ in range(min(repeats, 20))])
        ]
        return [float(q) for q in numpy.quantile(times, (0.2, 0.5, 0.8))]

    def rate(
        self,
        name: str,
        amount: float,
        unit: str,
        calls: Callable[[], object] | Sequence[Callable[[], object]],
        **more: object,
    ) -> float:
        """Write ``amount`` (FLOPs or bytes of a call) per second in ``unit`` (TFLOP/s or TB/s); returns the median
        milliseconds.
        """
        low, ms, high = self.quantiles_ms(calls)
        self.lines.write(
            name, amount / ms / 1e9, unit, ms=round(ms, 4), p20_ms=round(low, 4), p80_ms=round(high, 4), **more
        )
        return ms

    def randn(self, *shape: int, grad: bool = False) -> Tensor:
        """bf16 normals on the device."""
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16, requires_grad=grad)

    def free(self) -> None:
        """Give memory and compiled code back before the next configuration."""
        gc.collect()
        torch._dynamo.reset()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def matmul_tflops(self) -> float | None:
        """What the stage ``ceilings`` of this run measured for bf16, if it ran."""
        found = read_lines(self.lines.out / "ceilings.jsonl")
        return next(
            (line["value"] for line in found if line["name"].startswith("matmul bf16") and line["unit"] == "TFLOP/s"),
            None,
        )


def device(bench: Bench) -> None:
    """Which device, which versions, which clocks and power limits."""
    environment = record.begin("gpu", "make gpu", bench.device)
    bench.lines.write("machine", environment["machine"]["name"], "name", environment=environment)
    if bench.device != "cuda":
        return
    p = torch.cuda.get_device_properties(0)
    bench.lines.write(
        "memory", p.total_memory / 2**30, "GiB", sms=p.multi_processor_count, l2_mib=p.L2_cache_size >> 20
    )
    bench.lines.write("cuda", str(torch.version.cuda), "version", cudnn=torch.backends.cudnn.version())
    if shutil.which("nvidia-smi") is None:
        bench.lines.write("nvidia-smi", "not installed", "error")
        return
    fields = (
        "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu", "driver_version",
        "clocks_throttle_reasons.active",
    )  # fmt: skip
    for field in fields:  # one by one: a field that a driver does not know must not hide the others
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "--id=0"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        bench.lines.write(field, said.stdout.strip() or said.stderr.strip(), "nvidia-smi")


def ceilings(bench: Bench) -> None:
    """The largest matmul and copy rates: what every other figure is a fraction of."""
    n = 128 if bench.tiny else 8192
    pairs = [(bench.randn(n, n), bench.randn(n, n)) for _ in range(2)]
    bench.rate(f"matmul bf16 {n}^3", 2 * n**3, "TFLOP/s", [partial(torch.matmul, a, b) for a, b in pairs])
    if bench.device == "cuda":
        with bench.lines.attempt(f"matmul fp8 {n}^3"):
            a, b = (x.to(torch.float8_e4m3fn) for x in pairs[0])
            one = torch.ones((), device=bench.device)
            multiply = lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
            bench.rate(f"matmul fp8 {n}^3", 2 * n**3, "TFLOP/s", multiply)
    for mib in (1,) if bench.tiny else (64, 512, 4096):
        x = torch.zeros(mib << 20, device=bench.device, dtype=torch.uint8)
        y = torch.empty_like(x)
        bench.rate(f"copy {mib} MiB (read + written)", 2 * x.numel(), "TB/s", partial(y.copy_, x))


def attention(bench: Bench) -> None:
    """SDPA by kernel, forward and backward."""
    shapes = [(1, 2, 64, 64)] if bench.tiny else [
        (32, 12, 1024, 64), (16, 25, 1024, 64), (4, 32, 4096, 64), (1, 32, 16384, 64),
        (16, 16, 1024, 128), (4, 48, 4096, 128), (4, 48, 8192, 128),
    ]  # fmt: skip
    kinds = ("MATH",) if bench.device == "cpu" else ("CUDNN_ATTENTION", "FLASH_ATTENTION")
    for (B, H, T, D), causal, kind in itertools.product(shapes, (True, False), kinds):
        name = f"{kind} B={B} H={H} T={T} D={D} {'causal' if causal else 'full'}"
        q, k, v = (bench.randn(B, H, T, D, grad=True) for _ in range(3))
        with bench.lines.attempt(name), sdpa_kernel(getattr(SDPBackend, kind)):
            forward = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal)
            _forward_and_backward(bench, name, forward, (q, k, v), 4 * B * H * T * T * D / (2 if causal else 1))


def flex(bench: Bench) -> None:
    """FlexAttention, causal, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    for B, H, T, D in [(1, 2, 128, 64)] if bench.tiny else [(32, 12, 1024, 64), (4, 48, 4096, 128)]:
        name = f"FlexAttention B={B} H={H} T={T} D={D} causal"
        q, k, v = (
            bench.randn(B, H, T, D, grad=bench.device == "cuda") for _ in range(3)
        )  # it has no backward on a CPU
        with bench.lines.attempt(name):
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=bench.device)
            forward = partial(compiled, q, k, v, block_mask=mask)
            inputs = (q, k, v) if q.requires_grad else ()
            _forward_and_backward(bench, name, forward, inputs, 2 * B * H * T * T * D)


def _forward_and_backward(
    bench: Bench,
    name: str,
    forward: Callable[[], Tensor],
    inputs: Sequence[Tensor],
    flops: float,
    backward: float = 2.5,
) -> None:
    """The rates of ``forward`` and of its gradients with respect to ``inputs``, ``backward`` times its FLOPs."""
    bench.rate(f"{name} forward", flops, "TFLOP/s", forward)
    if inputs:
        out = forward()
        upstream = torch.randn_like(out)
        gradients = lambda: torch.autograd.grad(out, inputs, upstream, retain_graph=True)  # noqa: E731
        bench.rate(f"{name} backward", backward * flops, "TFLOP/s", gradients)


def gemm(bench: Bench) -> None:
    """The linears of the four GPT-2s: forward (x wᵀ), input gradient (g w), weight gradient (gᵀ x); the head at two
    vocabularies.
    """
    rows = 64 if bench.tiny else 32768
    models = {"tiny": TINY} if bench.tiny else {name: presets.load(name).model for name in GPT2S}
    for name, model in models.items():
        C, V = model.n_embd, model.vocab_size
        shapes = {
            "qkv": (rows, C, 3 * C), "proj": (rows, C, C), "up": (rows, C, 4 * C), "down": (rows, 4 * C, C),
            "head, padded V": (rows // 4, C, model.padded_vocab_size), "head, exact V": (rows // 4, C, V),
        }  # fmt: skip
        for part, (N, K, M) in shapes.items():
            x, w, g = bench.randn(N, K), bench.randn(M, K), bench.randn(N, M)
            calls = {
                "forward": lambda x=x, w=w: x @ w.t(),
                "dx": lambda g=g, w=w: g @ w,
                "dw": lambda g=g, x=x: g.t() @ x,
            }
            ms = {what: bench.quantiles_ms(call)[1] for what, call in calls.items()}
            each = {f"{what}_tflops": float(f"{2 * N * K * M / t / 1e9:.4g}") for what, t in ms.items()}
            bench.lines.write(f"{name} {part} {N}x{K}x{M}", 6 * N * K * M / sum(ms.values()) / 1e9, "TFLOP/s", **each)


def memory_bound(bench: Bench) -> None:
    """LayerNorm, cross-entropy and AdamW as PyTorch has them, eager and compiled, against the bytes an ideal kernel
    moves.
    """
    N = 64 if bench.tiny else 32768
    for C, compiled in itertools.product((64,) if bench.tiny else (768, 1600, 4096), (False, True)):
        name = f"layer_norm {'compiled' if compiled else 'eager'} {N}x{C}"
        x, w, b = bench.randn(N, C, grad=True), bench.randn(C, grad=True), bench.randn(C, grad=True)
        norm = lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b)  # noqa: E731
        with bench.lines.attempt(name):
            _bytes(bench, name, _maybe_compiled(norm, compiled), (x, w, b), (x, w, b), 4 * N * C, 6 * N * C)
    V, n = (512, 64) if bench.tiny else (50304, 8192)
    targets = torch.randint(V, (n,), device=bench.device)
    for compiled in (False, True):
        name = f"cross_entropy {'compiled' if compiled else 'eager'} {n}x{V}"
        logits = bench.randn(n, V, grad=True)
        loss = lambda z: F.cross_entropy(z.float(), targets)  # noqa: E731
        with bench.lines.attempt(name):
            _bytes(bench, name, _maybe_compiled(loss, compiled), (logits,), (logits,), 2 * n * V, 4 * n * V)
        bench.free()
    parameters = [
        torch.nn.Parameter(torch.randn(1 << (14 if bench.tiny else 24), device=bench.device)) for _ in range(8)
    ]
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    moved = 28 * sum(p.numel() for p in parameters)  # reads p, g, m, v and writes p, m, v, 4 bytes each
    bench.rate("AdamW fused, fp32, 28 bytes a parameter", moved, "TB/s", lambda: optimizer.step())


def _maybe_compiled(function: Callable[..., Tensor], compiled: bool) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False) if compiled else function


def _bytes(
    bench: Bench,
    name: str,
    f: Callable[..., Tensor],
    arguments: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    forward: int,
    backward: int,
) -> None:
    """Byte rates of ``f`` and of its gradients, from what an ideal kernel moves once."""
    bench.rate(f"{name} forward", forward, "TB/s", lambda: f(*arguments))
    out = f(*arguments)
    upstream = torch.randn_like(out)
    bench.rate(
        f"{name} backward", backward, "TB/s", lambda: torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    )


# ------------------------------------------------------------------------------------------------------ training steps


def shape_of(bench: Bench, preset: str) -> tuple[Config, int, int]:
    """(config, rows B, tokens T) of a training stage."""
    config = presets.load(preset)
    if bench.tiny:
        return dataclasses.replace(config, model=TINY), 2, TINY.block_size
    return config, GPT2S[preset], config.model.block_size


def textbook(bench: Bench) -> None:
    """GPT-2 in plain PyTorch under bf16 autocast, fused AdamW; the stage's name is the preset's."""
    from tritium.benchmarks.peers import textbook as peer

    preset = bench.lines.stage
    arms = [("default", "CUDNN_ATTENTION"), ("default", "FLASH_ATTENTION")] + [("false", "FLASH_ATTENTION")] * (
        preset == "gpt2_124m"
    )
    if bench.device == "cpu":
        arms = [("false", "MATH")]
    config, B, T = shape_of(bench, preset)
    for mode, kind in arms:
        variant = peers.Variant("bf16", "high", compile=mode)
        select = partial(sdpa_kernel, getattr(SDPBackend, kind))
        build = partial(peer.build, config.model, variant, bench.device, config.optim, select)
        tokens_per_second(bench, f"{preset}, plain PyTorch, {variant}, {kind}", build, config, B, T)
        bench.free()


def huggingface(bench: Bench) -> None:
    """transformers' GPT-2 124M, where transformers is installed."""
    from tritium.benchmarks.peers import huggingface as peer

    reason = peer.why_not()
    if reason is not None:
        bench.lines.write("transformers", reason, "absent")
        return
    config, B, T = shape_of(bench, "gpt2_124m")
    for variant in peer.variants("cuda")[:2]:
        chosen = dataclasses.replace(variant, compile="false") if bench.tiny else variant
        build = partial(peer.build, config.model, chosen, bench.device, config.optim)
        tokens_per_second(bench, f"gpt2_124m, transformers, {chosen}", build, config, B, T)
        bench.free()


def tokens_per_second(
    bench: Bench, name: str, build: Callable[[], peers.Training | ours.Training], config: Config, B: int, T: int
) -> None:
    """Whole steps (forward, backward, clip, update) of one implementation; what fails is recorded under its name."""
    with bench.lines.attempt(name):
        start = time.monotonic()
        training = build()
        batches = peers.batches(config.model, B, T, 4, bench.device)
        training.step(*batches[0]).item()
        first_s = time.monotonic() - start
        if bench.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        arm = iter_arm([partial(training.step, *batch) for batch in batches], bench.warm)
        warm = timing.warm_up(arm, limit_runs=2 if bench.tiny else 20, limit_s=60.0)
        ms = [arm() for _ in range(2 if bench.tiny else 30)]
        facts = {"first_step_s": round(first_s, 1), "warm": warm.stable}
        write_speed(bench, name, float(numpy.median(ms)), config.model, B, T, **facts)


def iter_arm(steps: Sequence[Callable[[], object]], clock: timing.Clock) -> timing.Arm:
    """An arm that takes the steps in turn."""
    turn = itertools.cycle(steps)
    return lambda: clock.times_ms([next(turn)])[0]


def write_speed(bench: Bench, name: str, ms: float, model: GPTConfig, B: int, T: int, **more: object) -> None:
    """tokens/s with model FLOP/s in both conventions, and as a fraction of the matmul rate that this run measured."""
    per_token = {kind: flops_per_token(model, T, kind) for kind in ("full", "causal")}
    tokens = 1e3 * B * T / ms
    facts: dict[str, object] = {"B": B, "T": T, "step_ms": round(ms, 3)}
    facts |= {f"tflops_{kind}": float(f"{tokens * flops / 1e12:.4g}") for kind, flops in per_token.items()}
    ceiling = bench.matmul_tflops()
    if ceiling:
        facts["full_over_measured_matmul"] = float(f"{tokens * per_token['full'] / 1e12 / ceiling:.4g}")
    if bench.device == "cuda":
        facts["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    bench.lines.write(name, tokens, "tokens/s", **facts, **more)
