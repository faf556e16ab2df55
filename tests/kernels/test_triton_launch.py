"""Remembered launches are Triton's own: the same kernel, the same arguments, for whatever Triton tells apart."""

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.jit import JITFunction

from tritium.kernels import aot
from tritium.kernels.lib import triton_launch
from tritium.kernels.lib.triton_launch import Kernel, constants


@triton.jit(do_not_specialize=["N"])
def _copy(X, BIAS, Y, stride, N, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at * stride, at < N) * factor
    if BIAS is not None:
        x += tl.load(BIAS + at, at < N)
    tl.store(Y + at, x, at < N)


@triton.jit
def _constexpr_first(BLOCK: tl.constexpr, X):
    tl.store(X + tl.arange(0, BLOCK), 0.0)


found = []


class Launcher:
    def __init__(self, source, metadata):
        self.hash = source.hash()

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, exit, *args):
        found.append((self.hash, (x, y, z), metadata, args))


@pytest.fixture
def launched(monkeypatch):
    """Every launch that reaches the driver's launcher, as (what was compiled, grid, ..., arguments); none is made."""
    found.clear()
    monkeypatch.setattr(aot._Driver, "launcher_cls", Launcher)
    with aot.compiling_for("sm_90"):
        monkeypatch.setattr(JITFunction, "run", Kernel._run)  # compiling_for's own watches launches
        yield found


def arguments(**changes):
    given = {"x": torch.zeros(64), "bias": None, "y": torch.zeros(64), "stride": 1, "N": 64, "factor": 1.5}
    return tuple((given | changes).values())


OTHERS = [
    {"bias": torch.zeros(64)},
    {"x": torch.zeros(64, dtype=torch.bfloat16)},
    {"x": torch.zeros(65)[1:]},  # not 16-byte aligned
    {"stride": 16},
    {"stride": 3},
    {"stride": 2**33},
    {"N": 63},
    {"N": 1},
    {"factor": 2.5},
]


def test_a_remembered_launch_is_tritons(launched):
    kernel, chosen = Kernel(_copy), constants(BLOCK=64, num_warps=2)
    for change in [{}, *OTHERS]:
        args = arguments(**change)
        _copy[(3, 2)](*args, **chosen)
        kernel((3, 2), chosen, *args)  # looked up
        kernel((3, 2), chosen, *args)  # remembered
        triton_own, first, second = launched[-3:]
        assert triton_own[:3] == first[:3] == second[:3], change
        for theirs, ours in zip(triton_own[3], second[3], strict=True):
            assert theirs is ours or theirs == ours


def test_it_tells_apart_what_triton_tells_apart_and_nothing_else(launched):
    kernel, chosen = Kernel(_copy), constants(BLOCK=64, num_warps=2)
    hashes = set()
    for change in [{}, *OTHERS]:
        kernel((1,), chosen, *arguments(**change))
        hashes.add(launched[-1][0])
    assert len(kernel.compiled) == len(hashes) == len(OTHERS) + 1 - 3  # two lengths and a factor compile nothing new
    kernel((1,), constants(BLOCK=32, num_warps=2), *arguments())
    assert len(kernel.compiled) == len(hashes) + 1
    assert launched[-1][0] not in hashes


def test_another_device_has_its_own(launched, monkeypatch):
    kernel, chosen = Kernel(_copy), constants(BLOCK=64, num_warps=2)
    kernel((1,), chosen, *arguments())
    monkeypatch.setattr(aot._Driver, "get_current_device", lambda self: 80)
    kernel((1,), chosen, *arguments())
    assert len(kernel.compiled) == 2


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profilers_hooks_see_every_launch(launched, hook, monkeypatch):
    kernel, chosen = Kernel(_copy), constants(BLOCK=64, num_warps=2)
    for _ in range(2):
        kernel((1,), chosen, *arguments())
    runs = []
    run = JITFunction.run
    monkeypatch.setattr(Kernel, "_run", lambda *a, **k: runs.append(1) or run(*a, **k))
    monkeypatch.setattr(JITFunction, "run", Kernel._run)
    kernel((1,), chosen, *arguments())
    assert not runs, "remembered"
    chain = getattr(knobs.runtime, hook)
    chain.add(print)
    try:
        kernel((1,), chosen, *arguments())
    finally:
        chain.remove(print)
    assert runs == [1]


def test_a_compilation_that_a_hook_took_over_is_not_remembered(launched, monkeypatch):
    kernel, chosen = Kernel(_copy), constants(BLOCK=128, num_warps=1)
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **about: True)
    kernel((1,), chosen, *arguments())
    assert not kernel.compiled
    assert not launched
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", None)
    kernel((1,), chosen, *arguments())
    assert len(launched) == 1


def test_who_watches_launches_sees_them():
    kernel, chosen = Kernel(_copy), constants(BLOCK=64, num_warps=2)
    with aot.compiling_for("sm_90") as seen:
        for _ in range(3):
            kernel((1,), chosen, *arguments())
    assert len(seen) == 3
    assert not kernel.compiled


def test_constants_are_equal_to_themselves_only():
    a, b = constants(BLOCK=1), constants(BLOCK=1)
    assert a != b
    assert len({a: 1, b: 2}) == 2
    assert dict(a) == {"BLOCK": 1, **triton_launch.OPTIONS}


def test_constexprs_come_last():
    with pytest.raises(TypeError, match="constexpr parameters come last"):
        Kernel(_constexpr_first)


def test_small_arithmetic():
    assert [triton_launch.power_of_two(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
    assert [triton_launch.cdiv(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]
