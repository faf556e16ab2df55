"""An arm in a process of its own, driven through pipes: it shares no setting and no memory with the others.

The parent (:class:`ArmProcess`) lets one arm run at a time; the child (:func:`serve`) builds an implementation,
trains it step by step when told to, and times its own steps, so that pipes are outside every figure. Requests and
answers are JSON lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import select
import subprocess
import sys
import time
import traceback
from types import ModuleType
from typing import Any

from tritium.engine import allocator, waiting
from tritium.engine.allocator import peak_bytes, resident_bytes
from tritium.engine.config import Config

OURS = "tritium"
# -P keeps the working directory off sys.path: a folder named kernels there would be found by other libraries
COMMAND = (sys.executable, "-P", "-c", "from tritium.benchmarks.arm import serve; serve()")


class ArmError(RuntimeError):
    """The child failed; the message is the child's own."""


class ArmProcess:
    """A child that trains one implementation. Use as a context manager: leaving it ends the child.

    name: "tritium" or a peer's module name. variant: fields of ``peers.Variant``, or None for the defaults.
    cache: a folder for what torch.compile caches; a fresh one makes the start-up time a cold one.
    """

    def __init__(self, name: str, variant: dict[str, Any] | None, cache: pathlib.Path, stderr: pathlib.Path):
        self.name, self.variant = name, variant
        self.stderr = stderr
        # threads wait as each implementation's users have them wait: ours as `tritium` has it, a peer's as torch does
        environment = waiting.as_given(os.environ)
        if name == OURS:
            waiting.choose(environment)
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TOKENIZERS_PARALLELISM": "false"}
        self.spawned = time.time()
        with stderr.open("w") as errors:
            self.process = subprocess.Popen(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True
            )

    def __enter__(self) -> ArmProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        # Ctrl-C or a job's end waits for no compiler
        self.close(0.0 if kind is not None and not issubclass(kind, Exception) else 10.0)

    def ask(self, what: str, *, timeout_s: float = 1800.0, **arguments: Any) -> dict[str, Any]:
        """One request, one answer; ArmError when the child fails, dies or does not answer in time."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], timeout_s)[0]:
                raise ArmError(f"{self.name} did not answer {what!r} within {timeout_s:.0f} s")
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            raise ArmError(f"{self.name} ended with status {status} during {what!r}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ArmError(f"{self.name} failed during {what!r}: {answer['error']}")
        return answer

    def start(self, config: Config, B: int, T: int, device: str, seed: int) -> dict[str, Any]:
        """Build and take two steps; see :meth:`Arm.start` for the answer."""
        arguments: dict[str, Any] = {"config": config.to_json(), "B": B, "T": T, "device": device, "seed": seed}
        return self.ask("start", name=self.name, variant=self.variant, spawned=self.spawned, **arguments)

    def settings(self) -> dict[str, str]:
        """What was built, beside the model: ``peers.settings``."""
        return self.ask("settings")

    def losses(self, steps: int, fp32: bool = False) -> list[float]:
        """The losses of the first ``steps`` steps from the common initial weights over the common batches.

        fp32: uncompiled and in fp32 whatever the arm trains in, over two rows of each batch at most.
        """
        return self.ask("losses", steps=steps, fp32=fp32)["losses"]

    def step_ms(self) -> float:
        """One training step: milliseconds, taken inside the child."""
        return self.ask("step")["ms"]

    def memory_bytes(self) -> int:
        """The most that it has held so far: of the device's memory, or of the host's where it computes on a CPU."""
        return self.ask("memory")["bytes"]

    def _last_words(self) -> str:
        lines = self.stderr.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def close(self, patience_s: float = 10.0) -> None:
        """Let the child end by itself, and kill it when it has not after ``patience_s``."""
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=patience_s)
        finally:  # also on a second Ctrl-C
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


# -------------------------------------------------------------------------------------------------------- in the child


def serve() -> None:
    """Answer requests from stdin until it closes. Whatever libraries print goes to stderr."""
    if waiting.is_ours(os.environ):
        waiting.begin()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    arm = Arm()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(arm, request.pop("do"))(**request)
        except Exception as error:  # told to the parent, which decides; the trace is in the child's stderr
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _implementation(name: str) -> ModuleType:
    """The module that builds ``name``; a peer does not import tritium's engine, or it would be charged for that."""
    if name == OURS:
        from tritium.benchmarks import ours

        return ours
    from tritium.benchmarks import peers

    return peers.peer(name)


class Arm:
    """The child's side: one implementation and the batches that it trains on, over and over."""

    def start(
        self,
        name: str,
        variant: dict[str, Any] | None,
        config: str,
        B: int,
        T: int,
        device: str,
        seed: int,
        spawned: float,
    ) -> dict[str, Any]:
        """Build and take two steps.

        Answer: startup_s, from before the process existed to the end of the first step; peak_bytes, the largest
        memory of the process (on a GPU: what torch had allocated there) less what it had after its imports; threads;
        what ``describe`` says.
        """
        import torch

        from tritium.benchmarks import peers, timing

        parsed = Config.from_json(config)
        # for good: the process ends with the arm. tritium trains like this on a CPU (train.settings)
        keep = device == "cpu" and (name == OURS or bool(variant and variant.get("keep_memory")))
        self.kept = contextlib.ExitStack()
        self.kept.enter_context(allocator.freed_memory_kept(keep))
        self.model, self.seed = parsed.model, seed
        self.clock = timing.clock_for(device)
        self.batches = peers.batches(self.model, B, T, count=4, device=device, seed=seed)
        self.turn = 0
        implementation = _implementation(name)
        baseline = resident_bytes()
        if name == OURS:
            self.training: Any = implementation.build(parsed, device, B)
        else:
            chosen = peers.Variant(**variant) if variant is not None else implementation.variants(device)[0]
            self.training = implementation.build(self.model, chosen, device, parsed.optim)
        self.training.step(*self.batches[0]).item()
        startup_s = time.time() - spawned
        self.training.step(*self.batches[1]).item()
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else peak_bytes() - baseline
        described = {"variant": str(chosen), "kernels": []} if name != OURS else implementation.describe(self.training)
        return {"startup_s": startup_s, "peak_bytes": peak, "threads": torch.get_num_threads(), **described}

    def settings(self) -> dict[str, Any]:
        return self.training.settings(*(rows[:1] for rows in self.batches[0]))

    def losses(self, steps: int, fp32: bool = False) -> dict[str, Any]:
        from tritium.benchmarks import peers

        with self.training.in_fp32() if fp32 else contextlib.nullcontext():
            self.training.load(peers.initial_weights(self.model, self.seed))
            rows = 2 if fp32 else None
            batches = [(ids[:rows], targets[:rows]) for ids, targets in self.batches]
            values = [self.training.step(*batches[i % len(batches)]) for i in range(steps)]
            return {"losses": [value.item() for value in values]}

    def memory(self) -> dict[str, Any]:
        import torch

        return {"bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else peak_bytes()}

    def step(self) -> dict[str, Any]:
        batch = self.batches[self.turn % len(self.batches)]
        self.turn += 1
        (ms,) = self.clock.times_ms([lambda: self.training.step(*batch)])
        return {"ms": ms}
