"""loss.png: the curves of a run, from its metrics.jsonl."""

from __future__ import annotations

import math
import pathlib
from typing import Any

from tritium.engine.metrics import read_metrics

_INK, _TRAIN, _VAL, _LINE = "#222222", "#9db8d9", "#c23b22", "#7a7a7a"


def plot_losses(out: pathlib.Path) -> pathlib.Path | None:
    """Draw ``out``/metrics.jsonl into ``out``/loss.png: training and validation loss over tokens, and the unigram and
    bigram models' losses where the run measured them. Returns the picture's path, None when nothing was logged yet."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state
    from matplotlib.ticker import FuncFormatter

    path = out / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    train = [(line["tokens"], line["loss"]) for line in lines if line.get("kind") == "step" and "loss" in line]
    val = [(line["tokens"], line["val_loss"]) for line in lines if line.get("kind") == "eval" and "val_loss" in line]
    if not train and not val:
        return None

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), color=_TRAIN, linewidth=1.4, label="training")
    if val:
        loss = val[-1][1]
        axes.plot(
            *zip(*val, strict=True), color=_VAL, linewidth=2, marker="o", markersize=4, label=f"validation ({loss:.3f})"
        )
    for name, level in baseline_levels(lines).items():
        style = "--" if name == "bigram" else ":"
        axes.axhline(level, color=_LINE, linestyle=style, linewidth=1.2, label=f"{name} model ({level:.3f})")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(out.resolve().name, color=_INK)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _count(x)))
    axes.set_xlim(left=0)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path = out / "loss.png"
    temporary = path.with_name(".loss.tmp.png")
    figure.savefig(temporary)
    temporary.replace(path)
    return path


def baseline_levels(lines: list[dict[str, Any]]) -> dict[str, float]:
    """unigram and bigram losses in nats per token of the last "end" line, by the ratio that its evaluation used."""
    evals = [line for line in lines if line.get("kind") == "eval" and line.get("bits_per_byte")]
    ends = [line for line in lines if line.get("kind") == "end"]
    if not evals or not ends:
        return {}
    nats_per_bits = evals[-1]["val_loss"] / evals[-1]["bits_per_byte"]
    found = {name: ends[-1].get(f"{name}_bits_per_byte") for name in ("unigram", "bigram")}
    return {name: bits * nats_per_bits for name, bits in found.items() if bits is not None and math.isfinite(bits)}


def _count(x: float) -> str:
    """1500000 → 1.5M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:g}{letter}"
    return f"{x:g}"
