"""The plan of a step's memory (engine/plan.py) against what processes really took: drawn configurations, each in a
fresh process.

    python -P -m tritium.benchmarks.memory [--count 12] [--seed 0] [--device cpu] [--json FILE]

On a CPU a process's peak is its largest resident size less what it had before the engine was built, when it had
imported everything and taken a step of a miniature of the same model (which loads libraries, starts threads and lets
them take their scratch). It is measured twice: with glibc told to give what is freed back to the system, where the
process has what the program asks for; and as tritium trains, with freed memory kept, holes and all. In both the plan
may be off by plan.MARGIN (exit status 1 beyond), but not where the heap is glibc's, whose holes a plan can only guess
at: that is shown. Compiled
(--compile), the peak is that of the steps after the first, less what the process has when the engine has gone:
compiling takes memory of its own. On a GPU it is torch.cuda.max_memory_allocated(); that has never been run.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tritium.engine.config import Config, GPTConfig, TrainConfig

CHILD = (sys.executable, "-P", "-c", "from tritium.benchmarks.memory import child; child()")
SIZES = (3e8, 1.2e9)  # bytes that a drawn configuration's plan may have
MOST_FLOPS = 8e11  # of a step
STEPS = 2
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}  # glibc's default, which then no longer grows


@dataclass(frozen=True)
class Comparison:
    """One configuration. bytes: the plan's, by kind. kept_*: with freed memory kept, where that was measured too."""

    about: str
    planned: int
    measured: int
    bytes: dict[str, int]
    kept_planned: int = 0
    kept_measured: int = 0

    @property
    def error(self) -> float:
        return self.planned / self.measured - 1.0

    @property
    def kept_error(self) -> float:
        return self.kept_planned / self.kept_measured - 1.0 if self.kept_measured else 0.0


def draw(seed: int, number: int, device: str = "cpu", compile: bool = False) -> Config:
    """A configuration of a few hundred MB and seconds, of all that the plan knows of; equal for equal arguments.
    compile: the same one, compiled."""
    from tritium.engine import metrics

    r = random.Random(f"memory {seed} {number}")
    while True:
        C = r.choice((256, 384, 512, 768))
        D = r.choice((32, 64))
        heads = C // D
        gated = r.random() < 0.3
        model = GPTConfig(
            vocab_size=r.choice((1000, 4096, 16000, 50257)), block_size=r.choice((128, 256, 512)),
            n_layer=r.randint(2, 8), n_head=heads, n_kv_head=r.choice((0, 0, heads // 2)), n_embd=C,
            position=r.choice(("learned", "rope")), norm=r.choice(("layer_norm", "rms_norm")),
            activation=r.choice(("swiglu", "geglu")) if gated else r.choice(("gelu", "relu2")),
            bias=r.random() < 0.5, qk_norm=r.random() < 0.2, tie_head=r.random() < 0.6,
            fused_loss=r.random() < 0.8,
        )  # fmt: skip
        rows, parts = r.choice((2, 4, 8, 16)), r.choice((1, 1, 2))
        train = TrainConfig(
            batch_rows=rows * parts, micro_rows=rows, precision=r.choice(("fp32", "bf16")), compile="false",
            recompute=r.choice(("none", "none", "full", "every", "selective", "budget")),
            device=device,  # type: ignore[arg-type]
        )  # fmt: skip
        config = Config(name=f"drawn_{seed}_{number}", model=model, train=train).replace(
            kernels={"default": r.choice(("auto", "auto", "reference"))}
        )
        if metrics.flops_per_token(model) * config.batch_tokens > MOST_FLOPS:
            continue
        if train.recompute == "budget":  # somewhere between the blocks' inputs and all
            config = config.replace(train={"recompute_budget_gb": _budget(config, r.uniform(0.2, 0.8))})
        if SIZES[0] <= planned(config)[0] <= SIZES[1]:
            return config.replace(train={"compile": "true"}) if compile else config


def _budget(config: Config, share: float) -> float:
    import torch

    from tritium.engine import recompute, train

    with torch._subclasses.FakeTensorMode():
        engine = train.build(config.replace(train={"recompute": "none"}), compile=False)
        looked = recompute.look_at(engine.model, config.train.micro_rows)
    return config.model.n_layer * (looked.least + share * (looked.most - looked.least)) / 1e9


def planned(config: Config, kept: bool = False) -> tuple[int, dict[str, int]]:
    """(peak, by kind) of the plan for this machine: on a CPU of the process, on a GPU of torch's allocator. kept: on a
    CPU, with freed memory kept."""
    import torch

    from tritium.engine import allocator, plan
    from tritium.kernels.peaks import H100
    from tritium.kernels.site import Machine

    device = torch.device(config.train.device)
    heap = allocator.policy() if kept else ""
    target = plan.Target(Machine.here(device), 1, H100, kept=heap)  # neither memory nor rates matter here
    compiled = config.train.compile == "true"
    row = plan.measure(plan.settled(config, target.machine), target, compiled=compiled)
    used = {kind: size for kind, size in row.bytes.items() if device.type == "cpu" or kind != "holes"}
    return sum(used.values()), used


def measured(config: Config, kept: bool = False) -> int:
    """The peak of a fresh process that takes STEPS steps, in bytes; kept: as it trains, with freed memory kept."""
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **({} if kept else GIVEN_BACK)}
    done = subprocess.run(
        CHILD, input=config.to_json(), capture_output=True, text=True, env=environment, check=False, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"{describe(config)} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def child() -> None:
    """The fresh process: a configuration on stdin, its peak on stdout."""
    import gc

    import torch

    from tritium.engine import allocator

    config = Config.from_json(sys.stdin.read())
    device = config.train.device
    with allocator.freed_memory_kept(device == "cpu"):
        _train(miniature(config), device)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        else:
            _trim()
        before = allocator.resident_bytes()
        _train(config, device)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else allocator.peak_bytes()
        if device == "cpu" and config.train.compile == "true":
            gc.collect()  # what compiling has left behind is the compiler's: it stays when the engine has gone
            _trim()
            before = allocator.resident_bytes()
    print(json.dumps({"peak_bytes": peak - (before if device == "cpu" else 0)}))


def _trim() -> None:
    import ctypes

    with_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if with_trim is not None:
        with_trim(0)


def _forget_peak() -> None:
    """VmHWM starts anew (Linux)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def miniature(config: Config) -> Config:
    """The same kind of model at a size that takes no memory."""
    m = config.model
    small = {"vocab_size": 100, "block_size": 32, "n_layer": 2, "n_embd": 2 * m.head_width, "n_head": 2,
             "n_kv_head": 1 if m.n_kv_head else 0}  # fmt: skip
    parts = config.train.batch_rows // config.train.micro_rows
    return config.replace(model=small, train={"batch_rows": parts, "micro_rows": 1, "recompute_budget_gb": 1.0})


def _train(config: Config, device: str) -> None:
    import torch

    from tritium.engine import train
    from tritium.engine.parallel import World
    from tritium.engine.step import MicroBatch, train_step

    place = torch.device(device)
    with train.determinism(train.is_deterministic(config, place)):
        engine = train.build(config, World(device=place))
        t, shape = config.train, (config.train.micro_rows, config.model.block_size)
        lr, inverse_count = (torch.full((), value, device=place) for value in (1e-3, 1.0 / config.batch_tokens))
        compiles = t.compile == "true"
        for step in range(STEPS + compiles):
            if compiles and step == 1:
                _forget_peak()
            batches = []
            for _ in range(t.batch_rows // t.micro_rows):
                ids = torch.randint(config.model.vocab_size, shape, device=place)
                batches.append(MicroBatch(ids, ids.roll(-1, 1)))
            loss, _ = train_step(engine.loss, engine.optimizer, batches, lr, inverse_count)
        assert torch.isfinite(loss), "a loss that is not finite: the step was skipped, and its memory means nothing"


def describe(config: Config) -> str:
    m, t = config.model, config.train
    policy = {"every": f"every {t.recompute_every}", "budget": f"budget {t.recompute_budget_gb:.2f} GB"}
    extras = [name for name, on in (
        ("untied", not m.tie_head), ("bias", m.bias), ("qk_norm", m.qk_norm), ("loss apart", not m.fused_loss),
        (f"{m.kv_heads} kv heads", bool(m.n_kv_head)), ("reference", config.kernels.default == "reference"),
        (f"{config.optim.moments} moments", config.optim.moments != "fp32"),
    ) if on]  # fmt: skip
    return (
        f"L={m.n_layer} C={m.n_embd} H={m.n_head} V={m.vocab_size} T={m.block_size} "
        f"B={t.batch_rows // t.micro_rows}×{t.micro_rows} {t.precision} {m.norm} {m.position} {m.activation} "
        f"{', '.join([policy.get(t.recompute, t.recompute), *extras])}"
    )


def compare(config: Config, kept: bool = False) -> Comparison:
    """Plan one configuration, run it, and hold the two against each other; kept: with freed memory kept, too."""
    expected, kinds = planned(config)
    more = (planned(config, kept=True)[0], measured(config, kept=True)) if kept else ()
    return Comparison(describe(config), expected, measured(config), kinds, *more)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 when a plan is off by more than plan.MARGIN."""
    from tritium.engine import allocator, plan

    made = argparse.ArgumentParser(prog="python -P -m tritium.benchmarks.memory", description=__doc__.split("\n\n")[0])
    made.add_argument("--count", type=int, default=12, help="configurations to draw (12)")
    made.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--compile", action="store_true", help="compiled steps; half a minute each")
    made.add_argument("--moments", choices=("fp32", "bf16", "int8"), default="fp32", help="optim.moments of all (fp32)")
    made.add_argument("--json", type=pathlib.Path, help="also write what was found to this file")
    options = made.parse_args(argv)
    found: list[Comparison] = []
    print(f"{'plan, MB':>9} {'measured':>9} {'error':>7} | {'kept':>7} {'measured':>9} {'error':>7}  configuration")
    for number in range(options.count):
        config = draw(options.seed, number, options.device, options.compile)
        if options.moments != "fp32":
            config = config.replace(optim={"moments": options.moments})
        c = compare(config, kept=options.device == "cpu" and not options.compile)
        found.append(c)
        kept = f"{c.kept_planned / 1e6:7.1f} {c.kept_measured / 1e6:9.1f} {c.kept_error:+7.1%}"
        print(f"{c.planned / 1e6:9.1f} {c.measured / 1e6:9.1f} {c.error:+7.1%} | {kept}  {c.about}", flush=True)
    worst = max(abs(c.error) for c in found)
    print(f"worst error {worst:.1%} of {len(found)}; {plan.MARGIN:.0%} is allowed")
    kept_worst = max(abs(c.kept_error) for c in found)
    if any(c.kept_measured for c in found):
        held = allocator.policy() == "native"
        print(f"with freed memory kept: worst {kept_worst:.1%}{'' if held else ', in glibc: not held to it'}")
        worst = max(worst, kept_worst) if held else worst
    if options.json:
        records: list[dict[str, Any]] = [{**asdict(c), "error": c.error, "kept_error": c.kept_error} for c in found]
        options.json.write_text(json.dumps(records, indent=2))
    return int(worst > plan.MARGIN)


if __name__ == "__main__":
    sys.exit(main())
