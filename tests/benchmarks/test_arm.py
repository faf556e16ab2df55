"""A process for each arm: its answers, its failures, its memory."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tritium.benchmarks import arm as arms
from tritium.benchmarks.arm import ArmError, ArmProcess
from tritium.engine import waiting
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


@pytest.mark.parametrize("user", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "3"}])
def test_threads_wait_as_the_users_of_each_have_them_wait(tmp_path, monkeypatch, user):
    """A parent's own choice is no peer's; what the user has set is everyone's."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    waiting.choose(os.environ)
    chosen = {name: os.environ[name] for name in names if name in os.environ}
    code = f"import json, os; print(json.dumps({{k: os.environ[k] for k in {names} if k in os.environ}}))"
    monkeypatch.setattr(arms, "COMMAND", (sys.executable, "-c", code))
    found = {}
    for name in (arms.OURS, "textbook"):
        with ArmProcess(name, None, tmp_path, tmp_path / "stderr.txt") as process:
            found[name] = process.ask("environment")
    assert found == {arms.OURS: chosen, "textbook": {} if not user else chosen}
    assert chosen == user | ({} if "OMP_WAIT_POLICY" in user else {"OMP_WAIT_POLICY": "PASSIVE"}) | (
        {} if user else {"GOMP_SPINCOUNT": str(waiting.SPINS)}
    )


@pytest.mark.parametrize("ours", [True, False])
def test_our_arm_watches_over_its_spinning(ours):
    environment = waiting.as_given({k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"})
    if ours:
        waiting.choose(environment)
    code = "import sys, threading; from tritium.benchmarks.arm import serve; serve(); print(threading.enumerate())"
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, input="", capture_output=True, text=True, env=environment, check=True)
    assert ("tritium-watch" in done.stderr) == ours
