"""What is counted: FLOPs per token in both conventions, this machine's matmul rate, and the metrics file."""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
from typing import IO, Any, Literal

import torch

from tritium.engine.config import GPTConfig


def matmul_parameters(config: GPTConfig) -> int:
    """Weights that multiply every token: all linear layers and the (padded) head; embeddings are look-ups."""
    C, D, H, G, F = config.n_embd, config.head_width, config.n_head, config.kv_heads, config.hidden_width
    mlp = (3 if config.activation in ("swiglu", "geglu") else 2) * C * F
    return config.n_layer * (C * D * (H + 2 * G) + C * H * D + mlp) + C * config.padded_vocab_size


def flops_per_token(config: GPTConfig, T: int | None = None, convention: Literal["full", "causal"] = "full") -> int:
    """FLOPs of forward and backward for one token at context ``T`` (default: block_size).

    full: 6·N_matmul + 12·L·C·T, attention counted as if it were not causal (nanoGPT, nanochat, torchtitan).
    causal: 6·N_matmul + 6·L·C·T, only the half that is needed (llm.c, Megatron). They differ by 7 % on GPT-2 124M.
    """
    width = config.n_head * config.head_width
    attention = (12 if convention == "full" else 6) * config.n_layer * width * (T or config.block_size)
    return 6 * matmul_parameters(config) + attention


def matmul_rate(device: torch.device, dtype: torch.dtype, N: int, C: int, F: int, seconds: float = 0.5) -> float:
    """FLOP/s of (N, C) @ (C, F) here and now: the median over repeats that fill about ``seconds`` after a warm-up.

    On a CPU 300 repeats are enough, however short; a GPU needs the time to raise its clock.
    """
    draw = torch.Generator(device).manual_seed(0)  # its own: measuring must not move the random state of a resumed run
    x, w = (torch.randn(n, C, device=device, dtype=dtype, generator=draw) for n in (N, F))
    sync = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    times: list[float] = []
    end = time.perf_counter() + 1.5 * seconds
    enough = 300 if device.type == "cpu" else sys.maxsize
    while len(times) < 5 or (time.perf_counter() < end and len(times) < enough):
        sync()
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        sync()
        times.append(time.perf_counter() - start)
    kept = sorted(times[len(times) // 3 :])  # the first third warms up caches and threads
    return 2 * N * C * F / kept[len(kept) // 10]


class MetricsFile:
    """metrics.jsonl: one JSON object a line, appended and flushed, so that a killed run keeps what it had written.

    Opening at ``step`` drops lines after that step: a resumed run continues one curve instead of writing a second one
    over it.
    """

    def __init__(self, path: pathlib.Path, step: int):
        self.path = path
        self.file = self._open(step)

    def _open(self, step: int) -> IO[str]:
        path = self.path
        kept = [line for line in read_metrics(path) if line.get("step", 0) <= step] if path.exists() else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)
        return path.open("a")

    def rewind(self, step: int) -> None:
        """Drop the lines after ``step``: the run has gone back to it."""
        self.file.close()
        self.file = self._open(step)

    def write(self, **values: Any) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of a metrics file up to the first that is none: a last line cut short by a kill is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines
