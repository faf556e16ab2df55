"""What a run tells its user while it runs. ``train.main`` calls a Reporter; the CLI's draws a live line, this one prints plain lines."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One logged step. Losses in nats/token; tokens_per_s over all processes; matmul_fraction: model FLOP/s over this machine's measured
    matmul FLOP/s (full convention); eta_s to the end of the run; nan where not known yet."""

    step: int
    steps: int
    loss: float
    val_loss: float = math.nan
    lr: float = math.nan
    grad_norm: float = math.nan
    tokens: int = 0
    tokens_per_s: float = math.nan
    matmul_fraction: float = math.nan
    eta_s: float = math.nan


class Reporter:
    """Prints plain lines to stdout; silent on processes other than the first."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet

    def note(self, text: str) -> None:
        """Something the user should know: where data came from, the kernel table, what was resumed."""
        if not self.quiet:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Something that is not as the user would expect, though the run goes on."""
        self.note(f"warning: {text}")

    def progress(self, p: Progress) -> None:
        self.note(progress_line(p))

    def sample(self, step: int, text: str) -> None:
        self.note(f"--- sample at step {step} ---\n{text}\n---")

    def close(self) -> None:
        """The run is over, in whatever way."""


def progress_line(p: Progress) -> str:
    """The live line: step, loss, validation loss, tokens/s, fraction of the measured matmul rate, ETA."""
    parts = [f"step {p.step}/{p.steps}", f"loss {p.loss:.3f}"]
    if not math.isnan(p.val_loss):
        parts.append(f"val {p.val_loss:.3f}")
    if not math.isnan(p.tokens_per_s):
        parts.append(f"{p.tokens_per_s:,.0f} tok/s")
    if not math.isnan(p.matmul_fraction):
        parts.append(f"{100 * p.matmul_fraction:.0f}% of matmul rate")
    if not math.isnan(p.eta_s):
        parts.append(f"ETA {int(p.eta_s) // 60}:{int(p.eta_s) % 60:02d}")
    return " | ".join(parts)
