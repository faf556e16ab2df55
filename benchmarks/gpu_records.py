"""What earlier runs of ``make gpu`` on this GPU have shown, so that a run spends its minutes on what is not known yet.

A run leaves its lines under benchmarks/results/GPU/gpu_TIME/. A line counts here and now when its *facts* do: the GPU's
name, torch's and triton's versions, the tiles that were measured on it, and digests of the source that it was made
with. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from tritium.benchmarks import record, stages

SOURCE = (".py", ".cpp", ".cu", ".h", ".cuh", ".json")


@dataclasses.dataclass(frozen=True)
class Found:
    """A line of an earlier run, and the file that has it."""

    path: pathlib.Path
    line: dict[str, Any]


class Earlier:
    """Every line under ``folder`` (None, or one that is not there: no line), the newest run's first."""

    def __init__(self, folder: pathlib.Path | None):
        self.files: dict[pathlib.Path, list[dict[str, Any]]] = {}
        paths = sorted(folder.rglob("*.jsonl"), reverse=True) if folder is not None else []
        for path in paths:  # the names of runs begin with their time
            self.files[path] = stages.read_lines(path)
        self._by_name: dict[str, list[Found]] = {}
        for path, lines in self.files.items():
            for line in lines:
                self._by_name.setdefault(line["name"], []).append(Found(path, line))

    def line(self, name: str, facts: Mapping[str, Any], stage: str = "") -> Found | None:
        """The newest line of this name that has all of ``facts``; stage: of this stage only."""
        for found in self._by_name.get(name, ()):
            same = all(found.line.get(key) == value for key, value in facts.items())
            if same and stage in ("", found.line.get("stage")):
                return found
        return None

    def stage(self, name: str, facts: Mapping[str, Any]) -> pathlib.Path | None:
        """The file of the newest run in which this stage ended well with these facts, with every backend that was to be
        in it: one that was left out, since it broke the contract then, has no figure there."""
        for found in self._by_name.get("end", ()):
            line = {"stage": found.line.get("stage"), **{key: found.line.get(key) for key in facts}}
            if line != {"stage": name, **facts} or found.line["value"] != "ok":
                continue
            if not any(line["unit"] == "left out" and "backend" in line for line in self.files[found.path]):
                return found.path
        return None


@dataclasses.dataclass
class Run:
    """What all stages of one run share. ops: to look at; empty for all. again: repeat what is recorded. end:
    time.monotonic() until which the stage may begin something. facts: device, torch, triton, tiles. child: a command
    that serves items of a stage, to which its name is added.
    """

    ops: Sequence[str] = ()
    again: bool = False
    earlier: Earlier = dataclasses.field(default_factory=lambda: Earlier(None))
    end: float | None = None
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    child: Sequence[str] = ()


def tree_digest(root: pathlib.Path = record.ROOT) -> str:
    """16 hexadecimal digits over every source file of engine/ and kernels/: what decides a training step."""
    digest = hashlib.sha256()
    for path in sorted(p for part in ("engine", "kernels") for p in (root / part).rglob("*") if p.suffix in SOURCE):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def oracle_digest(op: str, root: pathlib.Path = record.ROOT) -> str:
    """The same over what a backend of ``op`` is held to: the contract, the op's cases and its reference."""
    digest = hashlib.sha256()
    folder = root / "kernels"
    for path in (folder / "contract.py", folder / op / "cases.py", folder / op / "reference.py"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def tiles_digest(device: str, root: pathlib.Path = record.ROOT) -> str:
    """16 hexadecimal digits over the file of tiles that launchers read on this device; "" where there is none."""
    path = root / "kernels" / "tuning" / "tiles" / f"{folder_of(device).name}.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else ""


def facts_of(out: pathlib.Path) -> dict[str, str]:
    """{device, torch, triton, tiles}, the first three as the stage ``device`` of the run in ``out`` wrote them; {}
    where it did not."""
    for line in stages.read_lines(out / "device.jsonl"):
        if "environment" in line:
            versions = line["environment"]["versions"]
            facts = {"device": line["value"], "torch": versions["torch"], "triton": versions["triton"]}
            return {**facts, "tiles": tiles_digest(line["value"])}
    return {}


def folder_of(device: str) -> pathlib.Path:
    """Where records of a GPU of this name lie, as throughput.results_folder has it."""
    results = record.ROOT / "benchmarks" / "results" if record.IN_SOURCE_TREE else pathlib.Path("benchmark-results")
    return results / re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def new_folder(records: pathlib.Path) -> pathlib.Path:
    """A folder for this run among the records, named after the time; not made yet."""
    return records / f"gpu_{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}"


def keep(out: pathlib.Path, names: Sequence[str], folder: pathlib.Path, begun: float) -> None:
    """Copy what stages of these names, and records, have written since ``begun`` (time.time()). OSError where that
    cannot be done."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():
        record = path.suffix == ".json" and path.stat().st_mtime >= begun - 1.0
        if record or (path.suffix == ".jsonl" and path.stem in names):
            shutil.copyfile(path, folder / path.name)
