"""A process for each arm: its answers, its failures, its memory."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tritium.benchmarks import arm as arms
from tritium.benchmarks.arm import ArmError, ArmProcess
from tritium.engine.config import Config, GPTConfig

MODEL = GPTConfig(vocab_size=200, block_size=32, n_layer=1, n_head=2, n_embd=32)
EAGER = {"precision": "fp32", "matmul": "highest", "padded": True, "compile": "false", "extra": ""}


@pytest.fixture
def arm(tmp_path):
    with ArmProcess("textbook", EAGER, tmp_path / "cache", tmp_path / "stderr.txt") as process:
        yield process


def test_an_arm_answers_and_its_failures_are_told(arm):
    started = arm.start(Config(model=MODEL), B=2, T=16, device="cpu", seed=0)
    assert 0 < started["startup_s"] < 300
    assert started["peak_bytes"] > 0
    first, again = arm.losses(2), arm.losses(2)
    assert first == again
    assert first[0] > first[1] * 0.9
    assert arm.step_ms() > 0
    with pytest.raises(ArmError, match=r"textbook failed during 'losses'.*TypeError"):
        arm.ask("losses", stps=2)
    assert arm.step_ms() > 0  # and it goes on
    with pytest.raises(ArmError, match="did not answer 'losses' within"):
        arm.ask("losses", steps=1_000_000, timeout_s=0.3)
    os.kill(arm.process.pid, signal.SIGKILL)
    with pytest.raises(ArmError, match="ended with status -9"):
        arm.ask("step")


def test_a_stop_does_not_wait_for_an_arm_that_is_at_work(tmp_path, monkeypatch):
    """A stage that reached its limit is killed after three seconds, and its temporary folder would stay."""
    monkeypatch.setattr(arms, "COMMAND", (sys.executable, "-c", "import time; time.sleep(600)"))
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), ArmProcess("busy", None, tmp_path, tmp_path / "stderr.txt") as busy:
        raise KeyboardInterrupt
    assert busy.process.returncode == -signal.SIGKILL
    assert time.monotonic() - begun < 3.0


def test_an_unknown_arm_is_an_error_with_its_name(tmp_path):
    with (
        ArmProcess("nobody", None, tmp_path / "cache", tmp_path / "stderr.txt") as arm,
        pytest.raises(ArmError, match="nobody"),
    ):
        arm.start(Config(model=MODEL), B=2, T=16, device="cpu", seed=0)


def test_peak_memory_is_the_process_s_own():
    """A parent with 400 MB starts a child that uses 100 MB: the child's peak is its own (ru_maxrss would say 400)."""
    child = (
        "from tritium.benchmarks import arm; before = arm.resident_bytes()\n"
        "x = bytearray(100 << 20); x[::4096] = b'x' * len(x[::4096])\n"
        "del x; print(before, arm.peak_bytes() - before, arm.resident_bytes())"
    )
    parent = (
        "import subprocess, sys; x = bytearray(400 << 20); x[::4096] = b'x' * len(x[::4096])\n"
        f"command = [sys.executable, '-P', '-c', {child!r}]\n"
        "print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)"
    )
    said = subprocess.run([sys.executable, "-P", "-c", parent], capture_output=True, text=True, check=True).stdout
    before, grown, after = map(int, said.split())
    assert before < 300 << 20
    assert 95 << 20 < grown < 130 << 20
    assert after < before + (60 << 20)
