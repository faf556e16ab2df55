"""Benchmark records: what was run, where, and every number, as JSON that is checked when it is written.

Every record has the fields of :data:`COMMON`; a kind of benchmark adds its own (``throughput.SCHEMA``). A schema is
written in plain Python: a type, a tuple of types, ``[schema]`` for a list, ``{"name": schema}`` for an object with
exactly these keys, and ``{str: schema}`` for an object with any keys.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
from typing import Any

Schema = Any
VERSION = 1
ROOT = pathlib.Path(__file__).resolve().parent.parent
IN_SOURCE_TREE = (ROOT / "setup.py").exists()  # and not an installed wheel, which may lie inside some other repository
PACKAGES = ("torch", "triton", "numpy", "transformers", "tritium")
NUMBER = (int, float)

MACHINE: Schema = {
    "device": str,  # "cpu" or "cuda"
    "name": str,  # marketing name of the device
    "arch": str,  # "x86_64", "sm_90"
    "features": [str],  # of a CPU: which of FEATURES it has
    "cores": int,  # that this process may use
    "memory_bytes": int,  # of the host
    "load_average": [NUMBER],  # when the record was begun: 1, 5, 15 minutes
}
COMMON: Schema = {
    "schema": int,  # VERSION
    "kind": str,
    "command": str,  # what to type to run it again
    "date": str,  # UTC, ISO 8601
    "commit": str,  # of the source tree, or "unknown"
    "dirty": bool,  # whether the tree differed from that commit (benchmarks/results aside)
    "machine": MACHINE,
    "versions": {str: str},  # python and PACKAGES; "absent" where not installed
}
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


def begin(kind: str, command: str, device: str) -> dict[str, Any]:
    """The common fields, taken now."""
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
    }


def write(record: dict[str, Any], schema: Schema, path: pathlib.Path) -> None:
    """Check a record and write it whole or not at all; RecordError lists every problem."""
    found = problems(record, {**COMMON, **schema})
    if found:
        raise RecordError(f"{path.name} was not written, its record does not fit the schema:\n  " + "\n  ".join(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


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
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _cpuinfo(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo, or ""."""
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")


def _cpu() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set((_cpuinfo("flags") or _cpuinfo("Features")).split())
