"""Compile the Triton kernels ahead of time, for GPUs this machine need not have, and hold what comes out to its limits.

    python -m tritium.kernels.aot [op ...] [--arch sm_90 ...] [--dtype bfloat16 ...] [--case gpt2_124m_1k ...]
        [--backend my_package.my_norm] [--also FOLDER] [--write docs/performance.md]

The ops' real launchers run, forward and backward, on meta tensors of the shapes in ``cases.py`` that are marked large.
A driver of the wanted architecture stands in Triton's place for one: it answers what a launcher asks about its GPU,
lets Triton compile, and launches nothing. So what is compiled is exactly what would be launched there; what each
launch passed is held against what the module's ``config(...)`` returned meanwhile. Registers, stack and instructions
are read from the binary with the tools in the triton package.

A failure, exit status 1, is a kernel with a stack (registers spilled), with more shared memory than a block may have,
with a tile that ``config`` did not choose, or outside a ``BUDGETS`` of its op's ``cases.py``; and a call that raises.

Ops and architectures are compiled in as many processes as the machine has cores. ``--also`` does everything once more
with the packages of a folder before the others, another Triton's, and shows both. ``--write`` puts the tables, and
what the GPU's peaks allow (kernels/peaks.py), into a page between its markers.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tritium.kernels import peaks
from tritium.kernels.case import Budget, Case
from tritium.kernels.contract import site_of
from tritium.kernels.interrupts import interrupts_held
from tritium.kernels.op import Backend, KernelError, Op
from tritium.kernels.ops import OPS
from tritium.kernels.site import Machine, interpreting

ARCHS = ("sm_80", "sm_90", "sm_100")
# what CUDA's programming guide says of each: shared memory a block may have (bytes), threads and blocks of a processor;
# and the processors of the usual board
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
PROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}
REGISTERS = 65536  # of a processor
TENSOR_MEMORY = 512  # columns of a processor, sm_100
# a generation's own matrix instructions: mma, warp-group mma, tcgen05. sm_90 executes HMMA too, at half its speed
TENSOR_CORE = {8: r"[HIQ]MMA", 9: r"[HIQ]GMMA", 10: r"UTC[A-Z]*MMA", 12: r"[HIQO]MMA"}
DTYPES = ("bfloat16", "float16", "float32")
BEGIN, END = "<!-- written by make check-kernels: from here -->", "<!-- to here -->"


# ------------------------------------------------------------------------------------------------- a driver to compile


class _Utilities:
    def __init__(self, capability: int, name: str):
        self.capability, self.name = capability, name

    def get_device_properties(self, device: int) -> dict[str, Any]:
        return {
            "name": self.name,
            "max_shared_mem": SHARED_LIMIT[self.capability],
            "max_num_regs": REGISTERS,
            "multiprocessor_count": PROCESSORS[self.capability],
            "warpSize": 32,
        }

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int, *rest: Any
    ) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, threads: the true ones are read from the binary

    def unload_module(self, module: int) -> None:
        pass


class _NoLauncher:
    def __init__(self, source: object, metadata: object):
        pass

    def __call__(self, *args: object) -> None:
        pass


class _Driver(DriverBase):
    """What Triton asks of a driver. The device's number is the capability, so that Triton's cache of kernels per
    device is one per arch."""

    launcher_cls = _NoLauncher

    def __init__(self, capability: int, name: str = ""):
        self.capability, self.utils = capability, _Utilities(capability, name)

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_benchmarker(self) -> Any:
        raise RuntimeError(
            "ahead-of-time compilation cannot time kernels; choose tiles by a function of shape and arch, "
            "not by autotuning"
        )


@dataclass(frozen=True)
class Launch:
    """One launch. constants: its constexpr arguments. compiled: Triton's compiled kernel; None where it was only
    recorded. config: the tile that ``config(...)`` returned and that this launch was made with; None for none."""

    kernel: str
    constants: Mapping[str, Any]
    warps: int
    stages: int
    compiled: Any
    config: Mapping[str, Any] | None

    @property
    def tile(self) -> str:
        """The constants that make the tile: those that ``config`` chose, else those called BLOCK."""
        chosen = self.config or {}
        return " ".join(f"{n}={v}" for n, v in self.constants.items() if n in chosen or n.startswith("BLOCK"))


@contextlib.contextmanager
def compiling_for(arch: str, *, compile: bool = True, device: str = "") -> Iterator[list[Launch]]:
    """Within, every Triton launch compiles for ``arch`` and launches nothing; yields the launches, in order.

    Tensors given to the launchers should be meta tensors: nothing reads or writes them. compile: False only records
    the launches. device: the name of a board, whose measured tiles (kernels/tuning/tiles/) are taken; "": the
    launchers' own.
    """
    if interpreting():
        raise RuntimeError(
            "TRITON_INTERPRET is set, so Triton would interpret and not compile; run this in a process without it"
        )
    capability = int(arch.removeprefix("sm_"))
    if capability not in SHARED_LIMIT:
        raise ValueError(f"arch must be one of {', '.join(f'sm_{c}' for c in SHARED_LIMIT)}, not {arch!r}")
    launched: list[Launch] = []
    active, run = driver._active, JITFunction.run

    def recorded(self: JITFunction, *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **options) if compile else None
        given = dict(zip((p.name for p in self.params), args, strict=False)) | options
        constants = {p.name: given.get(p.name, p.default) for p in self.params if p.is_constexpr}
        about = kernel.metadata if kernel is not None else None
        warps = about.num_warps if about else options.get("num_warps", 4)
        stages = about.num_stages if about else options.get("num_stages", 3)
        effective = {**constants, "num_warps": warps, "num_stages": stages}
        chosen = next((c for c in reversed(configs) if _agrees(c, effective)), None)
        launched.append(Launch(self.fn.__name__, constants, warps, stages, kernel, chosen))
        return kernel

    with _watched_configs() as configs:
        JITFunction.run = recorded
        driver.set_active(_Driver(capability, device))
        try:
            yield launched
        finally:
            JITFunction.run = run
            driver._active = active


def _agrees(config: Mapping[str, Any], launched: Mapping[str, Any]) -> bool:
    """Whether a launch was made with this tile: with every part of it that a launch can have, the warps among them."""
    shared = config.keys() & launched.keys()
    return "num_warps" in shared and len(shared) > 1 and all(config[name] == launched[name] for name in shared)


@contextlib.contextmanager
def _watched_configs() -> Iterator[list[Mapping[str, Any]]]:
    """What every function ``config`` or ``*_config`` of a loaded Triton module returns meanwhile (named tuples)."""
    returned: list[Mapping[str, Any]] = []

    def watch(function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            made = function(*args, **options)
            if hasattr(made, "_asdict") and made._asdict() not in returned:
                returned.append(made._asdict())
            return made

        return watched

    modules = [
        module
        for path, module in list(sys.modules.items())
        if path.startswith("tritium.kernels.") and path.rpartition(".")[2].startswith(("impl_triton", "triton_"))
    ]
    members = [(module, name, value) for module in modules for name, value in list(vars(module).items())]
    found = [(m, n, value) for m, n, value in members if (n == "config" or n.endswith("_config")) and callable(value)]

    def forget() -> None:
        for _, _, value in members:
            if hasattr(value, "cache_clear"):  # what a launcher remembers of an earlier choice: it is to choose again
                value.cache_clear()

    forget()
    for module, name, function in found:
        setattr(module, name, watch(function))
    try:
        yield returned
    finally:
        for module, name, function in found:
            setattr(module, name, function)
        forget()


# ----------------------------------------------------------------------------------------------------------- resources


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes.

    stack: bytes a thread, above 0 when registers spilled; spills: instructions that store to it or load from it.
    threads: of a block, the warps that Triton adds included. blocks: resident on a processor at one time.
    tensor_core: matrix instructions of the architecture's own kind; other_matrix: of an older one.
    tma: bulk copies of tensors. load_bits, store_bits: the widest access to global memory of one thread.
    """

    kernel: str
    arch: str
    warps: int
    stages: int
    registers: int
    stack: int
    shared_bytes: int
    instructions: int
    tensor_core: int
    blocks: int
    spills: int = 0
    threads: int = 0
    other_matrix: int = 0
    tma: int = 0
    load_bits: int = 0
    store_bits: int = 0

    @property
    def resident(self) -> int:
        """Threads on a processor at one time."""
        return self.blocks * self.threads

    @property
    def problem(self) -> str | None:
        """Why this kernel must not be launched, or None."""
        limit = SHARED_LIMIT[int(self.arch.removeprefix("sm_"))]
        if self.shared_bytes > limit:
            return (
                f"needs {self.shared_bytes} bytes of shared memory and a block on {self.arch} may have {limit}; "
                "take a smaller tile or fewer stages"
            )
        if self.stack > 0 or self.spills > 0:
            return (
                f"spills: {self.stack} bytes of stack a thread, {self.spills} instructions that use it; "
                "take a smaller tile or more warps"
            )
        return None

    def over(self, budget: Budget) -> list[str]:
        """How this kernel breaks a budget."""
        found = []
        if self.registers > budget.registers:
            found.append(f"{self.registers} registers a thread, the budget is {budget.registers}")
        if self.resident < budget.threads:
            found.append(f"{self.resident} threads on a processor, the budget asks for {budget.threads}")
        there = {
            "tensor core": self.tensor_core > 0,
            "tma": self.tma > 0,
            "wide loads": self.load_bits >= 128,
            "wide stores": self.store_bits >= 128,
        }
        for need in budget.needs:
            if need not in there:
                raise ValueError(f"a budget's needs are of {', '.join(there)}, not {need!r}")
            if not there[need]:
                found.append(f"has no {need}")
        return found


def resources(kernel: Any) -> Resources:
    """Read the resources of a compiled Triton kernel from its binary."""
    metadata = kernel.metadata
    capability = metadata.target.arch
    read = _read_binary(kernel.asm["cubin"])
    counts = Counter(read["instructions"])
    extra = re.search(r"\.reqntid (\d+)", kernel.asm.get("ptx", ""))  # with the warps of a warp-specialised kernel
    threads = int(extra[1]) if extra else 32 * metadata.num_warps
    registers, shared = read["registers"], metadata.shared
    tensor_memory = getattr(metadata, "tmem_size", None) or 0
    blocks = min(
        THREADS[capability] // threads,
        REGISTERS // (-(-registers // 8) * 8 * threads) if registers else BLOCKS[capability],
        (SHARED_LIMIT[capability] + 1024) // (shared + 1024),  # the system takes 1 KB of every block
        TENSOR_MEMORY // tensor_memory if tensor_memory else BLOCKS[capability],
        BLOCKS[capability],
    )

    def number(pattern: str) -> int:
        return sum(n for opcode, n in counts.items() if re.match(rf"(?:{pattern})\b", opcode))

    own = number(TENSOR_CORE[capability // 10])
    return Resources(
        metadata.name, f"sm_{capability}", metadata.num_warps, metadata.num_stages, registers, read["stack"], shared,
        counts.total(), own, blocks,
        spills=number("STL|LDL"), threads=threads, other_matrix=number(r"[HIQO]G?MMA|UTC[A-Z]*MMA") - own,
        tma=number("UTMALDG|UTMASTG|UTMAREDG"),
        load_bits=max((_bits(o) for o in counts if re.match(r"LDG\b|LDGSTS\b", o)), default=0),
        store_bits=max((_bits(o) for o in counts if re.match(r"STG\b", o)), default=0),
    )  # fmt: skip


def _bits(opcode: str) -> int:
    """Of one access of a thread: LDG.E.128 → 128."""
    widths = [int(part.lstrip("US")) for part in opcode.split(".") if re.fullmatch(r"[US]?(8|16|32|64|128|256)", part)]
    return max(widths, default=32)


@cache
def _read_binary(cubin: bytes) -> dict[str, Any]:
    """registers, stack and how often each instruction stands in a binary. Kept on disk: nvdisasm takes a second."""
    reader = inspect.getsource(_read_binary.__wrapped__) + triton.__version__
    key = hashlib.sha256(cubin + reader.encode()).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    kept = Path(base) / "tritium" / "aot" / f"{key}.json"
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(kept.read_text()))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(
            f"cuobjdump -res-usage said nothing of registers; this triton's tool has another format:\n{usage}"
        )
    # "@!P0 LDG.E.128 R4, ..." without its predicate and operands
    lines = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.M)
    if not lines:
        raise RuntimeError("nvdisasm listed no instructions; this triton's tool has another format")
    read = {"registers": int(found[1]), "stack": int(found[2]), "instructions": dict(Counter(lines))}
    with contextlib.suppress(OSError):  # a home that cannot be written only costs time
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(read))
        part.replace(kept)
    return read


def _tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(path), *args], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} from the triton package failed: {done.stderr.strip()}")
    return done.stdout


# -------------------------------------------------------------------------------------------------------------- checks


@dataclass(frozen=True)
class Line:
    """One kernel of one case. tile: what makes it; budgets: how it breaks those of its op."""

    op: str
    case: str
    dtype: torch.dtype
    resources: Resources
    tile: str = ""
    budgets: tuple[str, ...] = ()

    @property
    def problem(self) -> str | None:
        """Why this kernel fails, or None."""
        return "; ".join(filter(None, (self.resources.problem, *self.budgets))) or None


def compile_case(
    op: Op, case: Case, arch: str, dtype: torch.dtype = torch.bfloat16, backend: str | Backend = "triton"
) -> list[Line]:
    """Compile every kernel that the backend launches for this case, forward and backward."""
    loaded = backend if isinstance(backend, Backend) else op.load(backend)
    launched = launches(op, case, arch, dtype, loaded)
    unique = {id(launch.compiled): launch for launch in launched}
    lines = []
    for launch in unique.values():
        taken = resources(launch.compiled)
        budgets = broken_budgets(op, case, dtype, launch, taken) if loaded.name == "triton" else ()
        lines.append(Line(op.name, case.name, dtype, taken, launch.tile, tuple(budgets)))
    return lines


def launches(
    op: Op, case: Case, arch: str, dtype: torch.dtype, backend: Backend, *, compile: bool = True
) -> list[Launch]:
    """Every launch of the case, forward and backward; nothing is compiled where ``compile`` is False."""
    arguments = meta_inputs(op, case, dtype)
    with compiling_for(arch, compile=compile) as launched:
        if backend.prepare is not None and isinstance(arguments.get("seq_start"), Tensor):
            arguments["seq_start"] = backend.prepare(arguments["seq_start"])
        outputs = backend.function(**arguments)
        if not op.updates:
            outputs = [o for o in (outputs if isinstance(outputs, (tuple, list)) else (outputs,)) if o.requires_grad]
            wanted = [a for a in arguments.values() if isinstance(a, Tensor) and a.requires_grad]
            if outputs and wanted:
                torch.autograd.grad(outputs, wanted, [torch.empty_like(o) for o in outputs], allow_unused=True)
    return launched


def broken_budgets(op: Op, case: Case, dtype: torch.dtype, launch: Launch, taken: Resources) -> list[str]:
    """What ``BUDGETS`` of the op's cases.py forbids. Its numbers are for 16 bits; the tile is config's in any dtype."""
    mine = budgets_of(op, launch.kernel, taken.arch, case.name)
    found = []
    if launch.config is None and not any(budget.fixed for budget in mine):
        made = f"{launch.tile} num_warps={launch.warps} num_stages={launch.stages}".strip()
        found.append(f"launched with {made}, which no config() returned")
    if dtype.itemsize == 2:
        for budget in mine:
            found += taken.over(budget)
    return found


def budgets_of(op: Op, kernel: str, arch: str, case: str) -> list[Budget]:
    """The budgets that hold for a kernel."""
    matches = fnmatch.fnmatchcase
    return [
        b
        for b in getattr(op.cases, "BUDGETS", ())
        if matches(kernel, b.kernel) and matches(arch, b.arch) and matches(case, b.cases)
    ]


def meta_inputs(op: Op, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The case's inputs as meta tensors: shapes, strides and dtypes without memory, however large."""
    key = (op.name, repr(case), dtype)
    if key not in _meta_inputs:
        with FakeTensorMode():
            made = op.cases.inputs(case, dtype, "cpu", 0)
        _meta_inputs[key] = {name: _meta(value) for name, value in made.items()}
    return dict(_meta_inputs[key])


_meta_inputs: dict[tuple[str, str, torch.dtype], dict[str, Any]] = {}  # a list of 1500 tensors takes seconds


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        bare = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return bare.requires_grad_(value.requires_grad)
    return [_meta(v) for v in value] if isinstance(value, (list, tuple)) else value


def refusal(op: Op, case: Case, arch: str, dtype: torch.dtype, backend: Backend) -> str | None:
    return backend.unsupported(site_of(op, case, dtype, Machine("cuda", arch)))


# ---------------------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True)
class Job:
    """Some cases of one op, for one architecture: what one process compiles at a time."""

    op: str
    backend: str
    cases: tuple[str, ...]
    arch: str
    dtypes: tuple[str, ...]

    def __str__(self) -> str:
        more = f" + {len(self.cases) - 1}" if len(self.cases) > 1 else ""
        return f"{self.op} {self.arch} {self.cases[0]}{more}"


@dataclass
class Done:
    """What came of a job. refused: reasons. errors: calls that raised. no_triton: nothing launched a Triton kernel, and
    the module has none; what the calls raised then, if they did, is in notes."""

    job: Job
    lines: list[Line] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    no_triton: bool = False
    seconds: float = 0.0


def run_job(job: Job) -> Done:
    """Compile one job's kernels in this process."""
    started, done, op = time.monotonic(), Done(job), OPS[job.op]
    try:
        backend = op.load(job.backend)
    except KernelError as error:
        done.errors.append(str(error))
        return done
    tried = False
    for case in op.cases.CASES:
        if case.name not in job.cases:
            continue
        for dtype in (getattr(torch, name) for name in job.dtypes):
            if reason := refusal(op, case, job.arch, dtype, backend):
                done.refused.append(f"{op.name} {case.name} {job.arch} {str(dtype).removeprefix('torch.')}: {reason}")
                continue
            tried = True
            try:
                done.lines += compile_case(op, case, job.arch, dtype, backend)
            except Exception as error:
                place = "".join(traceback.format_tb(error.__traceback__)[-2:]).rstrip()
                done.errors.append(f"{op.name} {case.name} {job.arch}: {type(error).__name__}: {error}\n{place}")
    if tried and not done.lines and not any(isinstance(v, JITFunction) for v in vars(backend.module).values()):
        done.no_triton, done.notes, done.errors = True, done.errors, []
    done.seconds = time.monotonic() - started
    return done


def _begin_worker() -> None:
    torch.set_num_threads(1)


def run_jobs(jobs: Sequence[Job], processes: int, say: Callable[[str], None]) -> list[Done]:
    """All jobs, in ``processes`` processes (1: in this one), in the order given. A compiler that crashes is an error of
    its job."""

    def tell(done: Done) -> None:
        number[0] += 1
        say(f"[{number[0]:>{len(str(len(jobs)))}}/{len(jobs)}] {done.job}: {len(done.lines)} kernels, "
            f"{done.seconds:.0f} s{', FAILED' if done.errors else ''}")  # fmt: skip

    number = [0]
    if processes <= 1 or len(jobs) <= 1:
        found = []
        for job in jobs:
            found.append(run_job(job))
            tell(found[-1])
        return found
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    results: dict[Job, Done] = {}

    def run(some: Sequence[Job], workers: int) -> list[Job]:
        """Run some jobs; returns those that a process died over: one of them killed it, and the pool with it."""
        died: list[Job] = []
        resource_tracker.ensure_running()
        with interrupts_held():
            pool = ProcessPoolExecutor(workers, spawn, _begin_worker)
        try:
            with interrupts_held():
                pending: dict[Future[Done], Job] = {pool.submit(run_job, job): job for job in some}
            for future in as_completed(pending):
                try:
                    results[pending[future]] = future.result()
                    tell(results[pending[future]])
                except BrokenProcessPool:
                    died.append(pending[future])
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return died

    for job in run(jobs, min(processes, len(jobs))):
        if run([job], 1):
            results[job] = Done(job, errors=[f"{job}: the compiler ended its process"])
            tell(results[job])
    return [results[job] for job in jobs]


# -------------------------------------------------------------------------------------------------------------- tables


HEAD = (
    "op", "kernel", "arch", "cases", "dtype", "tile", "warps", "stages", "registers", "stack", "spills", "shared",
    "blocks/SM", "threads/SM", "tensor core", "tma", "load, store bits",
)  # fmt: skip


def table(found: Mapping[str, Sequence[Line]]) -> list[tuple[str, ...]]:
    """Rows under HEAD and a last cell of problems: one for each different outcome of a kernel.

    found: Triton's version → lines. Where versions differ a cell has both, "76 / 80"; "-" for none.
    """
    versions = list(found)
    outcomes: dict[tuple[str, ...], dict[str, dict[str, Line]]] = {}  # kernel and tile → case → version → line
    for version, lines in found.items():
        for line in lines:
            r = line.resources
            key = (line.op, r.kernel, r.arch, str(line.dtype).removeprefix("torch."), line.tile, str(r.warps),
                   str(r.stages))  # fmt: skip
            outcomes.setdefault(key, {}).setdefault(line.case, {})[version] = line
    rows: dict[tuple[str, ...], list[str]] = {}
    for (op, kernel, arch, dtype, tile, warps, stages), by_case in outcomes.items():
        for case, lines_of in by_case.items():

            def cell(value: Callable[[Line], object], lines_of: dict[str, Line] = lines_of) -> str:
                values = [str(value(lines_of[v])) if v in lines_of else "-" for v in versions]
                return values[0] if len(set(values)) == 1 else " / ".join(values)

            cells = (
                cell(lambda x: x.resources.registers),
                cell(lambda x: x.resources.stack),
                cell(lambda x: x.resources.spills),
                cell(lambda x: x.resources.shared_bytes),
                cell(lambda x: x.resources.blocks),
                cell(lambda x: x.resources.resident),
                cell(lambda x: _matrix(x.resources)),
                cell(lambda x: x.resources.tma or ""),
                cell(lambda x: f"{x.resources.load_bits}, {x.resources.store_bits}"),
                cell(lambda x: x.problem or ""),
            )
            rows.setdefault((op, kernel, arch, dtype, tile, warps, stages, *cells), []).append(case)
    shown = []
    for (op, kernel, arch, *rest), cases in rows.items():
        name = cases[0] if len(cases) == 1 else f"{cases[0]} + {len(cases) - 1}"
        shown.append((op, kernel, arch, name, *rest))
    return shown


def _matrix(r: Resources) -> str:
    """How many instructions of the tensor core's own kind, and how many of an older kind."""
    own = str(r.tensor_core) if r.tensor_core else ""
    return own + (f" ({r.other_matrix} of an older kind)" if r.other_matrix else "")


def format_lines(found: Mapping[str, Sequence[Line]] | Sequence[Line]) -> str:
    """The table as text."""
    found = found if isinstance(found, Mapping) else {triton.__version__: found}
    rows = [(*HEAD, ""), *table(found)]
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in rows)


FORECAST_HEAD = ("op", "case", "", "bound by", "bound, ms", "goal, ms", "goal / bound", "goal", "best published")


def forecast_rows(ops: Sequence[Op], peak: peaks.Peak, patterns: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Rows under FORECAST_HEAD: of every case (default: the large ones) the least time that the GPU's peaks allow, and
    the goal's."""
    rows: list[tuple[str, ...]] = []
    for op in ops:
        for case in (c for c in op.cases.CASES if _chosen(c, patterns)):
            for f in peaks.forecast(op, case, peak):
                goal = ("", "", "", "")
                if f.goal is not None:
                    rate = f"{f.goal.rate:g} {f.goal.unit}"
                    goal = (f"{f.goal_ms:.4g}", f"{f.goal_over_bound:.2f}", rate, f.goal.best)
                rows.append((f.op, f.case, f.what, f.bound_by, f"{f.bound_ms:.4g}", *goal))
    return rows


def _text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    width = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in (head, *rows)
    )


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])


def page(found: Mapping[str, Sequence[Line]], ops: Sequence[Op]) -> str:
    """What ``--write`` puts between the markers of docs/performance.md."""
    versions = " / ".join(found)
    parts = [f"Triton {versions}; where the two differ, a cell has both in this order."]
    rows = table(found)
    kept = [i for i, name in enumerate(HEAD) if name not in ("arch", "dtype", "stack", "spills")]
    for arch in dict.fromkeys(row[2] for row in rows):
        mine = [tuple(row[i] for i in kept) for row in rows if row[2] == arch]
        parts += [f"### {arch}", _markdown([HEAD[i] for i in kept], mine)]
    over = [f"- {text} (Triton {version})" for version, lines in found.items() for text in over_limits(lines)]
    parts += ["### Over their limits", "\n".join(over) or "None."]
    peak = peaks.H100
    parts += [
        f"## Forecast for one {peak.name}: not run",
        f"Least time = the largest of FLOPs ÷ {peak.reached_matrix / 1e12:g} TFLOP/s (tensor cores; other arithmetic "
        f"{peak.vector / 1e12:g}), bytes ÷ {peak.reached_copy / 1e12:g} TB/s, and, where counted, exponentials ÷ "
        f"{peak.exponentials / 1e12:.3g} × 10¹² a second. The first two are measured ({peak.measured}).",
        _markdown(FORECAST_HEAD, forecast_rows(ops, peak)),
    ]
    return "\n\n".join(parts)


def write_page(path: Path, text: str) -> None:
    """Replace what lies between the markers of a page; SystemExit where it has none."""
    before = path.read_text() if path.exists() else ""
    if BEGIN not in before or END not in before:
        raise SystemExit(f"{path} has no markers; put these two lines where the tables should be:\n{BEGIN}\n{END}")
    head, _, rest = before.partition(BEGIN)
    path.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")


# ---------------------------------------------------------------------------------------------------------------- main


def jobs_of(
    ops: Sequence[Op], backend: str, archs: Sequence[str], dtypes: Sequence[str], patterns: Sequence[str] = ()
) -> list[Job]:
    """One job for each op, architecture and, of attention, head width; those that take longest first.

    patterns: of cases, whatever their size; none: the large ones.
    """
    jobs = []
    for op in ops:
        cases = [c for c in op.cases.CASES if _chosen(c, patterns)]
        groups: dict[int, list[str]] = {}
        for case in cases:
            groups.setdefault(case.shape.get("D", 0), []).append(case.name)
        jobs += [
            Job(op.name, backend, tuple(names), arch, tuple(dtypes)) for names in groups.values() for arch in archs
        ]
    return sorted(jobs, key=lambda job: not job.op.startswith("attention"))


def _chosen(case: Case, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(case.name, p) for p in patterns) if patterns else case.large


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and hold to the limits: 0, or 1 when a kernel is over one or nothing was compiled."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with_triton = [name for name, op in OPS.items() if "triton" in op.backends()]
    parser = argparse.ArgumentParser(
        prog="python -m tritium.kernels.aot", description="Compile the Triton kernels without a GPU."
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(with_triton)} (default: all)")
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), help=f"default: {' '.join(ARCHS)}")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=DTYPES)
    parser.add_argument("--case", nargs="+", default=[], help="patterns of names; default: the large ones")
    parser.add_argument("--backend", default="triton", help="a backend, or the module path of your own")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: the cores)")
    parser.add_argument("--also", metavar="FOLDER", help="once more with the packages of this folder before the others")
    parser.add_argument("--json", type=Path, help="write what was found to this file, and print no table")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--write", type=Path, help="put the tables into this page")
    options = parser.parse_args(argv)
    if options.backend == "triton" and (unknown := [name for name in options.ops if name not in with_triton]):
        parser.error(f"no Triton backend for {', '.join(unknown)}; there is one for {', '.join(with_triton)}")
    if unknown := [name for name in options.ops if name not in OPS]:
        parser.error(f"there is no op {', '.join(unknown)}; there are {', '.join(OPS)}")
    if unknown := [arch for arch in options.arch if arch.removeprefix("sm_") not in map(str, SHARED_LIMIT)]:
        parser.error(f"no arch {', '.join(unknown)}; there are {', '.join(f'sm_{c}' for c in SHARED_LIMIT)}")
    if options.also and not Path(options.also).is_dir():
        parser.error(f"--also {options.also}: there is no such folder")
    if options.write and (options.ops or options.case or options.backend != "triton"):
        parser.error("--write is for all ops and cases")
    try:
        return _main(options, [OPS[name] for name in options.ops or with_triton])
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130


def _main(options: argparse.Namespace, ops: Sequence[Op]) -> int:
    def say(text: str) -> None:
        if not options.quiet:
            print(f"triton {triton.__version__} {text}", file=sys.stderr, flush=True)

    jobs = jobs_of(ops, options.backend, options.arch, options.dtype, options.case)
    say(f"compiles {len(jobs)} jobs in {min(options.jobs, len(jobs))} processes")
    done = run_jobs(jobs, options.jobs, say)
    result = {
        "version": triton.__version__,
        "lines": [line for d in done for line in d.lines],
        "refused": [text for d in done for text in d.refused],
        "errors": [text for d in done for text in d.errors],
        "notes": [text for d in done for text in d.notes],
        "no_triton": any(d.no_triton for d in done),
    }
    if options.json:
        options.json.write_text(json.dumps(result, default=_plain))
        return _status([result])
    results = [result, *([_other(options)] if options.also else [])]
    found = {r["version"]: r["lines"] for r in results}
    if any(found.values()):
        print(format_lines(found))
        rows = forecast_rows(ops, peaks.H100, options.case)
        print(f"\nForecast for one {peaks.H100.name}, not run: the least time its peaks allow, and the goal\n"
              f"{_text(FORECAST_HEAD, rows)}\n")  # fmt: skip
    for r in results:
        report(r)
    if options.write:
        write_page(options.write, page(found, ops))
    return _status(results)


def over_limits(lines: Sequence[Line]) -> list[str]:
    """The kernels that fail, a line each: which, and why."""
    return sorted(
        {f"{x.op} {x.resources.kernel} {x.resources.arch} ({x.tile}): {x.problem}" for x in lines if x.problem}
    )


def report(result: Mapping[str, Any]) -> None:
    """Refusals, errors and problems of one version, and a last line with their numbers."""
    for text in result["refused"]:
        print(f"refused: {text}")
    for text in result["errors"]:
        print(f"FAILED: {text}")
    different = {(line.op, line.tile, line.resources, line.problem) for line in result["lines"]}
    over = over_limits(result["lines"])
    for text in over:
        print(f"OVER: {text}")
    if not result["lines"]:
        print(f"triton {result['version']}: nothing was compiled")
        return
    print(f"triton {result['version']}: {len(different)} kernels, {len(over)} over their limits, "
          f"{len(result['errors'])} calls failed")  # fmt: skip


def _status(results: Sequence[Mapping[str, Any]]) -> int:
    bad = any(not r["lines"] or r["errors"] or any(line.problem for line in r["lines"]) for r in results)
    return int(bad)


def _other(options: argparse.Namespace) -> dict[str, Any]:
    """What another Triton makes of the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        command = [
            *options.ops, "--arch", *options.arch, "--dtype", *options.dtype, "--backend", options.backend,
            "--jobs", str(options.jobs), *(["--case", *options.case] if options.case else []),
            *(["--quiet"] if options.quiet else []),
        ]  # fmt: skip
        return in_process(command, path, [os.path.abspath(options.also)])


def in_process(arguments: Sequence[str], path: Path, before: Sequence[str] = ()) -> dict[str, Any]:
    """Run this module in a process of its own, which finds modules where this one does, and Triton does not interpret.

    before: folders whose packages come first. path: a file for the answer. RuntimeError where it gives none.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*before, *(p for p in sys.path if p)])
    command = [sys.executable, "-P", "-m", "tritium.kernels.aot", *arguments, "--json", str(path)]
    status = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
    if status == 130:
        raise KeyboardInterrupt
    if not path.exists():
        raise RuntimeError(f"{' '.join(command)} ended with status {status} and no answer")
    answer: dict[str, Any] = json.loads(path.read_text())
    answer["lines"] = [_line(line) for line in answer["lines"]]
    return answer


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return asdict(value)


def _line(plain: dict[str, Any]) -> Line:
    return Line(
        plain["op"], plain["case"], getattr(torch, plain["dtype"]), Resources(**plain["resources"]), plain["tile"],
        tuple(plain["budgets"]),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
