"""The facts a backend judges before it says yes: which machine, and which place in which model.

Both are plain values, so a plan for an H100 can be made on a laptop: build ``Machine(device="cuda", arch="sm_90",
...)`` and bind against it. Backends read these and never ask ``torch.cuda``.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import torch

PHASES = ("train", "eval", "prefill", "decode")


@cache
def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Machine:
    """A device and what is installed beside it.

    device: "cpu" or "cuda". arch: "sm_90" for a GPU, ``platform.machine()`` for a CPU. name: the marketing name, for
    records. interpreted: Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), hence on CPU tensors.
    packages: distribution name → version; None means "ask this Python installation".
    """

    device: str
    arch: str
    name: str = ""
    interpreted: bool = False
    packages: Mapping[str, str] | None = None

    @staticmethod
    def here(device: str | torch.device | None = None) -> Machine:
        """The machine this process runs on; ``device`` defaults to a GPU when there is one."""
        kind = torch.device(device).type if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
        if kind == "cuda":
            major, minor = torch.cuda.get_device_capability()
            return Machine("cuda", f"sm_{major}{minor}", torch.cuda.get_device_name(), interpreting())
        return Machine(kind, platform.machine(), platform.processor() or platform.machine(), interpreting())

    @property
    def capability(self) -> int:
        """90 for sm_90; 0 for a CPU."""
        return int(self.arch.removeprefix("sm_")) if self.arch.startswith("sm_") else 0

    def version(self, package: str) -> str | None:
        """The installed version of a distribution, or None."""
        return _installed(package) if self.packages is None else self.packages.get(package)


def interpreting() -> bool:
    """Whether ``@triton.jit`` functions run in Triton's interpreter: the variable Triton itself reads when it
    decorates."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@dataclass(frozen=True)
class Site:
    """One call site of one op, in one phase: everything a backend may base its answer on.

    name: the module's path in the model, e.g. "blocks.0.attention". phase: one of PHASES.
    shape: the sizes known before the first batch, by their letter (D, H, G, C, V, ...); sizes that vary (B, T) may be
    absent. options: the op's own options at this place (causal, window, documents, dropout, ...). compiled: the call
    happens inside a torch.compile graph. deterministic: bitwise repeatable results are required.
    """

    op: str
    machine: Machine
    name: str = ""
    phase: str = "train"
    dtype: torch.dtype = torch.float32
    shape: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    compiled: bool = False
    deterministic: bool = False

    @property
    def device(self) -> str:
        return self.machine.device

    @property
    def needs_grad(self) -> bool:
        return self.phase == "train"

    def option(self, name: str, default: object = None) -> object:
        return self.options.get(name, default)

    def replace(self, **changes: object) -> Site:
        return replace(self, **changes)  # type: ignore[arg-type]


def triton_unavailable(site: Site) -> str | None:
    """Why Triton kernels cannot run at this site, or None. Shared by every ``impl_triton.py``."""
    if site.machine.version("triton") is None:
        return "needs the package triton, which is not installed; pip install triton"
    if site.device == "cuda":
        if site.machine.capability < 80:
            return f"needs a GPU of compute capability 8.0 or later, this is {site.machine.arch}; choose reference"
        return None
    if not site.machine.interpreted:
        return (
            f"Triton compiles for GPUs and this site is on {site.device}; use a GPU, or set TRITON_INTERPRET=1 to run "
            "it in Triton's interpreter (exact, very slow)"
        )
    return None
