"""Benchmark records: what was run, where, and every number, as JSON that is checked when it is written.

Every record has the fields of :data:`COMMON`; a kind of benchmark adds its own (``throughput.SCHEMA``), its *figures*
(what was measured, with every single sample: what ``tritium bench compare`` compares and ``report`` shows) and its
*checks* (what had to hold for the figures to mean anything). A schema is written in plain Python: a type, a tuple of
types, ``[schema]`` for a list, ``{"name": schema}`` for an object with exactly these keys, and ``{str: schema}`` for an
object with any keys. docs/benchmarks.md describes every field.
"""

from __future__ import annotations

import ast
import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

Schema = Any
VERSION = 4
READABLE = (1, 2, 3, VERSION)
ROOT = pathlib.Path(__file__).resolve().parent.parent
IN_SOURCE_TREE = (ROOT / "setup.py").exists()  # and not an installed wheel, which may lie inside some other repository
PACKAGES = ("torch", "triton", "numpy", "transformers", "tritium")
NUMBER = (int, float)

STATE: Schema = {  # null or [] where the system does not say
    "clock_mhz": (*NUMBER, type(None)),  # of a GPU's processors; of a CPU, the mean over its cores
    "clock_max_mhz": (*NUMBER, type(None)),
    "memory_clock_mhz": (*NUMBER, type(None)),
    "power_w": (*NUMBER, type(None)),
    "power_limit_w": (*NUMBER, type(None)),
    "temperature_c": (*NUMBER, type(None)),
    "throttled_by": [str],  # reasons that a GPU's driver names, e.g. "sw_power_cap"
}
MACHINE: Schema = {
    "device": str,  # "cpu" or "cuda"
    "name": str,  # marketing name of the device
    "arch": str,  # "x86_64", "sm_90"
    "features": [str],  # of a CPU: which of FEATURES it has
    "cores": int,  # that this process may use
    "threads": (int, type(None)),  # that torch computes with; null where torch was not loaded, and before version 3
    "memory_bytes": int,  # of the host
    "load_average": [NUMBER],  # when the record was begun: 1, 5, 15 minutes
    "load_after": [NUMBER],  # when all was timed; [] where nobody looked, and before version 3
    "state": STATE,  # when the record was begun
    "state_after": (dict, type(None)),  # STATE when all was timed, the device still warm; null as load_after
}
FIGURE: Schema = {
    "name": str,  # "tokens_per_s", or "layer_norm.triton gpt2_124m forward"; unique in its record
    "value": NUMBER,  # the median of the samples, where there are any
    "unit": str,
    "better": str,  # "higher", "lower", or "" for a figure that is no goal
    "samples": [NUMBER],  # in the order in which they were taken, in the same unit
    "restarts": [int],  # of each sample: in which of several processes it was taken, from 0; [] where it was one
}
CHECK: Schema = {"name": str, "ok": bool, "detail": str}
KERNEL: Schema = {"site": str, "op": str, "phase": str, "backend": str, "why": str}
COMMON: Schema = {
    "schema": int,  # VERSION
    "kind": str,
    "command": str,  # what to type to run it again
    "date": str,  # UTC, ISO 8601
    "commit": str,  # of the source tree, or "unknown"
    "dirty": bool,  # whether the tree differed from that commit (benchmarks/results aside)
    "machine": MACHINE,
    "versions": {str: str},  # python and PACKAGES; "absent" where not installed
    "environment": (
        dict,
        type(None),
    ),  # the variables that were set and may decide a speed: see ENVIRONMENT; null before
    # version 3
    "preset": (str, type(None)),
    "kernels": [KERNEL],  # which backend served which call site of tritium's model
    "sources": {str: str},  # "op.backend" → digest of the source files that it is made of
    "figures": [FIGURE],
    "checks": [CHECK],
}
ENVIRONMENT = (  # what the variables that may decide a speed begin with; places and versions are none
    "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_", "TORCH", "PYTORCH_", "ATEN_", "TRITON_", "CUDA_",
    "CUBLAS_", "CUDNN_", "NCCL_", "MALLOC_", "GLIBC_", "LD_PRELOAD",
)  # fmt: skip
NOT_ENVIRONMENT = ("DIR", "PATH", "HOME", "FILE", "VERSION")
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


class RecordError(ValueError):
    """A record that does not fit its schema; the message lists every place."""


def problems(value: Any, schema: Schema, where: str = "record") -> list[str]:
    """Every place where ``value`` does not fit ``schema``."""
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{where} must be a list, not {value!r}"]
        return [p for i, item in enumerate(value) for p in problems(item, schema[0], f"{where}[{i}]")]
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where} must be an object, not {value!r}"]
        if str in schema:
            return [p for key, item in value.items() for p in problems(item, schema[str], f"{where}.{key}")]
        found = [f"{where}.{key} is missing" for key in schema if key not in value]
        found += [f"{where}.{key} is not in the schema" for key in value if key not in schema]
        return found + [
            p for key in schema if key in value for p in problems(value[key], schema[key], f"{where}.{key}")
        ]
    allowed = schema if isinstance(schema, tuple) else (schema,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
        return [f"{where} must be {names}, not {value!r}"]
    if isinstance(value, float) and not math.isfinite(value):
        return [f"{where} must be finite, not {value!r}"]
    return []


def begin(kind: str, command: str, device: str, preset: str | None = None) -> dict[str, Any]:
    """The common fields, taken now; kernels, sources, figures and checks are empty, to be filled in."""
    commit, dirty = source()
    return {
        "schema": VERSION,
        "kind": kind,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "machine": machine(device),
        "versions": versions(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(ENVIRONMENT) and not name.endswith(NOT_ENVIRONMENT)
        },
        "preset": preset,
        "kernels": [],
        "sources": {},
        "figures": [],
        "checks": [],
    }


def figure(
    name: str,
    unit: str,
    better: str,
    samples: Sequence[float] = (),
    value: float | None = None,
    restarts: Sequence[int] = (),
) -> dict[str, Any]:
    """A FIGURE: of ``samples``, whose median is its value, or of a ``value`` that was taken once. restarts: () where
    all samples are of one process."""
    if better not in ("higher", "lower", ""):
        raise ValueError(f"better is 'higher', 'lower' or '', not {better!r}")
    if value is None:
        value = statistics.median(samples)
    return {
        "name": name, "value": value, "unit": unit, "better": better, "samples": list(samples),
        "restarts": list(restarts) if len(set(restarts)) > 1 else [],
    }  # fmt: skip


def check(name: str, ok: bool, detail: str = "") -> dict[str, Any]:
    """A CHECK."""
    return {"name": name, "ok": ok, "detail": detail}


def sources(backends: Iterable[tuple[str, str]]) -> dict[str, str]:
    """(op, backend) pairs → the record's ``sources``."""
    return {f"{op}.{backend}": source_digest(op, backend) for op, backend in sorted(set(backends))}


@functools.cache
def source_digest(op: str, backend: str) -> str:
    """16 hexadecimal digits of SHA-256 over what decides a backend's result and speed: its module, the modules of
    tritium.kernels that this imports, directly or not, and for native code the C++ files beside them. "unknown" for a
    module of the user's without a file."""
    from tritium.kernels.ops import OPS

    file = getattr(OPS[op].load(backend).module, "__file__", None)
    if file is None:
        return "unknown"
    files = _imported(pathlib.Path(file), {})
    if any(path.name == "native.py" for path in files):
        folders = {p.parent for p in files}
        files |= {p: p.read_bytes() for folder in folders for p in folder.rglob("*.*") if p.suffix in (".cpp", ".h")}
    digest = hashlib.sha256()
    for path, content in sorted(files.items()):
        digest.update(path.name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()[:16]


KERNELS = ROOT / "kernels"
NOT_OF_A_BACKEND = (
    "op.py",
    "ops.py",
    "site.py",
    "case.py",
    "autograd.py",
    "contract.py",
)  # of the tree, not of a kernel


def _imported(path: pathlib.Path, seen: dict[pathlib.Path, bytes]) -> dict[pathlib.Path, bytes]:
    """The file and every file of tritium.kernels that it imports, with their contents."""
    if path not in seen and not (path.parent == KERNELS and path.name in NOT_OF_A_BACKEND):
        seen[path] = path.read_bytes()
        for node in ast.walk(ast.parse(seen[path])):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                inner = name.removeprefix("tritium.kernels.").replace(".", "/")
                if name.startswith("tritium.kernels.") and (KERNELS / f"{inner}.py").exists():
                    _imported(KERNELS / f"{inner}.py", seen)
    return seen


def read(path: pathlib.Path) -> dict[str, Any]:
    """A record's common and own fields; RecordError when it is none, is cut short, is of a version that this does
    not read (older ones are brought up to date), or whose figures contradict themselves."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not a record that can be read: {error}") from error
    if not isinstance(found, dict) or "schema" not in found or "kind" not in found:
        raise RecordError(f"{path} is not a benchmark record: it has no fields schema and kind")
    if found["schema"] == 1:
        try:
            found = _from_version_1(found)
        except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise RecordError(f"{path} is a damaged record of version 1: {type(error).__name__}: {error}") from error
    found = up_to_date(found)
    if found["schema"] != VERSION:
        known = ", ".join(map(str, READABLE))
        raise RecordError(f"{path} has schema {found['schema']!r}; this version of tritium reads {known}")
    wrong = problems({k: found[k] for k in COMMON if k in found}, COMMON) or contradictions(found["figures"])
    if wrong:
        raise RecordError(f"{path} does not fit the schema of records:\n  " + "\n  ".join(wrong))
    return found


def _from_version_1(old: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had no state of the machine, no sources, figures and checks; a throughput record's come of its arms."""
    new = old | {"schema": 2, "preset": None, "kernels": [], "sources": {}, "figures": [], "checks": []}
    new["machine"] = old.get("machine", {}) | {"state": dict.fromkeys(STATE) | {"throttled_by": []}}
    if old["kind"] == "throughput":
        settings, arms = old["settings"], old["arms"]
        new["preset"] = settings["preset"]
        new["command"] = old["command"].replace("tritium bench ", "tritium bench peers ", 1)  # as it is called now
        tokens = settings["B"] * settings["T"]
        for key, arm in arms.items():
            times = [ms for pair in arm["times"]["rounds_ms"] for ms in pair]
            new["figures"].append(figure(f"{key} tokens/s", "tokens/s", "higher", [1e3 * tokens / ms for ms in times]))
            new["kernels"] += arm["kernels"]
        equal = old["equal_loss"]
        new["checks"].append(
            check("equal losses", equal["ok"], f"worst relative difference {equal['worst_relative']:g}")
        )
    return new


def up_to_date(found: dict[str, Any]) -> dict[str, Any]:
    """A record of version 2 or 3 as one of this version; any other as it is."""
    if found["schema"] == 2:
        found = _from_version_2(found)
    return _from_version_3(found) if found["schema"] == 3 else found


def _from_version_2(old: dict[str, Any]) -> dict[str, Any]:
    """Version 2 did not say with how many threads and in which environment, and called figures OF_A_RATE goals."""
    new = {"environment": None, **old, "schema": 3}
    if isinstance(old.get("machine"), dict):
        new["machine"] = {"threads": None, "state_after": None, "load_after": [], **old["machine"]}
    if old["kind"] == "train" and isinstance(old.get("figures"), list):
        new["figures"] = [
            f | {"better": ""} if isinstance(f, dict) and str(f.get("name")).endswith(OF_A_RATE) else f
            for f in old["figures"]
        ]
    return new


def _from_version_3(old: dict[str, Any]) -> dict[str, Any]:
    """Version 3 had one process of each arm."""
    new = old | {"schema": VERSION}
    if isinstance(old.get("figures"), list):
        new["figures"] = [f | {"restarts": []} if isinstance(f, dict) else f for f in old["figures"]]
    return new


OF_A_RATE = " of measured matmul"  # no goal: the divisor is measured once, and its noise is in no sample


def contradictions(figures: Iterable[dict[str, Any]]) -> list[str]:
    """Every figure that is there twice, whose value is not the median of its samples, or that has another number of
    restarts than of samples."""
    found, seen = [], set()
    for i, one in enumerate(figures):
        name = one["name"]
        if name in seen:
            found.append(f"record.figures[{i}] is the second with the name {name!r}; names are unique")
        seen.add(name)
        if one["restarts"] and len(one["restarts"]) != len(one["samples"]):
            counts = f"{len(one['restarts'])} restarts for {len(one['samples'])} samples"
            found.append(f"record.figures[{i}] of {name!r} has {counts}; it takes one for each, or none")
        try:
            median = statistics.median(one["samples"]) if one["samples"] else one["value"]
            fits = math.isclose(one["value"], median, rel_tol=1e-6, abs_tol=1e-12)
        except OverflowError:  # of an integer that no float holds
            median, fits = math.inf, False
        if not fits:
            found.append(f"record.figures[{i}].value of {name!r} is {one['value']!r}, its samples' median {median!r}")
    return found


def write(record: dict[str, Any], schema: Schema, path: pathlib.Path) -> str:
    """Check a record and write it whole or not at all; RecordError lists every problem. Returns which one it replaced,
    to be said after the path, or ""."""
    found = problems(record, {**COMMON, **schema}) or contradictions(record["figures"])
    path.parent.mkdir(parents=True, exist_ok=True)
    if found:
        kept = path.with_suffix(".rejected")  # not .json, since it is no record
        kept.write_text(json.dumps(record, indent=1, default=str) + "\n")
        raise RecordError(
            f"{path.name} was not written, its record does not fit the schema; what was measured is in {kept}:\n  "
            + "\n  ".join(found)
        )
    replaced = _replaced(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")  # two runs may write one record at one time
    try:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    return replaced


def _replaced(path: pathlib.Path) -> str:
    if not path.exists():
        return ""
    try:
        before = json.loads(path.read_text())
        when, commit = before["date"][:16].replace("T", " "), before["commit"][:10]
        return f", in place of that of {when}, commit {commit}; another --out keeps both"
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return ", in place of a file that was no record"


def unwritable(path: pathlib.Path) -> str:
    """Why no record can be written to ``path``, or "": asked before hours of measuring. Makes the folder."""
    if path.is_dir():
        return f"{path} is a folder; name a file in it, e.g. {path / 'record.json'}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(b"{}")
    except OSError as error:
        return f"{path.parent} cannot hold a record ({error.strerror or error}); name another place with --out"
    return ""


def source() -> tuple[str, bool]:
    """(commit, whether the tree differs from it) of this source tree; ("unknown", True) where there is none."""
    if not IN_SOURCE_TREE:
        return "unknown", True
    try:
        commit = _git("rev-parse", "HEAD")
        return commit, bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def versions() -> dict[str, str]:
    """Versions of Python and of what decides a speed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def machine(device: str) -> dict[str, Any]:
    """This machine, as MACHINE says."""
    name, arch, flags = _cpu(), platform.machine(), _cpu_flags()
    if device == "cuda":
        import torch

        major, minor = torch.cuda.get_device_capability()
        name, arch, flags = torch.cuda.get_device_name(), f"sm_{major}{minor}", set()
    return {
        "device": device,
        "name": name,
        "arch": arch,
        "features": [feature for feature in FEATURES if feature in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "load_after": [],
        "state": _state(device),
        "state_after": None,
    }


def after(record: dict[str, Any]) -> None:
    """Look at the machine again: to be called as soon as all is timed."""
    machine = record["machine"]
    machine |= {"state_after": _state(machine["device"]), "load_after": [round(load, 2) for load in os.getloadavg()]}


def _state(device: str) -> dict[str, Any]:
    return _gpu_state() if device == "cuda" else _cpu_state()


THROTTLE = {  # bits of NVML's clocks_event_reasons that mean a GPU was held back
    0x4: "sw_power_cap", 0x8: "hw_slowdown", 0x20: "sw_thermal", 0x40: "hw_thermal", 0x80: "hw_power_brake",
}  # fmt: skip


def _gpu_state() -> dict[str, Any]:
    """MACHINE's state of the first GPU, as nvidia-smi tells; field by field, since drivers differ in what they know."""
    fields = {
        "clock_mhz": "clocks.sm", "clock_max_mhz": "clocks.max.sm", "memory_clock_mhz": "clocks.mem",
        "power_w": "power.draw", "power_limit_w": "power.limit", "temperature_c": "temperature.gpu",
    }  # fmt: skip
    bits = _nvidia_smi("clocks_throttle_reasons.active") or _nvidia_smi("clocks_event_reasons.active")
    try:
        held = [name for bit, name in THROTTLE.items() if int(bits, 16) & bit]
    except ValueError:
        held = []
    return {name: _number(_nvidia_smi(field)) for name, field in fields.items()} | {"throttled_by": held}


def _nvidia_smi(field: str) -> str:
    """One field of the first GPU without its unit, or ""."""
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_state() -> dict[str, Any]:
    """MACHINE's state of this CPU: what /proc and /sys say of its clock."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    clocks = [
        mhz for line in lines if line.startswith("cpu MHz") and (mhz := _number(line.partition(":")[2])) is not None
    ]
    most = pathlib.Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    most_khz = _number(most.read_text()) if most.exists() else None
    return {
        "clock_mhz": round(statistics.fmean(clocks), 1) if clocks else None,
        "clock_max_mhz": most_khz / 1e3 if most_khz is not None else None,
        "memory_clock_mhz": None, "power_w": None, "power_limit_w": None, "temperature_c": None, "throttled_by": [],
    }  # fmt: skip


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo, or ""."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def _cpu() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())
