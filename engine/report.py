"""What a run tells its user: a Reporter while it runs (plain, or the live one of the CLI), and the closing report."""

from __future__ import annotations

import math
import os
import pathlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One logged step. Losses in nats/token; tokens_per_s over all processes; matmul_fraction: model FLOP/s over this
    machine's measured matmul FLOP/s (full convention); eta_s to the end of the run; nan where not known yet."""

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
            self.write(text)

    def warn(self, text: str) -> None:
        """Something that is not as the user would expect, though the run goes on."""
        self.note(f"warning: {text}")

    def status(self, text: str) -> None:
        """What the run is busy with from now on, when that takes long and shows no progress: compiling, saving."""
        self.note(f"{text} …")

    def progress(self, p: Progress) -> None:
        self.note(progress_line(p))

    def sample(self, step: int, text: str) -> None:
        self.note(f"--- sample at step {step} ---\n{text}\n---")

    def close(self) -> None:
        """The run is over, in whatever way."""

    def write(self, text: str) -> None:
        """One print. A reader that went away (``| head``) must not end the training: from then on we are quiet."""
        try:
            print(text, flush=True)
        except BrokenPipeError:
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at exit


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
        parts.append(f"ETA {duration(p.eta_s)}")
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """m:ss, or h:mm:ss from an hour on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def bits_table(bits_per_byte: Mapping[str, float]) -> str:
    """The table unigram, bigram, model with the verdict; only what is known."""
    lines = ["bits per byte of the validation text (lower is better)"]
    lines += [f"  {k:<10}{bits_per_byte[k]:.4f}" for k in ("unigram", "bigram", "model") if k in bits_per_byte]
    model, bigram = bits_per_byte.get("model"), bits_per_byte.get("bigram")
    if model is not None and bigram is not None:
        change = abs(1.0 - model / bigram)
        lines.append(
            f"  the model beats the bigram model by {change:.1%}"
            if model < bigram
            else f"  the model does NOT beat the bigram model ({change:.1%} behind)"
        )
    return "\n".join(lines)


def closing_report(
    status: str, out: pathlib.Path, checkpoint: pathlib.Path | None, steps: int, bits_per_byte: Mapping[str, float],
    *, command: str = "tritium",
) -> str:  # fmt: skip
    """What came out, where it lies, and what to do next.

    status: the Outcome's ("done", "interrupted", "behind"). steps: of the run, done or configured, whichever
    are more. command: how this user calls tritium. Files that do not exist are not mentioned.
    """
    blocks = []
    if bits_per_byte:
        blocks.append(bits_table(bits_per_byte))
    if status == "behind":
        blocks.append(
            "This run required the model to beat the bigram model (run.require_bigram) and it did not, so it failed. "
            "Train longer (--train.steps), on more text, or with another learning rate (--optim.lr)."
        )
    files = [("sample", out / "sample.txt"), ("loss curve", out / "loss.png"), ("metrics", out / "metrics.jsonl")]
    files += [("checkpoint", checkpoint)] if checkpoint is not None else []
    blocks.append("\n".join(f"{what:<14}{path}" for what, path in files if path.exists()))
    if status == "interrupted":
        blocks.append(f"{'continue':<14}{command} train {out}")
    else:
        blocks.append(
            f"{'continue':<14}{command} train {out} --train.steps {2 * steps}\n"
            f'{"sample":<14}{command} sample {out} --prompt "The"\n'
            f"{'scale up':<14}{launcher(command, 8)} train gpt2_124m --data.sources YOUR_TEXT"
        )
    return "\n\n".join(block for block in blocks if block)


def launcher(command: str, processes: int) -> str:
    """torchrun for ``command``, taken from the same folder when that is not on the PATH."""
    folder = command.split()[0].rpartition("/")[0]
    return f"{folder + '/' if folder else ''}torchrun --nproc-per-node={processes} -m tritium.engine.cli"
