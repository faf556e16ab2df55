"""Settings that are measured per device, as data: ``tuned.json``, what ``auto`` means where it is listed there.

An entry holds where its arch (a pattern), and its dtype if it has one, are the run's; the first that holds is taken.
evidence: the measurement it was written from, of whole training steps. (Which kernel serves an op is data of its own:
tritium.kernels' tuning folder.)
"""

from __future__ import annotations

import fnmatch
import functools
import json
import pathlib
from typing import Any

import torch


@functools.cache
def entries() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())
    return found


def value(setting: str, arch: str, dtype: torch.dtype, otherwise: str) -> str:
    """What ``setting`` ("train.weight_layout") was measured best at on ``arch`` ("x86_64", "sm_90") in ``dtype``."""
    for entry in entries():
        fits = entry["setting"] == setting and fnmatch.fnmatch(arch, entry["arch"])
        if fits and entry.get("dtype") in (None, str(dtype).removeprefix("torch.")):
            return str(entry["value"])
    return otherwise
