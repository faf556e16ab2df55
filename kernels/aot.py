"""Compile the Triton kernels ahead of time, for GPUs this machine need not have, and hold what comes out to its limits.

    python -m tritium.kernels.aot [op ...] [--arch sm_90 ...] [--dtype bfloat16 ...] [--case gpt2_124m_1k ...]

The ops' real launchers run, forward and backward, on meta tensors of the shapes in ``cases.py`` that are marked large.
A driver of the wanted architecture stands in Triton's place for one: it answers what a launcher asks about its GPU,
lets Triton compile, and launches nothing. So what is compiled is exactly what would be launched there. Registers, stack
and instructions are read from the binary with the tools in the triton package. A kernel with a stack (spilled
registers) or with more shared memory than a block may have is a failure: exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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

from tritium.kernels.case import Case
from tritium.kernels.contract import site_of
from tritium.kernels.op import Backend, Op
from tritium.kernels.ops import OPS
from tritium.kernels.site import Machine, interpreting

ARCHS = ("sm_80", "sm_90", "sm_100")
# what CUDA's programming guide says of each: shared memory a block may have (bytes), and the processors of the usual
# board
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
PROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}
REGISTERS, THREADS, BLOCKS = 65536, {80: 2048, 90: 2048, 100: 2048}, 32  # of a processor
# matrix instructions by generation: mma, warp-group mma, tcgen05
TENSOR_CORE = re.compile(r"\b(?:H|I|Q|O)G?MMA\b|\bUTC[A-Z]*MMA\b")


# ---------------------------------------------------------------------------------------------------- a driver to
# compile


class _Utilities:
    def __init__(self, capability: int):
        self.capability = capability

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
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

    def __init__(self, capability: int):
        self.capability, self.utils = capability, _Utilities(capability)

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


@contextlib.contextmanager
def compiling_for(arch: str) -> Iterator[list[Any]]:
    """Within, every Triton launch compiles for ``arch`` and launches nothing; yields the compiled kernels, in order
    of launch.

    Tensors given to the launchers should be meta tensors: nothing reads or writes them.
    """
    if interpreting():
        raise RuntimeError(
            "TRITON_INTERPRET is set, so Triton would interpret and not compile; run this in a process without it"
        )
    capability = int(arch.removeprefix("sm_"))
    if capability not in SHARED_LIMIT:
        raise ValueError(f"arch must be one of {', '.join(f'sm_{c}' for c in SHARED_LIMIT)}, not {arch!r}")
    launched: list[Any] = []
    active, run = driver._active, JITFunction.run

    def recorded(self: JITFunction, *args: Any, **options: Any) -> Any:
        kernel = run(self, *args, **options)
        launched.append(kernel)
        return kernel

    JITFunction.run = recorded
    driver.set_active(_Driver(capability))
    try:
        yield launched
    finally:
        JITFunction.run = run
        driver._active = active


# -------------------------------------------------------------------------------------------------------------
# resources


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes. stack: bytes a thread, above 0 when registers spilled; blocks: resident on a
    processor at one time."""

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

    @property
    def problem(self) -> str | None:
        """Why this kernel must not be launched, or None."""
        limit = SHARED_LIMIT[int(self.arch.removeprefix("sm_"))]
        if self.shared_bytes > limit:
            return (
                f"needs {self.shared_bytes} bytes of shared memory and a block on {self.arch} may have {limit}; "
                "take a smaller tile or fewer stages"
            )
        if self.stack > 0:
            return f"spills: {self.stack} bytes of stack a thread; take a smaller tile or more warps"
        return None


def resources(kernel: Any) -> Resources:
    """Read the resources of a compiled Triton kernel from its binary."""
    capability = kernel.metadata.target.arch
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(
            f"cuobjdump -res-usage said nothing of registers; this triton's tool has another format:\n{usage}"
        )
    registers, stack = int(found[1]), int(found[2])
    instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", code, re.M)
    if not instructions:
        raise RuntimeError("nvdisasm listed no instructions; this triton's tool has another format")
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    threads = 32 * warps
    blocks = min(
        2048 // threads,
        REGISTERS // (-(-registers // 8) * 8 * threads) if registers else BLOCKS,
        (SHARED_LIMIT[capability] + 1024) // (shared + 1024),  # the system takes 1 KB of every block
        BLOCKS,
    )
    return Resources(
        kernel.metadata.name, f"sm_{capability}", warps, kernel.metadata.num_stages, registers, stack, shared,
        len(instructions),
        sum(1 for i in instructions if TENSOR_CORE.search(i)), blocks,
    )  # fmt: skip


def _tool(name: str, *args: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(path), *args], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} from the triton package failed: {done.stderr.strip()}")
    return done.stdout


# ----------------------------------------------------------------------------------------------------------------
# checks


@dataclass(frozen=True)
class Line:
    """One kernel of one case."""

    op: str
    case: str
    dtype: torch.dtype
    resources: Resources


def compile_case(
    op: Op, case: Case, arch: str, dtype: torch.dtype = torch.bfloat16, backend: str | Backend = "triton"
) -> list[Line]:
    """Compile every kernel that the backend launches for this case, forward and backward."""
    loaded = backend if isinstance(backend, Backend) else op.load(backend)
    arguments = meta_inputs(op, case, dtype)
    with compiling_for(arch) as launched:
        if op.updates:
            loaded.function(**arguments)
        else:
            outputs = loaded.function(**arguments)
            outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
            wanted = [a for a in arguments.values() if isinstance(a, Tensor) and a.requires_grad]
            if outputs and wanted:
                torch.autograd.grad(outputs, wanted, [torch.empty_like(o) for o in outputs], allow_unused=True)
    unique = {id(kernel): kernel for kernel in launched}
    return [Line(op.name, case.name, dtype, resources(kernel)) for kernel in unique.values()]


def meta_inputs(op: Op, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The case's inputs as meta tensors: shapes, strides and dtypes without memory, however large."""

    def meta(value: Any) -> Any:
        if isinstance(value, Tensor):
            bare = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            return bare.requires_grad_(value.requires_grad)
        if isinstance(value, (list, tuple)):
            return [meta(v) for v in value]
        return value

    with FakeTensorMode():
        made = op.cases.inputs(case, dtype, "cpu", 0)
    return {name: meta(value) for name, value in made.items()}


def refusal(op: Op, case: Case, arch: str, dtype: torch.dtype, backend: Backend) -> str | None:
    return backend.unsupported(site_of(op, case, dtype, Machine("cuda", arch)))


def format_lines(lines: Sequence[Line]) -> str:
    """A table, one row for each different outcome of a kernel; cases that compiled to the same are counted together."""
    head = (
        "op",
        "case",
        "dtype",
        "kernel",
        "arch",
        "warps",
        "stages",
        "registers",
        "stack",
        "shared",
        "tensor-core",
        "blocks/SM",
        "",
    )
    groups: dict[tuple[Any, ...], list[str]] = {}
    for line in lines:
        groups.setdefault((line.op, line.dtype, line.resources), []).append(line.case)
    rows = [head]
    for (op, dtype, r), cases in groups.items():
        case = cases[0] if len(cases) == 1 else f"{cases[0]} + {len(cases) - 1}"
        rows.append(
            (op, case, str(dtype).removeprefix("torch."), r.kernel, r.arch, str(r.warps), str(r.stages),
            str(r.registers), str(r.stack),
             str(r.shared_bytes), str(r.tensor_core), str(r.blocks), r.problem or "")
        )  # fmt: skip
    width = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    with_triton = [name for name, op in OPS.items() if "triton" in op.backends()]
    parser = argparse.ArgumentParser(
        prog="python -m tritium.kernels.aot", description="Compile the Triton kernels without a GPU."
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(with_triton)} (default: all)")
    parser.add_argument("--arch", nargs="+", default=list(ARCHS), help=f"default: {' '.join(ARCHS)}")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--case", nargs="+", help="names of cases; default: those marked large")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.ops if name not in with_triton]:
        parser.error(f"no Triton backend for {', '.join(unknown)}; there is one for {', '.join(with_triton)}")
    lines: list[Line] = []
    for op in (OPS[name] for name in options.ops or with_triton):
        backend = op.load("triton")
        for case in op.cases.CASES:
            if case.name not in options.case if options.case else not case.large:
                continue
            for arch in options.arch:
                for dtype in (getattr(torch, name) for name in options.dtype):
                    if reason := refusal(op, case, arch, dtype, backend):
                        print(f"{op.name} {case.name} {arch}: refused: {reason}")
                    else:
                        lines += compile_case(op, case, arch, dtype, backend)
    if not lines:
        print("nothing was compiled: no case of that name")
        return 1
    print(format_lines(lines))
    problems = [line for line in lines if line.resources.problem]
    print(
        f"{len({(line.op, line.resources) for line in lines})} kernels, {len(problems)} over their limits, "
        f"triton {triton.__version__}"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
